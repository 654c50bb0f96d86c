"""The forecast as a whole: sensible orders, honest intervals, errors with hints."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from headrace.errors import UsageError
from headrace.forecast.architecture import of_params, published
from headrace.forecast.machine import find_machine
from headrace.forecast.predict import Forecast, Workload, forecast, outside, safe_device_bytes, safe_host_bytes
from headrace.forecast.search import with_devices

PROPERTY = settings(max_examples=60, deadline=None)

PC = "rtx-4090 + 64GB + nvme-gen4"
SERVER = "8x a100-80gb + epyc-7763 + 512GB + nvme-gen4"
NAMES = ("gpt-2", "llama-3-8b", "llama-3-70b", "gemma-3-27b", "mixtral-8x7b", "deepseek-v3")
MACHINES = (
    PC,
    SERVER,
    "m4-max-40 + 128GB + apple-ssd-m4-max",
    "epyc-7763 + 512GB + nvme-gen4",
    "2x rtx-3090 + 128GB + nvme-gen3",
)
CASES = st.tuples(st.sampled_from(NAMES), st.sampled_from(MACHINES))
ASKS = st.builds(
    Workload,
    bits=st.sampled_from([3.9, 4.85, 8.5, 16.0]),
    batch=st.sampled_from([1, 3, 8, 32]),
    prompt_tokens=st.integers(1, 512),
    tokens=st.integers(1, 512),
    skew=st.floats(0, 1),
)


def answer(model: str, machine: str, workload: Workload) -> Forecast | None:
    try:
        return forecast(published(model), find_machine(machine), workload)
    except UsageError:
        return None


def of(model: str = "llama-3-8b", machine: str = PC, **asked: Any) -> Forecast:
    return forecast(published(model), find_machine(machine), Workload(**asked))


# Properties of every forecast


@PROPERTY
@given(CASES, ASKS)
def test_the_expected_value_lies_between_low_and_high(case: tuple[str, str], workload: Workload) -> None:
    found = answer(*case, workload)
    assume(found is not None)
    assert found is not None

    prices = (found.usd_per_million_output, found.usd_per_million_input)
    phases = [one for phase in (found.prefill, found.decode) for one in (phase.pass_s, phase.tok_per_s)]
    for interval in (found.ttft_s, found.s_per_token, *phases, *(price for price in prices if price)):
        assert 0 < interval.low <= interval.expected <= interval.high
    assert found.decode.tok_per_s.expected == pytest.approx(workload.batch / found.s_per_token.expected)
    assert found.decode.tok_per_s.low == pytest.approx(workload.batch / found.s_per_token.high)
    assert found.decode.tok_per_s.high == pytest.approx(workload.batch / found.s_per_token.low)


@PROPERTY
@given(CASES, ASKS)
def test_shares_add_up_and_every_weight_has_a_tier(case: tuple[str, str], workload: Workload) -> None:
    found = answer(*case, workload)
    assume(found is not None)
    assert found is not None

    where = found.placement
    assert where.device + where.host + where.disk == pytest.approx(1)
    assert (
        where.device * found.weights_bytes + (1 - where.kv_host) * found.kv_bytes
        <= safe_device_bytes(found.machine) * 1.0001
    )
    for phase in (found.prefill, found.decode):
        assert phase.binding in phase.busy_s
        assert all(0 < share <= 1 for share in phase.utilisation.values())
        assert all(size > 0 for size in phase.bytes_by_tier.values())
    assert found.reasons
    json.dumps(found.as_json(), allow_nan=False)


@PROPERTY
@given(CASES, ASKS, st.sampled_from([(16.0, 8.5), (8.5, 4.85), (16.0, 3.9)]))
def test_fewer_bits_are_never_slower(case: tuple[str, str], workload: Workload, bits: tuple[float, float]) -> None:
    more, fewer = (answer(*case, replace(workload, bits=number)) for number in bits)
    assume(more is not None)
    assert more is not None

    assert fewer is not None
    assert fewer.s_per_token.expected <= more.s_per_token.expected * (1 + 1e-9)
    assert fewer.weights_bytes < more.weights_bytes


@PROPERTY
@given(CASES, ASKS)
def test_a_larger_batch_is_never_faster_for_each(case: tuple[str, str], workload: Workload) -> None:
    small, large = answer(*case, workload), answer(*case, replace(workload, batch=2 * workload.batch))
    assume(small is not None)
    assume(large is not None)
    assert small is not None
    assert large is not None

    assert large.s_per_token.expected >= small.s_per_token.expected * (1 - 1e-9)
    # Together they are faster, unless caches push weights out of the devices.
    if large.placement.device == 1:
        assert large.tok_per_s >= small.tok_per_s * (1 - 1e-9)


@PROPERTY
@given(CASES, ASKS)
def test_a_longer_context_is_never_faster(case: tuple[str, str], workload: Workload) -> None:
    short, long = answer(*case, workload), answer(*case, replace(workload, prompt_tokens=2 * workload.prompt_tokens))
    assume(short is not None)
    assume(long is not None)
    assert short is not None
    assert long is not None

    assert long.s_per_token.expected >= short.s_per_token.expected * (1 - 1e-9)
    assert long.kv_bytes >= short.kv_bytes


# Known results


def test_a_model_that_fits_is_bound_by_memory() -> None:
    found = of(bits=4.85)

    assert found.placement.device == 1
    assert found.category == "decode"
    assert found.decode.binding == "memory"
    assert found.prefill.binding == "compute"
    least_s = found.model.read_bytes(4.85) / found.machine.device_bytes_per_s
    assert least_s < found.s_per_token.expected < 2 * least_s


def test_more_devices_are_faster_for_a_large_model() -> None:
    model, machine = published("llama-3-70b"), find_machine("h100-sxm + 256GB")
    found = [forecast(model, with_devices(machine, count), Workload(bits=8.5)) for count in (1, 2, 4, 8)]
    seconds = [one.s_per_token.expected for one in found]

    assert seconds == sorted(seconds, reverse=True)
    assert found[-1].category == "tensor parallel"


def test_a_model_that_does_not_fit_is_streamed_and_far_slower() -> None:
    fits, streams = of("llama-3-8b", bits=4.85), of("llama-3-70b", bits=4.85)

    assert streams.category == "dense streaming"
    assert 0 < streams.placement.host < 1
    assert streams.placement.disk == 0
    assert streams.s_per_token.expected > 2 * fits.s_per_token.expected * streams.weights_bytes / fits.weights_bytes


def test_weights_beyond_host_memory_come_from_disk() -> None:
    found = of("llama-3-70b", bits=16.0)
    assert found.placement.disk > 0
    assert found.s_per_token.expected > found.decode.bytes_by_tier["disk"] / found.machine.disk_bytes_per_s


def test_experts_are_read_on_demand() -> None:
    found = of("deepseek-v3", "rtx-4090 + 128GB + nvme-gen4", bits=4.85)

    assert found.category == "MoE streaming"
    assert any("routing assumed" in reason for reason in found.reasons)
    more = of("deepseek-v3", "rtx-4090 + 256GB + nvme-gen4", bits=4.85)
    assert more.s_per_token.expected < found.s_per_token.expected
    assert more.decode.bytes_by_tier["disk"] < found.decode.bytes_by_tier["disk"]


def test_a_faster_disk_helps_a_streamed_model() -> None:
    slow, fast = (of("llama-3-70b", f"rtx-4090 + 64GB + {disk}") for disk in ("nvme-gen3", "2x nvme-gen5"))
    assert fast.s_per_token.expected < slow.s_per_token.expected


def test_a_long_prompt_is_computed_in_chunks() -> None:
    short, long = of(batch=8, prompt_tokens=1024), of(batch=8, prompt_tokens=4096)
    assert short.prefill.rows == long.prefill.rows == 8192
    assert long.ttft_s.expected > 3.9 * short.ttft_s.expected


def test_more_host_memory_is_never_slower_for_an_moe() -> None:
    sizes = (256, 384, 450, 460, 512)
    found = [of("deepseek-v3", f"rtx-4090 + {size}GB + nvme-gen4", bits=4.85) for size in sizes]
    seconds = [one.s_per_token.expected for one in found]
    assert seconds == sorted(seconds, reverse=True)


def test_more_host_memory_is_never_slower_for_a_dense_model() -> None:
    found = [of("llama-3-70b", f"rtx-4090 + {size}GB + nvme-gen4") for size in (16, 32, 64, 128, 160, 512)]
    seconds = [one.s_per_token.expected for one in found]
    assert seconds == sorted(seconds, reverse=True)


# A draft


def test_a_draft_is_reported_if_it_pays() -> None:
    small = published("llama-3.2-1b")
    plain, drafted = of("llama-3-70b", bits=4.85), of("llama-3-70b", bits=4.85, draft=small)

    assert drafted.draft_tokens > 0
    assert drafted.tokens_per_pass > 1
    assert drafted.s_per_token.expected < plain.s_per_token.expected
    assert drafted.decode.rows == 1 + drafted.draft_tokens
    assert any("drafts" in reason for reason in drafted.reasons)


def test_a_draft_that_does_not_pay_is_not_used_and_the_reason_is_given() -> None:
    found = of("llama-3-8b", bits=4.85, draft=published("llama-3-8b"))

    assert found.draft_tokens == 0
    assert found.tokens_per_pass == 1
    assert any("does not pay" in reason for reason in found.reasons)


def test_a_draft_takes_memory_from_the_model() -> None:
    small = published("llama-3.2-1b")
    plain, drafted = of("llama-3-70b", bits=4.85), of("llama-3-70b", bits=4.85, draft=small)
    taken = small.all_bytes(4.85) + small.kv_bytes(1024)
    assert (plain.placement.device - drafted.placement.device) * plain.weights_bytes == pytest.approx(taken)


# Money


def test_idle_hours_make_a_token_dearer() -> None:
    busy, idle = of(utilisation=1.0), of(utilisation=0.25)

    assert busy.usd_per_million_output is not None
    assert idle.usd_per_million_output is not None
    assert idle.usd_per_million_output.expected == pytest.approx(4 * busy.usd_per_million_output.expected)
    assert idle.s_per_token == busy.s_per_token


def test_dollars_and_joules_follow_from_the_time() -> None:
    found = of(batch=8)
    assert found.usd_per_h is not None
    assert found.usd_per_million_output is not None
    assert found.usd_per_million_output.expected == pytest.approx(found.usd_per_h / 3600 / found.tok_per_s * 1e6)
    assert found.joules_per_token == pytest.approx(450 / found.tok_per_s)


def test_all_nodes_draw_power() -> None:
    found = of(machine="8x h100-sxm + 4 nodes + infiniband-ndr")
    assert found.joules_per_token == pytest.approx(4 * 8 * 700 / found.tok_per_s)


def test_electricity_makes_an_owned_machine_dearer() -> None:
    cheap, dear = (of(machine="m4-max-40", usd_per_kwh=price).usd_per_h for price in (0.1, 0.4))
    assert cheap is not None
    assert dear is not None
    assert dear - cheap == pytest.approx(0.3 * 0.145)


def test_a_machine_without_a_price_has_no_cost() -> None:
    machine = replace(find_machine(PC), rent_usd_per_h=None, price_usd=None)
    found = forecast(published("llama-3-8b"), machine, Workload())
    assert (found.usd_per_h, found.usd_per_million_output, found.usd_per_million_input) == (None, None, None)


# Safe memory


def test_no_machine_gives_all_its_memory() -> None:
    for text in MACHINES:
        machine = find_machine(text)
        assert 0 < safe_device_bytes(machine) < machine.device_memory_bytes * machine.all_devices
        assert safe_host_bytes(machine) < machine.host_memory_bytes * machine.nodes
        assert (safe_host_bytes(machine) == 0) == machine.unified


# Outside the measurements


def test_intervals_are_wider_outside_the_measurements() -> None:
    inside, beyond = of(bits=2.0), of(bits=1.6)

    assert not outside(inside.model, inside.machine, inside.workload)
    assert outside(beyond.model, beyond.machine, beyond.workload) == ["1.6 bits"]
    assert any("outside of what was measured" in reason for reason in beyond.reasons)
    ratio = [one.s_per_token.high / one.s_per_token.expected for one in (inside, beyond)]
    assert ratio[1] == pytest.approx(ratio[0] ** 2)


def test_everything_outside_the_measurements_is_named() -> None:
    named = outside(of_params(2e12), find_machine("100x h100-sxm"), Workload(batch=2000, prompt_tokens=40000))
    assert len(named) == 4


# Errors


def test_weights_that_fit_nowhere_need_a_disk() -> None:
    with pytest.raises(UsageError, match="no disk to stream from") as caught:
        of("gpt-3", "rtx-4090 + 64GB")
    assert "nvme-gen4" in str(caught.value.hint)


def test_caches_that_do_not_fit_are_an_error_that_names_the_batch_that_does() -> None:
    with pytest.raises(UsageError, match="KV caches of 2000 conversations") as caught:
        of(batch=2000)
    most = int(str(caught.value.hint).rsplit("--batch ", 1)[1])

    assert of(batch=most).kv_bytes > 0
    with pytest.raises(UsageError):
        of(batch=most + 1)


def test_the_hint_is_a_shorter_context_if_not_even_one_cache_fits() -> None:
    with pytest.raises(UsageError) as caught:
        of("llama-2-7b", "epyc-7763 + 3GB + nvme-gen4", prompt_tokens=3000)
    assert "--kv-bits 8" in str(caught.value.hint)


def test_a_context_longer_than_the_model_s_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"9000 tokens.*8192") as caught:
        of(prompt_tokens=8000, tokens=1000)
    assert "8192" in str(caught.value.hint)


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": 0.5},
        {"bits": float("nan")},
        {"kv_bits": 1},
        {"batch": 0},
        {"prompt_tokens": 0},
        {"tokens": 0},
        {"utilisation": 0.0},
        {"utilisation": 1.5},
    ],
)
def test_an_impossible_workload_is_an_error(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Workload(**wrong)  # type: ignore[arg-type]


def test_a_machine_with_hardly_any_memory_has_none_to_give() -> None:
    assert safe_device_bytes(find_machine("epyc-7763 + 1GB")) >= 0
    with pytest.raises(UsageError) as caught:
        of(machine="epyc-7763 + 1GB")
    assert "--batch -" not in str(caught.value.hint)


def test_a_computing_host_reads_the_caches_in_its_memory() -> None:
    """These caches are several times a device's memory; they once cost no time."""
    model = replace(published("llama-3-8b"), context=131072)
    machine = find_machine("rtx-4090 + 256GB")
    long = forecast(model, machine, Workload(batch=8, prompt_tokens=100_000, tokens=100))
    on_host = long.kv_bytes * long.placement.kv_host
    assert on_host > 50e9
    assert long.decode.pass_s.expected > on_host / machine.host_bytes_per_s
