"""MoE in the engine: cached experts, prefetch and other sequences of a pass change no bit."""

from pathlib import Path

import pytest
import torch

from headrace.engine import Engine, Rows
from headrace.engine.expert_prefetch import DISTANCE
from headrace.errors import CheckpointError
from headrace.kernels import Kernels
from support.engines import build_engine
from support.zoo.folders import VOCAB, tiny_model, write_folder

pytestmark = pytest.mark.zoo

TOKENS = torch.randint(0, VOCAB, (64,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss", "deepseek_v3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tiny_model(request.param), tmp_path_factory.mktemp("experts") / request.param)


def engine_of(folder: Path, *, slots: int, readers: int = 2, share: float = 0.5) -> Engine:
    return build_engine(
        folder, share=share, options={"readers": readers, "expert_slots": slots, "expert_readers": readers}
    )


def logits_of(engine: Engine, parts: tuple[int, ...]) -> torch.Tensor:
    cache, tokens, found = engine.new_cache(len(TOKENS)), list(TOKENS), []
    for count in parts:
        found.append(engine.step([Rows(cache=cache, tokens=tokens[:count], logits=count)]))
        tokens = tokens[count:]
    return torch.cat(found)


def test_memory_and_readers_change_no_bit(folder: Path) -> None:
    # torch's matmuls of prefill rows depend on the cut of a linear, so those are compared at one share only.
    for parts, shares in (((12, 1, 1, 4, 1), (0.3, 0.0, 0.5, 1.0)), ((30, 1), (1.0, 1.0))):
        with engine_of(folder, slots=64, share=1.0) as engine:
            expected = logits_of(engine, parts)
        for slots, readers, share in zip((1, 2, 5, 9), (2, 0, 1, 3), shares, strict=False):
            with engine_of(folder, slots=slots, readers=readers, share=share) as engine:
                assert torch.equal(logits_of(engine, parts), expected)


def test_rows_of_a_batch_share_experts_and_no_row_changes(folder: Path) -> None:
    with engine_of(folder, slots=6) as engine:
        alone = []
        for start in range(4):
            cache = engine.new_cache(16)
            engine.step([Rows(cache=cache, tokens=TOKENS[start : start + 5], row_invariant=True)])
            alone.append(engine.step([Rows(cache=cache, tokens=[TOKENS[start + 5]])]))
        caches = [engine.new_cache(16) for _ in range(4)]
        engine.step([Rows(cache=c, tokens=TOKENS[i : i + 5], row_invariant=True) for i, c in enumerate(caches)])
        together = engine.step([Rows(cache=c, tokens=[TOKENS[i + 5]]) for i, c in enumerate(caches)])
        assert torch.equal(together, torch.cat(alone))
        stats = engine.passes[-1]
    layers = len(engine.experts.stream.bundles) if engine.experts is not None else 0
    requested = stats.expert_hits + stats.expert_prefetched + stats.expert_misses
    assert requested < 4 * 2 * layers + 1  # at most one request for an expert, for all rows that chose it


def test_prefetched_experts_change_no_bit_and_are_counted(folder: Path) -> None:
    parts = (4,) + (1,) * 40
    with engine_of(folder, slots=64) as engine:
        expected = logits_of(engine, parts)
    with engine_of(folder, slots=7) as engine:
        assert engine.experts is not None
        predictor = engine.experts.expert_predictor
        predictor._ranks[:] = [predictor._per_token] * DISTANCE  # as if every prediction had been a hit so far
        assert torch.equal(logits_of(engine, parts), expected)
        assert sum(stats.expert_prefetched for stats in engine.passes) > 0


def test_a_router_that_chooses_an_expert_that_does_not_exist_is_an_error(folder: Path) -> None:
    with engine_of(folder, slots=6) as engine:
        assert engine.experts is not None
        packed = engine.weights.steps[-1] and next(
            step.experts for step in engine.weights.steps if hasattr(step, "experts")
        )
        hidden = torch.zeros((1, 64))
        with pytest.raises(CheckpointError, match="chose expert 99 of"):
            engine.experts(packed, hidden, torch.tensor([[0, 99]]), torch.ones((1, 2)), invariant_rows=1)


def test_threads_spin_only_where_nothing_is_read(folder: Path) -> None:
    for slots, share, spins in ((7, 1.0, False), (64, 0.5, False), (64, 1.0, True)):
        with engine_of(folder, slots=slots, share=share) as engine:
            kernels = engine.kernels
            assert isinstance(kernels, Kernels)
            assert (kernels.graphs._decode_workers is not kernels.graphs._prefill_workers) == spins
