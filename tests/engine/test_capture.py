"""A replayed step must equal the eager step, for other tokens and caches too."""

from pathlib import Path

import numpy as np
import pytest
import torch

from headrace.engine import Rows
from headrace.engine.buffer_pool import BufferPool
from headrace.engine.capture import MAX_CAPTURED_STEPS, CaptureCache, CapturedStep
from headrace.engine.fuse import FusedCall
from headrace.engine.pooled_allocation import PooledAllocation
from support.engines import PROMPT, build_engine
from support.zoo.gguf_files import random_model, write_gguf


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_replayed_steps_equal_eager_steps(tiny_llama: Path, share: float) -> None:
    tokens = [3, 99, 41, 250, 7, 12, 130, 64]
    found = []
    for replays in (True, False):
        with build_engine(tiny_llama, share=share) as engine:
            if not replays:
                engine._captures = NeverCaptured()
            cache = engine.new_cache(64)
            engine.step([Rows(cache=cache, tokens=PROMPT)])
            logits = [engine.step([Rows(cache=cache, tokens=[token])]) for token in tokens]
            other = engine.new_cache(64)  # another sequence, and two of them at once
            logits.append(engine.step([Rows(cache=other, tokens=[5])]))
            for token in tokens[:4]:
                pair = [Rows(cache=cache, tokens=[token]), Rows(cache=other, tokens=[token, 9], logits=2)]
                logits.append(engine.step(pair))
            if replays:
                assert set(engine._captures._ready) == {((1, 1),), ((1, 1), (2, 2))}
                calls = engine._captures._ready[((1, 1),)]._calls
                fused = [call for call in calls if isinstance(call.function, FusedCall)]
                assert len(fused) == (share == 1)  # one graph is the whole pass
            found.append(torch.cat(logits))
    assert torch.equal(found[0], found[1])


class NeverCaptured(CaptureCache):
    def capturing(self, key: object, at_once: bool = False) -> object:  # type: ignore[override]
        self._uncapturable[key] = "never"  # type: ignore[index]
        return super().capturing(key, at_once)  # type: ignore[arg-type]


def captured(pool: BufferPool, function: object, value: torch.Tensor) -> CapturedStep:
    capture = CapturedStep(pool)
    with torch.inference_mode(), capture:
        capture.output(function(capture.input(value)))  # type: ignore[operator]
    return capture


WEIGHT = torch.randn(8)


def small_model(x: torch.Tensor) -> torch.Tensor:
    y = torch.rms_norm(x * 2 + WEIGHT, (8,), WEIGHT, 1e-6)
    a, b = y.view(2, 4).t().contiguous().chunk(2)
    z = torch.cat((-b, a), -1).softmax(-1)
    z[0] += 1
    best = z.flatten().topk(3)
    return best.values + best.indices + torch.arange(3)


def test_a_captured_step_gives_the_eager_result_for_other_inputs() -> None:
    capture = captured(BufferPool(), small_model, torch.randn(8))
    assert capture.uncapturable_reason is None
    for _ in range(3):
        x = torch.randn(8)
        with torch.inference_mode():
            assert torch.equal(capture.replay(x), small_model(x))


@pytest.mark.parametrize(
    "model",
    [
        lambda x: x * float(x.max()),
        lambda x: x * 2 if x.max() > 0 else x * 3,
        lambda x: x[x > 0].sum(0, keepdim=True),
        lambda x: x + torch.rand_like(x),
        lambda x: WEIGHT + 1,
        lambda x: KEPT.copy_(x) * 2,
    ],
    ids=["a number", "a truth", "a shape", "chance", "no input", "a buffer of the model"],
)
def test_operations_that_depend_on_values_make_a_step_uncapturable(model: object) -> None:
    assert captured(BufferPool(), model, torch.randn(8)).uncapturable_reason


KEPT = torch.zeros(8)


def test_steps_whose_captures_differ_in_a_number_are_not_replayed() -> None:
    captures, x = CaptureCache(), torch.randn(8)
    for factor in (2.0, 3.0, 4.0, 5.0):
        assert captures.find("key") is None
        with torch.inference_mode(), captures.capturing("key") as capture:
            if capture is not None:
                capture.output(capture.input(x) * factor)
    assert "differs" in captures._uncapturable["key"]


