"""ggml's repacked layout: blocks of eight rows stored together, so that one load of activations serves eight dot products.

On AVX-512 Q4_K matmuls are 1.03 to 1.4 times as fast for one row, 1.3 to 2.3 for several. It is for pinned weights:
a copy where memory holds both, or in place. It has the same values; sums are added in another order, so results differ from
the plain layout's in the last bits.

ggml only repacks tensors in its own buffer type, which it recognises by two fields of the tensor. A tiny tensor in such
a buffer supplies both fields for tensors over our own memory.
"""

import ctypes
from typing import Any

from headrace.checkpoint.tensor import row_bytes
from headrace.kernels.ggml import InitParams, library, type_number

ROWS = 8  # rows repacked together
# Formats that ggml repacks on some processor; ggml says which of them it repacks here.
_CANDIDATES = ("Q4_K", "Q4_0", "IQ4_NL", "Q2_K")
_BLOCK_BYTES = 1 << 20  # bytes that are repacked in place at a time

_Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_silent = _Log(lambda level, text, data: None)


class Repacking:
    """The formats that this processor can repack. One for each `Kernels`."""

    def __init__(self) -> None:
        self._repacked_fields: dict[str, tuple[int, int]] = {}  # (`buffer`, `extra`) of a repacked tensor, by type
        kind = _buffer_type()
        self._buffer = None
        self._context = None
        if kind is None:
            return
        ggml = library()
        ggml.ggml_log_set(_silent, None)  # it reports every tensor on stderr
        self._context = ggml.ggml_init(InitParams(16 << 10, None, True))
        tensors = {name: ggml.ggml_new_tensor_2d(self._context, type_number(name), 256, ROWS) for name in _CANDIDATES}
        self._buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(self._context, kind)
        for name, tensor in tensors.items():
            if self._buffer and tensor.contents.extra:
                self._repacked_fields[name] = (tensor.contents.buffer, tensor.contents.extra)

    def takes(self, type_name: str, rows: int) -> bool:
        """True if `rows` rows of this format can be repacked."""
        return type_name in self._repacked_fields and rows % ROWS == 0

    @property
    def types(self) -> frozenset[str]:
        """The formats that can be repacked here."""
        return frozenset(self._repacked_fields)

    def mark(self, type_name: str, tensor: Any) -> None:
        """Tell ggml that this tensor's data is repacked."""
        tensor.buffer, tensor.extra = self._repacked_fields[type_name]

    def copy(self, type_name: str, rows: int, columns: int, source: int, target: int) -> None:
        """Write the repacked form of packed rows at `source` to `target`; both take the same bytes."""
        ggml = library()
        context = ggml.ggml_init(InitParams(4 << 10, None, True))
        tensor = ggml.ggml_new_tensor_2d(context, type_number(type_name), columns, rows)
        self.mark(type_name, tensor.contents)
        tensor.contents.data = target
        ggml.ggml_backend_tensor_set(tensor, source, 0, ggml.ggml_nbytes(tensor))
        ggml.ggml_free(context)

    def overwrite(self, type_name: str, rows: int, columns: int, address: int) -> None:
        """Repack rows where they lie."""
        stride = row_bytes(type_name, columns)
        step = max(ROWS, _BLOCK_BYTES // stride // ROWS * ROWS)
        block = (ctypes.c_uint8 * (step * stride))()
        for first in range(0, rows, step):
            count = min(step, rows - first)
            at = address + first * stride
            ctypes.memmove(block, at, count * stride)
            self.copy(type_name, count, columns, ctypes.addressof(block), at)

    def close(self) -> None:
        """Free ggml's buffer and context."""
        if self._buffer:
            library().ggml_backend_buffer_free(self._buffer)
            library().ggml_free(self._context)
        self._buffer, self._repacked_fields = None, {}


def _buffer_type() -> int | None:
    """ggml's buffer type for repacked weights, or None where this build has none."""
    ggml = library()
    registry = ggml.ggml_backend_cpu_reg()
    address = ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return None
    list_types = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)
    types = list_types(ggml.ggml_backend_reg_dev_get(registry, 0))
    at = 0
    while types and types[at]:
        if ggml.ggml_backend_buft_name(types[at]) == b"CPU_REPACK":
            return int(types[at])
        at += 1
    return None
