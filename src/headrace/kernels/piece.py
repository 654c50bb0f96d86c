"""A piece of a packed weight, as the stream delivers it and the kernels take it."""

from collections.abc import Iterator
from dataclasses import dataclass

from headrace.checkpoint.tensor import row_bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of a packed weight, in memory: `type`, number of rows, address, and the first column they fill.

    Of a tensor in slabs: whole slabs, of which each fills all columns; `first` and `rows` count the rows of all slabs.
    """

    type: str
    rows: int
    address: int
    first: int
    interleaved: int | None = None  # address in ggml's interleaved layout: a copy's, or its own
    slab_rows: int = 0
    slab_columns: int = 0

    @property
    def only_interleaved(self) -> bool:
        """Whether the file's own layout is gone."""
        return self.interleaved == self.address

    def slabs(self) -> "Iterator[Piece]":
        """Each slab as a matrix of its own."""
        nbytes = self.slab_rows * row_bytes(self.type, self.slab_columns)
        for index in range(self.rows // self.slab_rows):
            yield Piece(self.type, self.slab_rows, self.address + index * nbytes, 0)
