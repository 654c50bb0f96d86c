"""Headers of checkpoints as tables of tensors. Imports no torch, reads no weights, trusts no byte."""

import os

from headrace.checkpoint.folder import open_folder
from headrace.checkpoint.gguf import Checkpoint, open_gguf
from headrace.checkpoint.source import LocalSource, OpenSource
from headrace.checkpoint.tensor import Tensor

__all__ = ["Checkpoint", "Tensor", "open_checkpoint"]


def open_checkpoint(path: str | os.PathLike[str], open_source: OpenSource = LocalSource) -> Checkpoint:
    """Read the header of a model: a .gguf file (or the first part of a split), a Hugging Face folder, or a file in it.

    `open_source` opens the file at a path, by default a local one.

    Raises:
        CheckpointError: not a model, truncated, inconsistent, or a part is missing.
        UnsupportedError: a quantisation or a layout without a kernel.
    """
    name = os.fspath(path)
    if not name.endswith(".gguf") and (
        os.path.isdir(name) or name.endswith(".safetensors") or open_source is not LocalSource
    ):
        return open_folder(name, open_source)
    return open_gguf(name, open_source)
