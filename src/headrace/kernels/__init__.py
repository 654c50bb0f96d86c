"""How packed weights multiply: rows of activations times rows of weights that stay in their file's own format.

Two paths behind one call. Few rows: ggml's dot products on the packed blocks; a row's result does not depend on the
rows beside it. Many rows: blocks of weights are unpacked and multiplied by torch; faster from a measured number of rows
on, and not row-invariant. `torch_reference` is the slow twin of both.
"""

from typing import TYPE_CHECKING, Any

from headrace.kernels.limits import FEW_ROWS
from headrace.kernels.piece import Piece

if TYPE_CHECKING:
    from headrace.kernels.multiply import Kernels
    from headrace.kernels.torch_reference import ReferenceKernels

__all__ = ["FEW_ROWS", "Kernels", "Piece", "ReferenceKernels", "make_kernels"]


def make_kernels(
    threads: int, bf16_many_rows: bool = True, row_invariant: bool = True
) -> "tuple[Kernels | ReferenceKernels, str]":
    """(kernels, why these): ggml's, or the slow twin where ggml is not installed. Arguments as for `Kernels`."""
    try:
        from headrace.kernels.multiply import Kernels
    except ImportError as error:
        from headrace.kernels.torch_reference import ReferenceKernels

        return ReferenceKernels(threads), f"ggml cannot be loaded ({error}): slow kernels, expect 20 times the time"
    return Kernels(threads, bf16_many_rows, row_invariant), "ggml"


def __getattr__(name: str) -> Any:
    """`Kernels` and its slow twin are imported when used: the planner only needs the limits."""
    if name == "Kernels":
        from headrace.kernels.multiply import Kernels

        return Kernels
    if name == "ReferenceKernels":
        from headrace.kernels.torch_reference import ReferenceKernels

        return ReferenceKernels
    raise AttributeError(name)
