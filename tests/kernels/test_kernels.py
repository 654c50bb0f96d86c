"""The fast kernels against the reference implementation, and row-invariance: decode rows do not influence each other."""

import ctypes
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.checkpoint.tensor import COMPUTABLE, block_of
from headrace.errors import HeadraceError
from headrace.kernels import (
    DECODE_MAX_ROWS,
    Kernels,
    ReferenceKernels,
    WeightSlice,
    dot_bits,
    make_kernels,
    torch_reference,
)
from headrace.kernels.ggml import library, type_number
from headrace.kernels.matmul import ExpertMatmul
from headrace.kernels.thresholds import PRECISE_TYPES

pytestmark = pytest.mark.zoo

COLUMNS, ROWS = 512, 24
# The gguf package cannot unpack it, so there is no twin to compare with.
WITHOUT_TWIN = {"Q1_0"}
TYPES = sorted(COMPUTABLE - WITHOUT_TWIN)


def quantised(kind: str) -> torch.Tensor:
    weights = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(7))
    block, size = block_of(kind)
    packed = torch.zeros(ROWS * COLUMNS // block * size, dtype=torch.uint8)
    importance = (ctypes.c_float * COLUMNS)(*[1.0] * COLUMNS)
    source = ctypes.cast(weights.data_ptr(), ctypes.POINTER(ctypes.c_float))
    library().ggml_quantize_chunk(type_number(kind), source, packed.data_ptr(), 0, ROWS, COLUMNS, importance)
    return packed


def matmul(kernels: Kernels | ReferenceKernels, x: torch.Tensor, kind: str, packed: torch.Tensor) -> torch.Tensor:
    out = torch.full((x.shape[0], ROWS + 5), 99.0)
    kernels.matmul(x, [(0, WeightSlice(kind, ROWS, packed.data_ptr(), 3))], [out])
    assert (out[:, :3] == 99).all()
    assert (out[:, 3 + ROWS :] == 99).all()
    return out[:, 3 : 3 + ROWS]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels(2)


@pytest.mark.parametrize("rows", [1, 3, DECODE_MAX_ROWS, DECODE_MAX_ROWS + 1, 70])
@pytest.mark.parametrize("kind", TYPES)
def test_matmuls_equal_the_reference_implementation(kernels: Kernels, kind: str, rows: int) -> None:
    packed = quantised(kind)
    x = torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(rows))
    expected = torch_reference.matmul(x, kind, packed.data_ptr(), ROWS)
    error = (matmul(kernels, x, kind, packed) - expected).norm() / expected.norm()

    # ggml quantises the activations to 8 bits per block of 32 or 256: about 0.7 %. bf16 has 8 bits too, fp32 none to lose.
    exact = kind == "F32" or (kind in PRECISE_TYPES and rows > DECODE_MAX_ROWS)
    assert error < (1e-5 if exact else 2e-2)


@pytest.mark.parametrize("kind", TYPES)
def test_the_result_of_a_row_does_not_depend_on_the_rows_beside_it(kernels: Kernels, kind: str) -> None:
    packed = quantised(kind)
    x = torch.randn(DECODE_MAX_ROWS, COLUMNS)
    together = matmul(kernels, x, kind, packed)
    for row in range(DECODE_MAX_ROWS):
        assert torch.equal(matmul(kernels, x[row : row + 1].clone(), kind, packed)[0], together[row])


def test_a_matmul_with_other_bits_than_dot_products_is_not_used_for_decode_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not dot_bits.has_dot_bits("Q4_K")
    monkeypatch.setattr(dot_bits, "_product", lambda *given: torch.tensor([1.0 + 1e-7 * given[3]]))
    assert not dot_bits.has_dot_bits.__wrapped__("Q8_0")
    monkeypatch.setattr(dot_bits, "_product", lambda *given: torch.tensor([1.0]))
    assert dot_bits.has_dot_bits.__wrapped__("Q8_0")


