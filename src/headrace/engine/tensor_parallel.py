"""The owners of a model's rows: one runner that owns all, or several that own some each and gather results."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from headrace.checkpoint import Tensor
from headrace.stream.layout import RowRange


class Shard(NamedTuple):
    """A range along one dimension of a result, and the rank of the member that computes it."""

    rank: int
    first: int
    last: int


class TensorParallelGroup(Protocol):
    """Members that compute one model together, in step. Each has a rank."""

    @property
    def is_single(self) -> bool:
        """True if one member owns everything."""

    @property
    def rank(self) -> int:
        """The rank of this member."""

    def owned(self, tensor: Tensor) -> RowRange:
        """The rows of a matrix that this member reads and multiplies."""

    def shards(self, tensor: Tensor) -> Sequence[Shard]:
        """Ranges of a matrix's outputs, by the member that owns them."""

    def expert_owners(self, count: int) -> npt.NDArray[np.integer]:
        """The rank that owns each of `count` experts of a layer."""

    def all_gather(self, value: torch.Tensor, dim: int, shards: Sequence[Shard]) -> None:
        """Fill the shards of a tensor that other members computed. All members call this with the same shards."""


class SingleRank:
    """A group of one."""

    is_single = True
    rank = 0

    def owned(self, tensor: Tensor) -> RowRange:
        """All rows."""
        return RowRange(0, tensor.rows)

    def shards(self, tensor: Tensor) -> Sequence[Shard]:
        """One part."""
        return (Shard(0, 0, tensor.rows),)

    def expert_owners(self, count: int) -> npt.NDArray[np.integer]:
        """This member."""
        return np.zeros(count, np.int64)

    def all_gather(self, value: torch.Tensor, dim: int, shards: Sequence[Shard]) -> None:
        """Nothing to do."""
