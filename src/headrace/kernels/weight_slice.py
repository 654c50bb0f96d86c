"""A slice of a packed weight, as the stream delivers it and the kernels take it."""

from collections.abc import Iterator
from dataclasses import dataclass

from headrace.checkpoint.tensor import row_bytes


@dataclass(frozen=True, slots=True)
class WeightSlice:
    """Some rows of a packed weight, in memory: `type`, number of rows, address, and the first output column they fill.

    A tensor in K-splits has slices of whole K-splits, each of which fills all columns; `first` and `rows` count all their rows.
    """

    type: str
    rows: int
    address: int
    first: int
    repacked: int | None = None  # address of ggml's repacked layout: a copy's, or the slice's own
    k_split_rows: int = 0
    k_split_columns: int = 0

    @property
    def repacked_in_place(self) -> bool:
        """True if the file's own layout was overwritten."""
        return self.repacked == self.address

    def k_splits(self) -> "Iterator[WeightSlice]":
        """Each K-split as a separate matrix."""
        nbytes = self.k_split_rows * row_bytes(self.type, self.k_split_columns)
        for index in range(self.rows // self.k_split_rows):
            yield WeightSlice(self.type, self.k_split_rows, self.address + index * nbytes, 0)
