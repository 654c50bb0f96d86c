"""Where the rows of a model's matrix lie in the tensors of a checkpoint.

A checkpoint stores what its writer found handy: q, k and v in one tensor or in three, experts one by one or stacked, rows
in another order. What transformers does to such weights is done here to row numbers instead: a conversion that copies
rows about says by it where each row of the model's matrix comes from, and no weight is read.
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
    """An (outputs, inputs) matrix made of slices one under another, then put in order."""

    slices: tuple[Slice, ...]
    order: torch.Tensor | None = None  # which row of the slices each output is; None: as they come
    input_order: torch.Tensor | None = None  # which activation each column of the slices takes; None: as they come
    # Of latent attention: two slices, what makes keys, head by head with inputs as rows, and what makes values.
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
    numbers: npt.NDArray[np.int64],
    tensors: Sequence[Tensor],
    bases: Sequence[int],
    input_order: torch.Tensor | None = None,
) -> Matrix:
    """The matrix whose row i is row `numbers[i]` of the tensors, counted through from the ascending `bases`."""
    owners = np.searchsorted(np.asarray(bases), numbers, side="right") - 1
    slices: list[Slice] = []
    places = np.empty(len(numbers), np.int64)
    height = 0
    seen, firsts = np.unique(owners, return_index=True)
    for owner in seen[np.argsort(firsts)]:
        mine = owners == owner
        rows = numbers[mine] - bases[owner]
        first, count = int(rows.min()), int(rows.max() - rows.min()) + 1
        places[mine] = rows - first + height
        slices.append(Slice(tensors[owner], first, count))
        height += count
    ordered = np.array_equal(places, np.arange(height))
    return Matrix(tuple(slices), None if ordered else torch.from_numpy(places), input_order)


def below_one_another(matrices: Sequence[Matrix]) -> Matrix:
    """Matrices of the same inputs as one, none of them in another order than it is stored."""
    return Matrix(tuple(part for matrix in matrices for part in matrix.slices))


def part_of(tensor: Tensor, index: int, count: int) -> Tensor:
    """One of `count` equal matrices that lie one after another in a tensor."""
    shape = tensor.shape[1:] if len(tensor.shape) > 2 else (tensor.shape[0] // count, tensor.shape[1])
    size = tensor.nbytes // count
    return replace(
        tensor, name=f"{tensor.name}[{index}]", shape=shape, offset=tensor.offset + index * size, nbytes=size
    )
