"""Formats for which ggml's fastest matmul of several rows has the bits of its dot products.

For blocks of 32 weights that is ggml's copy of tinyBLAS: it adds up in the order of the dot products, at up to twice their
speed for 4 rows and more. The order depends on the processor, so it is checked.
"""

import functools

import torch

from headrace.checkpoint.tensor import row_bytes
from headrace.kernels.convert import convert
from headrace.kernels.ggml_graph import MatmulGraph, MatmulPointers, MatmulShape, Workers
from headrace.kernels.repack import Repacking

_CANDIDATES = ("Q8_0", "Q4_0", "Q5_0", "IQ4_NL")
_WEIGHT_ROWS, _COLUMNS = 29, 1056  # not multiples of any tile
_ROWS = (2, 3, 5, 16)


@functools.cache
def has_dot_bits(type_name: str) -> bool:
    """True if, on this processor, matmuls of several rows have the bits of dot products. Takes some milliseconds."""
    if type_name not in _CANDIDATES:
        return False
    random = torch.Generator().manual_seed(0)
    weights = torch.randn(_WEIGHT_ROWS, _COLUMNS, generator=random)
    packed = torch.empty(_WEIGHT_ROWS * row_bytes(type_name, _COLUMNS), dtype=torch.uint8)
    convert("F32", weights.data_ptr(), type_name, packed.data_ptr(), _WEIGHT_ROWS, _COLUMNS)
    workers, repacking = Workers(1, spin=False), Repacking()
    try:
        return all(
            torch.equal(*(_product(type_name, packed, x, dots, workers, repacking) for dots in (True, False)))
            for x in (torch.randn(rows, _COLUMNS, generator=random) for rows in _ROWS)
        )
    finally:
        repacking.close()
        workers.close()


def _product(
    type_name: str, packed: torch.Tensor, x: torch.Tensor, dots: bool, workers: Workers, repacking: Repacking
) -> torch.Tensor:
    """x @ packed.T: (rows of x, rows of packed)."""
    result = torch.empty(len(x), _WEIGHT_ROWS)
    shape = MatmulShape(type_name, _WEIGHT_ROWS, _COLUMNS, "F32", 4 * _COLUMNS, 4 * _WEIGHT_ROWS, repacked=False)
    graph = MatmulGraph([shape], len(x), dots, workers, repacking)
    try:
        graph([MatmulPointers(packed.data_ptr(), x.data_ptr(), result.data_ptr(), len(x))])
    finally:
        graph.close()
    return result
