"""A tensor of a checkpoint: its file, offset, shape and type. Common to all formats.

Types have ggml's names (`Q4_K`, `BF16`); types that only safetensors has keep its names (`F8_E4M3`, `I32`).
"""

import re
from dataclasses import dataclass
from math import prod

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

TYPE_NAMES = {int(kind): kind.name for kind in GGMLQuantizationType}
# Types that ggml multiplies: all but integers, F64 and its internal formats for activations.
COMPUTABLE = frozenset(TYPE_NAMES.values()) - {"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"}
# Bytes per element of the types that only safetensors files hold.
_PLAIN_BYTES = {
    "BOOL": 1, "U8": 1, "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """The place and the storage format of one tensor. `shape` is in torch's order: rows first."""

    name: str
    shape: tuple[int, ...]
    type: str
    path: str
    offset: int  # bytes from the start of the file
    nbytes: int
    k_splits: int = 0  # K-splits of the reduction dimension; unless 0, shape is (..., k_splits, outputs, columns)

    @property
    def columns(self) -> int:
        """Weights in a row: the contiguous dimension, which blocks never cross."""
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        """Number of rows, over all leading dimensions."""
        return prod(self.shape[:-1])

    @property
    def row_multiple(self) -> int:
        """Granularity of row reads: the rows of a whole K-split, else 1."""
        return self.shape[-2] if self.k_splits else 1

    @property
    def outputs(self) -> int:
        """Output features of this matrix."""
        return self.shape[-2] if self.k_splits else self.rows

    @property
    def inputs(self) -> int:
        """Input features of this matrix."""
        return self.columns * max(1, self.k_splits)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of packed weights."""
        return row_bytes(self.type, self.columns)


@dataclass(frozen=True, slots=True)
class Slice:
    """A range of a tensor's output rows: `rows` of them, from `first` on."""

    tensor: Tensor
    first: int
    rows: int

    @property
    def whole(self) -> bool:
        """True if the slice holds all rows."""
        return self.rows == self.tensor.outputs


def layer_of(name: str) -> int:
    """Layer index in a tensor's name; -1 if it belongs to no layer."""
    match = re.search(r"(?:^|\.)(?:blk|layers|h|blocks)\.(\d+)\.", name)
    return -1 if match is None else int(match[1])


def block_of(type_name: str) -> tuple[int, int]:
    """(weights, bytes) of one block of a type, from the `gguf` package's table. Raises `KeyError` for an unknown one."""
    if type_name in _PLAIN_BYTES:
        return 1, _PLAIN_BYTES[type_name]
    weights, size = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    return int(weights), int(size)


def row_bytes(type_name: str, columns: int) -> int:
    """Bytes of a row of `columns` weights."""
    weights, size = block_of(type_name)
    return columns // weights * size


def bits_per_weight(type_name: str) -> float:
    """Bits of one weight, scales included."""
    weights, size = block_of(type_name)
    return 8 * size / weights
