"""Bindings of the ggml functions that we call, to the available build that suits this processor best.

A build is a folder of shared libraries. One has ggml's tensors; one or several have its kernels, each for some
instruction set. The package transcribe-cpp-native carries kernels for a dozen processors and needs no compiler. Otherwise
ggml-python, which is compiled on installation, has a build. HEADRACE_GGML names another folder.
"""

import ctypes
import functools
import importlib.util
import os
from collections.abc import Iterator
from ctypes import POINTER, c_bool, c_char, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any, TypeAlias

import gguf

from headrace.errors import HeadraceError

# Packages that carry a build, and the folders in them.
_PACKAGES = (("transcribe_cpp_native", "_native"), ("ggml", "lib"))
_OBJECT_BYTES = 32  # ggml's header before a tensor in a context


class InitParams(ctypes.Structure):
    """Parameters of a context: its memory for bookkeeping; `no_alloc`: none for the tensors' data."""

    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class GgmlTensor(ctypes.Structure):
    """A tensor: `ne` are its sizes, innermost first, and `nb` its strides in bytes."""


GgmlTensor._fields_ = [
    ("type", c_int),
    ("buffer", c_void_p),
    ("ne", c_int64 * 4),
    ("nb", c_size_t * 4),
    ("op", c_int),
    ("op_params", c_int32 * 16),
    ("flags", c_int32),
    ("src", POINTER(GgmlTensor) * 10),
    ("view_src", POINTER(GgmlTensor)),
    ("view_offs", c_size_t),
    ("data", c_void_p),
    ("name", c_char * 64),
    ("extra", c_void_p),
    ("padding", c_char * 8),
]


class GgmlPlan(ctypes.Structure):
    """Plan of a graph's computation: its scratch and its threads."""

    _fields_ = [
        ("work_size", c_size_t),
        ("work_data", c_void_p),
        ("n_threads", c_int),
        ("threadpool", c_void_p),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("use_ref", c_bool),
        ("reserved", c_char * 64),  # for builds in which it is longer
    ]


class ThreadpoolParams(ctypes.Structure):
    """Threads that wait for graphs; `poll`: how long they spin before they sleep, 0 to 100."""

    _fields_ = [
        ("cpumask", c_bool * 512),
        ("n_threads", c_int),
        ("prio", c_int),
        ("poll", c_uint32),
        ("strict_cpu", c_bool),
        ("paused", c_bool),
    ]


ToFloat = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)


class TypeTraits(ctypes.Structure):
    """Layout of a quantisation: elements and bytes of a block, and the function that unpacks a row."""

    _fields_ = [
        ("type_name", c_char_p),
        ("blck_size", c_int64),
        ("blck_size_interleave", c_int64),
        ("type_size", c_size_t),
        ("is_quantized", c_bool),
        ("to_float", ToFloat),
        ("from_float_ref", c_void_p),
    ]


class KernelTraits(ctypes.Structure):
    """Kernels of a quantisation, and the format in which its dot products take activations."""

    _fields_ = [("from_float", c_void_p), ("vec_dot", c_void_p), ("vec_dot_type", c_int), ("nrows", c_int64)]


