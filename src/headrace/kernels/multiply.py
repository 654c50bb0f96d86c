"""Choose and run the kernel for one product: packed rows at an address, times the activations' rows.

Limits on the machine of docs/benchmarks.md: ggml reads Q4_K at 17 giga-weights/s for one row (25 interleaved) and is bound
by its dot products from two rows on (3.5 at 16 rows, 8 interleaved); unpacking runs at 6.6, torch's bf16 tile products at
1.1 giga-weights/s for 512 rows.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import replace

import torch

from headrace.checkpoint.tensor import block_of
from headrace.kernels import interleaved
from headrace.kernels.ggml_graph import Part, Products, Unpack, Workspace
from headrace.kernels.interleaved import ACTIVATION_ROWS, Interleaving
from headrace.kernels.limits import FEW_ROWS, PRECISE_TYPES
from headrace.kernels.piece import Piece

# Weights unpacked at a time: 16 MiB of fp32, which keeps torch's products wide and the scratch small.
UNPACK_WEIGHTS = 4 << 20


class Kernels:
    """Runs products on `threads` cores. Owns ggml's graphs and the scratch for unpacked weights."""

    def __init__(self, threads: int, bf16_many_rows: bool = True, row_invariant: bool = True):
        """What is fixed for all products.

        Args:
            threads: cores to use.
            bf16_many_rows: whether torch multiplies quantised weights in bf16 (with fp32 sums) where rows are many.
            row_invariant: a row's result must not depend on the rows beside it. Only interleaved weights have a faster
                kernel for a single row that breaks this, in the last bits.
        """
        self.threads = threads
        self.bf16_many_rows = bf16_many_rows
        self.row_invariant = row_invariant
        self.interleaving = Interleaving()
        self._workspace = Workspace()
        self._products: dict[tuple[object, ...], Products] = {}
        self._unpacks: dict[tuple[str, int, int], Unpack] = {}
        self._scratch: torch.Tensor | None = None
        self._copies: list[torch.Tensor] = []

    def interleave(self, piece: Piece, columns: int, in_place: bool = False) -> Piece:
        """The same piece with an interleaved copy, where ggml has that layout for it. The copy lives as long as this.

        `in_place` overwrites the piece: then all products with it are exact, those of prompts too.
        """
        if not self.interleaving.takes(piece.type, piece.rows):
            return piece
        if in_place:
            self._overwrite(piece, columns)
            return replace(piece, interleaved=piece.address)
        block, size = block_of(piece.type)
        copy = torch.empty(piece.rows * columns // block * size + _ALIGNMENT, dtype=torch.uint8)
        target = -(-copy.data_ptr() // _ALIGNMENT) * _ALIGNMENT
        self.interleaving.copy(piece.type, piece.rows, columns, piece.address, target)
        self._copies.append(copy)
        return replace(piece, interleaved=target)

    def _overwrite(self, piece: Piece, columns: int) -> None:
        block, size = block_of(piece.type)
        row_bytes = columns // block * size
        step = max(interleaved.ROWS, _SLAB_BYTES // row_bytes // interleaved.ROWS * interleaved.ROWS)
        slab = (ctypes.c_uint8 * (step * row_bytes))()
        for first in range(0, piece.rows, step):
            rows = min(step, piece.rows - first)
            at = piece.address + first * row_bytes
            ctypes.memmove(slab, at, rows * row_bytes)
            self.interleaving.copy(piece.type, rows, columns, ctypes.addressof(slab), at)

    def multiply(
        self,
        x: torch.Tensor,
        pieces: Sequence[tuple[int, Piece]],
        outputs: Sequence[torch.Tensor],
        exact_rows: int | None = None,
    ) -> None:
        """For every (i, piece), fill `outputs[i][:, first : first + rows]` with x times the piece.

        Args:
            x: fp32 activations, contiguous, (rows, columns).
            pieces: packed weights with that many columns, each with the index of its output.
            outputs: fp32, contiguous, (rows, total rows of the tensor).
            exact_rows: so many rows, from the first on, are computed independently of each other; None: all of them if
                they are few. The others may go through torch's products.
        """
        if exact_rows is None or x.shape[0] - exact_rows <= FEW_ROWS:
            exact_rows = x.shape[0] if exact_rows is not None or x.shape[0] <= FEW_ROWS else 0
        if exact_rows < x.shape[0]:
            woven = [(i, piece) for i, piece in pieces if piece.only_interleaved]
            if woven:
                self._few_rows(x, woven, outputs)
            pieces = [(i, piece) for i, piece in pieces if not piece.only_interleaved]
            for i, piece in pieces:
                self._many_rows(x[exact_rows:], piece, outputs[i][exact_rows:])
        if exact_rows and pieces:
            self._few_rows(x[:exact_rows], pieces, [output[:exact_rows] for output in outputs])

    def _few_rows(self, x: torch.Tensor, pieces: Sequence[tuple[int, Piece]], outputs: Sequence[torch.Tensor]) -> None:
        missing = -x.shape[0] % ACTIVATION_ROWS
        if missing and (self.row_invariant or x.shape[0] > 1) and any(p.interleaved for _, p in pieces):
            self._padded(x, missing, pieces, outputs)
            return
        rows, columns = x.shape
        parts = tuple([Part(p.type, p.rows, 4 * outputs[i].shape[1], p.interleaved is not None) for i, p in pieces])
        most_rows = 1 << (rows - 1).bit_length()
        key = (columns, most_rows, parts)
        graph = self._products.get(key)
        if graph is None:
            graph = self._products[key] = Products(
                parts, columns, most_rows, self.threads, self._workspace, self.interleaving
            )
        addresses = [(p.interleaved or p.address, outputs[i].data_ptr() + 4 * p.first) for i, p in pieces]
        graph(x.data_ptr(), rows, addresses)

    def _padded(
        self, x: torch.Tensor, missing: int, pieces: Sequence[tuple[int, Piece]], outputs: Sequence[torch.Tensor]
    ) -> None:
        """Interleaved weights have one kernel for rows by the four and another for the rest: so no row is left over."""
        rows = x.shape[0]
        padded = [output.new_empty((rows + missing, output.shape[1])) for output in outputs]
        self._few_rows(torch.cat([x, x.new_zeros((missing, x.shape[1]))]), pieces, padded)
        for i, piece in pieces:
            part = slice(piece.first, piece.first + piece.rows)
            outputs[i][:, part] = padded[i][:rows, part]

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
            graph = self._unpacks[type_name, rows, columns] = Unpack(
                type_name, columns, rows, self.threads, self._workspace
            )
        graph(address, plain.data_ptr())
        return plain

    def close(self) -> None:
        """Free ggml's graphs and the copies."""
        for graph in (*self._products.values(), *self._unpacks.values()):
            graph.close()
        self._products.clear()
        self._unpacks.clear()
        self._scratch = None
        self._copies.clear()
        self.interleaving.close()


_ALIGNMENT = 64
_SLAB_BYTES = 1 << 20


def _view(address: int, nbytes: int) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=torch.uint8)
