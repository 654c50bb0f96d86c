"""Placement of virtual tensors in a virtual file, each from the start of a page."""

from math import prod

from headrace.checkpoint.encodings.encoding import Virtual
from headrace.checkpoint.tensor import Tensor, block_of

PAGE_BYTES = 4096


def placed(virtual: Virtual, path: str, offset: int) -> Tensor:
    """The virtual tensor at `offset` of `path`."""
    block, size = block_of(virtual.type)
    return Tensor(
        name=virtual.name,
        shape=virtual.shape,
        type=virtual.type,
        path=path,
        offset=offset,
        nbytes=prod(virtual.shape) // block * size,
        k_splits=virtual.k_splits,
    )
