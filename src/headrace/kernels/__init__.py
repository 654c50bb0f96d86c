"""Matmuls with packed weights: rows of activations times rows of weights that stay in their file's own format.

Three paths behind one call. Decode rows: ggml's dot-product kernel on the packed blocks; a row's result does not depend on
the rows beside it. Prefill rows: ggml's tile kernel in the formats that measured faster with it; it unpacks some weights for
all rows at once. Other formats: blocks of weights are unpacked and multiplied by torch, which is not row-invariant.
`torch_reference` is the reference implementation.
"""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from headrace.errors import HeadraceError
from headrace.kernels.backend import Backend
from headrace.kernels.thresholds import DECODE_MAX_ROWS
from headrace.kernels.weight_slice import WeightSlice
from headrace.limits import check_threads

if TYPE_CHECKING:
    from headrace.kernels.matmul import Kernels
    from headrace.kernels.torch_reference import ReferenceKernels

__all__ = ["DECODE_MAX_ROWS", "Backend", "Kernels", "ReferenceKernels", "WeightSlice", "make_kernels"]


def make_kernels(
    threads: int, bf16_prefill: bool = True, row_invariant: bool = True, tiled: Collection[str] = ()
) -> tuple[Backend, str]:
    """(backend, reason): ggml's, or the reference implementation where no build of ggml runs. Arguments as for `Kernels`."""
    check_threads(threads)
    try:
        from headrace.kernels.matmul import Kernels

        return Kernels(threads, bf16_prefill, row_invariant, tiled), "ggml"
    except (ImportError, HeadraceError) as error:
        from headrace.kernels.torch_reference import ReferenceKernels

        return ReferenceKernels(threads), f"ggml cannot be loaded ({error}): slow kernels, expect 20 times the time"


def __getattr__(name: str) -> Any:
    """Import `Kernels` and its reference implementation when used: the planner only needs the thresholds."""
    if name == "Kernels":
        from headrace.kernels.matmul import Kernels

        return Kernels
    if name == "ReferenceKernels":
        from headrace.kernels.torch_reference import ReferenceKernels

        return ReferenceKernels
    raise AttributeError(name)
