"""In which order a pass asks for weights: recorded in one forward over two tokens, in which zeros stand for all weights.

Linears that are called one after another with the same activations are one step. The order is not known from any list of
families, and the engine sees to it at run time that it holds.
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
    # Asked for when a text begins, and not when it goes on: an encoder, and what is made of its results.
    prefill_only: bool = False

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is multiplied, each tensor once though several linears may be cut from it."""
        found = {tensor.name: tensor for linear in self.linears for tensor in linear.matrix.tensors}
        return tuple(found.values())


@dataclass(frozen=True, eq=False)
class ExpertStep:
    """A layer's routed experts."""

    experts: PackedExperts
    prefill_only: bool = False


Step: TypeAlias = LinearStep | ExpertStep


class Tracer:
    """Takes the place of products and experts while the order is recorded."""

    def __init__(self) -> None:
        self.calls: list[tuple[PackedLinear | PackedExperts, torch.Tensor | None]] = []

    def linear(self, linear: PackedLinear, x: torch.Tensor) -> torch.Tensor:
        """Record a call; the result has the right shape and no content."""
        self.calls.append((linear, x))
        return x.new_zeros((*x.shape[:-1], linear.matrix.outputs))

    def experts(self, packed: PackedExperts, hidden: torch.Tensor) -> torch.Tensor:
        """Record that a layer's experts were asked for."""
        self.calls.append((packed, None))
        return torch.zeros_like(hidden)

    def take(self) -> tuple[Step, ...]:
        """The calls since the last time, those on the same activations together."""
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
    """The steps of a pass that begins a text.

    `forwards` gives the arguments of one forward, or of a second as well that takes up the text, as decoding does: it must
    go the same way, but for steps that only the beginning asks for.

    Raises:
        WeightAskedError: a module wants the weight of a packed linear itself.
        RuntimeError: the second forward asks for weights in another order.
    """
    linears = [module for module in model.modules() if isinstance(module, PackedLinear)]
    with (
        _replaced_linears(linears, tracer.linear),
        _stood_in_for(model),
        _kept_attributes(model),
        torch.inference_mode(),
    ):
        passes = []
        for given in forwards():
            model(**{"use_cache": False, **given})
            passes.append(tracer.take())
    return passes[0] if len(passes) == 1 else _told_apart(*passes)


def _told_apart(first: Sequence[Step], later: Sequence[Step]) -> tuple[Step, ...]:
    """The steps of the first pass; those that the later one leaves out are marked."""
    found: list[Step] = []
    left = [_members(step) for step in reversed(later)]
    for step in first:
        again = bool(left) and _members(step) == left[-1]
        found.append(step if again else replace(step, prefill_only=True))
        if again:
            left.pop()
    if left:
        raise RuntimeError("it asks for its weights in another order when it takes up a text")
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
def _stood_in_for(model: nn.Module) -> Any:
    """Zeros stand for all weights that are on meta, ones for whole numbers: of each a single number, which is repeated
    without taking memory. Numbers that depend on the tokens and their positions alone are then what they would be."""
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
        number = torch.full((), not tensor.is_floating_point(), dtype=tensor.dtype).expand(tensor.shape)
        table[key] = nn.Parameter(number, requires_grad=False) if isinstance(tensor, nn.Parameter) else number
    try:
        yield
    finally:
        for table, key, tensor in held:
            table[key] = tensor


@contextmanager
def _kept_attributes(model: nn.Module) -> Any:
    """Whatever modules remember of a forward (frequencies for a length, states) is forgotten: it came of zeros."""
    before = [(module, dict(module.__dict__)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
