"""Unquantised matrices stored transposed, [in, out]: GPT-2's, and some models' stacked experts.

They are cut into K-splits as in `k_splits.py`: each is one contiguous range, transposed on decoding. No value changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headrace.checkpoint.encodings.blocks import transpose
from headrace.checkpoint.encodings.encoding import FLOAT_TYPES, Bytes, Encoding, Read, Virtual, require
from headrace.checkpoint.encodings.k_splits import k_split_width
from headrace.checkpoint.encodings.placing import placed
from headrace.checkpoint.tensor import Tensor, block_of
from headrace.errors import CheckpointError

_WIDTHS = (256, 128, 64, 32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Transposed:
    """K-splits of a matrix stored transposed, or of a stack of them."""

    source: Tensor
    width: int
    label: str = "transposed"

    @property
    def row_multiple(self) -> int:
        """Rows of a whole K-split."""
        return self.source.columns

    def reads(self, first: int, last: int) -> Sequence[Read]:
        """See `Encoding.reads`. K-splits of stacked matrices are contiguous too."""
        row_bytes, outputs = self.source.row_bytes, self.source.columns
        start, end = first // outputs * self.width, last // outputs * self.width
        return ((self.source, start * row_bytes, (end - start) * row_bytes),)

    def decode(self, raw: Sequence[Bytes], first: int, last: int, out: Bytes) -> None:
        """See `Encoding.decode`."""
        dtype, outputs = np.dtype(f"u{block_of(self.source.type)[1]}"), self.source.columns
        stored = raw[0].view(dtype).reshape(-1, self.width, outputs)
        target = out.view(dtype).reshape(-1, outputs, self.width)
        for split, rows in zip(stored, target, strict=True):
            transpose(split, rows)


def transposed(tensor: Tensor, path: str, offset: int) -> tuple[Tensor, Encoding]:
    """A virtual tensor at `offset` of `path` from a stored (..., inputs, outputs): (..., k_splits, outputs, width).

    Raises:
        CheckpointError: not a matrix or a stack of them in F16, BF16 or F32.
    """
    require(tensor, FLOAT_TYPES)
    if len(tensor.shape) not in (2, 3) or 0 in tensor.shape:
        raise CheckpointError(f"tensor `{tensor.name}` has the shape {tensor.shape}, which cannot be transposed")
    *stack, inputs, outputs = tensor.shape
    width = k_split_width(inputs, _WIDTHS)
    k_splits = inputs // width
    shape = (*stack, k_splits, outputs, width)
    encoding = Transposed(source=tensor, width=width)
    virtual = Virtual(
        name=tensor.name, shape=shape, type=tensor.type, k_splits=k_splits, encoding=encoding, parts=(tensor.name,)
    )
    return placed(virtual, path, offset), encoding
