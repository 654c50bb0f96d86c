"""Layouts of quantised safetensors, decoded by rows into formats that ggml multiplies in place. No torch, no ggml, no files."""

from headrace.checkpoint.encodings.encoding import Encoding
from headrace.checkpoint.encodings.methods import decoded
from headrace.checkpoint.encodings.transposed import Transposed, transposed

__all__ = ["Encoding", "Transposed", "decoded", "transposed"]
