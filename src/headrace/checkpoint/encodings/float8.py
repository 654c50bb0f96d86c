"""FP8 with separate scales: per block of 128 x 128 (DeepSeek, Qwen), per tensor, output or matrix, and MXFP8.

A table of 256 values per scale decodes to fp16. An FP8 value (at most 4 significant bits) times its scale is rounded once, to
11 significant bits. The error is 2^-12 of the weight, where the FP8 step itself is 2^-4 of it. Weights below 6e-5 lose more,
down to steps of 6e-8. A scale with which the largest FP8 value exceeds fp16 is an error and never an infinity. Activation
scales are dropped: activations are not quantised to FP8 here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headrace.checkpoint.encodings.encoding import (
    CHUNK_WEIGHTS,
    FLOAT_TYPES,
    FP16_MAX,
    Bytes,
    Floats,
    Grid,
    Read,
    Virtual,
    floats,
    require,
    scale_tensor,
    scaling,
)
from headrace.checkpoint.tensor import Tensor, block_of
from headrace.errors import CheckpointError

LARGEST = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0}
_SCALE_TYPES = (*FLOAT_TYPES, "F8_E8M0", "U8")
# Min weights per scale for which a table of 256 saves time. The values are the same either way.
_SCALE_WEIGHTS = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Float8:
    """fp16 rows from FP8 values and their scales."""

    label: str
    weight: Tensor
    scale: Tensor
    grid: Grid
    columns_per_scale: int
    row_multiple: int = 1

    @property
    def groups(self) -> int:
        """Scales per row."""
        return -(-self.weight.columns // self.columns_per_scale)

    def reads(self, first: int, last: int) -> Sequence[Read]:
        """See `Encoding.reads`."""
        columns = self.weight.columns
        scale_bytes = self.groups * block_of(self.scale.type)[1]
        return (
            (self.weight, first * columns, (last - first) * columns),
            self.grid.read(self.scale, scale_bytes, first, last),
        )

    def decode(self, raw: Sequence[Bytes], first: int, last: int, out: Bytes) -> None:
        """See `Encoding.decode`."""
        codes = raw[0].reshape(last - first, self.weight.columns)
        target = out.view(np.float16).reshape(codes.shape)
        scales = floats(raw[1], self.scale.type).reshape(-1, self.groups)
        self._check(scales)
        rows = self.grid.rows(first, last)
        if scales.size * _SCALE_WEIGHTS > codes.size:
            self._multiply(codes, scales, rows, target)
        else:
            self._look_up(codes, scales, rows, target)

    def _check(self, scales: Floats) -> None:
        largest = float(np.abs(scales).max()) * LARGEST[self.weight.type]
        if not largest <= FP16_MAX:
            raise CheckpointError(
                f"tensor `{self.scale.name}` allows weights of {largest:.4g}, fp16 ends at {FP16_MAX:.0f}",
                hint="the file is damaged; download it again",
            )

    def _look_up(
        self, codes: Bytes, scales: Floats, rows: npt.NDArray[np.intp], target: npt.NDArray[np.float16]
    ) -> None:
        with np.errstate(invalid="ignore"):  # E5M2 infinity times a scale of 0
            values = TABLES[self.weight.type] * scales[:, :, None]
        tables = values.astype(np.float16).view(np.uint16).ravel()
        in_row = np.repeat(np.arange(self.groups) * 256, self.columns_per_scale)[: codes.shape[1]]
        of_row = (rows * (self.groups * 256))[:, None]
        parts = list(_chunks(codes))
        buffer = np.empty(codes[parts[0]].shape, np.intp)
        for part in parts:
            index = buffer[: len(codes[part])]
            np.copyto(index, codes[part])
            if len(scales) > 1:
                index += of_row[part]
            if self.groups > 1:
                index += in_row
            tables.take(index, out=target[part].view(np.uint16), mode="wrap")

    def _multiply(
        self, codes: Bytes, scales: Floats, rows: npt.NDArray[np.intp], target: npt.NDArray[np.float16]
    ) -> None:
        for part in _chunks(codes):
            values = TABLES[self.weight.type].take(codes[part])
            values *= np.repeat(scales[rows[part]], self.columns_per_scale, axis=1)[:, : codes.shape[1]]
            target[part] = values


def _chunks(codes: Bytes) -> Iterator[slice]:
    step = max(1, CHUNK_WEIGHTS // codes.shape[1])
    return (slice(first, first + step) for first in range(0, len(codes), step))


def _table(exponent_bits: int) -> Floats:
    """Values of all 256 codes with IEEE's bias; `_tables` sets the codes beyond the largest."""
    codes = np.arange(256)
    mantissa_bits = 7 - exponent_bits
    exponent, mantissa = (codes & 127) >> mantissa_bits, codes & ((1 << mantissa_bits) - 1)
    significand = np.where(exponent > 0, 1.0, 0.0) + mantissa / (1 << mantissa_bits)
    values = np.ldexp(significand, np.maximum(exponent, 1) - ((1 << (exponent_bits - 1)) - 1))
    signed: Floats = np.where(codes > 127, -values, values).astype(np.float32)
    return signed


def _tables() -> dict[str, Floats]:
    """Values of all codes by type. `F8_E4M3` of checkpoints has no infinities; only codes 127 and 255 are NaN."""
    e4m3, e5m2 = _table(4), _table(5)
    e4m3[[127, 255]] = np.nan
    e5m2[[124, 252]] = np.inf, -np.inf
    e5m2[[125, 126, 127, 253, 254, 255]] = np.nan
    return {"F8_E4M3": e4m3, "F8_E5M2": e5m2}


TABLES = _tables()


def float8(tensors: Mapping[str, Tensor], block: tuple[int, int] | None) -> Iterator[Virtual]:
    """A virtual tensor for each FP8 tensor. `block` is the configured (rows, columns) per scale, if any.

    Raises:
        CheckpointError: a scale is missing, or its shape fits no scaling scheme.
    """
    for name, tensor in tensors.items():
        if tensor.type not in LARGEST or len(tensor.shape) < 2:
            continue
        suffix = next((s for s in ("_scale_inv", "_scale") if name + s in tensors), "_scale_inv")
        scale = scale_tensor(tensors, name, name + suffix)
        require(scale, _SCALE_TYPES)
        grid, columns = scaling(tensor, tensor.shape, scale, block)
        encoding = Float8(
            label=f"FP8 {tensor.type[3:]}, a scale for {grid.per} x {columns}",
            weight=tensor,
            scale=scale,
            grid=grid,
            columns_per_scale=columns,
        )
        yield Virtual(name=name, shape=tensor.shape, type="F16", encoding=encoding, parts=(name, scale.name))
