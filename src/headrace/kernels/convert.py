"""Convert packed rows from one format to another, in the calling thread. Used by readers, so it holds no state.

ggml's own quantiser searches for the best scales of a Q4_K block and converts 14 million weights/s. A self-speculation
draft does not need the best. Scales from the smallest and the largest weight come at ten times that speed.
"""

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.kernels.ggml import library, type_number

# Weights converted at a time: 1 MiB of fp32 between the two formats stays in the cache.
_CHUNK_WEIGHTS = 1 << 18


def convert(source_type: str, source: int, target_type: str, target: int, rows: int, columns: int) -> None:
    """Write `rows` packed rows at `source` to `target` in another format, rounded to nearest, without an importance matrix."""
    ggml = library()
    from_type, to_type = type_number(source_type), type_number(target_type)
    from_bytes, to_bytes = (int(ggml.ggml_row_size(kind, columns)) for kind in (from_type, to_type))
    step = max(1, _CHUNK_WEIGHTS // columns)
    plain = np.empty(step * columns, np.float32)
    floats: Any = plain.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    to_float = ggml.ggml_get_type_traits(from_type).contents.to_float
    for first in range(0, rows, step):
        count = min(step, rows - first)
        at = source + first * from_bytes
        if source_type == "F32":
            ctypes.memmove(floats, at, count * from_bytes)
        else:
            to_float(at, floats, count * columns)
        if target_type == "Q4_K":
            blocks = q4_k_blocks(plain[: count * columns])
            ctypes.memmove(target + first * to_bytes, blocks.ctypes.data, blocks.nbytes)
        else:
            ggml.ggml_quantize_chunk(to_type, floats, target + first * to_bytes, 0, count, columns, None)


def q4_k_blocks(weights: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Blocks of Q4_K, (weights / 256, 144) bytes: 8 x 32 weights of 4 bits.

    Each 32 weights have a scale and a minimum of 6 bits. A weight is d * scale * q - dmin * minimum (ggml's `block_q4_K`).
    """
    x = weights.reshape(-1, 8, 32)
    low = np.minimum(x.min(2), 0)
    scale = (x.max(2) - low) / 15
    d = (scale.max(1) / 63).astype(np.float16)
    dmin = (-low.min(1) / 63).astype(np.float16)
    scales = np.rint(scale * _inverse(d)[:, None]).clip(0, 63).astype(np.uint8)
    minima = np.rint(-low * _inverse(dmin)[:, None]).clip(0, 63).astype(np.uint8)
    step = d.astype(np.float32)[:, None] * scales
    q = x + (dmin.astype(np.float32)[:, None] * minima)[:, :, None]
    q *= _inverse(step)[:, :, None]
    q += 0.5
    np.clip(q, 0, 15.5, out=q)
    nibbles = q.astype(np.uint8)
    blocks = np.empty((len(x), 144), np.uint8)
    blocks[:, 0:2] = d[:, None].view(np.uint8)
    blocks[:, 2:4] = dmin[:, None].view(np.uint8)
    # Six bits of the first four scales and minima; the upper two bits of their bytes belong to the last four.
    blocks[:, 4:8] = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    blocks[:, 8:12] = minima[:, :4] | (minima[:, 4:] >> 4) << 6
    blocks[:, 12:16] = scales[:, 4:] & 15 | minima[:, 4:] << 4
    blocks[:, 16:] = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).reshape(len(x), 128)
    return blocks


def _inverse(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """1 / x, and 0 where x is 0."""
    floats = values.astype(np.float32)
    return np.divide(1, floats, out=np.zeros_like(floats), where=floats > 0)
