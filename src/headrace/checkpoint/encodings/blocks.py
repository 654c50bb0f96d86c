"""Writers of ggml's blocks of 32 weights, from codes that other formats pack in other orders.

A nibble block of ggml has weight j in the low half of byte j and weight j + 16 in the high half. Other formats store weights
in order, two per byte. Conversion is arithmetic on eight bytes at a time, since numpy's loops are fastest where they are long
and plain: no gathers, no loop of less than thousands.
"""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from headrace.checkpoint.encodings.encoding import Bytes, Floats

Words: TypeAlias = npt.NDArray[np.uint64]
Halves: TypeAlias = npt.NDArray[np.float16]
_LOW_HALVES = np.uint64(0x0F0F0F0F0F0F0F0F)
_FOUR = np.uint64(4)
_TILE = 128  # columns transposed at a time


def _block(size: int, **fields: tuple[str, int]) -> np.dtype[Any]:
    formats, offsets = zip(*fields.values(), strict=True)
    return np.dtype({"names": list(fields), "formats": list(formats), "offsets": list(offsets), "itemsize": size})


# Two words hold the 16 bytes of nibbles; their writes are long strided loops.
# A second field covers the same bytes, for writers of other widths.
BLOCKS: dict[str, np.dtype[Any]] = {
    "Q4_0": _block(18, d=("<f2", 0), low=("<u8", 2), high=("<u8", 10), nibbles=("16u1", 2)),
    "Q4_1": _block(20, d=("<f2", 0), m=("<f2", 2), low=("<u8", 4), high=("<u8", 12), nibbles=("16u1", 4)),
    "MXFP4": _block(17, d=("u1", 0), low=("<u8", 1), high=("<u8", 9)),
    "Q8_0": _block(34, d=("<f2", 0), q=("4<u8", 2), quarters=("8<u4", 2)),
}


def blocks_of(out: Bytes, type_name: str, columns: int) -> npt.NDArray[Any]:
    """Rows of packed weights as blocks with named fields: (rows, columns / 32)."""
    return out.view(BLOCKS[type_name]).reshape(-1, columns // 32)


def halves(packed: npt.NDArray[Any]) -> Words:
    """Ordered nibbles, two per byte, expanded to a byte each: (..., bytes) to (..., bytes / 4) words.

    Byte 2 i of the result holds the low nibble of byte i, and byte 2 i + 1 the high one.
    """
    words: Words = packed.view(np.uint8).astype(np.uint16).view(np.uint64)
    words |= words << _FOUR
    words &= _LOW_HALVES
    return words


def write_nibbles(blocks: npt.NDArray[Any], first: Words, second: Words, third: Words, fourth: Words) -> None:
    """Write a block's 32 nibbles, eight from each word of `halves`, to the fields `low` and `high`."""
    np.bitwise_or(first, third << _FOUR, out=blocks["low"])
    np.bitwise_or(second, fourth << _FOUR, out=blocks["high"])


def write_ordered_nibbles(blocks: npt.NDArray[Any], packed: Bytes) -> None:
    """Write ordered nibbles, 16 bytes per block, to blocks of any shape."""
    words = halves(packed).reshape(*blocks.shape, 4)
    write_nibbles(blocks, words[..., 0], words[..., 1], words[..., 2], words[..., 3])


def half(values: Floats) -> Halves:
    """Finite values within fp16's range, rounded to nearest fp16: three times as fast as numpy's conversion.

    A factor of 2^-112 turns fp32's exponents into fp16's, subnormals included; then 13 bits are rounded away.
    """
    words = (values * np.float32(2.0**-112)).view(np.uint32)
    signs = words >> np.uint32(16) & np.uint32(0x8000)
    odd = words >> np.uint32(13) & np.uint32(1)
    words += odd
    words += np.uint32(0xFFF)
    words >>= np.uint32(13)
    words &= np.uint32(0x7FFF)
    words |= signs
    return words.astype(np.uint16).view(np.float16)


def transpose(source: npt.NDArray[Any], target: npt.NDArray[Any]) -> None:
    """Write (rows, columns) to `target`, (columns, rows) of the same type.

    Goes through a buffer whose rows are an odd number of cache lines. Rows of a source of 4096 columns all fall into the same
    few cache sets. Without the buffer that is six times as slow (350 against 2200 million values a second).
    """
    rows, columns = source.shape
    buffer = np.empty((rows, _TILE + 64 // target.itemsize), target.dtype)
    for start in range(0, columns, _TILE):
        tile = buffer[:, : min(_TILE, columns - start)]
        tile[:] = source[:, start : start + _TILE]
        target[start : start + _TILE] = tile.T