@pytest.mark.parametrize("kind", ["Q4_K", "F16"])
def test_the_result_does_not_depend_on_where_weight_slices_end(kernels: Kernels, kind: str) -> None:
    packed = quantised(kind)
    block, size = block_of(kind)
    row_bytes = COLUMNS // block * size
    for rows in (1, 5):
        x = torch.randn(rows, COLUMNS)
        whole, sliced = torch.empty(rows, ROWS), torch.empty(rows, ROWS)
        kernels.matmul(x, [(0, WeightSlice(kind, ROWS, packed.data_ptr(), 0))], [whole])
        for first in range(0, ROWS, 7):
            count = min(7, ROWS - first)
            kernels.matmul(x, [(0, WeightSlice(kind, count, packed.data_ptr() + first * row_bytes, first))], [sliced])
        assert torch.equal(whole, sliced)


def test_several_weights_share_one_call(kernels: Kernels) -> None:
    packed = {kind: quantised(kind) for kind in ("Q4_K", "Q6_K")}
    x = torch.randn(2, COLUMNS)
    outs = [torch.empty(2, ROWS), torch.empty(2, ROWS)]
    kernels.matmul(x, [(i, WeightSlice(k, ROWS, p.data_ptr(), 0)) for i, (k, p) in enumerate(packed.items())], outs)
    for out, (kind, data) in zip(outs, packed.items(), strict=True):
        assert torch.equal(out, matmul(kernels, x, kind, data))


def test_every_computable_type_is_known_to_ggml() -> None:
    for kind in COMPUTABLE:
        traits = library().ggml_get_type_traits(type_number(kind)).contents
        assert (traits.blck_size, traits.type_size) == block_of(kind)


def test_without_ggml_the_slow_twin_runs_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "headrace.kernels.matmul", None)
    kernels, why = make_kernels(2)
    assert isinstance(kernels, ReferenceKernels)
    assert "slow" in why
    packed, x = quantised("Q4_0"), torch.randn(2, COLUMNS)
    assert torch.equal(matmul(kernels, x, "Q4_0", packed), torch_reference.matmul(x, "Q4_0", packed.data_ptr(), ROWS))


def repacked(kernels: Kernels, kind: str) -> tuple[WeightSlice, torch.Tensor]:
    packed = quantised(kind)
    weight_slice = kernels.repack(WeightSlice(kind, ROWS, packed.data_ptr(), 0), COLUMNS)
    if weight_slice.repacked is None:
        pytest.skip(f"ggml has no repacked {kind} on this processor")
    return weight_slice, packed


@pytest.mark.parametrize("rows", [1, 2, 5, DECODE_MAX_ROWS, 70])
@pytest.mark.parametrize("kind", ["Q4_K", "Q4_0", "Q2_K"])
def test_a_repacked_copy_gives_the_same_results(kind: str, rows: int) -> None:
    kernels = Kernels(2, row_invariant=False)
    weight_slice, packed = repacked(kernels, kind)
    x = torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(rows))
    out, plain = torch.empty(rows, ROWS), torch.empty(rows, ROWS)
    kernels.matmul(x, [(0, weight_slice)], [out], invariant_rows=rows)
    kernels.matmul(x, [(0, WeightSlice(kind, ROWS, packed.data_ptr(), 0))], [plain], invariant_rows=rows)

    # Activations are rounded to 8 bits differently: the difference is a rounding of a rounding.
    assert (out - plain).norm() / plain.norm() < 1e-2


@pytest.mark.parametrize("kind", ["Q4_K", "Q4_0", "Q2_K"])
def test_rows_of_a_repacked_matmul_do_not_depend_on_each_other(kind: str) -> None:
    kernels = Kernels(2, row_invariant=True)
    weight_slice, packed = repacked(kernels, kind)
    x = torch.randn(23, COLUMNS)
    together = torch.empty(23, ROWS)
    kernels.matmul(x, [(0, weight_slice)], [together], invariant_rows=23)
    for count in (1, 3, 4, 9):
        out = torch.empty(count, ROWS)
        kernels.matmul(x[:count].contiguous(), [(0, weight_slice)], [out])
        assert torch.equal(out, together[:count])
    assert packed.numel()  # the weight_slice points into it


