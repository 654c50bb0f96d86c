"""A checkpoint that does not exist: the same model with its matrices in fewer bits, made when they are read.

Only the table of tensors is made here. Whoever reads from the copy's path must quantise rows of the original on the way
(`stream.quantising`); everything else then goes as with any other file, and nothing is written to disk.
"""

from dataclasses import replace

from headrace.checkpoint.gguf import Checkpoint
from headrace.checkpoint.tensor import Tensor, bits_per_weight, block_of, row_bytes

# Formats of a copy, the first that a row's length permits: quickly made, and accepted nearly always.
COPY_TYPES = ("Q4_K", "Q4_0")
_PAGE_BYTES = 4096


def low_bit_copy(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with every matrix of more bits in four and a half, in a file of which only the name exists."""
    path = f"{checkpoint.path}[{COPY_TYPES[0]}]"
    tensors: dict[str, Tensor] = {}
    offset = 0
    for name, tensor in checkpoint.tensors.items():
        type_name = next((kind for kind in COPY_TYPES if _shrinks(tensor, kind)), None)
        if type_name is None:
            tensors[name] = tensor
            continue
        nbytes = tensor.rows * row_bytes(type_name, tensor.columns)
        tensors[name] = replace(tensor, type=type_name, path=path, offset=offset, nbytes=nbytes)
        offset += -(-nbytes // _PAGE_BYTES) * _PAGE_BYTES
    return replace(checkpoint, tensors=tensors)


def _shrinks(tensor: Tensor, type_name: str) -> bool:
    """Whether a tensor is a matrix that takes fewer bits in that format."""
    block, _ = block_of(type_name)
    return (
        len(tensor.shape) == 2
        and not tensor.k_splits
        and tensor.columns % block == 0
        and bits_per_weight(tensor.type) > bits_per_weight(type_name)
    )