def test_a_capture_that_fails_is_not_kept() -> None:
    captures = CaptureCache()
    with captures.capturing("key") as capture:
        assert capture is None  # the first pass of a key is not captured
    for _ in range(3):
        with pytest.raises(OSError, match="broken"), torch.inference_mode(), captures.capturing("key") as capture:
            assert capture is not None
            capture.input(torch.ones(2))
            raise OSError("broken")
    assert captures.find("key") is None


def test_captures_of_passes_that_do_not_recur_are_not_kept() -> None:
    captures, x = CaptureCache(), torch.randn(8)
    for key in range(MAX_CAPTURED_STEPS + 8):
        for _ in range(2):
            with torch.inference_mode(), captures.capturing(key) as capture:
                if capture is not None:
                    capture.output(capture.input(x) * 2)
    assert len(captures._first) == MAX_CAPTURED_STEPS
    assert captures.find(MAX_CAPTURED_STEPS) is None


def test_embedding_rows_are_read_once_and_the_oldest_are_evicted(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with build_engine(tiny_llama) as engine:
        table = next(t for t in engine.checkpoint.tensors.values() if t.name == "token_embd.weight")
        monkeypatch.setattr("headrace.engine.tensor_reader.MAX_CACHED_ROW_BYTES", 3 * table.row_bytes)
        read: list[int] = []
        monkeypatch.setattr(
            engine._eager.parts.reader,
            "_read",
            lambda path, offset, nbytes: read.append(offset) or np.zeros(nbytes, np.uint8),
        )
        for index in (1, 2, 1, 3, 1, 4, 1, 2):
            engine._eager.parts.reader._row(table, index)
    assert [(offset - table.offset) // table.row_bytes for offset in read] == [1, 2, 3, 4, 2]


def test_a_buffer_is_reused_when_its_tensor_and_views_are_gone() -> None:
    pool = BufferPool()
    first = pool.empty((4, 1000))
    view, address = first[1:], first.data_ptr()
    del first
    assert pool.empty((4, 1000)).data_ptr() != address
    del view
    assert pool.empty((1000, 4), stride=(1, 1000)).data_ptr() == address
    assert pool.owns(pool.empty((3,), torch.int64))
    assert not pool.owns(torch.empty(3))


def test_pooled_allocation_changes_no_result_and_needs_few_buffers() -> None:
    x, weight, order = torch.randn(1, 700, 512), torch.randn(512), torch.randperm(512)

    def layer(x: torch.Tensor) -> torch.Tensor:
        y = torch.rms_norm(x, (512,), weight, 1e-5)
        heads = y.view(1, 700, 8, 64).transpose(1, 2)
        rotated = torch.cat((-heads[..., 32:], heads[..., :32]), -1) * heads
        return x + torch.nn.functional.silu(rotated.transpose(1, 2).reshape(x.shape)) * y.index_select(-1, order)

    with torch.inference_mode():
        expected = x
        for _ in range(6):
            expected = layer(expected)
        pooled, found = PooledAllocation(), x
        with pooled:
            for _ in range(6):
                found = layer(found)
            assert pooled._pool.owns(x.index_select(-1, order))
    assert torch.equal(found, expected)
    assert pooled._pool.owns(found)
    assert sum(map(len, pooled._pool._buffers.values())) <= 8


@pytest.mark.parametrize("family", ["gemma3", "qwen3", "phi3", "gpt2", "qwen3moe", "gpt-oss", "gemma2"])
def test_fused_graphs_change_no_bit_for_any_operations_between_matmuls(family: str, tmp_path: Path) -> None:
    path = write_gguf(random_model(family), family, tmp_path / "tiny.gguf", "Q8_0")
    found = []
    for replays in (True, False):
        with build_engine(path, share=1.0) as engine:
            if not replays:
                engine._captures = NeverCaptured()
            cache = engine.new_cache(64)
            engine.step([Rows(cache=cache, tokens=PROMPT)])
            found.append(torch.cat([engine.step([Rows(cache=cache, tokens=[token])]) for token in range(3, 33)]))
            if replays:
                calls = engine._captures._ready[((1, 1),)]._calls
                assert any(isinstance(call.function, FusedCall) for call in calls)
    assert torch.equal(found[0], found[1])
