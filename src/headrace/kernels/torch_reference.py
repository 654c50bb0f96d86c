"""The reference implementation: the same matmuls through the `gguf` package's own dequantisation and torch.

It shares nothing with ggml. Tests compare the fast kernels with it. It runs where ggml is not installed: exact in fp32, and tens
of times slower.
"""

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import gguf
import numpy as np
import torch

from headrace.checkpoint.tensor import row_bytes
from headrace.kernels.unpacking import unpack_slices
from headrace.kernels.weight_slice import WeightSlice

if TYPE_CHECKING:
    from headrace.kernels.expert_mlp import ExpertShapes
    from headrace.kernels.matmul import ExpertMatmul


def unpack(type_name: str, address: int, rows: int, columns: int) -> torch.Tensor:
    """Packed rows at an address as a new fp32 tensor of shape (rows, columns)."""
    kind = gguf.GGMLQuantizationType[type_name]
    nbytes = rows * row_bytes(type_name, columns)
    packed = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
    plain = gguf.dequantize(packed.reshape(rows, -1), kind)
    return torch.from_numpy(np.array(plain, np.float32).reshape(rows, columns))


def matmul(x: torch.Tensor, type_name: str, address: int, weight_rows: int) -> torch.Tensor:
    """x (rows, columns) times packed weights (weight_rows, columns) at an address: (rows, weight_rows) in fp32."""
    return x.float() @ unpack(type_name, address, weight_rows, x.shape[1]).T


class ReferenceKernels:
    """The reference implementation, a backend in torch."""

    attends = has_expert_mlp = False
    row_invariant = True

    def __init__(self, threads: int):
        self.threads = threads

    def start(self, *, spins: bool, pad_decode_rows_to_tiles: bool) -> None:
        """As `Backend.start`: nothing to set."""

    def has_tiles(self, type_name: str, columns: int) -> bool:
        """As `Backend.has_tiles`."""
        return False

    def repack(self, weight_slice: WeightSlice, columns: int, in_place: bool = False) -> WeightSlice:
        """As `Backend.repack`: there is no other layout here."""
        return weight_slice

    def matmul(
        self,
        x: torch.Tensor,
        slices: Sequence[tuple[int, WeightSlice]],
        outputs: Sequence[torch.Tensor],
        invariant_rows: int | None = None,
        chunks: Sequence[int] = (),
    ) -> None:
        """As `Backend.matmul`, in fp32."""
        if chunks and invariant_rows is not None:
            parts = torch.split(x, [1] * invariant_rows + list(chunks))
            targets = zip(*(torch.split(output, [len(part) for part in parts]) for output in outputs), strict=True)
            for part, target in zip(parts, targets, strict=True):
                self.matmul(part, slices, target)
            return
        for i, weight_slice in slices:
            if not weight_slice.k_split_rows:
                outputs[i][:, weight_slice.first : weight_slice.first + weight_slice.rows] = matmul(
                    x, weight_slice.type, weight_slice.address, weight_slice.rows
                )
                continue
            for index, split in enumerate(weight_slice.k_splits()):
                number, width = weight_slice.first // weight_slice.k_split_rows + index, weight_slice.k_split_columns
                part = matmul(x[:, number * width : (number + 1) * width], split.type, split.address, split.rows)
                outputs[i][:] = part if number == 0 else outputs[i] + part

    def matmul_each(self, jobs: Sequence["ExpertMatmul"]) -> None:
        """As `Backend.matmul_each`, in fp32."""
        for x, weight_slice, output, invariant_rows, chunks in jobs:
            self.matmul(x, [(0, weight_slice)], [output], invariant_rows, chunks)

    def expert_mlp(
        self, x: torch.Tensor, form: "ExpertShapes", experts: Sequence[Sequence[int]], outputs: Sequence[int]
    ) -> None:
        """Not implemented: `has_expert_mlp` says so."""
        raise NotImplementedError

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, out: torch.Tensor
    ) -> None:
        """Not implemented: `attends` says so."""
        raise NotImplementedError

    def fused_graph(self, operations: int) -> None:
        """As `Backend.fused_graph`: there is none."""

    def cached_matmul(
        self, x: torch.Tensor, slices: Sequence[tuple[int, WeightSlice]], outputs: Sequence[torch.Tensor]
    ) -> None:
        """As `Backend.cached_matmul`: there is none."""

    def quantise_q8(self, weight: torch.Tensor) -> tuple[WeightSlice, object]:
        """As `Backend.quantise_q8`, but unchanged."""
        return WeightSlice("F32", len(weight), weight.data_ptr(), 0), weight

    def rms_norm(self, out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
        """As `Backend.rms_norm`."""
        out.copy_(torch.rms_norm(x, weight.shape, weight, eps))

    def silu(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """As `Backend.silu`."""
        out.copy_(torch.nn.functional.silu(x))

    def unpack(self, type_name: str, address: int, rows: int, columns: int) -> torch.Tensor:
        """As `Backend.unpack`."""
        return unpack(type_name, address, rows, columns)

    def unpack_all(self, slices: Sequence[tuple[int, WeightSlice]], outputs: Sequence[torch.Tensor]) -> None:
        """As `Backend.unpack_all`."""
        unpack_slices(unpack, slices, outputs)

    def release(self) -> None:
        """Nothing to give back."""

    def close(self) -> None:
        """Nothing to give back."""
