"""Encodings of quantised safetensors: rows are transcoded to formats that ggml multiplies. No torch, no ggml, no files."""

from headrace.checkpoint.encodings.encoding import Encoding
from headrace.checkpoint.encodings.methods import decoded
from headrace.checkpoint.encodings.transposed import Transposed, transposed

__all__ = ["Encoding", "Transposed", "decoded", "transposed"]
