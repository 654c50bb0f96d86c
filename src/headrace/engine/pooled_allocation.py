"""Large results of a pass reuse the memory of earlier results of the pass.

The system's allocator may give large blocks back. Then every result page-faults again, beside the readers' page
faults. That takes 4 to 6 of 26 s for 512 rows of an 8B shape. Or it keeps them, and small tensors among them leave holes
of hundreds of megabytes. A buffer here serves only large results of about its size.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from headrace.engine.buffer_pool import BufferPool, result_strides

LARGE_BYTES = 1 << 20

_aten = torch.ops.aten
# Operations whose result has the broadcast shape of their operands, and the variant that writes to given memory.
ELEMENTWISE: dict[Any, Any] = {
    _aten.add.Tensor: _aten.add.out,
    _aten.sub.Tensor: _aten.sub.out,
    _aten.mul.Tensor: _aten.mul.out,
    _aten.div.Tensor: _aten.div.out,
    _aten.neg.default: _aten.neg.out,
    _aten.silu.default: _aten.silu.out,
    _aten.gelu.default: _aten.gelu.out,
    _aten.relu.default: _aten.relu.out,
    _aten.tanh.default: _aten.tanh.out,
    _aten.sigmoid.default: _aten.sigmoid.out,
    _aten.pow.Tensor_Scalar: _aten.pow.Tensor_Scalar_out,
}


class PooledAllocation(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode of torch: large fp32 results of operations within it come from its own buffer pool."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._pool = BufferPool()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # saves some us an operation: torch asks if its compiler is to skip the mode
        return False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Called by torch for every operation."""
        kwargs = kwargs or {}
        if func in ELEMENTWISE:
            return self._elementwise(func, args, kwargs)
        special = _SPECIAL.get(func)
        if special is not None:
            return special(self, func, args, kwargs)
        return func(*args, **kwargs)

    def _elementwise(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        out = buffer_for_elementwise(self._pool, args, LARGE_BYTES)
        return func(*args, **kwargs) if out is None else ELEMENTWISE[func](*args, **kwargs, out=out)

    def _cat(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        out = buffer_for_cat(self._pool, args, LARGE_BYTES)
        return func(*args, **kwargs) if out is None else _aten.cat.out(*args, **kwargs, out=out)

    def _index_select(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        x, dim, index = args
        shape = [*x.shape]
        if x.dtype != torch.float32 or not shape or 4 * x.numel() // max(1, shape[dim]) * len(index) < LARGE_BYTES:
            return func(*args, **kwargs)
        shape[dim] = len(index)
        return _aten.index_select.out(x, dim, index, out=self._pool.empty(shape))

    def _empty(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        shape = args[1] if func is _aten.new_empty.default else args[0]
        dtype = kwargs.get("dtype") or (args[0].dtype if func is _aten.new_empty.default else torch.get_default_dtype())
        if dtype != torch.float32 or 4 * math.prod(shape) < LARGE_BYTES or kwargs.get("pin_memory"):
            return func(*args, **kwargs)
        return self._pool.empty(shape)

    def _rms_norm(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        x, shape, weight, eps = (*args, None, None)[:4]
        if x.dtype != torch.float32 or 4 * x.numel() < LARGE_BYTES or not x.is_contiguous() or len(shape) != 1:
            return func(*args, **kwargs)
        return rms_norm_into(self._pool.empty(x.shape), x, weight, eps)


_SPECIAL: dict[Any, Callable[..., Any]] = {
    _aten.cat.default: PooledAllocation._cat,
    _aten.index_select.default: PooledAllocation._index_select,
    _aten.empty.memory_format: PooledAllocation._empty,
    _aten.new_empty.default: PooledAllocation._empty,
    _aten.rms_norm.default: PooledAllocation._rms_norm,
}


def rms_norm_into(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, eps: float | None) -> torch.Tensor:
    """`torch.rms_norm` over the last dimension, in the steps that torch itself takes."""
    torch.pow(x, 2, out=out)
    scale = out.mean(-1, keepdim=True).add_(torch.finfo(x.dtype).eps if eps is None else eps).rsqrt_()
    torch.mul(x, scale, out=out)
    return out if weight is None else out.mul_(weight)


def buffer_for_elementwise(pool: BufferPool, args: Sequence[Any], least_bytes: int = 0) -> torch.Tensor | None:
    """A buffer for the result of an elementwise operation; None: torch should allocate it."""
    operands = [operand for operand in args[:2] if isinstance(operand, torch.Tensor)]
    like = max(operands, key=torch.Tensor.numel)
    if 4 * like.numel() < least_bytes or any(operand.dtype != torch.float32 for operand in operands):
        return None
    strides = result_strides(like)
    if strides is None or like.shape != np.broadcast_shapes(*[operand.shape for operand in operands]):
        return None
    return pool.empty(like.shape, stride=strides)


def buffer_for_cat(pool: BufferPool, args: Sequence[Any], least_bytes: int = 0) -> torch.Tensor | None:
    """A buffer for the result of a concatenation; None: torch should allocate it."""
    tensors, dim = args[0], args[1] if len(args) > 1 else 0
    shape = list(tensors[0].shape)
    if any(one.dtype != torch.float32 or one.dim() != len(shape) for one in tensors) or not shape:
        return None
    shape[dim] = sum([one.shape[dim] for one in tensors])
    return None if 4 * math.prod(shape) < least_bytes else pool.empty(shape)