def test_row_invariant_rows_are_computed_as_if_they_were_alone(kernels: Kernels) -> None:
    packed = quantised("Q4_K")
    weight_slice = [(0, WeightSlice("Q4_K", ROWS, packed.data_ptr(), 0))]
    x = torch.randn(90, COLUMNS)
    mixed, alone, prefill = torch.empty(90, ROWS), torch.empty(40, ROWS), torch.empty(50, ROWS)
    kernels.matmul(x, weight_slice, [mixed], invariant_rows=40)
    kernels.matmul(x[:40].contiguous(), weight_slice, [alone], invariant_rows=40)
    kernels.matmul(x[40:].contiguous(), weight_slice, [prefill])

    assert torch.equal(mixed[:40], alone)
    assert torch.equal(mixed[40:], prefill)


@pytest.mark.parametrize("kind", ["Q4_K", "Q4_0", "Q2_K"])
def test_repacking_in_place_gives_the_results_of_a_copy(kind: str) -> None:
    kernels = Kernels(2)
    weight_slice, packed = repacked(kernels, kind)
    x = torch.randn(9, COLUMNS)
    copied, overwritten = torch.empty(9, ROWS), torch.empty(9, ROWS)
    kernels.matmul(x, [(0, weight_slice)], [copied])
    kernels.matmul(
        x, [(0, kernels.repack(WeightSlice(kind, ROWS, packed.data_ptr(), 0), COLUMNS, in_place=True))], [overwritten]
    )
    assert torch.equal(copied, overwritten)


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "IQ4_XS", "Q8_0", "F16"])
@pytest.mark.parametrize("pad_decode_rows_to_tiles", [False, True])
def test_the_tile_kernel_changes_no_more_than_the_last_bits(kind: str, pad_decode_rows_to_tiles: bool) -> None:
    packed, x = quantised(kind), torch.randn(70, COLUMNS)
    tiled = Kernels(2, tiled=[kind], pad_decode_rows_to_tiles=pad_decode_rows_to_tiles)
    for rows, invariant_rows in ((1, None), (5, None), (16, None), (70, None), (70, 5), (70, 70)):
        out, expected = torch.zeros(rows, ROWS), torch.empty(rows, ROWS)
        slices = [(0, WeightSlice(kind, ROWS - 7, packed.data_ptr(), 0)), (0, cut_off(kind, packed, ROWS - 7))]
        tiled.matmul(x[:rows].contiguous(), slices, [out], invariant_rows)
        Kernels(2).matmul(x[:rows].contiguous(), slices, [expected], rows)
        unpacked = kind in ("F16", "Q8_0") and rows == 70 and invariant_rows != 70  # by torch, in fp32
        torch.testing.assert_close(
            out, expected, rtol=0, atol=(2e-2 if unpacked else 1e-5) * float(expected.abs().max())
        )


@pytest.mark.parametrize("pad_decode_rows_to_tiles", [False, True])
def test_decode_rows_are_row_invariant_where_prefill_rows_go_through_tiles(pad_decode_rows_to_tiles: bool) -> None:
    packed, x = quantised("Q4_K"), torch.randn(DECODE_MAX_ROWS, COLUMNS)
    kernels = Kernels(2, tiled=["Q4_K"], pad_decode_rows_to_tiles=pad_decode_rows_to_tiles)
    together = matmul(kernels, x, "Q4_K", packed)
    assert {dots for _, dots, _ in kernels.graphs.matmuls} == {not pad_decode_rows_to_tiles}  # the requested kernel
    for first, last in ((0, 1), (3, 8), (4, 16)):
        assert torch.equal(matmul(kernels, x[first:last].clone(), "Q4_K", packed), together[first:last])


