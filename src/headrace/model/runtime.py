"""What the modules of a model call: one interface, and a handle that passes calls on to its current implementation.

`TracingRuntime` (`model/trace.py`) records the calls of a forward. `EagerRuntime` computes them, `CapturingRuntime` records
them for replay as well (`engine/eager_runtime.py`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from headrace.checkpoint import Tensor
from headrace.model.packed import PackedExperts, PackedLinear


class AttentionCall(NamedTuple):
    """Arguments of a call of transformers' attention interface, all rows of a pass in a batch of one.

    `sinks` are attention sinks, one for each head: a further position without a value.
    """

    module: nn.Module
    query: torch.Tensor  # (1, heads, rows, head_dim)
    key: torch.Tensor  # (1, kv_heads, rows, head_dim)
    value: torch.Tensor
    mask: torch.Tensor | None
    scaling: float | None
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None
    others: dict[str, Any]


class Runtime(Protocol):
    """Computes, or notes, the calls of a model's modules."""

    def linear(self, linear: PackedLinear, x: torch.Tensor) -> torch.Tensor:
        """A packed linear: (..., inputs) to (..., outputs), fp32, without the bias."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Rows over the root of their mean square, times the weight."""

    def silu(self, x: torch.Tensor) -> torch.Tensor:
        """x / (1 + exp(-x))."""

    def gather(self, tensor: Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Rows of an embedding table: (tokens, columns), fp32."""

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Attention: (1, rows, heads, head_dim)."""

    def expand_kv(self, layer: Any, vectors: torch.Tensor, rotated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value that an MLA layer gives to attention.

        Args:
            layer: the layer.
            vectors: latents of the new rows, (1, 1, rows, rank).
            rotated: RoPE part of their keys, (1, 1, rows, width).
        """

    def experts(
        self, packed: PackedExperts, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum of the experts that each row chose: (..., hidden)."""

    def route(self, forward: Callable[..., Any], hidden: torch.Tensor, *others: Any) -> Any:
        """A router's forward. `others` are further arguments of some routers: token ids, or corrections for all rows."""


class RuntimeHandle:
    """Held by the modules of one model; `current` is the runtime of the forward in progress."""

    def __init__(self, current: Runtime):
        self.current = current

    def linear(self, linear: PackedLinear, x: torch.Tensor) -> torch.Tensor:
        """As `Runtime.linear`."""
        return self.current.linear(linear, x)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """As `Runtime.rms_norm`."""
        return self.current.rms_norm(x, weight, eps)

    def silu(self, x: torch.Tensor) -> torch.Tensor:
        """As `Runtime.silu`."""
        return self.current.silu(x)

    def gather(self, tensor: Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """As `Runtime.gather`."""
        return self.current.gather(tensor, token_ids)

    def expand_kv(self, layer: Any, vectors: torch.Tensor, rotated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Runtime.expand_kv`."""
        return self.current.expand_kv(layer, vectors, rotated)

    def route(self, forward: Callable[..., Any], hidden: torch.Tensor, *others: Any) -> Any:
        """As `Runtime.route`."""
        return self.current.route(forward, hidden, *others)

    def attention(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attention as transformers calls it."""
        call = AttentionCall(module, query, key, value, attention_mask, scaling, sliding_window, softcap, s_aux, others)
        return self.current.attend(call), None

    def experts(
        self, module: Any, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, *_: Any, **__: Any
    ) -> torch.Tensor:
        """The experts of a layer as transformers calls them."""
        return self.current.experts(module.packed, hidden, ids, weights)
