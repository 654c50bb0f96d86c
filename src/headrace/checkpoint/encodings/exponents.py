"""Lossless BF16 in three quarters of its bytes: exponents within a row are close, so four bits replace their byte.

The upper byte of a BF16 value is its sign and seven bits of its exponent; the lower byte is noise that no coder shortens. Each
row has a base. A value's nibble is its sign and a code c: 0 to 6 for the seven bits base + c, 7 for an escape. The seven bits
of an escape are stored separately. A stored row is a record; all records of a tensor have the same length:

    base (1 byte) | number of escapes (2 bytes) | nibbles (columns / 2, the first in the low half) | escapes | lower bytes

The row with the most escapes sets their space: any range of rows is one contiguous range of bytes. A few long numpy
loops decode 1.5 to 2.7 GB/s per core. Huffman codes would take 10 % fewer bytes and a library (docs/LEARNED.md). Nothing is
rounded, NaNs included.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.checkpoint.encodings.blocks import halves
from headrace.checkpoint.encodings.encoding import Bytes, Read, Settings, Virtual, require, scale_tensor
from headrace.checkpoint.tensor import Tensor
from headrace.errors import CheckpointError, UnsupportedError

METHOD = "headrace-exponents"
VERSION = 1
SUFFIX = ".exponents"
COLUMN_MULTIPLE = 8  # divisor of a row's columns: nibbles are read as words
MAX_COLUMNS = (1 << 16) - 1  # limit of the two bytes that count a row's escapes
_HEAD_BYTES = 3
_CODES = 7  # exponent values with a code
_ESCAPE = np.uint8(7)
_CHUNK_WEIGHTS = 1 << 18  # weights decoded at a time; 1 << 16 costs a fifth more in interpreter overhead
_SIGNS, _CODE_BITS = np.uint64(0x8080808080808080), np.uint64(0x0707070707070707)
_FOUR = np.uint64(4)
_DAMAGED = "the file is damaged; pack the model again"

Numbers = npt.NDArray[np.uint16]  # BF16 bit patterns


def record_bytes(columns: int, capacity: int) -> int:
    """Bytes of a record with space for `capacity` escapes."""
    return _HEAD_BYTES + columns // 2 + capacity + columns


@dataclass(frozen=True, kw_only=True, slots=True)
class Exponents:
    """BF16 rows from their records."""

    stored: Tensor
    columns: int
    row_multiple: int = 1
    label: str = "BF16, exponents in 4 bits"

    @property
    def capacity(self) -> int:
        """Escapes that fit into a record."""
        return self.stored.columns - record_bytes(self.columns, 0)

    def reads(self, first: int, last: int) -> Sequence[Read]:
        """See `Encoding.reads`."""
        return ((self.stored, first * self.stored.columns, (last - first) * self.stored.columns),)

    def decode(self, raw: Sequence[Bytes], first: int, last: int, out: Bytes) -> None:
        """See `Encoding.decode`."""
        records = raw[0].reshape(last - first, self.stored.columns)
        target = out.view(np.uint16).reshape(last - first, self.columns)
        step = max(1, _CHUNK_WEIGHTS // self.columns)
        for start in range(0, last - first, step):
            self._decode(records[start : start + step], target[start : start + step])

    def _decode(self, records: Bytes, target: Numbers) -> None:
        nibbles = halves(np.ascontiguousarray(records[:, _HEAD_BYTES : _HEAD_BYTES + self.columns // 2]))
        signs = nibbles << _FOUR
        signs &= _SIGNS
        nibbles &= _CODE_BITS
        upper = nibbles.view(np.uint8).reshape(target.shape)
        escaped = upper == _ESCAPE
        upper += self._bases(records)
        values = self._escapes(records)
        if np.count_nonzero(escaped) != len(values):
            raise self._damage(f"has {len(values)} escapes for {np.count_nonzero(escaped)} weights")
        if len(values):
            upper[escaped] = values
        nibbles |= signs
        np.copyto(target, upper)
        target <<= np.uint16(8)
        target |= records[:, -self.columns :]

    def _bases(self, records: Bytes) -> Bytes:
        bases = records[:, :1]
        if bases.max() > 128 - _CODES:
            raise self._damage(f"has a base of {bases.max()}, the largest is {128 - _CODES}")
        return bases

    def _escapes(self, records: Bytes) -> Bytes:
        """Values of all escapes, in row order."""
        counts = np.ascontiguousarray(records[:, 1:_HEAD_BYTES]).view("<u2")  # (rows, 1)
        if counts.max() > self.capacity:
            raise self._damage(f"counts {counts.max()} escapes in a row, its capacity is {self.capacity}")
        start = _HEAD_BYTES + self.columns // 2
        values: Bytes = records[:, start : start + self.capacity][np.arange(self.capacity) < counts]
        if len(values) and values.max() > 127:
            raise self._damage(f"has an escape of {values.max()}, the largest is 127")
        return values

    def _damage(self, what: str) -> CheckpointError:
        return CheckpointError(f"tensor `{self.stored.name}` {what}", hint=_DAMAGED)


def escapes_of(rows: Numbers) -> int:
    """Max escapes that a row needs: (rows, columns)."""
    return int(_best_bases(rows)[1].max())


def encode(rows: Numbers, capacity: int) -> Bytes:
    """Records of rows with at most `capacity` escapes: (rows, columns) to (rows, `record_bytes`)."""
    bases, counts = _best_bases(rows)
    assert counts.max() <= capacity
    upper = (rows >> np.uint16(8)).astype(np.uint8)
    values = upper & np.uint8(127)
    codes = np.minimum(values - bases[:, None], _ESCAPE)  # values below the base wrap around to large ones
    nibbles = codes | upper >> np.uint8(4) & np.uint8(8)
    escapes = np.zeros((len(rows), capacity), np.uint8)
    escapes[np.arange(capacity) < counts[:, None]] = values[codes == _ESCAPE]
    head = (bases[:, None], counts.astype("<u2")[:, None].view(np.uint8))
    packed = nibbles[:, 0::2] | nibbles[:, 1::2] << np.uint8(4)
    return np.concatenate((*head, packed, escapes, rows.astype(np.uint8)), axis=1)


def _best_bases(rows: Numbers) -> tuple[Bytes, npt.NDArray[np.intp]]:
    """Base of each row with the fewest escapes, and their number."""
    values = (rows >> np.uint16(8) & np.uint16(127)).astype(np.intp)
    values += np.arange(len(rows), dtype=np.intp)[:, None] * 128
    counts = np.bincount(values.ravel(), minlength=len(rows) * 128).reshape(-1, 128)
    sums = np.concatenate((np.zeros((len(rows), 1), np.intp), counts.cumsum(axis=1)), axis=1)
    covered = sums[:, _CODES:] - sums[:, :-_CODES]
    return covered.argmax(axis=1).astype(np.uint8), rows.shape[1] - covered.max(axis=1)


def exponents(tensors: Mapping[str, Tensor], settings: Settings) -> Iterator[Virtual]:
    """A virtual tensor for each packed one.

    Raises:
        UnsupportedError: another version of the layout.
        CheckpointError: records that are missing, or that do not fit the configuration.
    """
    if settings.get("version") != VERSION:
        raise UnsupportedError(
            f"the weights are packed in version {settings.get('version')!r} of the layout, this one reads {VERSION}",
            hint="get a newer headrace, or pack the model again",
        )
    columns = settings.get("columns")
    if not isinstance(columns, Mapping):
        raise CheckpointError("the configuration does not say how many columns packed tensors have", hint=_DAMAGED)
    for name, count in columns.items():
        stored = scale_tensor(tensors, name, name + SUFFIX)
        require(stored, ("U8",))
        _check(stored, count)
        shape = (*stored.shape[:-1], count)
        encoding = Exponents(stored=stored, columns=count)
        yield Virtual(name=name, shape=shape, type="BF16", encoding=encoding, parts=(stored.name,))


def _check(stored: Tensor, columns: Any) -> None:
    if type(columns) is not int or not 0 < columns <= MAX_COLUMNS or columns % COLUMN_MULTIPLE:
        raise CheckpointError(f"tensor `{stored.name}` would have {columns!r} columns", hint=_DAMAGED)
    least = record_bytes(columns, 0)
    if len(stored.shape) < 2 or 0 in stored.shape or not least <= stored.columns <= least + columns:
        raise CheckpointError(
            f"tensor `{stored.name}` of shape {stored.shape} holds no records of {columns} columns", hint=_DAMAGED
        )
