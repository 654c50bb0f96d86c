"""The place of each row of a model's matrix in the tensors of a checkpoint.

Checkpoints differ: q, k and v in one tensor or in three, experts one by one or stacked, rows in another order.
transformers' weight conversion runs here on row indices instead of weights. Its result says where each row of the
model's matrix is stored, and no weight is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from headrace.checkpoint import Tensor
from headrace.checkpoint.tensor import Slice


@dataclass(frozen=True, slots=True)
class Matrix:
    """An (outputs, inputs) matrix: slices stacked by rows, then reordered."""

    slices: tuple[Slice, ...]
    order: torch.Tensor | None = None  # row of the stacked slices for each output; None: in order
    input_order: torch.Tensor | None = None  # activation for each column of the slices; None: in order
    # True for MLA's kv_b_proj in two slices: key half (k_b), transposed per head, and value half (v_b)
    k_b_transposed: bool = False

    @property
    def outputs(self) -> int:
        """Rows of the matrix."""
        return sum(part.rows for part in self.slices) if self.order is None else len(self.order)

    @property
    def inputs(self) -> int:
        """Columns of the matrix."""
        return self.slices[0].tensor.inputs

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors to be multiplied."""
        return tuple(part.tensor for part in self.slices)


def matrix_of(
    indices: npt.NDArray[np.int64],
    tensors: Sequence[Tensor],
    bases: Sequence[int],
    input_order: torch.Tensor | None = None,
) -> Matrix:
    """The matrix whose row i is row `indices[i]` of the tensors; `bases` are the ascending indices of their first rows."""
    owners = np.searchsorted(np.asarray(bases), indices, side="right") - 1
    slices: list[Slice] = []
    places = np.empty(len(indices), np.int64)
    height = 0
    seen, firsts = np.unique(owners, return_index=True)
    for owner in seen[np.argsort(firsts)]:
        mine = owners == owner
        rows = indices[mine] - bases[owner]
        first, count = int(rows.min()), int(rows.max() - rows.min()) + 1
        places[mine] = rows - first + height
        slices.append(Slice(tensors[owner], first, count))
        height += count
    ordered = np.array_equal(places, np.arange(height))
    return Matrix(tuple(slices), None if ordered else torch.from_numpy(places), input_order)


def below_one_another(matrices: Sequence[Matrix]) -> Matrix:
    """One matrix of several with the same inputs, stacked by rows. None of them may be reordered."""
    return Matrix(tuple(part for matrix in matrices for part in matrix.slices))


def part_of(tensor: Tensor, index: int, count: int) -> Tensor:
    """One of `count` equal matrices, stored one after another in a tensor."""
    shape = tensor.shape[1:] if len(tensor.shape) > 2 else (tensor.shape[0] // count, tensor.shape[1])
    size = tensor.nbytes // count
    return replace(
        tensor, name=f"{tensor.name}[{index}]", shape=shape, offset=tensor.offset + index * size, nbytes=size
    )
