"""A pool of buffers for tensors; a buffer is reused when its tensor and all views of it are gone."""

import ctypes
import math
import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from headrace.stream import Arena

_LARGE_BYTES = 1 << 20
_ALIGNMENT = 64


class BufferPool:
    """Buffers, and tensors that lie in them."""

    def __init__(self) -> None:
        self._buffers: dict[int, list[npt.NDArray[np.uint8]]] = {}  # by size
        self.addresses: set[int] = set()  # start addresses of all buffers

    def empty(
        self, shape: Sequence[int], dtype: torch.dtype = torch.float32, stride: Sequence[int] | None = None
    ) -> torch.Tensor:
        """A dense tensor of this shape in an unused buffer, at most a quarter or 64 bytes larger."""
        nbytes = dtype.itemsize * math.prod(shape)
        # Sizes have three binary digits, so that tensors of about the same size share buffers.
        grain = max(_ALIGNMENT, 1 << max(0, nbytes.bit_length() - 3))
        size = max(1, -(-nbytes // grain)) * grain
        buffers = self._buffers.setdefault(size, [])
        buffer = _unused(buffers)
        if buffer is None:
            buffer = _new(size)
            buffers.append(buffer)
            self.addresses.add(buffer.ctypes.data)
        flat = torch.from_numpy(buffer[:nbytes]).view(dtype)
        return flat.view(shape) if stride is None else flat.as_strided(shape, stride)

    def owns(self, tensor: torch.Tensor) -> bool:
        """True if the tensor lies in this pool."""
        return tensor.untyped_storage().data_ptr() in self.addresses


def _unused(buffers: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint8] | None:
    for buffer in buffers:
        if sys.getrefcount(buffer) == _UNUSED:
            return buffer
    return None


def _references() -> int:
    """References to an unused buffer: from the list, the loop and `getrefcount`, unless the interpreter borrows some."""
    for buffer in [np.empty(1, np.uint8)]:
        return sys.getrefcount(buffer)
    raise AssertionError


_UNUSED = _references()


def _new(nbytes: int) -> npt.NDArray[np.uint8]:
    """An array whose views refer to it, not to the memory below it."""
    if nbytes >= _LARGE_BYTES:
        return np.frombuffer(Arena(nbytes).view, np.uint8)
    memory = bytearray(nbytes + _ALIGNMENT)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % _ALIGNMENT
    return np.frombuffer(memory, np.uint8, nbytes, start)


def result_strides(like: torch.Tensor) -> tuple[int, ...] | None:
    """The strides that torch gives the result of an elementwise operation on this tensor; None if not obvious."""
    if is_dense(like):
        return like.stride()
    inner = [stride for size, stride in zip(like.shape, like.stride(), strict=True) if size > 1]
    if inner != sorted(inner, reverse=True) or 0 in inner:
        return None
    return tuple(math.prod(like.shape[i + 1 :]) for i in range(like.dim()))


def is_dense(x: torch.Tensor) -> bool:
    """True if its elements lie side by side, in any order of dimensions."""
    return x.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense(x))
