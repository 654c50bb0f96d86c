"""Interface of all encodings, called by the reader, and the checks of scale and zero-point tensors.

An encoding is a few numbers and the stored tensors that it reads from. It holds no buffers and no files, so any number of
threads may decode with the same one. Headers are checked when it is made (`decoded`); during decoding only values can be
wrong.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from headrace.checkpoint.tensor import Tensor
from headrace.errors import CheckpointError

Bytes: TypeAlias = npt.NDArray[np.uint8]
Floats: TypeAlias = npt.NDArray[np.float32]
Read: TypeAlias = tuple[Tensor, int, int]  # stored tensor, first byte in it, number of bytes
Settings: TypeAlias = Mapping[str, Any]  # `quantization_config`, or a part of it

# Weights decoded at a time: intermediate values stay in the CPU cache.
CHUNK_WEIGHTS = 1 << 16
FLOAT_TYPES = ("F16", "BF16", "F32")
FP16_MAX = 65504.0
ANOTHER_VERSION = "get a GGUF, or a BF16, FP8, compressed-tensors, GPTQ or AWQ version of the model"


class Encoding(Protocol):
    """Decoder of a virtual tensor's rows from stored tensors."""

    @property
    def label(self) -> str:
        """Name for users: `compressed-tensors int4, group 128`."""

    @property
    def row_multiple(self) -> int:
        """Granularity of row ranges: `first` and `last` are multiples of it. 1 allows every range."""

    def reads(self, first: int, last: int) -> Sequence[Read]:
        """Contiguous byte ranges that rows [first, last) need, always the same number in the same order."""

    def decode(self, raw: Sequence[Bytes], first: int, last: int, out: Bytes) -> None:
        """Fill `out`, exactly the bytes of rows [first, last), from `raw`, the bytes of `reads(first, last)`.

        Raises:
            CheckpointError: a value that the target's format cannot hold, or that contradicts the configuration.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class Virtual:
    """A virtual tensor not yet placed in a file, and the names (`parts`) of the stored tensors that it replaces."""

    name: str
    shape: tuple[int, ...]
    type: str
    encoding: Encoding
    parts: tuple[str, ...]
    k_splits: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """Map of matrix rows to scale rows: one scale row for every `per` of the `outputs` rows of each matrix."""

    outputs: int
    per: int = 1

    def row(self, row: int) -> int:
        """Scale row of a matrix row, both counted over all matrices of a stack."""
        return row // self.outputs * -(-self.outputs // self.per) + row % self.outputs // self.per

    def rows(self, first: int, last: int) -> npt.NDArray[np.intp]:
        """Scale rows of the rows [first, last), counted from the first of them: (last - first,)."""
        rows = np.arange(first, last, dtype=np.intp)
        return rows // self.outputs * -(-self.outputs // self.per) + rows % self.outputs // self.per - self.row(first)

    def read(self, tensor: Tensor, row_bytes: int, first: int, last: int) -> Read:
        """Bytes of the scale rows for the rows [first, last)."""
        start, end = self.row(first), self.row(last - 1) + 1
        return tensor, start * row_bytes, (end - start) * row_bytes


def scaling(tensor: Tensor, shape: tuple[int, ...], scale: Tensor, block: tuple[int, int] | None) -> tuple[Grid, int]:
    """Layout of a matrix's scales: the grid of their rows, and the columns per scale.

    One scale for all, per matrix of a stack, per row, or per block. A block is `block` or divides the matrix evenly.

    Args:
        tensor: the scaled tensor, for the message.
        shape: shape of its weights.
        scale: its scales.
        block: configured (rows, columns) of a block, if any.

    Raises:
        CheckpointError: the shapes fit none of these.
    """
    *stack, outputs, columns = shape
    if prod((*shape, *scale.shape)) == 0:
        raise CheckpointError(f"tensor `{tensor.name}` or its scale is empty")
    if prod(scale.shape) == 1:
        return Grid(outputs=prod(shape[:-1]), per=prod(shape[:-1])), columns
    if scale.shape == (*stack, outputs):
        return Grid(outputs=outputs), columns
    if stack and scale.shape in (tuple(stack), (*stack, 1)):
        return Grid(outputs=outputs, per=outputs), columns
    if len(scale.shape) == len(shape) and scale.shape[:-2] == tuple(stack):
        high, wide = scale.shape[-2:]
        if block is not None and (-(-outputs // block[0]), -(-columns // block[1])) == (high, wide):
            return Grid(outputs=outputs, per=block[0]), min(columns, block[1])
        if outputs % high == 0 and columns % wide == 0:
            return Grid(outputs=outputs, per=outputs // high), columns // wide
    raise CheckpointError(
        f"tensor `{scale.name}` of shape {scale.shape} does not fit `{tensor.name}`, {outputs} x {columns} weights"
        + (f" in blocks of {block[0]} x {block[1]}" if block else ""),
        hint="the configuration and the weights are of different models; download both again",
    )


def floats(raw: Bytes, type_name: str) -> Floats:
    """Scales as fp32, exactly. U8 is an exponent, as in MX formats."""
    if type_name == "F32":
        return raw.view(np.float32)
    if type_name == "F16":
        return raw.view(np.float16).astype(np.float32)
    if type_name == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    exponent = raw.astype(np.uint32)
    return np.where(exponent > 0, exponent << 23, 1 << 22).astype(np.uint32).view(np.float32)


def scale_tensor(tensors: Mapping[str, Tensor], owner: str, name: str) -> Tensor:
    """The scale or zero-point tensor `name`, which `owner` needs."""
    if name not in tensors:
        raise CheckpointError(
            f"tensor `{owner}` is quantised, but `{name}` is missing",
            hint="a file of the model is missing or damaged; download it again",
        )
    return tensors[name]


def require(tensor: Tensor, types: Sequence[str], shape: Sequence[int] | None = None) -> None:
    """Check a stored tensor's type and, where given, its shape."""
    if tensor.type not in types:
        raise CheckpointError(f"tensor `{tensor.name}` is {tensor.type}, which should be {' or '.join(types)}")
    if shape is not None and tensor.shape != tuple(shape):
        raise CheckpointError(f"tensor `{tensor.name}` has the shape {tensor.shape}, which should be {tuple(shape)}")


def bounded(scales: Floats, name: str, largest: float = 1) -> Floats:
    """The scales, checked: the `largest` multiple of each must fit fp16."""
    limit = FP16_MAX / largest
    if not (np.abs(scales) <= limit).all():
        raise CheckpointError(
            f"tensor `{name}` has a scale of {float(np.abs(scales).max()):.4g}, the limit for fp16 is {limit:.4g}",
            hint="the file is damaged; download it again",
        )
    return scales


def order_of(raw: Bytes, groups: int, tensor: Tensor) -> npt.NDArray[np.int32]:
    """Group of each column (`g_idx`), checked to be within `groups`."""
    order = raw.view(np.int32)
    wrong = order[(order < 0) | (order >= groups)]
    if len(wrong):
        raise CheckpointError(f"tensor `{tensor.name}` names the group {wrong[0]} of {groups}")
    return order


def setting(settings: Settings, key: str, default: int | bool | str | None = None) -> Any:
    """A number, word or boolean of the configuration; a list or an object is an error."""
    value = settings.get(key, default)
    if value is not None and not isinstance(value, (int, float, str)):
        raise CheckpointError(f"`{key}` of the quantisation is {value!r}, which should be a single value")
    return value