_TensorPointer = POINTER(GgmlTensor)
_Functions: TypeAlias = dict[str, tuple[Any, list[Any]]]  # result and arguments, by name
_BASE: _Functions = {
    "ggml_version": (c_char_p, []),
    "ggml_tensor_overhead": (c_size_t, []),
    "ggml_log_set": (None, [c_void_p, c_void_p]),
    "ggml_init": (c_void_p, [InitParams]),
    "ggml_free": (None, [c_void_p]),
    "ggml_new_tensor_2d": (_TensorPointer, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_new_tensor_4d": (_TensorPointer, [c_void_p, c_int, c_int64, c_int64, c_int64, c_int64]),
    "ggml_nbytes": (c_size_t, [_TensorPointer]),
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
    "ggml_mul_mat": (_TensorPointer, [c_void_p, _TensorPointer, _TensorPointer]),
    "ggml_cast": (_TensorPointer, [c_void_p, _TensorPointer, c_int]),
    "ggml_cont": (_TensorPointer, [c_void_p, _TensorPointer]),
    "ggml_cpy": (_TensorPointer, [c_void_p, _TensorPointer, _TensorPointer]),
    "ggml_get_rows": (_TensorPointer, [c_void_p, _TensorPointer, _TensorPointer]),
    "ggml_soft_max_ext": (_TensorPointer, [c_void_p, _TensorPointer, c_void_p, c_float, c_float]),
    "ggml_out_prod": (_TensorPointer, [c_void_p, _TensorPointer, _TensorPointer]),
    "ggml_rms_norm": (_TensorPointer, [c_void_p, _TensorPointer, c_float]),
    "ggml_silu": (_TensorPointer, [c_void_p, _TensorPointer]),
    **{f"ggml_{name}": (_TensorPointer, [c_void_p] + 2 * [_TensorPointer]) for name in ("add", "sub", "mul", "div")},
    "ggml_new_graph_custom": (c_void_p, [c_void_p, c_size_t, c_bool]),
    "ggml_build_forward_expand": (None, [c_void_p, _TensorPointer]),
    "ggml_get_type_traits": (POINTER(TypeTraits), [c_int]),
    "ggml_quantize_chunk": (
        c_size_t,
        [c_int, POINTER(c_float), c_void_p, c_int64, c_int64, c_int64, c_void_p],
    ),
    "ggml_threadpool_params_default": (ThreadpoolParams, [c_int]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_reg_dev_get": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_tensor_set": (None, [_TensorPointer, c_void_p, c_size_t, c_size_t]),
}
_KERNELS: _Functions = {
    "ggml_cpu_init": (None, []),
    "ggml_get_type_traits_cpu": (POINTER(KernelTraits), [c_int]),
    "ggml_backend_cpu_reg": (c_void_p, []),
    "ggml_graph_plan": (GgmlPlan, [c_void_p, c_int, c_void_p]),
    "ggml_graph_compute": (c_int, [c_void_p, POINTER(GgmlPlan)]),
    "ggml_threadpool_new": (c_void_p, [POINTER(ThreadpoolParams)]),
    "ggml_threadpool_free": (None, [c_void_p]),
    "ggml_cpu_fp32_to_bf16": (None, [c_void_p, c_void_p, c_int64]),
}


class Library:
    """ggml's functions as attributes, loaded from `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        base = ctypes.CDLL(str(_libraries(folder, "ggml-base")[0]))
        self._bind(base, _BASE)
        if self.ggml_tensor_overhead() != _OBJECT_BYTES + ctypes.sizeof(GgmlTensor):
            raise OSError(f"the tensors of ggml {self.version} are not laid out as we know them")
        kernels = [ctypes.CDLL(str(path)) for path in _libraries(folder, "ggml-cpu")]
        best = max(kernels, key=_score)
        if _score(best) == 0:
            raise OSError("it has no kernels for this processor")
        self._bind(best, _KERNELS)
        self.ggml_cpu_init()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    @property
    def version(self) -> str:
        """ggml's own version."""
        return str(self.ggml_version().decode())

    def _bind(self, library: ctypes.CDLL, functions: _Functions) -> None:
        for name, (result, arguments) in functions.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)


def type_number(name: str) -> int:
    """ggml's number for a quantisation, by its name in the GGUF file."""
    return int(gguf.GGMLQuantizationType[name])


def tile_activations(type_name: str) -> str | None:
    """The activation format of ggml's tile kernel for these weights; None: it has none that is row-invariant."""
    traits = library().ggml_get_type_traits_cpu(type_number(type_name)).contents
    taken = gguf.GGMLQuantizationType(traits.vec_dot_type).name
    return taken if taken == "Q8_K" or type_name in _TILED_FLOATS else None


# Formats that ggml's copy of tinyBLAS multiplies: a result does not depend on its place in a tile.
_TILED_FLOATS = ("F16", "BF16", "F32")


@functools.cache
def library() -> Library:
    """ggml, loaded once.

    Raises:
        HeadraceError: there is no build that runs here.
    """
    reasons = []
    for folder in _folders():
        try:
            return Library(folder)
        except (OSError, IndexError, ValueError, AttributeError) as reason:  # the last: a function is missing
            reasons.append(f"{folder.name}: {reason}")
    raise HeadraceError(
        "no build of ggml runs here" + "".join(f"; {reason}" for reason in reasons),
        hint="pip install ggml-python, which compiles one, or name a folder with libggml-base and libggml-cpu in HEADRACE_GGML",
    )


def _folders() -> Iterator[Path]:
    if own := os.environ.get("HEADRACE_GGML"):
        yield Path(own)
        return
    for package, inside in _PACKAGES:
        found = importlib.util.find_spec(package)
        for location in (found.submodule_search_locations or []) if found else []:
            yield Path(location) / inside


def _libraries(folder: Path, name: str) -> list[Path]:
    return sorted(
        path for path in folder.glob(f"*{name}*") if path.suffix in (".so", ".dylib", ".dll") and not path.is_symlink()
    ) or sorted(folder.glob(f"*{name}*.so"))


def _score(kernels: ctypes.CDLL) -> int:
    """Score of a library on this processor; 0: it does not run. A build with a single library has none: 1."""
    score = getattr(kernels, "ggml_backend_score", None)
    return int(score()) if score is not None else 1
