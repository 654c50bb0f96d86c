"""Seconds of a pass: resident, split, streamed, and with experts on demand."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.forecast.architecture import Architecture, of_params, published
from headrace.forecast.machine import find_machine
from headrace.forecast.passes import (
    DeviceSpec,
    Parallelism,
    PassShape,
    Rates,
    collectives,
    resident_pass,
    unpack_bytes,
    weight_traffic,
)
from headrace.forecast.streaming import ExpertHitModel, FeedRates, Placement, expert_pass, place, streamed_pass

PROPERTY = settings(max_examples=80, deadline=None)

LLAMA, MIXTRAL = published("llama-3-8b"), published("mixtral-8x7b")
A100 = DeviceSpec(bytes_per_s=2.039e12, flop_per_s=312e12, memory_bytes=80e9, peer_bytes_per_s=300e9)
ONE, RATES, FEED = Parallelism(), Rates(), FeedRates()
PC = find_machine("rtx-4090 + 64GB + nvme-gen4")
WAYS = {"host": PC.path_from("host"), "disk": PC.path_from("disk")}

MODELS = st.sampled_from(
    [LLAMA, MIXTRAL, published("gpt-2"), published("gpt-3"), published("gemma-3-27b"), of_params(3e9)]
)
WORKS = st.builds(
    lambda rows, context, bits, skew: PassShape(rows=rows, sequences=rows, context=context, bits=bits, skew=skew),
    rows=st.integers(1, 64).map(float),
    context=st.floats(0, 4096),
    bits=st.sampled_from([3.9, 4.85, 8.5, 16.0]),
    skew=st.floats(0, 1),
)


def row(**other: Any) -> PassShape:
    return replace(PassShape(rows=1, sequences=1, context=512), **other)


def streamed(model: Architecture, placement: Placement, work: PassShape | None = None) -> float:
    return streamed_pass(model, PC.device_spec, ONE, work or row(), placement, PC.topology(), WAYS, RATES, FEED).seconds


# Resident


@PROPERTY
@given(MODELS, WORKS)
def test_a_pass_takes_no_less_than_its_bytes_and_its_flop(model: Architecture, work: PassShape) -> None:
    found = resident_pass(model, A100, ONE, work, RATES)

    assert found.seconds >= (found.weight_bytes + found.kv_bytes) / A100.bytes_per_s
    assert found.seconds >= found.flop / A100.flop_per_s
    assert found.seconds >= max(found.parts.values())
    assert found.seconds <= sum(found.parts.values()) * (1 + 1e-9)
    assert found.parts["collectives"] == 0


def test_a_dense_model_reads_every_weight_but_the_table() -> None:
    found = resident_pass(LLAMA, A100, ONE, row(), RATES)
    assert found.weight_bytes == pytest.approx(2 * (LLAMA.params - LLAMA.vocab * LLAMA.hidden))
    assert found.kv_bytes == LLAMA.kv_bytes(512)
    assert found.binding == "memory"


def test_prefill_is_compute_bound() -> None:
    assert resident_pass(LLAMA, A100, ONE, row(rows=4096), RATES).binding == "compute"


@PROPERTY
@given(MODELS, WORKS)
def test_more_rows_are_never_faster_and_never_slower_per_row(model: Architecture, work: PassShape) -> None:
    more = replace(work, rows=2 * work.rows, sequences=2 * work.sequences)
    few, many = (resident_pass(model, A100, ONE, one, RATES).seconds for one in (work, more))

    assert few <= many * (1 + 1e-9)
    assert many <= 2 * few * (1 + 1e-9)


@PROPERTY
@given(MODELS, WORKS)
def test_fewer_bits_are_never_slower_without_dequantisation(model: Architecture, work: PassShape) -> None:
    packed, plain = (resident_pass(model, A100, ONE, replace(work, bits=bits), RATES).seconds for bits in (4.0, 16.0))
    assert packed <= plain


@PROPERTY
@given(MODELS, WORKS)
def test_dequantisation_is_slower_and_a_chain_of_operations_slower_still(model: Architecture, work: PassShape) -> None:
    work = replace(work, bits=4.0)
    fused, memory, chain = (
        resident_pass(model, A100, ONE, replace(work, unpacking=how), RATES).seconds
        for how in ("fused", "memory", "chain")
    )
    assert fused < memory < chain


def test_sixteen_bits_need_no_dequantisation() -> None:
    for how in ("fused", "memory", "chain"):
        assert unpack_bytes(16, how, RATES) == 0
        assert weight_traffic(LLAMA, row(unpacking=how), RATES) == LLAMA.read_bytes(16)


def test_dequantisation_through_memory_writes_and_reads_two_bytes_per_weight() -> None:
    fused, memory = (weight_traffic(LLAMA, row(bits=4.0, unpacking=how), RATES) for how in ("fused", "memory"))
    assert memory == pytest.approx(fused + 4 * (LLAMA.params - LLAMA.vocab * LLAMA.hidden))


def test_two_dies_reach_less_of_their_bandwidth() -> None:
    one, two = (resident_pass(LLAMA, replace(A100, dies=dies), ONE, row(), RATES).seconds for dies in (1, 2))
    assert one < two


def test_an_moe_reads_the_experts_of_all_its_rows() -> None:
    reads = [weight_traffic(MIXTRAL, row(rows=rows), RATES) for rows in (1, 2, 8, 1000)]
    assert reads == sorted(reads)
    assert reads[0] == pytest.approx(MIXTRAL.read_bytes(16))
    assert reads[-1] == pytest.approx(MIXTRAL.read_bytes(16, 8))


# Parallelism


def test_two_devices_are_faster_than_one_for_a_large_model() -> None:
    model = published("llama-3-70b")
    seconds = [resident_pass(model, A100, Parallelism(width=width), row(), RATES).seconds for width in (1, 2, 4, 8)]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] / seconds[1] < 2


def test_eight_devices_are_slower_than_one_for_a_small_model() -> None:
    model = published("gpt-2")
    one, eight = (resident_pass(model, A100, Parallelism(width=width), row(), RATES).seconds for width in (1, 8))
    assert eight > one


def test_collectives_take_longer_over_more_devices_rows_and_nodes() -> None:
    def of(width: int, rows: float = 1, nodes: int = 1) -> float:
        return collectives(4096, 32, A100, Parallelism(width=width, nodes=nodes, node_bytes_per_s=25e9), rows, RATES)

    assert of(1) == 0
    assert 0 < of(2) < of(4) < of(8)
    assert of(8) < of(8, rows=512)
    assert of(16) < of(16, nodes=2)
    assert of(16, rows=512) < of(16, rows=512, nodes=2)


def test_every_doubling_of_the_devices_adds_one_hop_to_each_reduction() -> None:
    no_bytes = replace(A100, peer_bytes_per_s=0.0)
    seconds = [collectives(4096, 32, no_bytes, Parallelism(width=width), 1, RATES) for width in (2, 4, 8, 16)]
    assert [after - before for before, after in pairwise(seconds)] == pytest.approx([2 * 32 * RATES.hop_s] * 3)


@pytest.mark.parametrize("depth", [2, 4, 8])
def test_pipeline_stages_do_not_make_one_sequence_faster(depth: int) -> None:
    alone = resident_pass(LLAMA, A100, ONE, row(), RATES)
    staged = resident_pass(LLAMA, A100, Parallelism(depth=depth), row(), RATES)

    assert staged.seconds == pytest.approx(alone.seconds)
    assert staged.weight_bytes == pytest.approx(alone.weight_bytes)
    assert staged.flop == pytest.approx(alone.flop)


def test_pipeline_stages_make_a_batch_faster_but_by_less_than_their_number() -> None:
    work = PassShape(rows=2048, sequences=64, context=512)
    alone, staged = (resident_pass(LLAMA, A100, split, work, RATES).seconds for split in (ONE, Parallelism(depth=4)))
    assert alone / 4 < staged < alone


# Placement


@PROPERTY
@given(MODELS, st.sampled_from([4.85, 16.0]), st.floats(0, 2e11), st.floats(0, 8e11), st.floats(0, 8e11))
def test_every_weight_lies_somewhere_and_the_device_comes_first(
    model: Architecture, bits: float, kv: float, device: float, host: float
) -> None:
    found = place(model, bits, kv, device, host)
    weights = model.all_bytes(bits)

    assert found.device + found.host + found.disk == pytest.approx(1, abs=1e-6)
    free_bytes = max(0.0, device - kv)
    assert found.device * weights == pytest.approx(min(weights, free_bytes), rel=1e-6, abs=1e-6 * weights)
    assert found.host * weights <= host * (1 + 1e-9) + 1
    if found.disk > 1e-6:
        spilled = max(0.0, kv - device)
        assert found.host * weights == pytest.approx(max(0.0, host - spilled), rel=1e-6, abs=1e-6 * weights)
    assert found.kv_host == pytest.approx(max(0.0, kv - device) / kv if kv else 0, abs=1e-9)


def test_a_model_that_fits_is_all_on_the_device() -> None:
    assert place(LLAMA, 16, 1e9, 80e9, 64e9) == Placement()


@pytest.mark.parametrize("shares", [{"host": -0.1}, {"host": 0.6, "disk": 0.5}, {"kv_host": 1.1}, {"disk": -1}])
def test_impossible_shares_are_an_error(shares: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="shares"):
        Placement(**shares)


# Streamed


@PROPERTY
@given(MODELS, WORKS, st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_a_streamed_pass_is_no_faster_than_its_pipes_nor_than_its_compute(
    model: Architecture, work: PassShape, off: float, disk_share: float, kv_host: float
) -> None:
    placement = Placement(host=off * (1 - disk_share), disk=off * disk_share, kv_host=kv_host)
    found = streamed_pass(model, PC.device_spec, ONE, work, placement, PC.topology(), WAYS, RATES, FEED)
    moved = found.weight_bytes * off + found.kv_bytes * kv_host

    assert found.seconds >= moved / PC.bus_bytes_per_s
    assert found.seconds >= found.weight_bytes * placement.disk / PC.disk_bytes_per_s
    assert found.seconds >= resident_pass(model, PC.device_spec, ONE, work, RATES).seconds * (1 - 1e-9)
    assert found.seconds >= max(found.parts.values()) * (1 - 1e-9)


def test_weights_in_a_slower_tier_make_a_slower_pass() -> None:
    places = [Placement(), Placement(host=0.5), Placement(host=1), Placement(host=0.5, disk=0.5), Placement(disk=1)]
    seconds = [streamed(LLAMA, place) for place in places]
    assert seconds == sorted(seconds)
    assert len(set(seconds)) == len(seconds)


def test_weights_from_disk_are_bound_by_it() -> None:
    found = streamed_pass(LLAMA, PC.device_spec, ONE, row(), Placement(disk=1), PC.topology(), WAYS, RATES, FEED)
    assert found.binding == "disk"
    assert found.seconds >= LLAMA.read_bytes(16) / (PC.disk_bytes_per_s * FEED.disk_share)


def test_caches_in_host_memory_cross_the_bus() -> None:
    long = row(context=8192, sequences=8, rows=8)
    assert streamed(LLAMA, Placement(kv_host=1), long) > streamed(LLAMA, Placement(), long)


def test_more_rows_share_the_streamed_weights() -> None:
    one, many = streamed(LLAMA, Placement(host=1)), streamed(LLAMA, Placement(host=1), row(rows=16))
    assert many < 2 * one


# Experts on demand


@PROPERTY
@given(WORKS, st.floats(0, 1), st.floats(0, 1))
def test_more_hits_are_faster(work: PassShape, one: float, other: float) -> None:
    few, many = (
        expert_pass(MIXTRAL, PC.device_spec, ONE, work, hits, 5e9, RATES, FEED).seconds for hits in sorted((one, other))
    )
    assert many <= few
    if abs(one - other) > 1e-3:
        assert many < few


def test_a_pass_with_every_expert_in_memory_reads_none() -> None:
    all_there = expert_pass(MIXTRAL, PC.device_spec, ONE, row(), 1.0, 5e9, RATES, FEED)
    assert all_there.seconds == resident_pass(MIXTRAL, PC.device_spec, ONE, row(), RATES).seconds
    assert all_there.parts["experts"] == 0


def test_missed_experts_are_read_after_routing() -> None:
    inner = resident_pass(MIXTRAL, PC.device_spec, ONE, row(), RATES).seconds
    missed = expert_pass(MIXTRAL, PC.device_spec, ONE, row(), 0.0, 5e9, RATES, FEED)
    read_s = MIXTRAL.expert_params * 2 * 2 / 8 / (5e9 * FEED.expert_share)

    assert missed.parts["experts"] == pytest.approx(read_s)
    assert missed.seconds == pytest.approx(inner + read_s)
    assert missed.binding == "experts"


def test_a_cache_as_large_as_all_experts_holds_them() -> None:
    whole = MIXTRAL.expert_params / 2
    rates = [ExpertHitModel(cache_bytes=share * whole).hits(MIXTRAL, 4) for share in (0, 0.25, 0.5, 1)]
    assert rates == sorted(rates)
    assert rates[0] == 0
    assert rates[-1] == 1
