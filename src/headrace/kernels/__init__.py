"""How packed weights multiply: rows of activations times rows of weights that stay in their file's own format.

Two paths behind one call. Few rows: ggml's dot products on the packed blocks; a row's result does not depend on the
rows beside it. Many rows: blocks of weights are unpacked and multiplied by torch; faster from a measured number of rows
on, and not row-invariant. `torch_reference` is the slow twin of both.
"""

from headrace.kernels.multiply import FEW_ROWS, Kernels, Piece

__all__ = ["FEW_ROWS", "Kernels", "Piece"]
