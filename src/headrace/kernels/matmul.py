"""Choose and run the kernel for one matmul: activations times packed weight rows at an address.

On two cores of an AMD EPYC ggml multiplies one row with Q4_K at 40 to 48 giga-weights/s (memory speed). From two rows on
its dot products are the limit (4.8 at 16 rows). The tile kernel reaches 10 at 16 rows and 0.56 at 512. Unpacking runs at 6.6,
torch's bf16 GEMM at 0.36 for 512 rows.
"""

import ctypes
import weakref
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple, TypeAlias

import torch

from headrace.checkpoint.tensor import block_of, row_bytes
from headrace.kernels import repack
from headrace.kernels.attention_graph import AttentionGraph, Heads, Positions
from headrace.kernels.expert_mlp import ExpertMlp, ExpertShapes
from headrace.kernels.fused_graph import FusedGraph
from headrace.kernels.ggml import tile_activations
from headrace.kernels.ggml_graph import Cast, MatmulGraph, MatmulPointers, MatmulShape, RowFunction, Workers
from headrace.kernels.repack import Repacking
from headrace.kernels.thresholds import (
    ACTIVATION_ROWS,
    DECODE_MAX_ROWS,
    EXPERT_DECODE_MAX_ROWS,
    PRECISE_TYPES,
    TILE_COLUMNS,
    TILE_ROWS,
    TILE_WEIGHT_ROWS,
)
from headrace.kernels.unpacking import ToHalf, unpack_slices
from headrace.kernels.weight_slice import WeightSlice

# Scratch for unpacked weights, which keeps torch's GEMMs wide. Time of a prompt of 512 rows, 8B shape, Xeon with AMX:
# 16 MiB: 14.9 to 17.8 s; 8 MiB: 12.6 to 15.4 s; 4 MiB: 17.0 to 18.9 s.
UNPACK_BYTES = 8 << 20
# Row multiple of unpacked weights that oneDNN prefers. Speed of bf16 GEMMs, rows of 14336 columns:
# 292: 348 GFLOP/s; 256: 401; 512: 418.
UNPACKED_ROWS = 256


