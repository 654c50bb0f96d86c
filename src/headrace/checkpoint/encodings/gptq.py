"""GPTQ: a word packs consecutive inputs of one output. 2, 4 and 8 bits, symmetric or not, with or without act-order.

`qweight` (inputs * bits / 32, outputs), `qzeros` (groups, outputs * bits / 32), `scales` (groups, outputs), `g_idx` (inputs).
The first format stores zero points minus one, by subtracting a word of ones; adding it back also undoes borrows between
neighbours. Version 2 (`gptq_v2`) stores zero points unchanged. Two bits become four, since ggml has no 2-bit block like it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.checkpoint.encodings.blocks import halves, write_nibbles
from headrace.checkpoint.encodings.encoding import FLOAT_TYPES, Bytes, Settings, Virtual, require, scale_tensor, setting
from headrace.checkpoint.encodings.integers import unpacked
from headrace.checkpoint.encodings.k_splits import KSplitIntegers, group_of, group_widths, integer_type, k_split_width
from headrace.checkpoint.tensor import Tensor
from headrace.errors import CheckpointError, UnsupportedError

_HINT = "get the model as GPTQ with 4 or 8 bits, as AWQ, as a GGUF, or in BF16"
# Symmetric zero points are 2 in two bits and 8 in four: 6 is added to each nibble.
_TWO_TO_FOUR = np.uint32(0x66666666)


@dataclass(frozen=True, kw_only=True, slots=True)
class Gptq(KSplitIntegers):
    """K-splits from GPTQ's words."""

    stored_less: int  # amount subtracted from stored zero points: 1, or 0 in version 2

    def zeros_of(self, words: npt.NDArray[np.uint32]) -> npt.NDArray[Any]:
        """See `KSplitIntegers.zeros_of`."""
        ones = sum(self.stored_less << place for place in range(0, 32, self.bits))
        return unpacked(words + np.uint32(ones), self.bits)

    def codes(self, words: npt.NDArray[np.uint32]) -> Bytes:
        """See `KSplitIntegers.codes`."""
        per = 32 // self.bits
        codes = np.empty((len(words), per, self.outputs), np.uint8)
        for place in range(per):
            codes[:, place] = words >> np.uint32(place * self.bits) & np.uint32((1 << self.bits) - 1)
        return codes.reshape(-1, self.outputs)

    def write(self, blocks: npt.NDArray[Any], words: npt.NDArray[np.uint32], place: int) -> None:
        """See `KSplitIntegers.write`."""
        words = words[place * self.bits : (place + 1) * self.bits]
        if self.bits == 8:
            for row, word in enumerate(words):
                np.bitwise_xor(word, np.uint32(0x80808080), out=blocks["quarters"][:, row])
            return
        if self.bits == 2:
            words = _four_bits(words) + (_TWO_TO_FOUR if self.symmetric else np.uint32(0))
        write_nibbles(blocks, *halves(words))


def _four_bits(words: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """A word of 16 2-bit codes as two words of 8 nibbles: (rows, outputs) to (2 rows, outputs)."""
    spread = np.stack((words & np.uint32(0xFFFF), words >> np.uint32(16)), axis=1).reshape(-1, words.shape[1])
    for shift, mask in ((8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333)):
        spread = (spread | spread << np.uint32(shift)) & np.uint32(mask)
    return spread


def gptq(tensors: Mapping[str, Tensor], settings: Settings, *, stored_less: int | None = None) -> Iterator[Virtual]:
    """A K-split virtual tensor for each `qweight`. Formats without `checkpoint_format` pass `stored_less` themselves.

    Raises:
        UnsupportedError: bits or a format that cannot be decoded, named.
        CheckpointError: a tensor is missing, or shapes that contradict each other or the configuration.
    """
    if stored_less is None:
        form = setting(settings, "checkpoint_format", "gptq")
        if form not in ("gptq", "gptq_v2") or setting(settings, "is_marlin_format", False):
            raise UnsupportedError(f"weights of GPTQ's format `{form}` cannot be decoded", hint=_HINT)
        stored_less = 0 if form == "gptq_v2" else 1
    for name, tensor in tensors.items():
        if name.endswith(".qweight"):
            yield _matrix(tensors, tensor, settings, stored_less)


def _matrix(tensors: Mapping[str, Tensor], weight: Tensor, settings: Settings, stored_less: int) -> Virtual:
    base = weight.name.removesuffix("qweight")
    name = base + "weight"
    scale, zero = scale_tensor(tensors, name, base + "scales"), scale_tensor(tensors, name, base + "qzeros")
    bits = _bits(weight, scale, zero, settings)
    inputs, outputs = weight.rows * 32 // bits, weight.columns
    group = group_of(inputs, scale.rows, setting(settings, "group_size"), scale.name)
    ordered = bool(setting(settings, "desc_act", False)) and scale.rows > 1
    order = scale_tensor(tensors, name, base + "g_idx") if ordered else None
    if order is not None:
        require(order, ("I32",), (inputs,))
    symmetric, width = is_symmetric(settings), k_split_width(inputs, group_widths(group))
    type_name = "F16" if ordered else integer_type(bits, symmetric, group, width)
    encoding = Gptq(
        label=f"GPTQ int{bits}, {'one scale an output' if scale.rows == 1 else f'group {group}'}"
        + (", act-order" if ordered else ""),
        type=type_name,
        bits=bits,
        inputs=inputs,
        outputs=outputs,
        width=width,
        group=group,
        weight=weight,
        scale=scale,
        zero=zero,
        symmetric=symmetric,
        order=order,
        stored_less=stored_less,
    )
    parts = tuple(base + part for part in ("qweight", "qzeros", "scales", "g_idx"))
    shape = (inputs // width, outputs, width)
    return Virtual(name=name, shape=shape, type=type_name, k_splits=shape[0], encoding=encoding, parts=parts)


def _bits(weight: Tensor, scale: Tensor, zero: Tensor, settings: Settings) -> int:
    """Bits per weight, from the shapes: modules may differ."""
    require(weight, ("I32",))
    require(scale, FLOAT_TYPES)
    require(zero, ("I32",))
    if not len(weight.shape) == len(scale.shape) == len(zero.shape) == 2 or 0 in weight.shape + scale.shape:
        raise CheckpointError(f"tensor `{weight.name}` of shape {weight.shape} or its scales are no matrices")
    bits, rest = divmod(zero.columns * 32, scale.columns)
    if rest or scale.columns != weight.columns or zero.rows != scale.rows or not bits or weight.rows * 32 % bits:
        raise CheckpointError(
            f"tensor `{weight.name}` of shape {weight.shape} does not fit scales of {scale.shape} and zero points of"
            f" {zero.shape}",
            hint="a file of the model is of another version; download it again",
        )
    if bits not in (2, 4, 8):
        raise UnsupportedError(f"tensor `{weight.name}` is packed in {bits} bits; 2, 4 and 8 are known", hint=_HINT)
    configured = setting(settings, "bits", bits)
    if configured != bits and not settings.get("dynamic") and not settings.get("extra_config"):
        raise CheckpointError(f"tensor `{weight.name}` is packed in {bits} bits, the configuration says {configured}")
    return bits


def is_symmetric(settings: Settings) -> bool:
    """True if all zero points are half the range. One differing module gives False, which is correct for all."""
    overrides = [settings.get("dynamic"), settings.get("extra_config")]
    modules = [module for table in overrides if isinstance(table, Mapping) for module in table.values()]
    differs = any(isinstance(module, Mapping) and module.get("sym") is False for module in modules)
    return bool(setting(settings, "sym", True)) and not differs
