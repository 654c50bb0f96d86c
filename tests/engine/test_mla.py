"""MLA: the cache holds the latents that keys and values derive from."""

from pathlib import Path

import numpy as np
import pytest
import torch

from headrace.engine import Engine, Rows
from headrace.engine.attention import Entry, KVCache, PackedAttention
from headrace.engine.mla import KvBSplit
from headrace.errors import CheckpointError
from headrace.kernels import Kernels, ReferenceKernels
from headrace.kernels.weight_slice import WeightSlice
from support.engines import build_engine
from support.zoo.gguf_files import random_model, write_gguf

PROMPT = [5, 17, 99, 3, 250, 41, 7, 7, 12, 130, 64, 2, 9]
KINDS = [("deepseek2", "F32"), ("deepseek2", "Q8_0"), ("deepseek2-lite", "Q4_0")]


def opened(path: Path, share: float = 0.5, repacked: bool = False) -> Engine:
    options = {"repacked_types": frozenset({"Q4_0"} if repacked else ()), "repack_in_place": repacked}
    return build_engine(path, share=share, row_multiple=8, options={"expert_slots": 24, **options})


@pytest.fixture(params=KINDS, ids=lambda kind: "-".join(kind), scope="module")
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture, kind = request.param
    return write_gguf(random_model(architecture), architecture, tmp_path_factory.mktemp("mla") / "tiny.gguf", kind)


def alone(engine: Engine, tokens: list[int], bits: int = 16) -> torch.Tensor:
    """Logits of every row, computed one by one."""
    cache = engine.new_cache(64, bits)
    return torch.cat([engine.step([Rows(cache=cache, tokens=[token])]) for token in tokens])


@pytest.mark.parametrize("share", [0.0, 0.7])
def test_streamed_logits_equal_resident_ones_bit_for_bit(path: Path, share: float) -> None:
    with opened(path, 1.0) as engine:
        resident = alone(engine, PROMPT)
    with opened(path, share) as engine:
        assert torch.equal(alone(engine, PROMPT), resident)


def test_row_invariant_rows_do_not_depend_on_the_rows_beside_them(path: Path) -> None:
    with opened(path) as engine:
        expected = alone(engine, PROMPT)
        first, second = engine.new_cache(64), engine.new_cache(64)
        together = engine.step(
            [Rows(cache=first, tokens=PROMPT, logits=13), Rows(cache=second, tokens=PROMPT[:4], logits=4)]
        )
        assert torch.equal(together, torch.cat([expected, expected[:4]]))
        first.truncate(6)
        assert torch.equal(engine.step([Rows(cache=first, tokens=PROMPT[6:], logits=7)]), expected[6:])
        shared = engine.new_cache(64)
        shared.copy_prefix(first, 9)
        assert torch.equal(engine.step([Rows(cache=shared, tokens=PROMPT[9:], logits=4)]), expected[9:])


def test_prefill_rows_and_8_bits_give_nearly_the_same(path: Path) -> None:
    with opened(path) as engine:
        expected = alone(engine, PROMPT)
        small = alone(engine, PROMPT, 8)
        assert 0 < float((small - expected).norm() / expected.norm()) < 0.1
        prefill = engine.step([Rows(cache=engine.new_cache(64), tokens=PROMPT * 3, logits=39, row_invariant=False)])
        close = (prefill[:13].argmax(-1) == expected.argmax(-1)).float().mean()
        assert close > 0.7  # a row that chooses another expert is far away


def test_kv_b_proj_is_not_repacked(tmp_path: Path) -> None:
    path = write_gguf(random_model("deepseek2-lite"), "deepseek2-lite", tmp_path / "tiny.gguf", "Q4_0")
    with opened(path, 1.0) as engine:
        plain = alone(engine, PROMPT)
    with opened(path, 1.0, repacked=True) as engine:
        close = (alone(engine, PROMPT).argmax(-1) == plain.argmax(-1)).float().mean()
        assert close > 0.7


def test_a_position_takes_one_latent_and_one_rope_key(path: Path) -> None:
    with opened(path) as engine:
        cache = engine.new_cache(64)
        engine.step([Rows(cache=cache, tokens=PROMPT)])
        assert isinstance(cache, KVCache)
        rotated, vectors = cache.get(0, 13)
        assert rotated.shape == (1, 13, 16)
        assert vectors.shape == (1, 13, 64)


def test_k_b_and_v_b_of_other_sizes_than_the_model_are_refused(tmp_path: Path) -> None:
    model = random_model("deepseek2")
    extra = {"attention.value_length_mla": 20}
    path = write_gguf(model, "deepseek2", tmp_path / "tiny.gguf", extra=extra)
    with pytest.raises(CheckpointError, match="kv_b_proj"):
        opened(path)


def test_a_sliding_window_is_the_same_for_prefill_rows_and_for_each_row_alone() -> None:
    torch.manual_seed(0)
    kv_b = KvBSplit(torch.randn(2, 8, 16), torch.randn(2, 6, 16))
    query, vectors, rotated = torch.randn(1, 2, 25, 12), torch.randn(1, 1, 25, 16), torch.randn(1, 1, 25, 4)
    results = []
    for row_invariant in (False, True):
        attention, cache, found = PackedAttention(ReferenceKernels(1)), KVCache(1, 64, 32), []
        for first, last in ((0, 20), (20, 25)):
            for part in attention.buffers.take((1, 64, 4), (1, 64, 16)):
                part.fill_(torch.nan)  # positions that are not filled
            attention.begin([Entry(cache, slice(0, last - first), row_invariant, first)])
            part = slice(first, last)
            rows = query[0, :, part], rotated[:, :, part], vectors[:, :, part]
            found.append(attention.attend_mla(0, kv_b, *rows, 0.3, 4))
            cache.length = last
        results.append(torch.cat(found, 1))
    assert torch.allclose(*results, atol=1e-5)


@pytest.mark.parametrize("kernels", [Kernels(1), ReferenceKernels(1)])
def test_weight_slices_are_unpacked_to_their_places(kernels: Kernels | ReferenceKernels) -> None:
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    k_splits = np.arange(100, 116, dtype=np.float32).reshape(2, 4, 2)  # of a (4, 4) matrix, two columns each
    plain, joined = torch.empty(4, 3), torch.empty(4, 4)
    slices = [
        (0, WeightSlice("F32", 1, rows[3:].ctypes.data, 3)),
        (1, WeightSlice("F32", 4, k_splits[1:].ctypes.data, 4, k_split_rows=4, k_split_columns=2)),
        (0, WeightSlice("F32", 3, rows.ctypes.data, 0)),
        (1, WeightSlice("F32", 4, k_splits.ctypes.data, 0, k_split_rows=4, k_split_columns=2)),
    ]
    kernels.unpack_all(slices, [plain, joined])
    assert torch.equal(plain, torch.from_numpy(rows))
    assert torch.equal(joined, torch.from_numpy(np.concatenate(list(k_splits), 1)))
