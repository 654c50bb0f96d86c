"""AWQ in its `gemm` layout: a word packs eight interleaved outputs of one input.

`qweight` (inputs, outputs / 8), `qzeros` (groups, outputs / 8), `scales` (groups, outputs). The nibbles of a word are the
outputs 0, 2, 4, 6, 1, 3, 5, 7, from the lowest. Zero points are stored unchanged.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.checkpoint.encodings.encoding import FLOAT_TYPES, Bytes, Settings, Virtual, require, scale_tensor, setting
from headrace.checkpoint.encodings.k_splits import KSplitIntegers, group_of, group_widths, integer_type, k_split_width
from headrace.checkpoint.tensor import Tensor
from headrace.errors import CheckpointError, UnsupportedError

_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)
_HINT = "get the model as AWQ in its `gemm` version, as GPTQ, as a GGUF, or in BF16"
_LOW, _HIGH = np.uint32(0x0F0F0F0F), np.uint32(0xF0F0F0F0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Awq(KSplitIntegers):
    """K-splits from AWQ's words."""

    def zeros_of(self, words: npt.NDArray[np.uint32]) -> npt.NDArray[Any]:
        """See `KSplitIntegers.zeros_of`."""
        return self.codes(words)

    def codes(self, words: npt.NDArray[np.uint32]) -> Bytes:
        """See `KSplitIntegers.codes`."""
        codes = np.empty((*words.shape, 8), np.uint8)
        for place, output in enumerate(_OUTPUTS):
            codes[:, :, output] = words >> np.uint32(4 * place) & np.uint32(15)
        return codes.reshape(len(words), -1)

    def write(self, blocks: npt.NDArray[Any], words: npt.NDArray[np.uint32], place: int) -> None:
        """See `KSplitIntegers.write`."""
        upper, lower = words[place * 32 : place * 32 + 16], words[place * 32 + 16 : place * 32 + 32]
        pairs = _outputs_in_order(
            upper & _LOW | (lower & _LOW) << np.uint32(4), upper >> np.uint32(4) & _LOW | lower & _HIGH
        )
        for row, nibbles in enumerate(pairs):
            blocks["nibbles"][:, row] = nibbles


def _outputs_in_order(even: npt.NDArray[np.uint32], odd: npt.NDArray[np.uint32]) -> Bytes:
    """A byte per output. Words of `even` hold the outputs 0, 4, 1, 5, those of `odd` 2, 6, 3, 7."""
    byte, eight = [np.uint32(0xFF << shift) for shift in (0, 8, 16, 24)], np.uint32(8)
    words = np.empty((*even.shape, 2), np.uint32)
    words[..., 0] = (
        even & byte[0] | even >> eight & byte[1] | (odd & byte[0]) << np.uint32(16) | (odd & byte[2]) << eight
    )
    words[..., 1] = even >> eight & byte[0] | even >> np.uint32(16) & byte[1] | odd << eight & byte[2] | odd & byte[3]
    return words.view(np.uint8).reshape(len(even), -1)


def awq(tensors: Mapping[str, Tensor], settings: Settings) -> Iterator[Virtual]:
    """A K-split virtual tensor for each `qweight`.

    Raises:
        UnsupportedError: bits or a version that cannot be decoded, named.
        CheckpointError: a tensor is missing, or shapes that contradict each other.
    """
    version, bits = setting(settings, "version", "gemm"), setting(settings, "bits", setting(settings, "w_bit", 4))
    if str(version).lower() != "gemm" or bits != 4:
        raise UnsupportedError(f"AWQ weights of version `{version}` in {bits} bits cannot be decoded", hint=_HINT)
    symmetric = not setting(settings, "zero_point", not setting(settings, "sym", False))
    for name, tensor in tensors.items():
        if name.endswith(".qweight"):
            yield _matrix(tensors, tensor, settings, symmetric)


def _matrix(tensors: Mapping[str, Tensor], weight: Tensor, settings: Settings, symmetric: bool) -> Virtual:
    base = weight.name.removesuffix("qweight")
    name = base + "weight"
    scale, zero = scale_tensor(tensors, name, base + "scales"), scale_tensor(tensors, name, base + "qzeros")
    _check(weight, scale, zero)
    inputs, outputs = weight.rows, scale.columns
    configured = setting(settings, "group_size", setting(settings, "q_group_size"))
    group = group_of(inputs, scale.rows, configured, scale.name)
    width = k_split_width(inputs, group_widths(group))
    type_name = integer_type(4, symmetric, group, width)
    encoding = Awq(
        label="AWQ int4, " + ("one scale an output" if scale.rows == 1 else f"group {group}"),
        type=type_name,
        bits=4,
        inputs=inputs,
        outputs=outputs,
        width=width,
        group=group,
        weight=weight,
        scale=scale,
        zero=zero,
        symmetric=symmetric,
    )
    parts = tuple(base + part for part in ("qweight", "qzeros", "scales"))
    shape = (inputs // width, outputs, width)
    return Virtual(name=name, shape=shape, type=type_name, k_splits=shape[0], encoding=encoding, parts=parts)


def _check(weight: Tensor, scale: Tensor, zero: Tensor) -> None:
    require(weight, ("I32",))
    require(scale, FLOAT_TYPES)
    if len(weight.shape) != 2 or len(scale.shape) != 2 or 0 in weight.shape + scale.shape:
        raise CheckpointError(f"tensor `{weight.name}` of shape {weight.shape} or its scales are no matrices")
    require(scale, FLOAT_TYPES, (scale.rows, weight.columns * 8))
    require(zero, ("I32",), (scale.rows, weight.columns))
