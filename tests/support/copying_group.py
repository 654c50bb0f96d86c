"""Several runners in one process that own some rows of every tensor each, and copy results from each other."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from headrace.checkpoint import Tensor
from headrace.engine.tensor_parallel import Shard
from headrace.stream.layout import RowRange


class CopyingGroup:
    """Makes the members. `split_points` are the fractions of a tensor's rows at which the owner changes."""

    def __init__(self, split_points: Sequence[float]):
        self.split_points = [0.0, *split_points, 1.0]
        self.size = len(self.split_points) - 1
        self._barrier = threading.Barrier(self.size)
        self._values: list[Any] = [None] * self.size

    def member(self, rank: int) -> "Member":
        return Member(self, rank)

    def run(self, work: Callable[["Member"], Any]) -> list[Any]:
        """The results of all members, each in a thread."""
        results: list[Any] = [None] * self.size

        def call(rank: int) -> None:
            try:
                results[rank] = work(self.member(rank))
            except BaseException as error:
                results[rank] = error
                self._barrier.abort()

        threads = [threading.Thread(target=call, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        errors = [one for one in results if isinstance(one, BaseException)]
        errors.sort(key=lambda error: isinstance(error, threading.BrokenBarrierError))
        if errors:
            raise errors[0]
        return results

    def all_gather(self, rank: int, value: torch.Tensor, dim: int, parts: Sequence[Shard]) -> None:
        self._values[rank] = value
        self._barrier.wait(60)
        for part in parts:
            if part.rank != rank:
                source = self._values[part.rank].narrow(dim, part.first, part.last - part.first)
                value.narrow(dim, part.first, part.last - part.first).copy_(source)
        self._barrier.wait(60)


class Member:
    """A member of a copying group."""

    is_single = False

    def __init__(self, group: CopyingGroup, rank: int):
        self.rank = rank
        self.exchanged = 0
        self._group = group

    def shards(self, tensor: Tensor) -> Sequence[Shard]:
        if tensor.k_splits:  # columns, not rows
            return (Shard(0, 0, tensor.outputs),)
        ends = [int(share * tensor.rows) for share in self._group.split_points]
        return [Shard(rank, ends[rank], ends[rank + 1]) for rank in range(self._group.size)]

    def owned(self, tensor: Tensor) -> RowRange:
        if tensor.k_splits:
            return RowRange(0, tensor.rows if self.rank == 0 else 0)
        own = self.shards(tensor)[self.rank]
        return RowRange(own.first, own.last - own.first)

    def expert_owners(self, count: int) -> npt.NDArray[np.integer]:
        return np.arange(count) % self._group.size

    def all_gather(self, value: torch.Tensor, dim: int, parts: Sequence[Shard]) -> None:
        self.exchanged += 1
        self._group.all_gather(self.rank, value, dim, parts)