@pytest.mark.parametrize("kind", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("pad_decode_rows_to_tiles", [False, True])
def test_tiles_of_floats_are_row_invariant_wherever_the_weights_are_split(
    kind: str, pad_decode_rows_to_tiles: bool
) -> None:
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[kind]
    kernels = Kernels(2, tiled=[kind], pad_decode_rows_to_tiles=pad_decode_rows_to_tiles)
    for weight_rows, columns in ((40, 96), (37, 64), (3, 32), (130, 48)):
        weights, x = torch.randn(weight_rows, columns).to(dtype), torch.randn(150, columns)

        def multiplied(
            rows: int, splits: list[int], invariant: int, x: torch.Tensor = x, w: torch.Tensor = weights
        ) -> Any:
            out, ends = torch.full((rows, len(w)), torch.nan), [0, *splits, len(w)]
            slices = [
                (0, WeightSlice(kind, last - first, w[first:].data_ptr(), first))
                for first, last in itertools.pairwise(ends)
                if first < last
            ]
            kernels.matmul(x[:rows].contiguous(), slices, [out], invariant, [rows - invariant])
            return out

        whole = multiplied(150, [], 0)
        torch.testing.assert_close(whole, x @ weights.float().T, rtol=0, atol=1e-4 if kind == "F32" else 0.2)
        for rows in (1, 7, 8, 9, 64, 65):
            for splits in ([], [1], [weight_rows // 3], [weight_rows // 2, weight_rows // 2 + 1]):
                for invariant in {0, min(rows - 1, 5)} if pad_decode_rows_to_tiles else {0}:
                    assert torch.equal(multiplied(rows, splits, invariant), whole[:rows]), (rows, splits, invariant)


def test_activations_beyond_f16_are_scaled() -> None:
    weights, x = torch.randn(64, 256).half(), torch.randn(20, 256)
    x[3, 5], x[7, 1] = 1e6, -70_000.0
    out = torch.empty(20, 64)
    kernels = Kernels(2, tiled=["F16"])
    kernels.matmul(x, [(0, WeightSlice("F16", 64, weights.data_ptr(), 0))], [out], 0, [20])
    expected = x @ weights.float().T
    assert ((out - expected).abs().amax(1) < 2e-3 * expected.abs().amax(1)).all()


def test_prefill_rows_of_experts_go_through_tiles() -> None:
    packed, x = quantised("Q4_K"), torch.randn(24, COLUMNS)
    weight_slice = WeightSlice("Q4_K", ROWS, packed.data_ptr(), 0)
    results = []
    for kernels in (Kernels(2), Kernels(2, tiled=["Q4_K"])):
        outs = [torch.empty(rows, ROWS) for rows in (1, 9, 24)]
        kernels.matmul_each(
            [ExpertMatmul(x[: len(out)].contiguous(), weight_slice, out, 0, [len(out)]) for out in outs]
        )
        results.append(outs)
    for dots, tiles in zip(*results, strict=True):
        torch.testing.assert_close(tiles, dots, rtol=0, atol=2e-2 * float(dots.abs().max()))


def test_a_folder_without_ggml_is_refused_with_a_hint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HEADRACE_GGML", str(tmp_path))
    with pytest.raises(HeadraceError, match="no build of ggml runs here") as caught:
        library.__wrapped__()
    assert "HEADRACE_GGML" in str(caught.value.hint)
    library.cache_clear()
    try:
        kernels, why = make_kernels(2)
    finally:
        library.cache_clear()
    assert isinstance(kernels, ReferenceKernels)
    assert "slow" in why


def cut_off(kind: str, packed: torch.Tensor, first: int) -> WeightSlice:
    block, size = block_of(kind)
    return WeightSlice(kind, ROWS - first, packed.data_ptr() + first * (COLUMNS // block * size), first)


def test_spinning_threads_give_the_same_results() -> None:
    weights = torch.randn(4096, 256)
    x = torch.randn(1, 256)
    found = []
    for spins in (False, True):
        kernels = Kernels(2)
        if spins:
            kernels.start(spins=True, pad_decode_rows_to_tiles=False)
        output = torch.empty(1, 4096)
        kernels.matmul(x, [(0, WeightSlice("F32", 4096, weights.data_ptr(), 0))], [output])
        kernels.close()
        found.append(output)
    assert torch.equal(*found)


def test_a_matrix_quantised_to_q8_is_near_the_original() -> None:
    kernels = Kernels(2)
    for columns, error in ((256, 0.01), (40, 1e-6)):  # in blocks of 8 bits; unchanged
        weights, x = torch.randn(24, columns), torch.randn(1, columns)
        weight_slice, _owner = kernels.quantise_q8(weights)
        output = torch.empty(1, 24)
        kernels.matmul(x, [(0, weight_slice)], [output])
        assert (output - x @ weights.T).norm() < error * (x @ weights.T).norm()
    kernels.close()
