"""Plain quantisers: the tensors that common tools store for a matrix, and its dequantised values. A few lines of torch each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

Parts: TypeAlias = dict[str, torch.Tensor]  # tensors by the suffix after a module's name
Packer: TypeAlias = Callable[[torch.Tensor], tuple[Parts, torch.Tensor]]

GROUP = 128
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Layout:
    """A `quantization_config`, and the function that packs a matrix (outputs, inputs) accordingly."""

    config: dict[str, Any]
    pack: Packer


def in_words(codes: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """Pack codes along the last dimension into 32-bit words, the first in the lowest bits."""
    lanes = codes.reshape(*codes.shape[:-1], -1, 32 // bits).long()
    words = (lanes << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def fp8_blocks(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """FP8 with a scale for 128 x 128 weights, as DeepSeek and Qwen store it."""
    high, wide = -(-weight.shape[0] // 128), -(-weight.shape[1] // 128)
    padded = torch.zeros(high * 128, wide * 128)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    scale = padded.view(high, 128, wide, 128).abs().amax((1, 3)) / 448
    spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: weight.shape[0], : weight.shape[1]]
    codes = (weight / spread).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scale}, codes.float() * spread


def fp8_channels(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """FP8 with a scale for each output."""
    scale = weight.abs().amax(1, keepdim=True) / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def grouped(weight: torch.Tensor, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """4-bit codes (outputs, inputs), scales in fp16 and zero points (outputs, groups)."""
    parts = weight.reshape(weight.shape[0], -1, GROUP)
    if symmetric:
        scales = (parts.abs().amax(2) / 7).half()
        zeros = torch.full(scales.shape, 8)
    else:
        low, high = parts.amin(2).clamp(max=0), parts.amax(2).clamp(min=0)
        scales = ((high - low) / 15).half()
        zeros = (-low / scales.float()).round().clamp(0, 15).long()
    codes = ((parts / scales.float()[..., None]).round() + zeros[..., None]).clamp(0, 15).long()
    return codes.view(weight.shape), scales, zeros


def plain(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Dequantise codes."""
    parts = codes.view(*scales.shape, -1)
    return ((parts - zeros[..., None]) * scales.float()[..., None]).view(codes.shape).float()


def compressed(weight: torch.Tensor, symmetric: bool) -> tuple[Parts, torch.Tensor]:
    """compressed-tensors' `pack-quantized`."""
    codes, scales, zeros = grouped(weight, symmetric)
    parts = {"weight_packed": in_words(codes), "weight_scale": scales, "weight_shape": torch.tensor(weight.shape)}
    if not symmetric:
        parts["weight_zero_point"] = in_words(zeros.T).T.contiguous()
    return parts, plain(codes, scales, zeros)


def compressed_bytes(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """compressed-tensors' `int-quantized`: signed bytes, a scale for each output."""
    scale = weight.abs().amax(1, keepdim=True).div(127).half()
    codes = (weight / scale.float()).round().clamp(-127, 127)
    return {"weight": codes.to(torch.int8), "weight_scale": scale}, codes * scale.float()


def gptq(weight: torch.Tensor, ordered: bool = False) -> tuple[Parts, torch.Tensor]:
    """GPTQ's first format: stored transposed [in, out], zero points less one. `ordered`: groups of inputs that lie apart."""
    inputs = weight.shape[1]
    order = torch.randperm(inputs, generator=torch.Generator().manual_seed(2)) if ordered else torch.arange(inputs)
    codes, scales, zeros = grouped(weight[:, order], symmetric=True)
    back = order.argsort()
    parts = {
        "qweight": in_words(codes[:, back]).T.contiguous(),
        "qzeros": in_words((zeros - 1).T).contiguous(),
        "scales": scales.T.contiguous(),
        "g_idx": (back // GROUP).int(),
    }
    return parts, plain(codes, scales, zeros)[:, back]


def awq(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """AWQ's `gemm`: stored transposed [in, out], eight outputs per word in AWQ's order."""
    codes, scales, zeros = grouped(weight, symmetric=False)

    def words(values: torch.Tensor) -> torch.Tensor:
        return in_words(values.reshape(len(values), -1, 8)[:, :, list(AWQ_ORDER)].reshape(len(values), -1))

    parts = {"qweight": words(codes.T), "qzeros": words(zeros.T), "scales": scales.T.contiguous()}
    return parts, plain(codes, scales, zeros)


def mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """MXFP4 as gpt-oss stores it: blocks (..., inputs / 32, 16), scales (..., inputs / 32), and the dequantised values."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat([values, -values])
    parts = weight.reshape(*weight.shape[:-1], -1, 32)
    exponents = torch.floor(torch.log2(parts.abs().amax(-1))) - 2
    scale = torch.exp2(exponents)[..., None]
    codes = ((parts / scale)[..., None] - values).abs().argmin(-1)
    pairs = codes.view(*codes.shape[:-1], 16, 2)
    blocks = (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8)
    return blocks, (exponents + 127).to(torch.uint8), (values[codes] * scale).view(weight.shape)


def _compressed_config(form: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"type": "int", "symmetric": True, **weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


_PACKED = {"num_bits": 4, "strategy": "group", "group_size": GROUP}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True}
LAYOUTS = {
    "fp8 blocks": Layout({"quant_method": "fp8", "weight_block_size": [128, 128]}, fp8_blocks),
    "fp8 channels": Layout(
        _compressed_config("float-quantized", num_bits=8, type="float", strategy="channel"), fp8_channels
    ),
    "int4": Layout(_compressed_config("pack-quantized", **_PACKED), lambda weight: compressed(weight, True)),
    "int4 asymmetric": Layout(
        _compressed_config("pack-quantized", **_PACKED, symmetric=False), lambda weight: compressed(weight, False)
    ),
    "int8": Layout(_compressed_config("int-quantized", num_bits=8, strategy="channel"), compressed_bytes),
    "gptq": Layout({**_GPTQ, "desc_act": False}, gptq),
    "gptq act-order": Layout({**_GPTQ, "desc_act": True}, lambda weight: gptq(weight, ordered=True)),
    "awq": Layout({"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}, awq),
    "autoround": Layout({**_GPTQ, "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}, gptq),
}  # fmt: skip
