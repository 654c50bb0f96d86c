"""Plans of MoE models: pinning order, cached experts, and bytes read per token."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from headrace.checkpoint import Checkpoint, Tensor
from headrace.errors import BudgetError
from headrace.plan import Plan, RunConfig, budget_of, guessed_profile, make_plan
from headrace.plan.checkpoint_architecture import architecture_of
from headrace.plan.expert_cost import Experts
from headrace.plan.routing import Routing, load_routing, routing_path, save_routing
from headrace.plan.shape import shape_of

MIB = 1 << 20
LAYERS, COUNT, CHOSEN, HIDDEN, WIDTH = 8, 64, 4, 1024, 512


def tensors() -> Iterator[Tensor]:
    offset = 0

    def tensor(name: str, *shape: int) -> Tensor:
        nonlocal offset
        size = int(np.prod(shape)) // 32 * 18
        one = Tensor(name=name, shape=shape, type="Q4_0", path="/nowhere/model.gguf", offset=offset, nbytes=size)
        offset += size
        return one

    yield tensor("token_embd.weight", 4096, HIDDEN)
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            yield tensor(f"blk.{layer}.{name}.weight", HIDDEN, HIDDEN)
        yield tensor(f"blk.{layer}.ffn_gate_exps.weight", COUNT, WIDTH, HIDDEN)
        yield tensor(f"blk.{layer}.ffn_up_exps.weight", COUNT, WIDTH, HIDDEN)
        yield tensor(f"blk.{layer}.ffn_down_exps.weight", COUNT, HIDDEN, WIDTH)


MODEL = Checkpoint(
    path="/nowhere/model.gguf",
    paths=("/nowhere/model.gguf",),
    metadata={
        "general.architecture": "qwen3moe",
        "qwen3moe.block_count": LAYERS,
        "qwen3moe.embedding_length": HIDDEN,
        "qwen3moe.attention.head_count": 8,
        "qwen3moe.context_length": 4096,
        "qwen3moe.expert_count": COUNT,
        "qwen3moe.expert_used_count": CHOSEN,
    },
    tensors={one.name: one for one in tensors()},
)


def plan(memory_mib: int, **options: int) -> Plan:
    run_config = RunConfig(prompt_tokens=16, context_tokens=128, **options)
    return make_plan(MODEL, guessed_profile(), budget_of(memory_mib * MIB), run_config)


def test_the_sizes_of_experts_are_read_from_the_header() -> None:
    experts = shape_of(MODEL).experts
    assert experts is not None
    assert (experts.layers, experts.count, experts.per_token) == (LAYERS, COUNT, CHOSEN)
    assert experts.nbytes == LAYERS * COUNT * 3 * WIDTH * HIDDEN // 32 * 18
    assert all("exps" not in tensor.name for tensor in shape_of(MODEL).linears)


def test_a_budget_below_the_floor_is_refused_and_at_the_floor_is_planned() -> None:
    floor = plan(4096).floor_bytes
    with pytest.raises(BudgetError, match="needs at least"):
        plan(floor // MIB - 8)
    assert plan(floor // MIB + 1).expert_slots >= 4


def test_dense_weights_are_pinned_before_experts_get_more_than_the_minimum() -> None:
    for memory in range(plan(4096).floor_bytes // MIB + 1, 1200, 25):
        one = plan(memory)
        assert one.streamed_bytes_per_pass == 0 or one.expert_slots == 4


def test_more_memory_holds_more_experts_hits_more_and_reads_less() -> None:
    plans = [plan(memory) for memory in (700, 800, 1000, 1200, 4096)]
    slots = [one.expert_slots for one in plans]
    assert slots == sorted(slots)
    assert slots[-1] == LAYERS * COUNT
    rates = [one.experts.hit_rate for one in plans if one.experts is not None]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(1.0)
    assert plans[-1].decode.disk_s == 0
    assert [one.decode_s_per_token.expected for one in plans] == sorted(
        (one.decode_s_per_token.expected for one in plans), reverse=True
    )


def test_memory_adds_up() -> None:
    one = plan(900)
    parts = (
        one.runtime_bytes + one.kv_bytes + one.activation_bytes + one.pinned_bytes + one.ring_bytes + one.expert_bytes
    )
    assert parts <= one.budget.nbytes


def test_rows_of_a_batch_share_experts() -> None:
    experts = shape_of(MODEL).experts
    assert experts is not None
    assert experts.touched(1) == pytest.approx(CHOSEN, rel=1e-6)
    assert experts.touched(8) < 8 * CHOSEN
    assert experts.touched(10_000) == pytest.approx(COUNT, rel=1e-3)
    half = experts.with_cached(experts.total // 2)
    assert 0 < half.missed_bytes(8) < 8 * half.missed_bytes(1)


def brute_missed(experts: Experts, rows: int) -> float:
    chances = experts.chances
    assert chances is not None
    held = experts.cached / experts.layers
    missed = 0.0
    for rank, chance in enumerate(chances):
        absent = min(1.0, max(0.0, rank + 1 - held))
        missed += absent * (1 - (1 - chance) ** rows)
    return missed


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("cached", [0, 17, 100, 511, 512])
def test_missed_experts_are_those_not_in_memory(rows: int, cached: int) -> None:
    experts = shape_of(MODEL).experts
    assert experts is not None
    scores = np.full((LAYERS, COUNT), CHOSEN / COUNT, np.float32)
    known = experts.with_routing(Routing(scores=scores, cached=128, hit_rate=0.6)).with_cached(cached)
    assert known.missed(rows) == pytest.approx(brute_missed(known, rows), abs=1e-9)


def test_the_predicted_hit_rate_is_that_of_an_earlier_run() -> None:
    experts = shape_of(MODEL).experts
    assert experts is not None
    scores = np.full((LAYERS, COUNT), CHOSEN / COUNT, np.float32)
    for rate in (0.3, 0.5, 0.8):
        known = experts.with_routing(Routing(scores=scores, cached=128, hit_rate=rate)).with_cached(128)
        assert known.hit_rate == pytest.approx(rate, abs=0.02)
        assert known.source == "from an earlier run"


def test_routing_is_saved_and_loaded_and_an_invalid_file_is_ignored() -> None:
    assert load_routing(MODEL) is None
    scores = np.random.default_rng(0).random((LAYERS, COUNT)).astype(np.float32)
    save_routing(MODEL, Routing(scores=scores, cached=100, hit_rate=0.4))
    found = load_routing(MODEL)
    assert found is not None
    assert np.array_equal(found.scores, scores)
    assert (found.cached, found.hit_rate) == (100, 0.4)
    for content in (b"", b"PK", b"\x93NUMPY"):
        routing_path(MODEL).write_bytes(content)
        assert load_routing(MODEL) is None


def test_a_smaller_file_is_suggested_by_the_expert_bytes_it_saves() -> None:
    """A token reads only its routed experts, not all of them."""
    tight = plan(700)
    offers = [change for change in tight.changes if change.what.startswith("the same model as")]
    assert offers
    assert all(change.s_per_token < tight.decode_s_per_token.expected for change in offers)


def test_a_forecast_of_a_file_counts_the_routed_experts_of_a_token() -> None:
    found = architecture_of(MODEL)
    experts = LAYERS * COUNT * 3 * HIDDEN * WIDTH
    dense = LAYERS * 4 * HIDDEN * HIDDEN + 4096 * HIDDEN  # the head is tied to the table
    assert (found.experts, found.experts_per_token, found.dense_layers, found.tied) == (COUNT, CHOSEN, 0, True)
    assert found.params == experts + dense
    assert found.active_params == dense + experts * CHOSEN / COUNT
    assert found.bits == 4.5
    assert found.read_bytes(4.5) == pytest.approx((dense + experts * CHOSEN / COUNT) * 4.5 / 8)


def test_experts_stored_in_fewer_bytes_are_read_in_those() -> None:
    experts = shape_of(MODEL).experts
    assert experts is not None
    packed = replace(experts, read_share=0.75)
    assert packed.missed_bytes(3) == pytest.approx(0.75 * experts.missed_bytes(3))
