"""What is on disk: the header of a checkpoint as a table of tensors. No torch, no weights read, nothing trusted."""

import os

from headrace.checkpoint.folder import open_folder
from headrace.checkpoint.gguf import Checkpoint, open_gguf
from headrace.checkpoint.tensor import Tensor

__all__ = ["Checkpoint", "Tensor", "open_checkpoint"]


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read the header of a model: a .gguf file (or the first part of a split), a Hugging Face folder, or a file in it.

    Raises:
        CheckpointError: not a model, truncated, inconsistent, or a part is missing.
        UnsupportedError: a quantisation or a layout that cannot be multiplied.
    """
    name = os.fspath(path)
    if os.path.isdir(name) or name.endswith(".safetensors"):
        return open_folder(name)
    return open_gguf(name)
