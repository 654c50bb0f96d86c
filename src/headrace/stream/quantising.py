"""Low-bit draft copies: rows of the original, quantised by the reader thread while they are read.

Their encoding is used like those of `checkpoint.encodings`; its source is another tensor, of any format.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from headrace.checkpoint import Checkpoint, Tensor
from headrace.kernels.convert import convert


@dataclass(frozen=True, kw_only=True, slots=True)
class Requantised:
    """Encoding of a tensor's rows in another format."""

    source: Tensor
    type: str

    @property
    def label(self) -> str:
        """Name of the encoding, for people."""
        return f"{self.source.type} as {self.type}"

    @property
    def row_multiple(self) -> int:
        """Any range of rows can be decoded."""
        return 1

    def reads(self, first: int, last: int) -> Sequence[tuple[Tensor, int, int]]:
        """The same rows of the original."""
        return [(self.source, first * self.source.row_bytes, (last - first) * self.source.row_bytes)]

    def decode(self, raw: Sequence[npt.NDArray[np.uint8]], first: int, last: int, out: npt.NDArray[np.uint8]) -> None:
        """Quantise the rows."""
        source = self.source
        convert(source.type, raw[0].ctypes.data, self.type, out.ctypes.data, last - first, source.columns)


def with_encodings(copy: Checkpoint, original: Checkpoint) -> Checkpoint:
    """The copy that `checkpoint.low_bit` describes, with the encodings of its virtual tensors."""
    virtual: dict[str, list[tuple[Tensor, Requantised]]] = {}
    for name, tensor in copy.tensors.items():
        source = original.tensors[name]
        if tensor.path != source.path:
            virtual.setdefault(tensor.path, []).append((tensor, Requantised(source=source, type=tensor.type)))
    return replace(copy, virtual={**original.virtual, **virtual})
