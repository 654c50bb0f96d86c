"""Dequantise packed weights: to bf16 for prefill matmuls, and to each slice's place in its matrix."""

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from headrace.checkpoint.tensor import row_bytes
from headrace.kernels.ggml import library, type_number
from headrace.kernels.weight_slice import WeightSlice

# Weights that a thread unpacks to fp32 and then rounds: half a MiB, which stays in its core's cache. Two cores of a Xeon unpack
# 5.0 giga-weights/s of Q4_K, 3.3 with a quarter of it, 3.8 with twice as many. ggml's graphs and torch reach 1.1.
CACHED_WEIGHTS = 128 << 10


class ToBf16:
    """Unpacks rows to bf16 on several threads, rounding to the nearest even."""

    def __init__(self, threads: int):
        self._ggml = library()
        self._scratch = [torch.empty(0) for _ in range(threads)]  # one buffer per thread
        self._pool = ThreadPoolExecutor(max(1, threads - 1), "headrace-unpack")

    def __call__(self, type_name: str, address: int, rows: int, columns: int, target: int) -> None:
        """Write the packed rows at `address` to `target`."""
        share = -(-rows // len(self._scratch))
        others = [
            self._pool.submit(
                self._unpack_range, number, type_name, address, range(first, min(first + share, rows)), columns, target
            )
            for number, first in enumerate(range(share, rows, share), 1)
        ]
        try:
            self._unpack_range(0, type_name, address, range(min(share, rows)), columns, target)
        finally:  # no thread may write to `target` after the return
            for other in others:
                other.result()

    def _unpack_range(
        self, thread: int, type_name: str, address: int, some_rows: range, columns: int, target: int
    ) -> None:
        to_float = self._ggml.ggml_get_type_traits(type_number(type_name)).contents.to_float
        round_off = self._ggml.ggml_cpu_fp32_to_bf16
        stride = row_bytes(type_name, columns)
        step = max(1, CACHED_WEIGHTS // columns)
        if self._scratch[thread].numel() < step * columns:
            self._scratch[thread] = torch.empty(step * columns)
        plain = self._scratch[thread].data_ptr()
        for first in range(some_rows.start, some_rows.stop, step):
            count = min(step, some_rows.stop - first) * columns
            to_float(address + first * stride, plain, count)
            round_off(plain, target + 2 * first * columns, count)

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown()


def view_of(address: int, nbytes: int) -> torch.Tensor:
    """Bytes at an address."""
    return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=torch.uint8)


def unpack_slices(
    unpack: Callable[[str, int, int, int], torch.Tensor],
    slices: Sequence[tuple[int, WeightSlice]],
    outputs: Sequence[torch.Tensor],
) -> None:
    """For every (i, weight_slice), fill its part of `outputs[i]` (rows, columns) by `unpack` (type, address, rows, columns)."""
    for i, weight_slice in slices:
        if weight_slice.k_split_rows:
            width = weight_slice.k_split_columns
            for number, split in enumerate(weight_slice.k_splits(), weight_slice.first // weight_slice.k_split_rows):
                outputs[i][:, number * width : (number + 1) * width] = unpack(
                    split.type, split.address, split.rows, width
                )
        else:
            plain = unpack(weight_slice.type, weight_slice.address, weight_slice.rows, outputs[i].shape[1])
            outputs[i][weight_slice.first : weight_slice.first + weight_slice.rows] = plain
