"""What is on disk: the header of a checkpoint as a table of tensors. No torch, no weights read, nothing trusted."""

from headrace.checkpoint.gguf import Checkpoint, open_checkpoint
from headrace.checkpoint.tensor import Tensor

__all__ = ["Checkpoint", "Tensor", "open_checkpoint"]
