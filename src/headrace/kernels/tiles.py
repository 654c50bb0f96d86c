"""ggml's tile kernel: it takes several rows of activations and of weights at once, and is row-invariant.

It adds up in another order than the dot products do. Quantised weights take activations in 8 bits, floats in their own format.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import torch

from headrace.checkpoint.tensor import row_bytes
from headrace.kernels.cached_activations import CachedActivations
from headrace.kernels.ggml import tile_activations
from headrace.kernels.ggml_graph import MatmulPointers, MatmulShape
from headrace.kernels.graph_cache import GraphCache, Slices
from headrace.kernels.thresholds import DECODE_MAX_ROWS, TILE_COLUMNS, TILE_ROWS, TILE_WEIGHT_ROWS
from headrace.kernels.unpacking import view_of
from headrace.kernels.weight_slice import WeightSlice

_LARGEST_F16 = 65504.0


class TileMatmul:
    """Matmuls by the tile kernel, in the formats that measured faster with it."""

    def __init__(self, graphs: GraphCache, tiled: Collection[str]):
        found = {kind: tile_activations(kind) for kind in tiled}
        self.activations = {kind: one for kind, one in found.items() if one is not None}  # their format
        self._graphs = graphs
        self._cached: dict[str, CachedActivations] = {}  # by their format
        self._padded_results = torch.empty(0)
        self._last_tiles: list[torch.Tensor] = []  # copies of weights, padded

    def takes(self, type_name: str, columns: int) -> bool:
        """True if prefill rows go through the tile kernel."""
        return type_name in self.activations and columns % TILE_COLUMNS == 0

    def split(self, slices: Slices, columns: int, row_invariant: bool) -> tuple[Slices, Slices]:
        """(slices for the tile kernel, the others)."""
        tiled = [
            (i, p)
            for i, p in slices
            if self.takes(p.type, columns) and not p.k_split_rows and not (row_invariant and p.repacked)
        ]
        return tiled, [pair for pair in slices if pair not in tiled] if tiled else slices

    def multiply(self, x: torch.Tensor, chosen: range, slices: Slices, outputs: Sequence[torch.Tensor]) -> None:
        """Run these rows of x through the tile kernel, padded to at least `TILE_ROWS`."""
        self._last_tiles.clear()
        rows = max(len(chosen), TILE_ROWS)
        pads = len(chosen) < rows
        parts = [
            (output[chosen.start : chosen.stop, part.first : part.first + part.rows], part, rest)
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
            activations = self.activations[part.type]
            packed, x_stride = self._convert_activations(x, chosen, rows, activations)
            weight_rows = part.rows + rest
            stride = 4 * (weight_rows if buffer.numel() else out.stride(0))
            to = (buffer if buffer.numel() else out).data_ptr()
            shape = MatmulShape(part.type, weight_rows, x.shape[1], activations, x_stride, stride, repacked=False)
            jobs.append((shape, MatmulPointers(part.address, packed, to, rows)))
        self._graphs.run(jobs, dots=False)
        for (out, part, _), buffer in zip(parts, padded, strict=True):
            if buffer.numel():
                out.copy_(buffer.view(rows, -1)[: len(chosen), : part.rows])
            scale = self._cached[self.activations[part.type]].scale
            if scale is not None:
                out.mul_(scale)

    def _whole_tiles(self, p: WeightSlice, columns: int) -> Iterator[tuple[WeightSlice, int]]:
        """A slice in parts, each with its rows of padding: the kernel for floats takes multiples of `TILE_WEIGHT_ROWS`."""
        rest = p.rows % TILE_WEIGHT_ROWS if self.activations[p.type] != "Q8_K" else 0
        if rest < p.rows:
            yield replace(p, rows=p.rows - rest), 0
        if rest:
            nbytes = rest * row_bytes(p.type, columns)
            last = torch.zeros(TILE_WEIGHT_ROWS * row_bytes(p.type, columns), dtype=torch.uint8)
            last[:nbytes] = view_of(p.address + p.rows * row_bytes(p.type, columns) - nbytes, nbytes)
            self._last_tiles.append(last)
            first = p.first + p.rows - rest
            yield replace(p, rows=rest, first=first, address=last.data_ptr()), TILE_WEIGHT_ROWS - rest

    def _convert_activations(self, x: torch.Tensor, chosen: range, rows: int, kind: str) -> tuple[int, int]:
        """(address, bytes per row) of these rows of x in a format of the tile kernel, in a buffer for `rows`."""
        columns = x.shape[1]
        stride = row_bytes(kind, columns)
        cached = self._cached.setdefault(kind, CachedActivations())
        if not cached.are_of(x, chosen.start):
            buffer = cached.reserve(rows * stride, torch.uint8)
            part, scale = x[chosen.start : chosen.stop], None
            if kind == "F16" and not bool((largest := part.abs().amax(1, keepdim=True)).amax() <= _LARGEST_F16):
                # Rows beyond its range are divided by a power of two, and their results multiplied by it.
                scale = (largest / _LARGEST_F16).log2().ceil().clamp_min(0).exp2()
                part = part / scale
            cast = self._graphs.cast("F32", kind, columns, len(chosen) > DECODE_MAX_ROWS)
            cast(part.data_ptr(), buffer.data_ptr(), len(chosen))
            cached.keep(x, chosen.start, buffer)
            cached.scale = scale
        return cached.value.data_ptr(), stride

    def release(self) -> None:
        """Free buffers until the next prefill."""
        self._padded_results = torch.empty(0)
        self._cached.clear()
        self._last_tiles.clear()
