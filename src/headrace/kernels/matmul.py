"""Choose and run the kernel for one product: packed rows at an address, times the activations' rows.

On two cores of an AMD EPYC ggml multiplies Q4_K at 40 to 48 giga-weights/s for one row (the memory's speed) and is bound by its
dot products from two rows on (4.8 at 16 rows); through tiles it reaches 10 at 16 rows and 0.56 at 512. Unpacking runs at 6.6,
torch's products in bf16 at 0.36 for 512 rows.
"""

import ctypes
import weakref
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple, TypeAlias

import torch

from headrace.checkpoint.tensor import block_of, row_bytes
from headrace.kernels import repack
from headrace.kernels.attention_graph import AttentionGraph, Heads, Positions
from headrace.kernels.expert_mlp import ExpertMlp, ExpertShapes
from headrace.kernels.fused_graph import FusedGraph
from headrace.kernels.ggml import takes_super_blocks
from headrace.kernels.ggml_graph import Cast, MatmulGraph, MatmulPointers, MatmulShape, RowFunction, Workers
from headrace.kernels.repack import Repacking
from headrace.kernels.thresholds import (
    ACTIVATION_ROWS,
    DECODE_MAX_ROWS,
    EXPERT_DECODE_MAX_ROWS,
    PRECISE_TYPES,
    TILE_ROWS,
)
from headrace.kernels.unpacking import ToHalf, unpack_slices
from headrace.kernels.weight_slice import WeightSlice

# Scratch for unpacked weights, which keeps torch's products wide; and the rows of them that oneDNN likes multiples of: with
# 292 of 14336 columns bf16 products ran at 348 GFLOP/s, with 256 at 401, with 512 at 418. With 16 MiB a prompt of 512 rows of an
# 8B shape took 14.9 to 17.8 s on a Xeon with AMX, with 8 MiB 12.6 to 15.4, with 4 MiB 17.0 to 18.9.
UNPACK_BYTES = 8 << 20
UNPACKED_ROWS = 256


