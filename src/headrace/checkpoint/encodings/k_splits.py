"""K-splits of integers stored transposed, [in, out], as GPTQ and AWQ do.

A ggml row holds the inputs of one output; they would have to be gathered from the whole tensor. So the reduction dimension is
cut into K-splits, of a group's inputs where possible. A K-split's weights, scales and zero points are one contiguous range
each. y is the sum over K-splits of x's columns times the K-split's rows. Decoding transposes the words of a K-split.

Precision is that of row-major integers (`integers.py`). With act-order (`desc_act`) a K-split needs the scales of all groups:
in a matrix of 8192 inputs as many bytes again as its weights. Its weights become fp16.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.checkpoint.encodings.blocks import Halves, blocks_of, half, transpose
from headrace.checkpoint.encodings.encoding import Bytes, Floats, Read, bounded, floats, order_of
from headrace.checkpoint.tensor import Tensor, block_of
from headrace.errors import CheckpointError

WIDTHS = (128, 64, 32)
_OUTPUTS = 512  # outputs converted to fp16 at a time


def k_split_width(inputs: int, widths: Sequence[int]) -> int:
    """Inputs of a K-split: the first width that divides `inputs`, else all of them."""
    return next((width for width in widths if inputs % width == 0), inputs)


def group_widths(group: int) -> tuple[int, ...]:
    """K-split widths in order of preference. A group's comes first: a K-split then has one scale per output."""
    return (group, *WIDTHS) if 32 <= group <= 256 and group % 32 == 0 else WIDTHS


@dataclass(frozen=True, kw_only=True, slots=True)
class KSplitIntegers(ABC):
    """K-splits of `type` from integers stored transposed. Subclasses define the packing of words."""

    label: str
    type: str
    bits: int
    inputs: int
    outputs: int
    width: int  # inputs per K-split
    group: int  # inputs per scale
    weight: Tensor
    scale: Tensor  # (groups, outputs)
    zero: Tensor  # (groups, outputs * bits / 32) words
    symmetric: bool
    order: Tensor | None = None  # group of each input, with act-order

    @property
    def row_multiple(self) -> int:
        """Rows of a whole K-split."""
        return self.outputs

    def reads(self, first: int, last: int) -> Sequence[Read]:
        """See `Encoding.reads`."""
        start, end = self._inputs(first, last)
        first_group, last_group = self._groups(start, end)
        scale_bytes, zero_bytes = self.outputs * block_of(self.scale.type)[1], self.zero.row_bytes
        input_bytes = self.weight.nbytes // self.inputs
        reads = [
            (self.weight, start * input_bytes, (end - start) * input_bytes),
            (self.scale, first_group * scale_bytes, (last_group - first_group) * scale_bytes),
            (self.zero, first_group * zero_bytes, (last_group - first_group) * zero_bytes),
        ]
        if self.order is not None:
            reads.append((self.order, start * 4, (end - start) * 4))
        return reads

    def decode(self, raw: Sequence[Bytes], first: int, last: int, out: Bytes) -> None:
        """See `Encoding.decode`."""
        start, end = self._inputs(first, last)
        first_group, last_group = self._groups(start, end)
        count = (end - start) // self.width
        words = raw[0].view(np.uint32).reshape(count, -1, self.weight.columns)
        scales = bounded(floats(raw[1], self.scale.type), self.scale.name, 1 << self.bits).reshape(-1, self.outputs)
        zeros = self._zeros(raw[2].view(np.uint32).reshape(last_group - first_group, -1))
        group: npt.NDArray[Any] = np.arange(start, end) // self.group - first_group
        if self.order is not None:
            group = order_of(raw[3], self.scale.rows, self.order)
        target = out.reshape(count, -1)
        for split, groups in enumerate(group.reshape(count, self.width)):
            if self.type == "F16":
                self._floats(words[split], scales, zeros, groups, target[split])
            else:
                self._blocks(words[split], scales, zeros, groups[::32], target[split])

    def _inputs(self, first: int, last: int) -> tuple[int, int]:
        return first // self.outputs * self.width, last // self.outputs * self.width

    def _groups(self, start: int, end: int) -> tuple[int, int]:
        if self.order is not None:
            return 0, self.scale.rows
        return start // self.group, -(-end // self.group)

    def _zeros(self, words: npt.NDArray[np.uint32]) -> Floats:
        """Zero points as fp32: (groups, outputs). With symmetric weights they must be half the range."""
        zeros = self.zeros_of(words)
        middle = 1 << (self.bits - 1)
        if self.symmetric and not (zeros == middle).all():
            raise CheckpointError(
                f"tensor `{self.zero.name}` has the zero point {int(zeros[zeros != middle][0])}, symmetric weights of"
                f" {self.bits} bits have {middle}",
                hint='set "sym" to false in the `quantization_config` of config.json',
            )
        return zeros.astype(np.float32)

    def _blocks(
        self, words: npt.NDArray[np.uint32], scales: Floats, zeros: Floats, groups: npt.NDArray[Any], out: Bytes
    ) -> None:
        blocks = blocks_of(out, self.type, self.width)
        for place, group in enumerate(groups):
            d: Halves = scales[group].astype(np.float16)
            blocks["d"][:, place] = d
            if self.type == "Q4_1":
                blocks["m"][:, place] = -d.astype(np.float32) * zeros[group]
            self.write(blocks[:, place], words, place)

    def _floats(
        self, words: npt.NDArray[np.uint32], scales: Floats, zeros: Floats, groups: npt.NDArray[Any], out: Bytes
    ) -> None:
        codes, target = self.codes(words), out.view(np.float16).reshape(self.outputs, self.width)
        for start in range(0, self.outputs, _OUTPUTS):
            part = slice(start, start + _OUTPUTS)
            zero = np.float32(1 << (self.bits - 1)) if self.symmetric else zeros[:, part].take(groups, axis=0)
            weights = codes[:, part] - zero
            weights *= scales[:, part].take(groups, axis=0)
            transpose(half(weights), target[part])

    @abstractmethod
    def zeros_of(self, words: npt.NDArray[np.uint32]) -> npt.NDArray[Any]:
        """Zero points as stored: (groups, words) to (groups, outputs)."""

    @abstractmethod
    def codes(self, words: npt.NDArray[np.uint32]) -> Bytes:
        """Integers of a K-split: (rows of words, columns of words) to (width, outputs)."""

    @abstractmethod
    def write(self, blocks: npt.NDArray[Any], words: npt.NDArray[np.uint32], place: int) -> None:
        """Write the K-split's inputs [32 place, 32 place + 32) to one block per output: (outputs,)."""


def group_of(inputs: int, groups: int, configured: Any, name: str) -> int:
    """Inputs of a group: as configured if that fits the number of groups, else equal shares."""
    if type(configured) is int and configured > 0 and -(-inputs // configured) == groups:
        return min(configured, inputs)
    if groups < 1 or inputs % groups:
        raise CheckpointError(f"tensor `{name}` has {groups} groups of scales for {inputs} inputs")
    return inputs // groups


def integer_type(bits: int, symmetric: bool, group: int, width: int) -> str:
    """ggml format that holds the integers unchanged, else F16."""
    if group % 32 or width % 32 or (bits == 8 and not symmetric):
        return "F16"
    return "Q8_0" if bits == 8 else "Q4_0" if symmetric else "Q4_1"
