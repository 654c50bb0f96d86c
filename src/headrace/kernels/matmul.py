"""Choose and run the kernel for one matmul: activations times packed weight rows at an address.

On two cores of an AMD EPYC ggml multiplies one row with Q4_K at 40 to 48 giga-weights/s (memory speed). From two rows on
its dot products are the limit (4.8 at 16 rows). The tile kernel reaches 10 at 16 rows and 0.56 at 512. Unpacking runs at 6.6,
torch's bf16 GEMM at 0.36 for 512 rows.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from headrace.checkpoint.tensor import block_of, row_bytes
from headrace.kernels.attention_graph import Heads, Positions
from headrace.kernels.dots import DotMatmul
from headrace.kernels.expert_mlp import ExpertShapes
from headrace.kernels.fused_graph import FusedGraph
from headrace.kernels.ggml_graph import MatmulGraph, MatmulPointers
from headrace.kernels.graph_cache import GraphCache, MatmulJob, Slices, matmul_job
from headrace.kernels.prefill_gemm import PrefillGemm
from headrace.kernels.thresholds import DECODE_MAX_ROWS, EXPERT_DECODE_MAX_ROWS, TILE_ROWS
from headrace.kernels.tiles import TileMatmul
from headrace.kernels.unpacking import unpack_slices
from headrace.kernels.weight_slice import WeightSlice


class Kernels:
    """The backend on the CPU: ggml on `threads` cores, and torch for the prefill of some formats."""

    attends = has_expert_mlp = True

    def __init__(
        self,
        threads: int,
        bf16_prefill: bool = True,
        row_invariant: bool = True,
        tiled: Collection[str] = (),
        pad_decode_rows_to_tiles: bool = False,
    ):
        """Choose the kernels of all matmuls.

        Args:
            threads: cores to use.
            bf16_prefill: torch multiplies quantised weights of prefill in bf16, where the processor can.
            row_invariant: the result of a decode row must not depend on the number of rows. Kernels that are faster for
                one row, or for many, break this in the last bits.
            tiled: formats whose prefill rows go through ggml's tile kernel, and not through torch.
            pad_decode_rows_to_tiles: for the formats in `tiled`, run row-invariant rows through the tile kernel (padded),
                instead of one dot product per row. Both are row-invariant but differ in the last bits.
        """
        self.threads = threads
        self.row_invariant = row_invariant
        self.graphs = GraphCache(threads, row_invariant)
        self._dots = DotMatmul(self.graphs)
        self._tiles = TileMatmul(self.graphs, tiled)
        self.gemm = PrefillGemm(self.graphs, threads, bf16_prefill)
        self._pads = pad_decode_rows_to_tiles
        self._copies: list[torch.Tensor] = []
        self._cached_matmuls: dict[tuple[int, ...], CachedMatmul] = {}

    def start(self, *, spins: bool, pad_decode_rows_to_tiles: bool) -> None:
        """As `Backend.start`."""
        self._pads = pad_decode_rows_to_tiles
        if spins:
            self.graphs.spin()

    def has_tiles(self, type_name: str, columns: int) -> bool:
        """As `Backend.has_tiles`."""
        return self._tiles.takes(type_name, columns)

    def repack(self, weight_slice: WeightSlice, columns: int, in_place: bool = False) -> WeightSlice:
        """As `Backend.repack`, to ggml's CPU_REPACK layout. A copy lives as long as this.

        `in_place` overwrites the slice: then all matmuls with it are row-invariant, those of prefill too.
        """
        repacking = self.graphs.repacking
        if weight_slice.k_split_rows or not repacking.takes(weight_slice.type, weight_slice.rows):
            return weight_slice
        if in_place:
            repacking.overwrite(weight_slice.type, weight_slice.rows, columns, weight_slice.address)
            return replace(weight_slice, repacked=weight_slice.address)
        copy = torch.empty(weight_slice.rows * row_bytes(weight_slice.type, columns) + _ALIGNMENT, dtype=torch.uint8)
        target = -(-copy.data_ptr() // _ALIGNMENT) * _ALIGNMENT
        repacking.copy(weight_slice.type, weight_slice.rows, columns, weight_slice.address, target)
        self._copies.append(copy)
        return replace(weight_slice, repacked=target)

    def matmul(
        self,
        x: torch.Tensor,
        slices: Sequence[tuple[int, WeightSlice]],
        outputs: Sequence[torch.Tensor],
        invariant_rows: int | None = None,
        chunks: Sequence[int] = (),
    ) -> None:
        """As `Backend.matmul`: dot products for decode rows; tiles or torch for the others."""
        key = None
        is_decode_row = x.shape[0] == 1 and (invariant_rows != 0 or not chunks)
        if type(slices) is tuple and is_decode_row:
            key = _matmul_key(x, slices, outputs)
            cached = self._cached_matmuls.get(key)
            if cached is not None and cached.slices is slices:
                cached.graph(cached.operands)
                return
        self._dots.last = None
        self._matmul(x, slices, outputs, invariant_rows, chunks)
        if key is not None and self._dots.last is not None and len(self._dots.last[1]) == len(slices):
            if len(self._cached_matmuls) >= _MAX_CACHED_MATMULS:
                self._cached_matmuls.clear()
            self._cached_matmuls[key] = CachedMatmul(slices, *self._dots.last)

    def _matmul(
        self,
        x: torch.Tensor,
        slices: Slices,
        outputs: Sequence[torch.Tensor],
        invariant_rows: int | None,
        chunks: Sequence[int],
    ) -> None:
        if invariant_rows is None or (not chunks and x.shape[0] - invariant_rows <= DECODE_MAX_ROWS):
            invariant_rows = x.shape[0] if invariant_rows is not None or x.shape[0] <= DECODE_MAX_ROWS else 0
        if invariant_rows < x.shape[0]:
            repacked = [(i, weight_slice) for i, weight_slice in slices if weight_slice.repacked_in_place]
            if repacked:
                self._dots.multiply(x, repacked, outputs)
            slices = [(i, weight_slice) for i, weight_slice in slices if not weight_slice.repacked_in_place]
            tiled, others = self._tiles.split(slices, x.shape[1], row_invariant=False)
            if tiled:
                self._tiles.multiply(x, range(invariant_rows, len(x)), tiled, outputs)
            for i, weight_slice in others:
                activations = self.gemm.activations(x, invariant_rows, weight_slice.type)
                self.gemm.multiply(activations, weight_slice, outputs[i][invariant_rows:], chunks)
        if invariant_rows and slices:
            if self._pads if self.graphs.row_invariant else invariant_rows >= TILE_ROWS:
                tiled, slices = self._tiles.split(slices, x.shape[1], row_invariant=True)
                if tiled:
                    self._tiles.multiply(x, range(invariant_rows), tiled, outputs)
            if slices:
                self._dots.multiply(x[:invariant_rows], slices, [output[:invariant_rows] for output in outputs])

    def matmul_each(self, jobs: Sequence["ExpertMatmul"]) -> None:
        """As `Backend.matmul_each`."""
        dots: list[MatmulJob] = []
        others: list[MatmulJob] = []
        for x, weight_slice, output, invariant_rows, chunks in jobs:
            if weight_slice.k_split_rows:
                self.matmul(x, [(0, weight_slice)], [output], invariant_rows, chunks)
                continue
            if invariant_rows:
                (dots if self.graphs.row_invariant else others).append(
                    matmul_job(x[:invariant_rows], weight_slice, output[:invariant_rows])
                )
            if not chunks:
                continue
            tiled = self._tiles.takes(weight_slice.type, x.shape[1])
            if (
                tiled
                and self._tiles.activations[weight_slice.type] == "Q8_K"
                and x.shape[0] - invariant_rows >= TILE_ROWS
            ):
                others.append(matmul_job(x[invariant_rows:], weight_slice, output[invariant_rows:]))
            elif tiled:
                self._tiles.multiply(x, range(invariant_rows, x.shape[0]), [(0, weight_slice)], [output])
            else:
                unpacked, first = [], invariant_rows
                for count in chunks:
                    part = slice(first, first + count)
                    if count <= EXPERT_DECODE_MAX_ROWS:
                        (dots if self.graphs.row_invariant else others).append(
                            matmul_job(x[part], weight_slice, output[part])
                        )
                    else:
                        unpacked.append(part)
                    first += count
                if unpacked:
                    self.gemm.multiply_parts(
                        self.gemm.activations(x, 0, weight_slice.type), weight_slice, output, unpacked
                    )
        for some, by_dots in ((dots, True), (others, False)):
            for start in range(0, len(some), _MAX_MATMULS):
                self.graphs.run(some[start : start + _MAX_MATMULS], by_dots)

    def expert_mlp(
        self, x: torch.Tensor, form: ExpertShapes, experts: Sequence[Sequence[int]], outputs: Sequence[int]
    ) -> None:
        """As `Backend.expert_mlp`."""
        graph = self.graphs.expert_mlp(x.shape[1], form, len(experts))
        split = len(form.up)
        weights = [address for slices in experts for address in slices[:split]]
        weights += [address for slices in experts for address in slices[split:]]
        graph(x.data_ptr(), weights, outputs)

    def unpack(self, type_name: str, address: int, rows: int, columns: int) -> torch.Tensor:
        """As `Backend.unpack`."""
        return self.gemm.unpack(type_name, address, rows, columns)

    def unpack_all(self, slices: Slices, outputs: Sequence[torch.Tensor]) -> None:
        """As `Backend.unpack_all`."""
        unpack_slices(self.unpack, slices, outputs)

    def rms_norm(self, out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
        """As `Backend.rms_norm`."""
        function = self.graphs.row_function("rms_norm", x, eps)
        function(x.data_ptr(), 4 * x.stride(0), len(x), out.data_ptr(), weight.data_ptr())

    def silu(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """As `Backend.silu`."""
        self.graphs.row_function("silu", x)(x.data_ptr(), 4 * x.stride(0), len(x), out.data_ptr())

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, out: torch.Tensor
    ) -> None:
        """As `Backend.attend`."""
        count = keys.shape[1]
        heads = Heads(query.shape[0], keys.shape[0], keys.shape[2], values.shape[2])
        graph = self.graphs.attention(heads, max(_MIN_POSITIONS, 1 << (count - 1).bit_length()), scale)
        places = [Positions(one.data_ptr(), 4 * one.stride(0)) for one in (keys, values)]
        graph(count, (query.data_ptr(), 4 * query.stride(0)), out.data_ptr(), *places)

    def fused_graph(self, operations: int) -> FusedGraph:
        """As `Backend.fused_graph`."""
        return self.graphs.fused(operations)

    def cached_matmul(self, x: torch.Tensor, slices: Slices, outputs: Sequence[torch.Tensor]) -> "CachedMatmul | None":
        """As `Backend.cached_matmul`."""
        cached = self._cached_matmuls.get(_matmul_key(x, slices, outputs))
        return cached if cached is not None and cached.slices is slices else None

    def quantise_q8(self, weight: torch.Tensor) -> tuple[WeightSlice, object]:
        """As `Backend.quantise_q8`."""
        rows, columns = weight.shape
        if columns % block_of(_QUANTISED)[0]:
            return WeightSlice("F32", rows, weight.data_ptr(), 0), weight
        packed = torch.empty((rows, row_bytes(_QUANTISED, columns)), dtype=torch.uint8)
        self.graphs.cast("F32", _QUANTISED, columns, many=True)(weight.data_ptr(), packed.data_ptr(), rows)
        return WeightSlice(_QUANTISED, rows, packed.data_ptr(), 0), packed

    def release(self) -> None:
        """As `Backend.release`."""
        self.gemm.release()
        self._tiles.release()

    def close(self) -> None:
        """As `Backend.close`."""
        self._cached_matmuls.clear()
        self._tiles.release()
        self.gemm.close()
        self._copies.clear()
        self.graphs.close()


class ExpertMatmul(NamedTuple):
    """A matmul of an expert: x (rows, columns) times a slice to output (rows, rows of the slice).

    Both are fp32 with contiguous rows. As in `Kernels.matmul`, `invariant_rows` are computed independently; a chunk's rows
    depend on that chunk alone.
    """

    x: torch.Tensor
    weight_slice: WeightSlice
    output: torch.Tensor
    invariant_rows: int
    chunks: Sequence[int] = ()


class CachedMatmul(NamedTuple):
    """A matmul that is repeated with the same operands."""

    slices: Slices
    graph: MatmulGraph
    operands: list[MatmulPointers]


def _matmul_key(x: torch.Tensor, slices: Slices, outputs: Sequence[torch.Tensor]) -> tuple[int, ...]:
    return (id(slices), x.data_ptr(), *[output.data_ptr() for output in outputs])


_QUANTISED = "Q8_0"
_MIN_POSITIONS = 64  # min positions of an attention graph
_MAX_MATMULS = 32  # max matmuls in one graph
_MAX_CACHED_MATMULS = 4096
_ALIGNMENT = 64
