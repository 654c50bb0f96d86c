"""Prefill through torch: some rows of weights are unpacked at a time and multiplied with each chunk. Not row-invariant."""

from collections.abc import Sequence
from itertools import accumulate

import torch

from headrace.checkpoint.tensor import row_bytes
from headrace.kernels.cached_activations import CachedActivations
from headrace.kernels.graph_cache import GraphCache
from headrace.kernels.thresholds import PRECISE_TYPES
from headrace.kernels.unpacking import ToBf16, view_of
from headrace.kernels.weight_slice import WeightSlice
from headrace.torch_compat import multiplies_bf16

# Scratch for unpacked weights, which keeps torch's GEMMs wide. Time of a prompt of 512 rows, 8B shape, Xeon with AMX:
# 16 MiB: 14.9 to 17.8 s; 8 MiB: 12.6 to 15.4 s; 4 MiB: 17.0 to 18.9 s.
UNPACK_BYTES = 8 << 20
# Row multiple of unpacked weights that oneDNN prefers. Speed of bf16 GEMMs, rows of 14336 columns:
# 292: 348 GFLOP/s; 256: 401; 512: 418.
UNPACKED_ROWS = 256


class PrefillGemm:
    """Unpacks weights to fp32 or bf16, and multiplies them with torch."""

    def __init__(self, graphs: GraphCache, threads: int, bf16: bool):
        """`bf16`: multiply quantised weights in bf16 (fp32 sums, rounded to bf16), where the processor can."""
        self.uses_bf16 = bf16 and multiplies_bf16()
        self._graphs = graphs
        self._scratch: torch.Tensor | None = None
        self._half: torch.Tensor | None = None  # unpacked weights
        self._to_bf16 = ToBf16(threads)
        self._cached = CachedActivations()

    def multiply(self, x: torch.Tensor, weight_slice: WeightSlice, output: torch.Tensor, chunks: Sequence[int]) -> None:
        """Fill the columns of a slice in the output: each chunk by itself; without chunks, all rows together."""
        parts = [slice(last - count, last) for count, last in zip(chunks, accumulate(chunks), strict=True)]
        parts = parts or [slice(None)]
        if weight_slice.k_split_rows:
            width = weight_slice.k_split_columns
            for index, split in enumerate(weight_slice.k_splits()):
                number = weight_slice.first // weight_slice.k_split_rows + index
                self.multiply_parts(x[:, number * width : (number + 1) * width], split, output, parts, add=number > 0)
        else:
            self.multiply_parts(x, weight_slice, output, parts)

    def multiply_parts(
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

    def activations(self, x: torch.Tensor, first: int, type_name: str) -> torch.Tensor:
        """The rows of x from `first` on in torch's format for these weights; bf16 is made once for all slices."""
        if not self.uses_bf16 or type_name in PRECISE_TYPES:
            return x[first:]
        cached = self._cached
        if not cached.are_of(x, first):
            rows = cached.reserve((len(x) - first) * x.shape[1], torch.bfloat16).view(-1, x.shape[1])
            cached.keep(x, first, rows.copy_(x[first:]))
        return cached.value

    def plain(self, type_name: str, address: int, rows: int, columns: int, half: bool) -> torch.Tensor:
        """Packed rows at an address as (rows, columns), in fp32 or bf16. The result is scratch: valid until the next call."""
        if not half:
            return self.unpack(type_name, address, rows, columns)
        if type_name == "BF16":
            return view_of(address, rows * columns * 2).view(torch.bfloat16).view(rows, columns)
        if self._half is None or self._half.numel() < rows * columns:
            self._half = torch.empty(rows * columns, dtype=torch.bfloat16)
        plain = self._half[: rows * columns].view(rows, columns)
        self._to_bf16(type_name, address, rows, columns, plain.data_ptr())
        return plain

    def unpack(self, type_name: str, address: int, rows: int, columns: int) -> torch.Tensor:
        """Packed rows at an address as fp32 (rows, columns). The result is scratch: valid until the next call."""
        if type_name == "F32":
            return view_of(address, rows * columns * 4).view(torch.float32).view(rows, columns)
        if self._scratch is None or self._scratch.numel() < rows * columns:
            self._scratch = torch.empty(rows * columns, dtype=torch.float32)
        plain = self._scratch[: rows * columns].view(rows, columns)
        self._graphs.cast(type_name, "F32", columns, many=True)(address, plain.data_ptr(), rows)
        return plain

    def release(self) -> None:
        """Free the scratch until the next prefill."""
        self._scratch = self._half = None
        self._cached = CachedActivations()

    def close(self) -> None:
        """Free everything."""
        self.release()
        self._to_bf16.close()
