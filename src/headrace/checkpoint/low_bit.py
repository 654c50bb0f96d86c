"""Virtual checkpoint of a self-speculation draft: the same model with its matrices quantised on load.

This module makes only the table of tensors. A reader of the copy's path must quantise rows of the original
(`stream.quantising`); the rest works as with any file. Nothing is written to disk.
"""

from collections.abc import Sequence
from dataclasses import replace

from headrace.checkpoint.gguf import Checkpoint
from headrace.checkpoint.tensor import Tensor, bits_per_weight, block_of, row_bytes

# Formats in order of preference; the first that fits a row's length is used. Drafts are nearly always accepted.
COPY_TYPES = ("Q4_K", "Q4_0")
_PAGE_BYTES = 4096


def low_bit_copy(checkpoint: Checkpoint, types: Sequence[str] = COPY_TYPES) -> Checkpoint:
    """The checkpoint with matrices of more than 4.5 bits per weight at 4.5, in a virtual file. `types`: as `COPY_TYPES`."""
    path = f"{checkpoint.path}[{types[0]}]"
    tensors: dict[str, Tensor] = {}
    offset = 0
    for name, tensor in checkpoint.tensors.items():
        type_name = next((kind for kind in types if _shrinks(tensor, kind)), None)
        if type_name is None:
            tensors[name] = tensor
            continue
        nbytes = tensor.rows * row_bytes(type_name, tensor.columns)
        tensors[name] = replace(tensor, type=type_name, path=path, offset=offset, nbytes=nbytes)
        offset += -(-nbytes // _PAGE_BYTES) * _PAGE_BYTES
    return replace(checkpoint, tensors=tensors)


def _shrinks(tensor: Tensor, type_name: str) -> bool:
    """True for a matrix that takes fewer bits per weight in that format."""
    block, _ = block_of(type_name)
    return (
        len(tensor.shape) == 2
        and not tensor.k_splits
        and tensor.columns % block == 0
        and bits_per_weight(tensor.type) > bits_per_weight(type_name)
    )
