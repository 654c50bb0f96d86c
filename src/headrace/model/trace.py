"""Traces the order in which a pass uses weights, in one forward over two tokens with zeros for all weights.

Consecutive linears with the same activations are one step. No list of families gives the order; the engine checks at run
time that it holds.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel

from headrace.checkpoint import Tensor
from headrace.model.packed import PackedExperts, PackedLinear
from headrace.model.runtime import AttentionCall
from headrace.torch_compat import own_buffers, own_parameters


@dataclass(frozen=True, eq=False)
class LinearStep:
    """Linears that share their activations."""

    linears: tuple[PackedLinear, ...]
    # used only in the first pass of a sequence: an encoder, and the decoder's cross-attention K/V projections
    prefill_only: bool = False

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """Tensors of the linears, each once even if several linears are slices of it."""
        found = {tensor.name: tensor for linear in self.linears for tensor in linear.matrix.tensors}
        return tuple(found.values())


@dataclass(frozen=True, eq=False)
class ExpertStep:
    """A layer's routed experts."""

    experts: PackedExperts
    prefill_only: bool = False


Step: TypeAlias = LinearStep | ExpertStep


class TracingRuntime:
    """Stands in for matmuls, attention and experts: it notes their order, and computes nothing."""

    def __init__(self) -> None:
        self.calls: list[tuple[PackedLinear | PackedExperts, torch.Tensor | None]] = []
        # (KV heads, KV elements per token) of each layer whose attention was called.
        self.layers: dict[int, tuple[int, int]] = {}
        self.unknown_arguments: set[str] = set()  # unsupported arguments of these layers
        self._mla: set[nn.Module] = set()  # MLA layers that are about to attend

    def linear(self, linear: PackedLinear, x: torch.Tensor) -> torch.Tensor:
        """Record a call; the result has the right shape and no content."""
        self.calls.append((linear, x))
        return x.new_zeros((*x.shape[:-1], linear.matrix.outputs))

    def experts(
        self, packed: PackedExperts, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Record a call of a layer's experts; the result is zeros."""
        self.calls.append((packed, None))
        return torch.zeros_like(hidden)

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Note the layer and any unsupported arguments; the result is zeros."""
        key, value = call.key, call.value
        if key.shape[2] != call.query.shape[2]:
            self.unknown_arguments.add("keys beyond those of the rows")
        layer: Any = getattr(call.module, "layer_idx", None)
        if not isinstance(layer, int) or layer < 0 or layer in self.layers:
            self.unknown_arguments.add("layers that share a place in the cache")
        else:
            self.layers[layer] = key.shape[1], key.shape[1] * (key.shape[3] + value.shape[3])
        if call.mask is not None:
            self.unknown_arguments.add("an attention mask")
        asked = {name for name, given in call.others.items() if given is not None and given is not False}
        self.unknown_arguments |= {name for name in asked if name not in _HARMLESS and not name.startswith("output_")}
        width: Any = value.shape[3]
        if call.module in self._mla:
            self._mla.discard(call.module)
            width = call.module.v_head_dim
            if call.softcap is not None or call.sinks is not None:
                self.unknown_arguments.add("MLA with soft-capping or attention sinks")
        return call.query.new_zeros((1, call.query.shape[2], call.query.shape[1], width))

    def expand_kv(self, layer: Any, vectors: torch.Tensor, rotated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Record the use of `kv_b_proj`; return the latents."""
        layer.kv_b_proj(vectors)
        self._mla.add(layer)
        return rotated, vectors

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """By torch."""
        return torch.rms_norm(x, weight.shape, weight, eps)

    def silu(self, x: torch.Tensor) -> torch.Tensor:
        """By torch."""
        return nn.functional.silu(x)

    def gather(self, tensor: Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Zeros of the right shape."""
        return torch.zeros((len(token_ids), tensor.columns))

    def route(self, forward: Callable[..., Any], hidden: torch.Tensor, *others: Any) -> Any:
        """The router itself."""
        return forward(hidden, *others)

    def take(self) -> tuple[Step, ...]:
        """The steps recorded since the last `take`; linears on the same activations form one step."""
        calls, self.calls = self.calls, []
        steps: list[list[PackedLinear] | PackedExperts] = []
        last: Any = None
        for called, x in calls:
            if isinstance(called, PackedExperts):
                steps.append(called)
            elif x is last and isinstance(steps[-1], list) and called not in steps[-1]:
                steps[-1].append(called)
            else:
                steps.append([called])
            last = x
        return tuple(LinearStep(tuple(s)) if isinstance(s, list) else ExpertStep(s) for s in steps)


# Arguments of attention functions that change nothing here: causality and positions are known.
_HARMLESS = frozenset({"position_ids", "is_causal", "use_cache", "cache_position"})


def record_steps(
    model: PreTrainedModel, tracer: TracingRuntime, forwards: Callable[[], Iterator[dict[str, Any]]]
) -> tuple[Step, ...]:
    """The steps of the first pass of a sequence.

    `forwards` yields the arguments of one forward, or also of a second that continues the sequence, as decoding does. The
    second must take the same steps in the same order; steps missing from it are marked `prefill_only`.

    Raises:
        WeightAskedError: a module accesses the weight of a packed linear.
        RuntimeError: the second forward uses weights in another order.
    """
    with _zero_weights(model), _restored_attributes(model), torch.inference_mode():
        passes = []
        for given in forwards():
            model(**{"use_cache": False, **given})
            passes.append(tracer.take())
    return passes[0] if len(passes) == 1 else _marked_prefill_only(*passes)


def _marked_prefill_only(first: Sequence[Step], later: Sequence[Step]) -> tuple[Step, ...]:
    """The steps of the first pass; those missing from the later one are marked `prefill_only`."""
    found: list[Step] = []
    left = [_members(step) for step in reversed(later)]
    for step in first:
        again = bool(left) and _members(step) == left[-1]
        found.append(step if again else replace(step, prefill_only=True))
        if again:
            left.pop()
    if left:
        raise RuntimeError("it uses its weights in another order when it continues a sequence")
    return tuple(found)


def _members(step: Step) -> tuple[PackedLinear | PackedExperts, ...]:
    return step.linears if isinstance(step, LinearStep) else (step.experts,)


@contextmanager
def _zero_weights(model: nn.Module) -> Any:
    """Replace weights on meta by zeros, and integers by ones: one element each, expanded without taking memory.

    Values that depend only on tokens and positions are then the real ones.
    """
    tables: list[dict[str, Any]] = [
        table for module in model.modules() for table in (own_buffers(module), own_parameters(module))
    ]
    held = [
        (table, key, tensor)
        for table in tables
        for key, tensor in table.items()
        if tensor is not None and tensor.is_meta
    ]
    for table, key, tensor in held:
        filled = torch.full((), not tensor.is_floating_point(), dtype=tensor.dtype).expand(tensor.shape)
        table[key] = nn.Parameter(filled, requires_grad=False) if isinstance(tensor, nn.Parameter) else filled
    try:
        yield
    finally:
        for table, key, tensor in held:
            table[key] = tensor


@contextmanager
def _restored_attributes(model: nn.Module) -> Any:
    """Restore attributes that modules set in a forward (RoPE frequencies for a length, states): they were computed from zeros."""
    before = [(module, dict(module.__dict__)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
