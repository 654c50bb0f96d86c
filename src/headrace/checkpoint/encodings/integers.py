"""Row-major integers with separate scales, as compressed-tensors stores them: packed in words, or as bytes.

Where 32 divides the group, they are reordered to ggml's blocks: 4 bits symmetric are Q4_0, asymmetric Q4_1, 8 bits symmetric
Q8_0. The integers are kept exactly. Scales are rounded to fp16. BF16 and fp16 scales stay unchanged unless they are below
6e-5; an F32 scale loses 2^-12 of itself, and so does Q4_1's minimum, zero point times scale. All else (other groups,
act-order, 8 bits asymmetric) becomes fp16 weights, each rounded once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.checkpoint.encodings.blocks import blocks_of, half, write_ordered_nibbles
from headrace.checkpoint.encodings.encoding import (
    CHUNK_WEIGHTS,
    Bytes,
    Floats,
    Grid,
    Read,
    bounded,
    floats,
    order_of,
)
from headrace.checkpoint.tensor import Tensor, block_of

_SIGNS = np.uint64(0x8080808080808080)


@dataclass(frozen=True, kw_only=True, slots=True)
class Integers:
    """Rows of `type` from integers of `bits` bits: in I32 words unsigned, half the range is zero; in I8 signed."""

    label: str
    type: str
    bits: int
    columns: int
    weight: Tensor
    scale: Tensor
    grid: Grid  # scale rows of the weight's rows
    columns_per_scale: int
    zero: Tensor | None = None  # zero points, stored like the weights but packed along the outputs
    order: Tensor | None = None  # group of each column, with act-order
    row_multiple: int = 1

    @property
    def packed(self) -> bool:
        """True if the integers are packed in words."""
        return self.weight.type == "I32"

    @property
    def groups(self) -> int:
        """Scales per row."""
        return -(-self.columns // self.columns_per_scale)

    def reads(self, first: int, last: int) -> Sequence[Read]:
        """See `Encoding.reads`."""
        size = self.weight.row_bytes
        reads = [
            (self.weight, first * size, (last - first) * size),
            self.grid.read(self.scale, self.groups * block_of(self.scale.type)[1], first, last),
        ]
        if self.zero is not None:
            reads.append(self._zero_grid().read(self.zero, self.groups * block_of(self.zero.type)[1], first, last))
        if self.order is not None:
            reads.append((self.order, 0, self.order.nbytes))
        return reads

    def decode(self, raw: Sequence[Bytes], first: int, last: int, out: Bytes) -> None:
        """See `Encoding.decode`."""
        rows = last - first
        weights = raw[0].reshape(rows, self.weight.row_bytes)
        scales = floats(raw[1], self.scale.type).reshape(-1, self.groups)[self.grid.rows(first, last)]
        zeros = self._zeros(raw[2], first, last) if self.zero is not None else None
        target = out.reshape(rows, -1)
        step = max(1, CHUNK_WEIGHTS // self.columns)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            zero = None if zeros is None else zeros[part]
            if self.type == "F16":
                self._floats(weights[part], scales[part], zero, raw, target[part])
            else:
                self._blocks(weights[part], scales[part], zero, target[part])

    def _blocks(self, weights: Bytes, scales: Floats, zeros: npt.NDArray[Any] | None, out: Bytes) -> None:
        blocks = blocks_of(out.reshape(-1), self.type, self.columns)
        grouped = blocks.reshape(len(weights), self.groups, -1)
        d = bounded(scales, self.scale.name, 1 << self.bits).astype(np.float16)
        grouped["d"] = d[:, :, None]
        if self.type == "Q8_0":
            words = weights.reshape(-1).view(np.uint64).reshape(*blocks.shape, 4)
            np.bitwise_xor(words, _SIGNS if self.packed else np.uint64(0), out=blocks["q"])
            return
        if zeros is not None:
            grouped["m"] = (-d.astype(np.float32) * zeros)[:, :, None]
        write_ordered_nibbles(blocks, weights.reshape(-1))

    def _floats(
        self, weights: Bytes, scales: Floats, zeros: npt.NDArray[Any] | None, raw: Sequence[Bytes], out: Bytes
    ) -> None:
        codes = self._codes(weights).astype(np.float32)
        if zeros is not None:
            codes -= self._spread(zeros.astype(np.float32), raw)
        elif self.packed:
            codes -= 1 << (self.bits - 1)
        codes *= self._spread(bounded(scales, self.scale.name, 1 << self.bits), raw)
        out.view(np.float16)[:] = half(codes)

    def _spread(self, values: Floats, raw: Sequence[Bytes]) -> Floats:
        """One value per weight from one per group: (rows, groups) to (rows, columns)."""
        if self.order is not None:
            return values.take(order_of(raw[-1], self.groups, self.order), axis=1)
        return values.repeat(self.columns_per_scale, axis=1)[:, : self.columns]

    def _codes(self, weights: Bytes) -> npt.NDArray[Any]:
        """Stored integers of some rows: (rows, columns)."""
        if not self.packed:
            return weights.view(np.int8)
        return unpacked(weights.view(np.uint32), self.bits)[:, : self.columns]

    def _zero_grid(self) -> Grid:
        outputs = self.weight.shape[-2]
        return Grid(outputs=outputs, per=32 // self.bits) if self.packed else self.grid

    def _zeros(self, raw: Bytes, first: int, last: int) -> npt.NDArray[Any]:
        """Zero points in the integers' own range: (rows, groups)."""
        grid = self._zero_grid()
        if not self.packed:
            return raw.view(np.int8).reshape(-1, self.groups)[grid.rows(first, last)]
        words = raw.view(np.uint32).reshape(-1, self.groups)[grid.rows(first, last)]
        place = np.arange(first, last, dtype=np.uint32) % grid.outputs % grid.per
        return words >> (place * self.bits).astype(np.uint32)[:, None] & np.uint32((1 << self.bits) - 1)


def unpacked(words: npt.NDArray[np.uint32], bits: int) -> Bytes:
    """Integers packed in order in words, lowest bits first: (rows, words) to (rows, words * 32 / bits)."""
    stored = words.view(np.uint8)
    if bits == 8:
        return stored
    codes = np.empty((*stored.shape, 8 // bits), np.uint8)
    for place in range(8 // bits):
        codes[..., place] = stored >> np.uint8(place * bits) & np.uint8((1 << bits) - 1)
    return codes.reshape(len(words), -1)