class Kernels:
    """Runs matmuls on `threads` cores. Owns ggml's graphs and the scratch for unpacked weights."""

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
            bf16_prefill: torch multiplies quantised weights of prefill in bf16 (fp32 sums, rounded to bf16), where the
                processor can.
            row_invariant: the result of a decode row must not depend on the number of rows. Kernels that are faster for
                one row, or for many, break this in the last bits.
            tiled: formats whose prefill rows go through ggml's tile kernel, and not through torch. Quantised weights take
                activations in 8 bits there, floats in their own format.
            pad_decode_rows_to_tiles: for the formats in `tiled`, run row-invariant rows through the tile kernel (padded),
                instead of one dot product per row. Both are row-invariant but differ in the last bits.
        """
        self.threads = threads
        self.bf16_prefill = bf16_prefill and _multiplies_bf16()
        self.row_invariant = row_invariant
        activations = {kind: tile_activations(kind) for kind in tiled}
        self._tile_activations = {kind: found for kind, found in activations.items() if found is not None}
        self.pad_decode_rows_to_tiles = pad_decode_rows_to_tiles
        self.repacking = Repacking()
        self._prefill_workers = self.decode_workers = Workers(threads, spin=False)
        self._matmul_graphs: dict[tuple[object, ...], MatmulGraph] = {}
        self._casts: dict[tuple[str, str, int, bool], Cast] = {}
        self._one_worker = Workers(1, spin=False)
        self._row_functions: dict[tuple[str, int, float, bool], RowFunction] = {}
        self._expert_mlps: dict[tuple[int, ExpertShapes, int], ExpertMlp] = {}
        self._attentions: dict[tuple[Heads, int, float], AttentionGraph] = {}
        self._fused_graphs: list[FusedGraph] = []
        self._scratch: torch.Tensor | None = None
        self._half: torch.Tensor | None = None  # unpacked weights
        self._to_half = ToHalf(threads)
        self._activations_bf16 = _CachedActivations()
        self._activations_tiled: dict[str, _CachedActivations] = {}  # by their format
        self._padded_results = torch.empty(0)
        self._last_tiles: list[torch.Tensor] = []  # copies of weights, padded
        self._copies: list[torch.Tensor] = []
        self._cached_matmuls: dict[tuple[int, ...], _CachedMatmul] = {}
        # Graph and operands of the matmul in progress.
        self._last: tuple[MatmulGraph, list[MatmulPointers]] | None = None

    def spin(self) -> None:
        """From now on threads start at once on decode rows. Call before the first of them, and only if nothing is streamed."""
        if self.decode_workers is self._prefill_workers:
            self.decode_workers = Workers(self.threads, spin=True)

    def repack(self, weight_slice: WeightSlice, columns: int, in_place: bool = False) -> WeightSlice:
        """The same slice with a repacked copy, where ggml has that layout for it. The copy lives as long as this.

        `in_place` overwrites the slice: then all matmuls with it are row-invariant, those of prefill too.
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
        step = max(repack.ROWS, _REPACK_BYTES // stride // repack.ROWS * repack.ROWS)
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
        """For every (i, weight_slice), fill `outputs[i][:, first : first + rows]` with x times the slice.

        K-splits of a tensor are whole and come in order; each is added to the sum of those before.

        Args:
            x: fp32 activations, contiguous, (rows, columns).
            slices: packed weights with the columns of x, each with the index of its output. A tuple is
                assumed to come again: a matmul of a single row is cached by its identity.
            outputs: fp32, contiguous, (rows, total rows of the tensor).
            invariant_rows: number of rows, from the first on, computed independently of each other; None: all of them, up
                to `DECODE_MAX_ROWS`. The others may go through torch's GEMM.
            chunks: rows of each prompt chunk after the row-invariant rows; a result depends on its own chunk alone. Empty:
                the others are one chunk, or row-invariant up to `DECODE_MAX_ROWS`.
        """
        key = None
        if type(slices) is tuple and x.shape[0] == 1:
            key = _matmul_key(x, slices, outputs)
            cached = self._cached_matmuls.get(key)
            if cached is not None and cached.slices is slices:
                cached.graph(cached.operands)
                return
        self._last = None
        self._matmul(x, slices, outputs, invariant_rows, chunks)
        if key is not None and self._last is not None and len(self._last[1]) == len(slices):
            if len(self._cached_matmuls) >= _MAX_CACHED_MATMULS:
                self._cached_matmuls.clear()
            self._cached_matmuls[key] = _CachedMatmul(slices, *self._last)

    def _matmul(
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
            tiled, others = self._split_tiled(slices, x.shape[1], row_invariant=False)
            if tiled:
                self._tiles(x, range(invariant_rows, len(x)), tiled, outputs)
            for i, weight_slice in others:
                activations = self._activations(x, invariant_rows, weight_slice.type)
                self._prefill_rows(activations, weight_slice, outputs[i][invariant_rows:], chunks)
        if invariant_rows and slices:
            if self.pad_decode_rows_to_tiles if self.row_invariant else invariant_rows >= TILE_ROWS:
                tiled, slices = self._split_tiled(slices, x.shape[1], row_invariant=True)
                if tiled:
                    self._tiles(x, range(invariant_rows), tiled, outputs)
            if slices:
                self._decode_rows(x[:invariant_rows], slices, [output[:invariant_rows] for output in outputs])

    def has_tiles(self, type_name: str, columns: int) -> bool:
        """True if prefill rows go through the tile kernel, which is row-invariant."""
        return type_name in self._tile_activations and columns % TILE_COLUMNS == 0

    def _split_tiled(self, slices: "_Slices", columns: int, row_invariant: bool) -> tuple["_Slices", "_Slices"]:
        """(slices for the tile kernel, the others)."""
        tiled = [
            (i, p)
            for i, p in slices
            if self.has_tiles(p.type, columns) and not p.k_split_rows and not (row_invariant and p.repacked)
        ]
        return tiled, [pair for pair in slices if pair not in tiled] if tiled else slices

    def matmul_each(self, jobs: Sequence["ExpertMatmul"]) -> None:
        """Multiply experts: as `matmul`, but each slice has its own activations and output."""
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
            tiled = self.has_tiles(weight_slice.type, x.shape[1])
            if (
                tiled
                and self._tile_activations[weight_slice.type] == "Q8_K"
                and x.shape[0] - invariant_rows >= TILE_ROWS
            ):
                others.append(_job(x[invariant_rows:], weight_slice, output[invariant_rows:]))
            elif tiled:
                self._tiles(x, range(invariant_rows, x.shape[0]), [(0, weight_slice)], [output])
            else:
                unpacked, first = [], invariant_rows
                for count in chunks:
                    part = slice(first, first + count)
                    if count <= EXPERT_DECODE_MAX_ROWS:
                        (dots if self.row_invariant else others).append(_job(x[part], weight_slice, output[part]))
                    else:
                        unpacked.append(part)
                    first += count
                if unpacked:
                    self._unpacked(self._activations(x, 0, weight_slice.type), weight_slice, output, unpacked)
        for some, by_dots in ((dots, True), (others, False)):
            for start in range(0, len(some), _MAX_MATMULS):
                self._run(some[start : start + _MAX_MATMULS], by_dots)

    def expert_mlp(
        self, x: torch.Tensor, form: ExpertShapes, experts: Sequence[Sequence[int]], outputs: Sequence[int]
    ) -> None:
        """Compute experts whose gate is SiLU for one row.

        Args:
            x: fp32, contiguous, (1, columns).
            form: shapes of every expert.
            experts: for each expert the addresses of its gate_up_proj slices, then of its down_proj slices.
            outputs: for each expert the address of a row, in fp32.
        """
        key = x.shape[1], form, len(experts)
        graph = self._expert_mlps.get(key)
        if graph is None:
            graph = self._expert_mlps[key] = ExpertMlp(
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
        """Run these rows of x through the tile kernel, padded to at least `TILE_ROWS`."""
        self._last_tiles.clear()
        rows = max(len(which), TILE_ROWS)
        pads = len(which) < rows
        parts = [
            (output[which.start : which.stop, part.first : part.first + part.rows], part, rest)
            for output, p in ((outputs[i], p) for i, p in slices)
            for part, rest in self._whole_tiles(p, x.shape[1])
        ]
        # Results that are padded go to a buffer first.
        sizes = [rows * (part.rows + rest) if pads or rest else 0 for _, part, rest in parts]
        if self._padded_results.numel() < sum(sizes):
            self._padded_results = torch.empty(sum(sizes))
        padded = torch.split(self._padded_results[: sum(sizes)], sizes)
        jobs = []
        for (out, part, rest), buffer in zip(parts, padded, strict=True):
            activations = self._tile_activations[part.type]
            packed, x_stride = self._quantise_activations(x, which, rows, activations)
            weight_rows = part.rows + rest
            stride = 4 * (weight_rows if buffer.numel() else out.stride(0))
            to = (buffer if buffer.numel() else out).data_ptr()
            shape = MatmulShape(part.type, weight_rows, x.shape[1], activations, x_stride, stride, repacked=False)
            jobs.append((shape, MatmulPointers(part.address, packed, to, rows)))
        self._run(jobs, dots=False)
        for (out, part, _), buffer in zip(parts, padded, strict=True):
            if buffer.numel():
                out.copy_(buffer.view(rows, -1)[: len(which), : part.rows])
            scale = self._activations_tiled[self._tile_activations[part.type]].scale
            if scale is not None:
                out.mul_(scale)

    def _whole_tiles(self, p: WeightSlice, columns: int) -> Iterator[tuple[WeightSlice, int]]:
        """A slice in parts, each with its rows of padding: the kernel for floats takes multiples of `TILE_WEIGHT_ROWS`."""
        rest = p.rows % TILE_WEIGHT_ROWS if self._tile_activations[p.type] != "Q8_K" else 0
        if rest < p.rows:
            yield replace(p, rows=p.rows - rest), 0
        if rest:
            nbytes = rest * row_bytes(p.type, columns)
            last = torch.zeros(TILE_WEIGHT_ROWS * row_bytes(p.type, columns), dtype=torch.uint8)
            last[:nbytes] = _view(p.address + p.rows * row_bytes(p.type, columns) - nbytes, nbytes)
            self._last_tiles.append(last)
            first = p.first + p.rows - rest
            yield replace(p, rows=rest, first=first, address=last.data_ptr()), TILE_WEIGHT_ROWS - rest

    def _quantise_activations(self, x: torch.Tensor, which: range, rows: int, kind: str) -> tuple[int, int]:
        """(address, bytes per row) of these rows of x in a format of the tile kernel, in a buffer for `rows`."""
        columns = x.shape[1]
        stride = row_bytes(kind, columns)
        cached = self._activations_tiled.setdefault(kind, _CachedActivations())
        if not cached.are_of(x, which.start):
            buffer = cached.reserve(rows * stride, torch.uint8)
            part, scale = x[which.start : which.stop], None
            if kind == "F16" and not bool((largest := part.abs().amax(1, keepdim=True)).amax() <= _LARGEST_F16):
                # Rows beyond its range are divided by a power of two, and their results multiplied by it.
                scale = (largest / _LARGEST_F16).log2().ceil().clamp_min(0).exp2()
                part = part / scale
            cast = self._cast("F32", kind, columns, len(which) > DECODE_MAX_ROWS)
            cast(part.data_ptr(), buffer.data_ptr(), len(which))
            cached.keep(x, which.start, buffer)
            cached.scale = scale
        return cached.value.data_ptr(), stride

    def _run(self, jobs: Sequence["_Job"], dots: bool) -> tuple[MatmulGraph, list[MatmulPointers]]:
        """Compute matmuls in one graph, cached by their shapes."""
        parts = tuple([part for part, _ in jobs])
        most_rows = 1 << (max([operands.rows for _, operands in jobs]) - 1).bit_length()
        key = (most_rows, dots, parts)
        graph = self._matmul_graphs.get(key)
        if graph is None:
            workers = self._prefill_workers if most_rows > DECODE_MAX_ROWS else self.decode_workers
            nbytes = sum([part.rows * row_bytes(part.type, part.columns) for part in parts])
            if (
                nbytes * most_rows <= _SINGLE_THREAD_BYTES and self.decode_workers is self._prefill_workers
            ):  # no thread spins
                workers = self._one_worker
            graph = self._matmul_graphs[key] = MatmulGraph(parts, most_rows, dots, workers, self.repacking)
        operands = [operands for _, operands in jobs]
        graph(operands)
        return graph, operands

    def _cast(self, source_type: str, target_type: str, columns: int, many: bool) -> Cast:
        key = (source_type, target_type, columns, many)
        cast = self._casts.get(key)
        if cast is None:
            workers = self._prefill_workers if many else self.decode_workers
            cast = self._casts[key] = Cast(source_type, target_type, columns, 1, workers)
        return cast

    def _k_splits(self, x: torch.Tensor, weight_slice: WeightSlice, output: torch.Tensor) -> None:
        """Multiply with a slice's K-splits and add them up in order: the sum does not depend on where slices end."""
        width = weight_slice.k_split_columns
        for index, split in enumerate(weight_slice.k_splits()):
            number = weight_slice.first // weight_slice.k_split_rows + index
            part = output if number == 0 else torch.empty_like(output)
            self._run([_job(x[:, number * width : (number + 1) * width], split, part)], self.row_invariant)
            if number:
                output += part

    def _padded(
        self, x: torch.Tensor, missing: int, slices: Sequence[tuple[int, WeightSlice]], outputs: Sequence[torch.Tensor]
    ) -> None:
        """Pad the rows to a multiple of `ACTIVATION_ROWS`: repacked weights have another kernel for a remainder."""
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
            for index, split in enumerate(weight_slice.k_splits()):
                number = weight_slice.first // weight_slice.k_split_rows + index
                self._unpacked(x[:, number * width : (number + 1) * width], split, output, parts, add=number > 0)
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
        """Unpack some rows of weights at a time; torch multiplies them with each of these parts of x."""
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
                result = torch.mm(x[part], plain.T)
                target[part].add_(result) if add else target[part].copy_(result)

    def _activations(self, x: torch.Tensor, first: int, type_name: str) -> torch.Tensor:
        """The rows of x from `first` on in torch's format for these weights; bf16 is made once for all slices."""
        if not self.bf16_prefill or type_name in PRECISE_TYPES:
            return x[first:]
        cached = self._activations_bf16
        if not cached.are_of(x, first):
            rows = cached.reserve((len(x) - first) * x.shape[1], torch.bfloat16).view(-1, x.shape[1])
            cached.keep(x, first, rows.copy_(x[first:]))
        return cached.value

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
            x: fp32, (rows, columns), the elements of a row contiguous.
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
            query: (query heads, key width).
            keys: (KV heads, positions, key width), each head contiguous.
            values: (KV heads, positions, value width), as the keys.
            scale: scale of the scores.
            out: (query heads, value width), contiguous.
        """
        count = keys.shape[1]
        heads = Heads(query.shape[0], keys.shape[0], keys.shape[2], values.shape[2])
        most = max(_MIN_POSITIONS, 1 << (count - 1).bit_length())
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
            workers = self._prefill_workers if many else self._one_worker
            function = self._row_functions[key] = RowFunction(name, x.shape[1], workers, eps)
        return function

    def fused_graph(self, most: int) -> FusedGraph:
        """An empty graph for at most `most` operations. It lives as long as this."""
        graph = FusedGraph(self.decode_workers, most, self.repacking)
        self._fused_graphs.append(graph)
        return graph

    def quantise_q8(self, weight: torch.Tensor) -> tuple[WeightSlice, object]:
        """An fp32 matrix (rows, columns) in 8 bits, or unchanged where its rows are not whole blocks; its memory's owner."""
        rows, columns = weight.shape
        if columns % block_of(_QUANTISED)[0]:
            return WeightSlice("F32", rows, weight.data_ptr(), 0), weight
        packed = torch.empty((rows, row_bytes(_QUANTISED, columns)), dtype=torch.uint8)
        self._cast("F32", _QUANTISED, columns, many=True)(weight.data_ptr(), packed.data_ptr(), rows)
        return WeightSlice(_QUANTISED, rows, packed.data_ptr(), 0), packed

    def cached_matmul(
        self, x: torch.Tensor, slices: "_Slices", outputs: Sequence[torch.Tensor]
    ) -> "_CachedMatmul | None":
        """The cached matmul of one row with these operands, if there is one."""
        cached = self._cached_matmuls.get(_matmul_key(x, slices, outputs))
        return cached if cached is not None and cached.slices is slices else None

    def unpack_all(self, slices: Sequence[tuple[int, WeightSlice]], outputs: Sequence[torch.Tensor]) -> None:
        """For every (i, weight_slice), fill its rows of `outputs[i]`, fp32 (rows of the tensor, columns), with the weights."""
        unpack_slices(self.unpack, slices, outputs)

    def release(self) -> None:
        """Free the scratch for unpacked weights, until the next prefill."""
        self._scratch = self._half = None
        self._padded_results = torch.empty(0)
        self._activations_bf16 = _CachedActivations()
        self._activations_tiled.clear()
        self._last_tiles.clear()

    def close(self) -> None:
        """Free ggml's graphs and the copies."""
        small = (
            *self._casts.values(),
            *self._row_functions.values(),
            *self._expert_mlps.values(),
            *self._attentions.values(),
        )
        for graph in (*self._matmul_graphs.values(), *small, *self._fused_graphs):
            graph.close()
        self._matmul_graphs.clear()
        self._row_functions.clear()
        self._expert_mlps.clear()
        self._attentions.clear()
        self._fused_graphs.clear()
        self._cached_matmuls.clear()
        self._casts.clear()
        self.release()
        self._copies.clear()
        self.repacking.close()
        self._to_half.close()
        for workers in {self._one_worker, self.decode_workers, self._prefill_workers}:
            workers.close()


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


class _CachedMatmul(NamedTuple):
    """A matmul that is repeated with the same operands."""

    slices: "_Slices"
    graph: MatmulGraph
    operands: list[MatmulPointers]


def _matmul_key(x: torch.Tensor, slices: "_Slices", outputs: Sequence[torch.Tensor]) -> tuple[int, ...]:
    return (id(slices), x.data_ptr(), *[output.data_ptr() for output in outputs])


class _CachedActivations:
    """Activations in another format, made once for all slices that multiply them."""

    def __init__(self) -> None:
        self._source: weakref.ref[torch.Tensor] | None = None
        self._first = 0
        self._buffer = torch.empty(0)
        self.value = self._buffer
        self.scale: torch.Tensor | None = None  # (rows, 1): factors that rows were divided by; None: all 1

    def are_of(self, x: torch.Tensor, first: int) -> bool:
        """True if these are the rows of x from `first` on."""
        return self._source is not None and self._source() is x and self._first == first

    def reserve(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """A buffer for `elements`, the same as the last time if it is large enough."""
        if self._buffer.numel() < elements:
            self._source, self.value = None, torch.empty(0)
            self._buffer = torch.empty(elements, dtype=dtype)
        return self._buffer[:elements]

    def keep(self, x: torch.Tensor, first: int, value: torch.Tensor) -> None:
        """Remember the source of these rows."""
        self._source, self._first, self.value = weakref.ref(x), first, value


def _job(x: torch.Tensor, weight_slice: WeightSlice, output: torch.Tensor, to: int = 0) -> "_Job":
    """The matmul of x and a slice, to the address of `output` plus `to` bytes."""
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

_SINGLE_THREAD_BYTES = 640 << 10  # max bytes of weights times rows for one thread: it ends before another wakes
_QUANTISED = "Q8_0"
_LARGEST_F16 = 65504.0
_MIN_POSITIONS = 64  # min positions of an attention graph
_MAX_MATMULS = 32  # max matmuls in one graph
_MAX_CACHED_MATMULS = 4096
_ALIGNMENT = 64
_REPACK_BYTES = 1 << 20


def _multiplies_bf16() -> bool:
    """True if oneDNN has bf16 matmuls here. Where it has none, torch's own take hundreds of times as long."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(torch._C._has_mkldnn and supported is not None and supported())


def _view(address: int, nbytes: int) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=torch.uint8)
