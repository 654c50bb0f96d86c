"""Many forecasts: changes, the cheapest, the frontier, sellers."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from headrace.errors import UsageError
from headrace.forecast.architecture import published
from headrace.forecast.machine import find_machine
from headrace.forecast.predict import Forecast, Workload, forecast
from headrace.forecast.search import (
    BITS,
    changes,
    cheapest,
    configurations,
    draft_for,
    frontier,
    sellers,
    with_devices,
)

PC = find_machine("rtx-4090 + 64GB + nvme-gen4")
LLAMA = published("llama-3-8b")
LARGE = published("llama-3-70b")


@pytest.fixture(scope="module")
def found() -> Sequence[Forecast]:
    """Forecasts on every priced machine of the table."""
    return configurations(LLAMA, None, Workload())


def speed(one: Forecast) -> float:
    return 1 / one.s_per_token.expected


def cost(one: Forecast) -> float:
    assert one.usd_per_h is not None
    return one.usd_per_h


# Changes


@pytest.mark.parametrize(
    ("model", "machine", "bits"),
    [
        ("llama-3-8b", "rtx-4090 + 64GB + nvme-gen4", 16.0),
        ("llama-3-70b", "rtx-4090 + 64GB + nvme-gen4", 4.85),
        ("llama-3-70b", "rtx-4090 + 64GB + nvme-gen4", 16.0),
        ("deepseek-v3", "m4-max-40 + 128GB + apple-ssd-m4-max", 4.85),
        ("gpt-2", "epyc-7763 + 64GB", 16.0),
    ],
)
def test_changes_are_worth_it_and_the_best_comes_first(model: str, machine: str, bits: float) -> None:
    now = forecast(published(model), find_machine(machine), Workload(bits=bits))
    named = changes(now)
    gains = [change.gain for change in named]

    assert 0 < len(named) <= 6
    assert all(change.gain > 1.03 for change in changes(now, most=100))
    assert gains == sorted(gains, reverse=True)
    assert all(change.gain == pytest.approx(change.forecast.tok_per_s / now.tok_per_s) for change in named)
    assert len({change.what for change in named}) == len(named)


def test_a_model_streamed_from_disk_gets_suggestions_of_memory_and_disks() -> None:
    now = forecast(LARGE, PC, Workload())
    named = {change.what for change in changes(now, most=20)}
    assert {"twice the host's memory", "a second disk", "2x rtx-4090"} <= named


def test_the_number_of_changes_is_limited() -> None:
    assert len(changes(forecast(LARGE, PC, Workload()), most=2)) == 2


# More devices


def test_more_devices_cost_and_draw_in_proportion() -> None:
    four = with_devices(PC, 4)

    assert (four.devices, four.name) == (4, "4x rtx-4090 + 64GB + nvme-gen4")
    assert four.rent_usd_per_h == pytest.approx(4 * 0.34)
    assert four.watts == 4 * 450
    assert four.host_memory_bytes == PC.host_memory_bytes
    again = with_devices(four, 2)
    assert (again.devices, again.name) == (2, "2x rtx-4090 + 64GB + nvme-gen4")
    assert again.rent_usd_per_h == pytest.approx(2 * 0.34)


# Drafts


def test_a_draft_is_a_much_smaller_model_with_the_same_vocabulary() -> None:
    small = draft_for(LARGE)
    assert small is not None
    assert small.vocab == LARGE.vocab
    assert small.params < 0.2 * LARGE.params


def test_without_a_smaller_model_of_the_same_vocabulary_there_is_no_draft() -> None:
    assert draft_for(published("gpt-neox-20b")) is None


# Configurations


def test_every_configuration_is_within_what_was_asked(found: Sequence[Forecast]) -> None:
    assert len(found) > 1000
    assert {one.workload.bits for one in found} == set(BITS)
    assert all(one.workload.draft is None or one.draft_tokens > 0 for one in found)
    assert all(one.usd_per_h is not None for one in found)


def test_a_given_machine_is_tried_with_multiples_of_its_devices_only() -> None:
    own = configurations(LLAMA, PC, Workload(prompt_tokens=64, tokens=64))
    assert {one.machine.device for one in own} == {"rtx-4090"}
    assert {one.machine.devices for one in own} == {1, 2, 4, 8}


def test_a_unified_machine_is_not_multiplied() -> None:
    own = configurations(LLAMA, find_machine("m4-max-40"), Workload())
    assert {one.machine.devices for one in own} == {1}


# The cheapest


@pytest.mark.parametrize("wanted", [5.0, 30.0, 150.0])
def test_the_cheapest_meets_the_required_speed_and_no_other_is_cheaper(
    found: Sequence[Forecast], wanted: float
) -> None:
    best = cheapest(found, tok_per_s=wanted, usd=None)

    assert speed(best) >= wanted
    assert all(cost(one) >= cost(best) for one in found if speed(one) >= wanted)
    assert all(
        one.workload.bits <= best.workload.bits for one in found if speed(one) >= wanted and cost(one) == cost(best)
    )


def test_the_speed_may_be_the_total_of_all_sequences(found: Sequence[Forecast]) -> None:
    best = cheapest(found, tok_per_s=1000, usd=None, each=False)
    assert best.tok_per_s >= 1000
    assert cost(best) <= cost(cheapest(found, tok_per_s=200, usd=None))


def test_a_budget_alone_selects_the_fastest(found: Sequence[Forecast]) -> None:
    best = cheapest(found, tok_per_s=None, usd=1.0)
    assert cost(best) <= 1.0
    assert all(speed(one) <= speed(best) for one in found if cost(one) <= 1.0)


def test_speed_and_budget_are_met_together(found: Sequence[Forecast]) -> None:
    best = cheapest(found, tok_per_s=30, usd=1.0)
    assert speed(best) >= 30
    assert cost(best) <= 1.0


def test_a_speed_that_nothing_reaches_is_an_error_that_names_the_fastest(found: Sequence[Forecast]) -> None:
    with pytest.raises(UsageError, match="nothing reaches") as caught:
        cheapest(found, tok_per_s=1e6, usd=None)
    fastest = max(found, key=speed)
    assert f"{speed(fastest):.3g} tok/s" in str(caught.value.hint)
    assert fastest.machine.name in str(caught.value.hint)


def test_a_speed_that_the_money_does_not_buy_is_an_error_that_names_what_it_buys(found: Sequence[Forecast]) -> None:
    with pytest.raises(UsageError, match=r"for \$0\.50") as caught:
        cheapest(found, tok_per_s=1e6, usd=0.5)
    best = cheapest(found, tok_per_s=None, usd=0.5)
    assert f"{speed(best):.3g} tok/s" in str(caught.value.hint)


def test_less_money_than_anything_costs_is_an_error_that_names_the_least(found: Sequence[Forecast]) -> None:
    with pytest.raises(UsageError, match=r"nothing costs \$0\.01") as caught:
        cheapest(found, tok_per_s=1, usd=0.01)
    assert f"${min(cost(one) for one in found):.2f}" in str(caught.value.hint)


def test_without_a_price_there_is_no_cheapest() -> None:
    free = forecast(LLAMA, replace(find_machine("rtx-4090"), rent_usd_per_h=None, price_usd=None), Workload(bits=4.85))
    for nothing, said in (([], "fits no"), ([free], "price")):
        with pytest.raises(UsageError, match=said) as caught:
            cheapest(nothing, tok_per_s=1, usd=None)
        assert caught.value.hint


# The frontier


def test_along_the_frontier_more_money_is_more_speed(found: Sequence[Forecast]) -> None:
    line = frontier(found, "cost")
    prices = [one.usd_per_million_output.expected for one in line if one.usd_per_million_output]
    speeds = [speed(one) for one in line]

    assert len(prices) == len(line) > 3
    assert prices == sorted(prices)
    assert speeds == sorted(speeds)
    for one in found[::50]:
        assert one.usd_per_million_output is not None
        price = one.usd_per_million_output.expected
        assert any(p <= price and s * 1.0011 >= speed(one) for p, s in zip(prices, speeds, strict=True))


def test_along_the_frontier_fewer_bits_are_more_speed(found: Sequence[Forecast]) -> None:
    line = frontier(found, "bits")
    bits = [one.workload.bits for one in line]
    speeds = [speed(one) for one in line]

    assert bits == sorted(set(bits), reverse=True)
    assert speeds == sorted(set(speeds))
    assert bits[0] == 16


def test_no_forecasts_have_an_empty_frontier() -> None:
    assert frontier([], "cost") == []


# Sellers


def test_sellers_are_compared_with_what_it_costs_here() -> None:
    now = forecast(LARGE, find_machine("4x h100-sxm + 256GB"), Workload(batch=32))
    offers = sellers(now)

    assert now.usd_per_million_output is not None
    prices = [offer.usd_per_million_output for offer in offers]
    assert prices == sorted(prices, reverse=True)
    for offer in offers:
        assert offer.markup == pytest.approx(offer.usd_per_million_output / now.usd_per_million_output.expected)
        assert offer.break_even_batch is None or offer.break_even_batch >= 1
    assert offers


def test_a_model_without_offers_has_no_sellers() -> None:
    assert sellers(forecast(published("gpt-2"), PC, Workload())) == []


# Bugs that were found


@pytest.mark.parametrize("text", ["8xh100-sxm", "2 x h100-sxm", "H100 SXM + 64GB"])
def test_the_name_of_more_devices_can_be_read_again(text: str) -> None:
    machine = find_machine(text)
    many = with_devices(machine, 4)
    assert find_machine(many.name).devices == 4


def test_another_machine_is_suggested_even_if_its_name_has_the_same_prefix() -> None:
    now = forecast(LLAMA, find_machine("m4 + 16GB + nvme-gen4"), Workload())
    assert any("m4-max-40" in change.what for change in changes(now, most=20))


def test_a_search_varies_only_open_options() -> None:
    own = configurations(LLAMA, PC, Workload(), all_bits=(16.0,), batches=(4,), drafts=False)
    assert own
    assert {(one.workload.bits, one.workload.batch, one.workload.draft) for one in own} == {(16.0, 4, None)}


def test_each_node_streams_its_own_slice() -> None:
    workload = Workload(bits=16.0)
    one, three = (
        forecast(LARGE, find_machine(f"rtx-4090 + 64GB + nvme-gen4{more}"), workload).s_per_token.expected
        for more in ("", " + 3 nodes")
    )
    assert three < one / 2.5
