"""The model: config, tokenizer and modules, built by transformers from a checkpoint's header.

Nothing here rewrites a model's layers. The transformers model is built on meta and its linears are replaced by packed
ones. Its small tensors are filled in, and its own `forward` runs.
"""

from headrace.model.build import ModelSkeleton, build_skeleton
from headrace.model.packed import PackedLinear
from headrace.model.tokenizer import Tokenizer

__all__ = ["ModelSkeleton", "PackedLinear", "Tokenizer", "build_skeleton"]