class Kernels:
    """Runs products on `threads` cores. Owns ggml's graphs and the scratch for unpacked weights."""

    def __init__(
        self,
        threads: int,
        bf16_many_rows: bool = True,
        row_invariant: bool = True,
        tiled: Collection[str] = (),
        pad_decode_rows_to_tiles: bool = False,
    ):
        """What is fixed for all products.

        Args:
            threads: cores to use.
            bf16_many_rows: whether torch multiplies quantised weights in bf16 (fp32 sums, rounded to bf16) where rows are
                many; only done where the processor can.
            row_invariant: an exact row's result must not depend on the number of rows. Kernels that are faster for one
                row, or for many, break this in the last bits.
            tiled: the formats of which many rows go through ggml's tiles, in 8 bits, and not through torch.
            pad_decode_rows_to_tiles: how exact rows of these stay independent: all go through tiles, however few, instead of through
                dot products, however many.
        """
        self.threads = threads
        self.bf16_many_rows = bf16_many_rows and _multiplies_bf16()
        self.row_invariant = row_invariant
        self.tiled = frozenset(kind for kind in tiled if takes_super_blocks(kind))
        self.pad_decode_rows_to_tiles = pad_decode_rows_to_tiles
        self.repacking = Repacking()
        self._many_workers = self.decode_workers = Workers(threads, spin=False)
        self._matmul_graphs: dict[tuple[object, ...], MatmulGraph] = {}
        self._casts: dict[tuple[str, str, int, bool], Cast] = {}
        self._one_worker = Workers(1, spin=False)
        self._row_functions: dict[tuple[str, int, float, bool], RowFunction] = {}
        self._gated: dict[tuple[int, ExpertShapes, int], ExpertMlp] = {}
        self._attentions: dict[tuple[Heads, int, float], AttentionGraph] = {}
        self._fused_graphs: list[FusedGraph] = []
        self._scratch: torch.Tensor | None = None
        self._half: torch.Tensor | None = None  # unpacked weights
        self._to_half = ToHalf(threads)
        self._activations_half = _Prepared()
        self._activations_8 = _Prepared()
        self._padded_results = torch.empty(0)
        self._copies: list[torch.Tensor] = []
        self._cached_matmuls: dict[tuple[int, ...], _CachedMatmul] = {}
        self._last: tuple[MatmulGraph, list[MatmulPointers]] | None = (
            None  # all that the product in progress consists of
        )

    def spin(self) -> None:
        """From now on threads start at once on products of few rows. Before the first of them, and only if nothing is read."""
        if self.decode_workers is self._many_workers:
            self.decode_workers = Workers(self.threads, spin=True)

    def repack(self, weight_slice: WeightSlice, columns: int, in_place: bool = False) -> WeightSlice:
        """The same weight_slice with a repacked copy, where ggml has that layout for it. The copy lives as long as this.

        `in_place` overwrites the weight_slice: then all matmuls with it are row-invariant, those of prompts too.
        """
        if weight_slice.k_split_rows or not self.repacking.takes(weight_slice.type, weight_slice.rows):
            return weight_slice
        if in_place:
            self._overwrite(weight_slice, columns)
            return replace(weight_slice, repacked=weight_slice.address)
        copy = torch.empty(weight_slice.rows * row_bytes(weight_slice.type, columns) + _ALIGNMENT, dtype=torch.uint8)
        target = -(-copy.data_ptr() // _ALIGNMENT) * _ALIGNMENT
        self.repacking.copy(weight_slice.type, weight_slice.rows, columns, weight_slice.address, target)
        self._copies.append(copy)
        return replace(weight_slice, repacked=target)

    def _overwrite(self, weight_slice: WeightSlice, columns: int) -> None:
        stride = row_bytes(weight_slice.type, columns)
        step = max(repack.ROWS, _K_SPLIT_BYTES // stride // repack.ROWS * repack.ROWS)
        block = (ctypes.c_uint8 * (step * stride))()
        for first in range(0, weight_slice.rows, step):
            rows = min(step, weight_slice.rows - first)
            at = weight_slice.address + first * stride
            ctypes.memmove(block, at, rows * stride)
            self.repacking.copy(weight_slice.type, rows, columns, ctypes.addressof(block), at)

    def matmul(
        self,
        x: torch.Tensor,
        slices: Sequence[tuple[int, WeightSlice]],
        outputs: Sequence[torch.Tensor],
        invariant_rows: int | None = None,
        chunks: Sequence[int] = (),
    ) -> None:
        """For every (i, weight_slice), fill `outputs[i][:, first : first + rows]` with x times the weight_slice.

        Of a tensor in k_splits, slices are whole k_splits and come in order; each is added to what those before have given.

        Args:
            x: fp32 activations, contiguous, (rows, columns).
            slices: packed weights with that many columns, each with the index of its output. A tuple is taken for one that
                will come again: a product with a single row is remembered by it.
            outputs: fp32, contiguous, (rows, total rows of the tensor).
            invariant_rows: so many rows, from the first on, are computed independently of each other; None: all of them if
                they are few. The others may go through torch's products.
            chunks: rows of each prompt chunk after the exact rows; a result depends on its own chunk alone. Empty: the others
                are one chunk, or row_invariant if they are few.
        """
        called = None
        if type(slices) is tuple and x.shape[0] == 1:
            called = _called(x, slices, outputs)
            cached = self._cached_matmuls.get(called)
            if cached is not None and cached.slices is slices:
                cached.graph(cached.operands)
                return
        self._last = None
        self._multiply(x, slices, outputs, invariant_rows, chunks)
        if called is not None and self._last is not None and len(self._last[1]) == len(slices):
            if len(self._cached_matmuls) >= _MAX_CACHED_MATMULS:
                self._cached_matmuls.clear()
            self._cached_matmuls[called] = _CachedMatmul(slices, *self._last)

    def _multiply(
        self,
        x: torch.Tensor,
        slices: "_Slices",
        outputs: Sequence[torch.Tensor],
        invariant_rows: int | None,
        chunks: Sequence[int],
    ) -> None:
        if invariant_rows is None or (not chunks and x.shape[0] - invariant_rows <= DECODE_MAX_ROWS):
            invariant_rows = x.shape[0] if invariant_rows is not None or x.shape[0] <= DECODE_MAX_ROWS else 0
        if invariant_rows < x.shape[0]:
            repacked = [(i, weight_slice) for i, weight_slice in slices if weight_slice.repacked_in_place]
            if repacked:
                self._decode_rows(x, repacked, outputs)
            slices = [(i, weight_slice) for i, weight_slice in slices if not weight_slice.repacked_in_place]
            tiled, others = self._divide(slices, row_invariant=False)
            if tiled:
                self._tiles(x, range(invariant_rows, len(x)), tiled, outputs)
            for i, weight_slice in others:
                many = self._activations(x, invariant_rows, weight_slice.type)
                self._prefill_rows(many, weight_slice, outputs[i][invariant_rows:], chunks)
        if invariant_rows and slices:
            if self.pad_decode_rows_to_tiles if self.row_invariant else invariant_rows >= TILE_ROWS:
                tiled, slices = self._divide(slices, row_invariant=True)
                if tiled:
                    self._tiles(x, range(invariant_rows), tiled, outputs)
            if slices:
                self._decode_rows(x[:invariant_rows], slices, [output[:invariant_rows] for output in outputs])

    def _divide(self, slices: "_Slices", row_invariant: bool) -> tuple["_Slices", "_Slices"]:
        """(those that go through tiles, the others)."""
        tiled = [
            (i, p)
            for i, p in slices
            if p.type in self.tiled and not p.k_split_rows and not (row_invariant and p.repacked)
        ]
        return tiled, [pair for pair in slices if pair not in tiled] if tiled else slices

    def matmul_each(self, jobs: Sequence["ExpertMatmul"]) -> None:
        """As `multiply`, for slices that each have activations and an output of their own: those of experts."""
        dots: list[_Job] = []
        others: list[_Job] = []
        for x, weight_slice, output, invariant_rows, chunks in jobs:
            if weight_slice.k_split_rows:
                self.matmul(x, [(0, weight_slice)], [output], invariant_rows, chunks)
                continue
            if invariant_rows:
                (dots if self.row_invariant else others).append(
                    _job(x[:invariant_rows], weight_slice, output[:invariant_rows])
                )
            if not chunks:
                continue
            if weight_slice.type in self.tiled and x.shape[0] - invariant_rows >= TILE_ROWS:
                others.append(_job(x[invariant_rows:], weight_slice, output[invariant_rows:]))
            elif weight_slice.type in self.tiled:
                self._tiles(x, range(invariant_rows, x.shape[0]), [(0, weight_slice)], [output])
            else:
                many, first = [], invariant_rows
                for count in chunks:
                    part = slice(first, first + count)
                    if count <= EXPERT_DECODE_MAX_ROWS:
                        (dots if self.row_invariant else others).append(_job(x[part], weight_slice, output[part]))
                    else:
                        many.append(part)
                    first += count
                if many:
                    self._unpacked(self._activations(x, 0, weight_slice.type), weight_slice, output, many)
        for some, by_dots in ((dots, True), (others, False)):
            for start in range(0, len(some), _MOST_PARTS):
                self._run(some[start : start + _MOST_PARTS], by_dots)

    def expert_mlp(
        self, x: torch.Tensor, form: ExpertShapes, experts: Sequence[Sequence[int]], outputs: Sequence[int]
    ) -> None:
        """For one row the experts whose gate is SiLU.

        Args:
            x: fp32, contiguous, (1, columns).
            form: that all of the experts have.
            experts: of each the addresses of the slices that lead up to gate and up, then of those that lead down.
            outputs: for each expert the address of a row, in fp32.
        """
        key = x.shape[1], form, len(experts)
        graph = self._gated.get(key)
        if graph is None:
            graph = self._gated[key] = ExpertMlp(
                form, len(experts), x.shape[1], self.row_invariant, self.decode_workers, self.repacking
            )
        split = len(form.up)
        weights = [address for slices in experts for address in slices[:split]]
        weights += [address for slices in experts for address in slices[split:]]
        graph(x.data_ptr(), weights, outputs)

    def _decode_rows(
        self, x: torch.Tensor, slices: Sequence[tuple[int, WeightSlice]], outputs: Sequence[torch.Tensor]
    ) -> None:
        for i, weight_slice in slices:
            if weight_slice.k_split_rows:
                self._k_splits(x, weight_slice, outputs[i])
        whole = [(i, weight_slice) for i, weight_slice in slices if not weight_slice.k_split_rows]
        missing = -x.shape[0] % ACTIVATION_ROWS
        if missing and (self.row_invariant or x.shape[0] > 1) and any(p.repacked for _, p in whole):
            self._padded(x, missing, whole, outputs)
            self._last = None
        elif whole:
            self._last = self._run([_job(x, p, outputs[i], 4 * p.first) for i, p in whole], self.row_invariant)

    def _tiles(self, x: torch.Tensor, which: range, slices: "_Slices", outputs: Sequence[torch.Tensor]) -> None:
        """These rows of x, padded to as many as ggml takes for tiles."""
        rows = max(len(which), TILE_ROWS)
        pads = len(which) < rows  # then results lie apart first
        packed, x_stride = self._eight_bits(x, which, rows)
        sizes = [rows * p.rows if pads else 0 for _, p in slices]
        if self._padded_results.numel() < sum(sizes):
            self._padded_results = torch.empty(sum(sizes))
        padded = torch.split(self._padded_results[: sum(sizes)], sizes)
        jobs = []
        for (i, p), result in zip(slices, padded, strict=True):
            stride = 4 * (p.rows if pads else outputs[i].stride(0))
            to = result.data_ptr() if pads else outputs[i].data_ptr() + which.start * stride + 4 * p.first
            part = MatmulShape(p.type, p.rows, x.shape[1], _ROWS_8_BITS, x_stride, stride, repacked=False)
            jobs.append((part, MatmulPointers(p.address, packed, to, rows)))
        self._run(jobs, dots=False)
        if pads:
            for (i, p), result in zip(slices, padded, strict=True):
                outputs[i][which.start : which.stop, p.first : p.first + p.rows] = result.view(rows, -1)[: len(which)]

    def _eight_bits(self, x: torch.Tensor, which: range, rows: int) -> tuple[int, int]:
        """(address, bytes a row) of these rows of x as ggml's tiles take them, with room for `rows`."""
        columns = x.shape[1]
        stride = row_bytes(_ROWS_8_BITS, columns)
        kept = self._activations_8
        if not kept.are_of(x, which.start):
            buffer = kept.room(rows * stride, torch.uint8)
            cast = self._cast("F32", _ROWS_8_BITS, columns, len(which) > DECODE_MAX_ROWS)
            cast(x.data_ptr() + 4 * which.start * columns, buffer.data_ptr(), len(which))
            kept.keep(x, which.start, buffer)
        return kept.value.data_ptr(), stride

    def _run(self, jobs: Sequence["_Job"], dots: bool) -> tuple[MatmulGraph, list[MatmulPointers]]:
        """Compute products in one graph, kept by their shapes."""
        parts = tuple([part for part, _ in jobs])
        most_rows = 1 << (max([operands.rows for _, operands in jobs]) - 1).bit_length()
        key = (most_rows, dots, parts)
        graph = self._matmul_graphs.get(key)
        if graph is None:
            workers = self._many_workers if most_rows > DECODE_MAX_ROWS else self.decode_workers
            nbytes = sum([part.rows * row_bytes(part.type, part.columns) for part in parts])
            if nbytes * most_rows <= _OF_ONE and self.decode_workers is self._many_workers:  # none that spin
                workers = self._one_worker
            graph = self._matmul_graphs[key] = MatmulGraph(parts, most_rows, dots, workers, self.repacking)
        operands = [operands for _, operands in jobs]
        graph(operands)
        return graph, operands

    def _cast(self, source_type: str, target_type: str, columns: int, many: bool) -> Cast:
        key = (source_type, target_type, columns, many)
        cast = self._casts.get(key)
        if cast is None:
            workers = self._many_workers if many else self.decode_workers
            cast = self._casts[key] = Cast(source_type, target_type, columns, 1, workers)
        return cast

    def _k_splits(self, x: torch.Tensor, weight_slice: WeightSlice, output: torch.Tensor) -> None:
        """MatmulGraph with the slabs of a weight_slice, added up one after another: the sum does not depend on the cuts."""
        width = weight_slice.k_split_columns
        for index, slab in enumerate(weight_slice.k_splits()):
            number = weight_slice.first // weight_slice.k_split_rows + index
            part = output if number == 0 else torch.empty_like(output)
            self._run([_job(x[:, number * width : (number + 1) * width], slab, part)], self.row_invariant)
            if number:
                output += part

    def _padded(
        self, x: torch.Tensor, missing: int, slices: Sequence[tuple[int, WeightSlice]], outputs: Sequence[torch.Tensor]
    ) -> None:
        """Interleaved weights have one kernel for rows by the four and another for the rest: so no row is left over."""
        rows = x.shape[0]
        padded = [output.new_empty((rows + missing, output.shape[1])) for output in outputs]
        self._decode_rows(torch.cat([x, x.new_zeros((missing, x.shape[1]))]), slices, padded)
        for i, weight_slice in slices:
            part = slice(weight_slice.first, weight_slice.first + weight_slice.rows)
            outputs[i][:, part] = padded[i][:rows, part]

    def _prefill_rows(
        self, x: torch.Tensor, weight_slice: WeightSlice, output: torch.Tensor, chunks: Sequence[int]
    ) -> None:
        parts = [slice(last - count, last) for count, last in zip(chunks, accumulate(chunks), strict=True)]
        parts = parts or [slice(None)]
        if weight_slice.k_split_rows:
            width = weight_slice.k_split_columns
            for index, slab in enumerate(weight_slice.k_splits()):
                number = weight_slice.first // weight_slice.k_split_rows + index
                self._unpacked(x[:, number * width : (number + 1) * width], slab, output, parts, add=number > 0)
        else:
            self._unpacked(x, weight_slice, output, parts)

    def _unpacked(
        self,
        x: torch.Tensor,
        weight_slice: WeightSlice,
        output: torch.Tensor,
        parts: Sequence[slice],
        add: bool = False,
    ) -> None:
        """Unpack some rows of weights at a time and let torch multiply them: of x each of these parts by itself."""
        columns = x.shape[1]
        stride = row_bytes(weight_slice.type, columns)
        half = x.dtype == torch.bfloat16
        step = max(1, UNPACK_BYTES // (2 if half else 4) // columns)
        step = step // UNPACKED_ROWS * UNPACKED_ROWS or step
        for start in range(0, weight_slice.rows, step):
            rows = min(step, weight_slice.rows - start)
            plain = self.plain(weight_slice.type, weight_slice.address + start * stride, rows, columns, half)
            target = output[:, weight_slice.first + start : weight_slice.first + start + rows]
            for part in parts:
                product = torch.mm(x[part], plain.T)
                target[part].add_(product) if add else target[part].copy_(product)

    def _activations(self, x: torch.Tensor, first: int, type_name: str) -> torch.Tensor:
        """The rows of x from `first` on as torch multiplies them with such weights: in bf16 made once for all slices."""
        if not self.bf16_many_rows or type_name in PRECISE_TYPES:
            return x[first:]
        kept = self._activations_half
        if not kept.are_of(x, first):
            rows = kept.room((len(x) - first) * x.shape[1], torch.bfloat16).view(-1, x.shape[1])
            kept.keep(x, first, rows.copy_(x[first:]))
        return kept.value

    def plain(self, type_name: str, address: int, rows: int, columns: int, half: bool) -> torch.Tensor:
        """Packed rows at an address as (rows, columns), in fp32 or bf16. The result is scratch: valid until the next call."""
        if not half:
            return self.unpack(type_name, address, rows, columns)
        if type_name == "BF16":
            return _view(address, rows * columns * 2).view(torch.bfloat16).view(rows, columns)
        if self._half is None or self._half.numel() < rows * columns:
            self._half = torch.empty(rows * columns, dtype=torch.bfloat16)
        plain = self._half[: rows * columns].view(rows, columns)
        self._to_half(type_name, address, rows, columns, plain.data_ptr())
        return plain

    def unpack(self, type_name: str, address: int, rows: int, columns: int) -> torch.Tensor:
        """Packed rows at an address as fp32 (rows, columns). The result is scratch: valid until the next call."""
        if type_name == "F32":
            return _view(address, rows * columns * 4).view(torch.float32).view(rows, columns)
        if self._scratch is None or self._scratch.numel() < rows * columns:
            self._scratch = torch.empty(rows * columns, dtype=torch.float32)
        plain = self._scratch[: rows * columns].view(rows, columns)
        self._cast(type_name, "F32", columns, many=True)(address, plain.data_ptr(), rows)
        return plain

    def rms_norm(self, out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
        """Rows of x, each over the root of its mean square, times the weight.

        Args:
            out: fp32, contiguous, (rows, columns); it may be x.
            x: fp32, (rows, columns), the numbers of a row side by side.
            weight: fp32, (columns,).
            eps: added to the mean square.
        """
        self._row_function("rms_norm", x, eps)(x.data_ptr(), 4 * x.stride(0), len(x), out.data_ptr(), weight.data_ptr())

    def silu(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """x / (1 + exp(-x)) for rows as in `rms_norm`."""
        self._row_function("silu", x)(x.data_ptr(), 4 * x.stride(0), len(x), out.data_ptr())

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, out: torch.Tensor
    ) -> None:
        """Attention of one row over the positions of one sequence, all in fp32.

        Args:
            query: (heads, key width).
            keys: (kept heads, positions, key width), those of a head without a gap.
            values: (kept heads, positions, value width), as the keys.
            scale: of the scores.
            out: (heads, value width), contiguous.
        """
        count = keys.shape[1]
        heads = Heads(query.shape[0], keys.shape[0], keys.shape[2], values.shape[2])
        most = max(_LEAST_POSITIONS, 1 << (count - 1).bit_length())
        graph = self._attentions.get((heads, most, scale))
        if graph is None:
            graph = AttentionGraph(self.decode_workers, heads, most, scale, self.row_invariant)
            self._attentions[heads, most, scale] = graph
        places = [Positions(one.data_ptr(), 4 * one.stride(0)) for one in (keys, values)]
        graph(count, (query.data_ptr(), 4 * query.stride(0)), out.data_ptr(), *places)

    def _row_function(self, name: str, x: torch.Tensor, eps: float = 0.0) -> RowFunction:
        many = x.shape[0] > DECODE_MAX_ROWS
        key = name, x.shape[1], eps, many
        function = self._row_functions.get(key)
        if function is None:
            workers = self._many_workers if many else self._one_worker
            function = self._row_functions[key] = RowFunction(name, x.shape[1], workers, eps)
        return function

    def fused_graph(self, most: int) -> FusedGraph:
        """An empty one for at most so many operations. It lives as long as this."""
        graph = FusedGraph(self.decode_workers, most, self.repacking)
        self._fused_graphs.append(graph)
        return graph

    def quantise_q8(self, weight: torch.Tensor) -> tuple[WeightSlice, object]:
        """A matrix (rows, columns) in fp32 rounded to 8 bits, or as it is where its rows are not whole blocks; its owner."""
        rows, columns = weight.shape
        if columns % block_of(_SHORT)[0]:
            return WeightSlice("F32", rows, weight.data_ptr(), 0), weight
        packed = torch.empty((rows, row_bytes(_SHORT, columns)), dtype=torch.uint8)
        self._cast("F32", _SHORT, columns, many=True)(weight.data_ptr(), packed.data_ptr(), rows)
        return WeightSlice(_SHORT, rows, packed.data_ptr(), 0), packed

    def cached_matmul(
        self, x: torch.Tensor, slices: "_Slices", outputs: Sequence[torch.Tensor]
    ) -> "_CachedMatmul | None":
        """A product with one row that was done before."""
        cached = self._cached_matmuls.get(_called(x, slices, outputs))
        return cached if cached is not None and cached.slices is slices else None

    def unpack_all(self, slices: Sequence[tuple[int, WeightSlice]], outputs: Sequence[torch.Tensor]) -> None:
        """For every (i, weight_slice), fill its rows of `outputs[i]`, fp32 (rows of the tensor, columns), with the weights."""
        unpack_slices(self.unpack, slices, outputs)

    def release(self) -> None:
        """Give up the scratch for unpacked weights, until they are many again."""
        self._scratch = self._half = None
        self._padded_results = torch.empty(0)
        self._activations_half, self._activations_8 = _Prepared(), _Prepared()

    def close(self) -> None:
        """Free ggml's graphs and the copies."""
        small = (
            *self._casts.values(),
            *self._row_functions.values(),
            *self._gated.values(),
            *self._attentions.values(),
        )
        for graph in (*self._matmul_graphs.values(), *small, *self._fused_graphs):
            graph.close()
        self._matmul_graphs.clear()
        self._row_functions.clear()
        self._gated.clear()
        self._attentions.clear()
        self._fused_graphs.clear()
        self._cached_matmuls.clear()
        self._casts.clear()
        self.release()
        self._copies.clear()
        self.repacking.close()
        self._to_half.close()
        for workers in {self._one_worker, self.decode_workers, self._many_workers}:
            workers.close()


class ExpertMatmul(NamedTuple):
    """A product of an expert: x (rows, columns) times a weight_slice to output (rows, rows of the weight_slice), fp32, rows contiguous.

    As in `Kernels.multiply`, `invariant_rows` are computed independently, and those of a chunk depend on that chunk alone.
    """

    x: torch.Tensor
    weight_slice: WeightSlice
    output: torch.Tensor
    invariant_rows: int
    chunks: Sequence[int] = ()


class _CachedMatmul(NamedTuple):
    """A product that is done again with the same operands."""

    slices: "_Slices"
    graph: MatmulGraph
    operands: list[MatmulPointers]


def _called(x: torch.Tensor, slices: "_Slices", outputs: Sequence[torch.Tensor]) -> tuple[int, ...]:
    return (id(slices), x.data_ptr(), *[output.data_ptr() for output in outputs])


class _Prepared:
    """Activations in another format, made once for all slices that multiply them."""

    def __init__(self) -> None:
        self._source: weakref.ref[torch.Tensor] | None = None
        self._first = 0
        self._room = torch.empty(0)
        self.value = self._room

    def are_of(self, x: torch.Tensor, first: int) -> bool:
        """Whether they are those of x from this row on."""
        return self._source is not None and self._source() is x and self._first == first

    def room(self, numbers: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory for so many numbers, the same as the last time if it is large enough."""
        if self._room.numel() < numbers:
            self._source, self.value = None, torch.empty(0)
            self._room = torch.empty(numbers, dtype=dtype)
        return self._room[:numbers]

    def keep(self, x: torch.Tensor, first: int, value: torch.Tensor) -> None:
        """Remember what they were made of."""
        self._source, self._first, self.value = weakref.ref(x), first, value


def _job(x: torch.Tensor, weight_slice: WeightSlice, output: torch.Tensor, to: int = 0) -> "_Job":
    """x times the weight_slice to `output`, which begins so many bytes further."""
    rows = weight_slice.k_split_rows or weight_slice.rows
    part = MatmulShape(
        weight_slice.type,
        rows,
        x.shape[1],
        "F32",
        4 * x.stride(0),
        4 * output.stride(0),
        weight_slice.repacked is not None,
    )
    return part, MatmulPointers(
        weight_slice.repacked or weight_slice.address, x.data_ptr(), output.data_ptr() + to, x.shape[0]
    )


_Job: TypeAlias = tuple[MatmulShape, MatmulPointers]
_Slices: TypeAlias = Sequence[tuple[int, WeightSlice]]

_OF_ONE = 640 << 10  # bytes of weights times rows that one thread has multiplied before another wakes
_SHORT = "Q8_0"
_ROWS_8_BITS = "Q8_K"  # in which ggml's tiles take activations
_LEAST_POSITIONS = 64  # that a graph of attention is made for
_MOST_PARTS = 32  # products in one graph
_MAX_CACHED_MATMULS = 4096
_ALIGNMENT = 64
_K_SPLIT_BYTES = 1 << 20


def _multiplies_bf16() -> bool:
    """Whether oneDNN has products in bf16 here. Where it has none, torch's own take hundreds of times as long."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(torch._C._has_mkldnn and supported is not None and supported())


def _view(address: int, nbytes: int) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=torch.uint8)
