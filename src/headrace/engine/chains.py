"""Of a tape, runs of entries around products become chains: one call of ggml for each run.

A run ends where only Python or torch can go on: attention, experts, an operation that ggml does in another way, a product with
weights that stream.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from headrace.kernels.chain import Chain
from headrace.kernels.multiply import Kernels
from headrace.model.order import LinearStep
from headrace.stream import WeightStream
from headrace.stream.weights import Batch

_aten = torch.ops.aten
_COMBINING = {_aten.add.out: "add", _aten.sub.out: "sub", _aten.mul.out: "mul", _aten.div.out: "div"}


class Entry(NamedTuple):
    """One call of a tape."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    named: dict[str, Any]


class _Visit(NamedTuple):
    """A product within a chain: whose weights were where when it was linked."""

    step: LinearStep
    stream: WeightStream
    place: int  # in the stream
    weights: Batch


class Products(Protocol):
    """What chains need of the engine."""

    def place(self, step: LinearStep) -> tuple[WeightStream, int]:
        """The stream that a step's weights come from, and its visit there."""

    def chained(self, steps: Sequence[LinearStep], start: float, end: float) -> None:
        """These steps were computed in this time."""


class Linker:
    """Makes chains for the tapes of one engine."""

    def __init__(self, kernels: Kernels, products: Products, multiply: Callable[..., None]):
        """`multiply` is the function of entries that are products: of a step, its activations and its outputs."""
        self._kernels = kernels
        self._products = products
        self._multiply = multiply

    def __call__(self, entries: Sequence[Entry]) -> list[Entry]:
        """The same entries, in chains where they can be."""
        done: list[Entry] = []
        run: list[Entry] = []
        for entry in entries:
            if self._fits(entry):
                run.append(entry)
            else:
                done += [*self._linked(run), entry]
                run = []
        return done + self._linked(run)

    def _fits(self, entry: Entry) -> bool:
        """Whether ggml can do it. It is tried out, in a chain that is thrown away."""
        if entry.function == self._multiply:
            return self._visit(entry) is not None
        chain = Chain(self._kernels.few_workers, _operations(entry), self._kernels.interleaving)
        try:
            return self._add(chain, entry)
        finally:
            chain.close()

    def _linked(self, run: list[Entry]) -> list[Entry]:
        if len(run) < 2 or not any(entry.function == self._multiply for entry in run):
            return run
        chain = self._kernels.chain(sum(map(_operations, run)))
        visits = []
        for entry in run:
            if entry.function == self._multiply:
                visit = self._visit(entry)
                assert visit is not None
                visits.append(visit)
            self._add(chain, entry)
        chain.seal(self._kernels.row_invariant)
        return [Entry(Linked(run, chain, visits, self._products), (), {})]

    def _visit(self, entry: Entry) -> _Visit | None:
        step, x, outputs, _ = entry.arguments
        stream, index = self._products.place(step)
        weights = stream.whole(index)
        if weights is None or len(x) != 1 or self._kernels.known(x, weights, outputs) is None:
            return None
        return _Visit(step, stream, index, weights)

    def _add(self, chain: Chain, entry: Entry) -> bool:
        """Whether ggml can do it; then it is added."""
        function, arguments, named = entry
        if function == self._multiply:
            visit = self._visit(entry)
            known = None if visit is None else self._kernels.known(arguments[1], visit.weights, arguments[2])
            return known is not None and chain.multiply(known.graph.parts, known.operands)
        if function == self._kernels.rms_norm:
            return chain.rms_norm(*arguments)
        if function == self._kernels.silu:
            return chain.silu(*arguments)
        if named.keys() != {"out"}:
            return False
        out = named["out"]
        if function in _COMBINING:
            return chain.combine(_COMBINING[function], out, *arguments)
        if function is _aten.neg.out:
            return chain.combine("mul", out, arguments[0], -1.0)
        if function is _aten.cat.out:
            tensors, dim = (*arguments, 0)[:2]
            parts = torch.split(out, [tensor.shape[dim] for tensor in tensors], dim)
            return all(chain.copy(part, tensor) for part, tensor in zip(parts, tensors, strict=True))
        return False


class Linked:
    """A run of entries as one call."""

    def __init__(self, run: Sequence[Entry], chain: Chain, visits: Sequence[_Visit], products: Products):
        self._run = run
        self._chain = chain
        self._visits = visits
        self._products = products
        self._steps = [visit.step for visit in visits]

    def __call__(self) -> None:
        """Do what the run does."""
        for _, stream, place, weights in self._visits:
            if stream.whole(place) is not weights:  # they were read again, to be sure that they are whole
                for function, arguments, named in self._run:
                    function(*arguments, **named)
                return
        start = time.perf_counter()
        for visit in self._visits:
            visit.stream.skip(visit.place)
        self._chain.compute()
        self._products.chained(self._steps, start, time.perf_counter())


def _operations(entry: Entry) -> int:
    """At most so many of ggml."""
    function, arguments, _ = entry
    if function is _aten.cat.out:
        return len(arguments[0])
    return max(2, *[len(one) for one in arguments if isinstance(one, (list, tuple))], 2)
