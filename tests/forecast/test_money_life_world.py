"""Dollars, training and copies: known numbers, and errors."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.forecast.life import (
    Life,
    break_even_tokens,
    inference_flop,
    training_flop,
)
from headrace.forecast.money import (
    HOURS_PER_YEAR,
    Tariff,
    break_even_batch,
    flop_price,
    markup,
    usd_per_million,
)
from headrace.forecast.world import (
    Mind,
    Stock,
    copies,
    grown,
    halving_months,
    least_token_s,
    reading_tok_per_s,
    years_until,
)

PROPERTY = settings(max_examples=60, deadline=None)

GPT3 = Mind(flop_per_token=350e9, weights_bytes=350e9, conversation_bytes=2048 * 4.718592e6, tok_per_s=5.56)
H100 = Stock(devices=15e6, flop_per_s=1e15, bytes_per_s=3.35e12, memory_bytes=80e9)


# Money


def test_a_dollar_an_hour_at_a_thousand_tokens_per_second_is_28_cents_a_million() -> None:
    assert usd_per_million(1.0, 1000) == pytest.approx(0.2778, abs=1e-4)


def test_a_rent_is_paid_for_idle_hours_too() -> None:
    assert Tariff(rent_usd_per_h=2.0).usd_per_h == 2.0
    assert Tariff(rent_usd_per_h=2.0, utilisation=0.5).usd_per_h == 4.0


def test_a_price_is_spread_over_a_life_and_electricity_comes_on_top() -> None:
    tariff = Tariff(price_usd=HOURS_PER_YEAR, life_years=2, resale_share=0.1, watts=1000, usd_per_kwh=0.2, overhead=1.5)
    assert tariff.usd_per_h == pytest.approx(0.45 + 0.3)
    # Idle hours use no electricity, but the machine ages.
    assert replace(tariff, utilisation=0.5).usd_per_h == pytest.approx(0.9 + 0.3)


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({}, "a rent or a price"),
        ({"rent_usd_per_h": 1.0, "price_usd": 1.0}, "a rent or a price"),
        ({"rent_usd_per_h": 1.0, "utilisation": 0.0}, "utilisation"),
        ({"rent_usd_per_h": 1.0, "utilisation": 1.1}, "utilisation"),
        ({"price_usd": 1.0, "life_years": 0.0}, "life_years must be above 0"),
    ],
)
def test_a_tariff_that_makes_no_sense_is_an_error(numbers: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Tariff(**numbers)


def test_the_price_of_flop_is_per_unit() -> None:
    assert flop_price(2.0, 1e15) == pytest.approx(0.2)
    assert flop_price(2.0, 1e15, unit=1e15) == pytest.approx(2.0)


def test_a_markup_is_price_over_cost() -> None:
    assert markup(60, 0.24) == pytest.approx(250)


def test_break_even_is_the_first_batch_that_earns_its_cost() -> None:
    passes = {8: 0.012, 1: 0.010, 2: 0.010, 4: 0.011}  # dollars of a pass at $3.6 an hour: a thousandth of the seconds
    assert break_even_batch(5e-6, 3.6, passes) == 2
    assert break_even_batch(1e-5, 3.6, passes) == 1
    assert break_even_batch(1e-7, 3.6, passes) is None


# Life


def test_training_takes_six_flop_and_inference_two_per_parameter_and_token() -> None:
    assert training_flop(175e9, 300e9) == pytest.approx(3.15e23)
    assert inference_flop(175e9, 1) == pytest.approx(3.5e11)


def test_the_serving_share_is_the_rest_after_training() -> None:
    life = Life(making_flop=6e20, flop_per_token=2e9, tokens=1e11)
    assert life.total_flop == pytest.approx(8e20)
    assert life.serving_share == pytest.approx(0.25)


def test_a_smaller_model_breaks_even_when_it_has_saved_its_training_flop() -> None:
    tokens = break_even_tokens(1e21, 140e9, 16e9)
    large = Life(making_flop=0, flop_per_token=140e9, tokens=tokens)
    small = Life(making_flop=1e21, flop_per_token=16e9, tokens=tokens)
    assert large.total_flop == pytest.approx(small.total_flop)


def test_a_model_that_is_no_smaller_never_breaks_even() -> None:
    assert break_even_tokens(1e21, 16e9, 16e9) == float("inf")


# World


def test_a_reader_takes_five_and_a_half_tokens_per_second() -> None:
    assert reading_tok_per_s() == pytest.approx(5.556, abs=1e-3)


def test_memory_binds_the_copies_of_gpt_3() -> None:
    found = copies(H100, GPT3, group=64)

    assert found.binding == "memory"
    assert found.least == pytest.approx(1.157e8, rel=0.001)
    assert found.by_flop == pytest.approx(7.71e9, rel=0.001)
    assert found.by_memory < found.by_bandwidth < found.by_flop


def test_a_group_of_64_holds_493_conversations() -> None:
    assert int(copies(replace(H100, devices=64), GPT3, group=64).by_memory) == 493


def test_a_group_that_does_not_hold_the_weights_runs_no_copy() -> None:
    assert copies(H100, GPT3, group=4).least == 0


def test_weights_that_cannot_be_read_in_the_time_of_a_token_run_no_copy() -> None:
    slow = replace(H100, bytes_per_s=1e10)
    assert copies(slow, GPT3, group=8).by_bandwidth == 0


@PROPERTY
@given(st.floats(1, 1e6), st.floats(1, 1e6), st.floats(1.05, 10))
def test_growing_for_the_years_until_a_size_reaches_it(now: float, times: float, per_year: float) -> None:
    wanted = now * times
    assert grown(now, years_until(now, wanted, per_year), per_year) == pytest.approx(wanted)


def test_an_existing_stock_takes_no_years() -> None:
    assert years_until(10, 5, 2) == 0


def test_sixteen_times_cheaper_in_64_months_is_a_half_every_16() -> None:
    assert halving_months(16, 64) == pytest.approx(16)


def test_the_shortest_time_per_token_is_the_closed_form_where_many_devices_help() -> None:
    read_s, reduce_s = 175e9 * 2 / 3.35e12, 96 * 2 * 1.7e-6
    expected = 3 * reduce_s ** (2 / 3) * read_s ** (1 / 3)
    assert least_token_s(175e9, 96, 16, 3.35e12) == pytest.approx(expected)


def test_no_number_of_devices_is_faster_than_the_shortest_time() -> None:
    read_s, reduce_s = 175e9 * 2 / 3.35e12, 96 * 2 * 1.7e-6
    least = least_token_s(175e9, 96, 16, 3.35e12)
    assert all(read_s / n + 2 * reduce_s * n**0.5 >= least * (1 - 1e-12) for n in range(1, 4096))
