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


class Tracer:
    """Stands in for matmuls and experts during tracing."""

    def __init__(self) -> None:
        self.calls: list[tuple[PackedLinear | PackedExperts, torch.Tensor | None]] = []

    def linear(self, linear: PackedLinear, x: torch.Tensor) -> torch.Tensor:
        """Record a call; the result has the right shape and no content."""
        self.calls.append((linear, x))
        return x.new_zeros((*x.shape[:-1], linear.matrix.outputs))

    def experts(self, packed: PackedExperts, hidden: torch.Tensor) -> torch.Tensor:
        """Record a call of a layer's experts; the result is zeros."""
        self.calls.append((packed, None))
        return torch.zeros_like(hidden)

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


def record_steps(
    model: PreTrainedModel, tracer: Tracer, forwards: Callable[[], Iterator[dict[str, Any]]]
) -> tuple[Step, ...]:
    """The steps of the first pass of a sequence.

    `forwards` yields the arguments of one forward, or also of a second that continues the sequence, as decoding does. The
    second must take the same steps in the same order; steps missing from it are marked `prefill_only`.

    Raises:
        WeightAskedError: a module accesses the weight of a packed linear.
        RuntimeError: the second forward uses weights in another order.
    """
    linears = [module for module in model.modules() if isinstance(module, PackedLinear)]
    with (
        _replaced_linears(linears, tracer.linear),
        _zero_weights(model),
        _restored_attributes(model),
        torch.inference_mode(),
    ):
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
def _replaced_linears(
    linears: list[PackedLinear], function: Callable[[PackedLinear, torch.Tensor], torch.Tensor]
) -> Any:
    before = [linear.linear_function for linear in linears]
    for linear in linears:
        linear.linear_function = function
    try:
        yield
    finally:
        for linear, own in zip(linears, before, strict=True):
            linear.linear_function = own


@contextmanager
def _zero_weights(model: nn.Module) -> Any:
    """Replace weights on meta by zeros, and integers by ones: one element each, expanded without taking memory.

    Values that depend only on tokens and positions are then the real ones.
    """
    tables: list[dict[str, Any]] = [
        table for module in model.modules() for table in (module._buffers, module._parameters)
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
