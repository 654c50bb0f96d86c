"""A piece of a packed weight, as the stream delivers it and the kernels take it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of a packed weight, in memory: `type`, number of rows, address, and the first column they fill."""

    type: str
    rows: int
    address: int
    first: int
    interleaved: int | None = None  # address in ggml's interleaved layout: a copy's, or its own

    @property
    def only_interleaved(self) -> bool:
        """Whether the file's own layout is gone."""
        return self.interleaved == self.address
