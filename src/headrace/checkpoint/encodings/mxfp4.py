"""MXFP4: 32 weights of four bits (E2M1) with one 8-bit exponent. ggml has this format in another nibble order.

Lossless: ggml uses the same element table and exponent byte. gpt-oss stores `X_blocks` (experts, rows, groups,
16) and `X_scales` (experts, rows, groups); compressed-tensors `X.weight_packed` (rows, columns / 2) and `X.weight_scale`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from headrace.checkpoint.encodings.blocks import blocks_of, write_ordered_nibbles
from headrace.checkpoint.encodings.encoding import CHUNK_WEIGHTS, Bytes, Read, Virtual, require, scale_tensor
from headrace.checkpoint.tensor import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Microscaled4:
    """Rows of MXFP4 blocks from ordered nibbles and their exponents."""

    label: str = "MXFP4"
    packed: Tensor
    scale: Tensor
    groups: int  # exponents per row
    row_multiple: int = 1

    def reads(self, first: int, last: int) -> Sequence[Read]:
        """See `Encoding.reads`."""
        start, count = first * self.groups, (last - first) * self.groups
        return (self.packed, start * 16, count * 16), (self.scale, start, count)

    def decode(self, raw: Sequence[Bytes], first: int, last: int, out: Bytes) -> None:
        """See `Encoding.decode`."""
        blocks = blocks_of(out, "MXFP4", 32).reshape(-1)
        blocks["d"] = raw[1]
        step = CHUNK_WEIGHTS // 32
        for start in range(0, len(blocks), step):
            write_ordered_nibbles(blocks[start : start + step], raw[0][start * 16 : (start + step) * 16])


def mxfp4(tensors: Mapping[str, Tensor]) -> Iterator[Virtual]:
    """A virtual tensor for each pair of gpt-oss's `_blocks` and `_scales`.

    Raises:
        CheckpointError: half of a pair is missing, or the shapes differ.
    """
    for name, tensor in tensors.items():
        if name.endswith("_scales") and tensor.type == "U8":
            scale_tensor(tensors, name, name.removesuffix("_scales") + "_blocks")
        if not name.endswith("_blocks"):
            continue
        base = name.removesuffix("_blocks")
        require(tensor, ("U8",))
        scale = scale_tensor(tensors, base, base + "_scales")
        require(scale, ("U8", "F8_E8M0"))
        require(tensor, ("U8",), (*scale.shape, 16))
        yield microscaled(base, (*scale.shape[:-1], scale.columns * 32), tensor, scale)


def microscaled(name: str, shape: tuple[int, ...], packed: Tensor, scale: Tensor) -> Virtual:
    """The virtual tensor `name` from `packed`, 16 bytes per byte of `scale`."""
    encoding = Microscaled4(packed=packed, scale=scale, groups=scale.columns)
    return Virtual(name=name, shape=shape, type="MXFP4", encoding=encoding, parts=(packed.name, scale.name))
