"""Private attributes of torch, in one place."""

from typing import Any

import torch
from torch import nn


def own_parameters(module: nn.Module) -> dict[str, Any]:
    """The parameters of a module itself, without those of its children. Changes to the table change the module."""
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, Any]:
    """The buffers of a module itself, as `own_parameters`."""
    return module._buffers


def has_forward_pre_hooks(module: nn.Module) -> bool:
    """True if a function is called before the module's forward."""
    return bool(module._forward_pre_hooks)


def multiplies_bf16() -> bool:
    """True if oneDNN has bf16 matmuls here. Where it has none, torch's own take hundreds of times as long."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(torch._C._has_mkldnn and supported is not None and supported())
