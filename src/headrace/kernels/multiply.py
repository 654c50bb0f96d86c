"""Choose and run the kernel for one product: packed rows at an address, times the activations' rows.

Limits on the machine of docs/benchmarks.md: ggml reads Q4_K at 17 GB/s for one row and is bound by its dot products from
two rows on; unpacking runs at 6.6, torch's bf16 tile products at 1.1 giga-weights/s for 512 rows.
"""

import ctypes
from collections.abc import Sequence

import torch

from headrace.checkpoint.gguf import block_of
from headrace.kernels.ggml_graph import Products, Unpack
from headrace.kernels.limits import FEW_ROWS, PRECISE_TYPES
from headrace.kernels.piece import Piece

# Weights unpacked at a time: 16 MiB of fp32, which keeps torch's products wide and the scratch small.
UNPACK_WEIGHTS = 4 << 20


class Kernels:
    """Runs products on `threads` cores. Owns ggml's graphs and the scratch for unpacked weights."""

    def __init__(self, threads: int, bf16_many_rows: bool = True):
        """`bf16_many_rows`: whether torch multiplies quantised weights in bf16 (with fp32 sums) from FEW_ROWS on."""
        self.threads = threads
        self.bf16_many_rows = bf16_many_rows
        self._products: dict[tuple[object, ...], Products] = {}
        self._unpacks: dict[tuple[str, int, int], Unpack] = {}
        self._scratch: torch.Tensor | None = None

    def multiply(self, x: torch.Tensor, pieces: Sequence[tuple[int, Piece]], outputs: Sequence[torch.Tensor]) -> None:
        """For every (i, piece), fill `outputs[i][:, first : first + rows]` with x times the piece.

        Args:
            x: fp32 activations, contiguous, (rows, columns).
            pieces: packed weights with that many columns, each with the index of its output.
            outputs: fp32, contiguous, (rows, total rows of the tensor).
        """
        if x.shape[0] <= FEW_ROWS:
            self._few_rows(x, pieces, outputs)
            return
        for i, piece in pieces:
            self._many_rows(x, piece, outputs[i])

    def _few_rows(self, x: torch.Tensor, pieces: Sequence[tuple[int, Piece]], outputs: Sequence[torch.Tensor]) -> None:
        parts = tuple([(piece.type, piece.rows, 4 * outputs[i].shape[1]) for i, piece in pieces])
        key = (x.shape, parts)
        graph = self._products.get(key)
        if graph is None:
            graph = self._products[key] = Products(parts, x.shape[1], x.shape[0], self.threads)
        graph(x.data_ptr(), [(piece.address, outputs[i].data_ptr() + 4 * piece.first) for i, piece in pieces])

    def _many_rows(self, x: torch.Tensor, piece: Piece, output: torch.Tensor) -> None:
        columns = x.shape[1]
        block, size = block_of(piece.type)
        row_bytes = columns // block * size
        step = max(1, UNPACK_WEIGHTS // columns)
        for start in range(0, piece.rows, step):
            rows = min(step, piece.rows - start)
            plain = self.unpack(piece.type, piece.address + start * row_bytes, rows, columns)
            self._torch_product(x, plain, piece.type, output[:, piece.first + start : piece.first + start + rows])

    def _torch_product(self, x: torch.Tensor, plain: torch.Tensor, type_name: str, output: torch.Tensor) -> None:
        precision = "bf16" if self.bf16_many_rows and type_name not in PRECISE_TYPES else "ieee"
        matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        before = matmul.fp32_precision
        matmul.fp32_precision = precision
        try:
            output.copy_(torch.mm(x, plain.T))
        finally:
            matmul.fp32_precision = before

    def unpack(self, type_name: str, address: int, rows: int, columns: int) -> torch.Tensor:
        """Packed rows at an address as fp32 (rows, columns). The result is scratch: valid until the next call."""
        if type_name == "F32":
            return _view(address, rows * columns * 4).view(torch.float32).view(rows, columns)
        if self._scratch is None or self._scratch.numel() < rows * columns:
            self._scratch = torch.empty(max(UNPACK_WEIGHTS, rows * columns), dtype=torch.float32)
        plain = self._scratch[: rows * columns].view(rows, columns)
        graph = self._unpacks.get((type_name, rows, columns))
        if graph is None:
            graph = self._unpacks[type_name, rows, columns] = Unpack(type_name, columns, rows, self.threads)
        graph(address, plain.data_ptr())
        return plain

    def close(self) -> None:
        """Free ggml's graphs."""
        for graph in (*self._products.values(), *self._unpacks.values()):
            graph.close()
        self._products.clear()
        self._unpacks.clear()
        self._scratch = None


def _view(address: int, nbytes: int) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=torch.uint8)
