"""What is on disk: the header of a checkpoint as a table of tensors. No torch, no weights read, nothing trusted."""

from headrace.checkpoint.gguf import Checkpoint, Tensor, open_checkpoint

__all__ = ["Checkpoint", "Tensor", "open_checkpoint"]
