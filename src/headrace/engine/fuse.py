"""Captured calls around matmuls are fused into ggml graphs: one graph for each run of calls.

A run ends where only Python or torch can go on. Those are experts, streamed weights, an operation that ggml computes
differently, and attention with soft-capping, sinks or an 8-bit cache. Without any of these, the run is the whole pass.
"""

import time
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple, Protocol

import torch

from headrace.engine.attention import PackedAttention
from headrace.engine.capture import Call, put_all
from headrace.engine.model_weights import ModelWeights
from headrace.kernels.attention_graph import AttentionNodes, Heads, Positions
from headrace.kernels.backend import Backend
from headrace.kernels.fused_graph import FusedGraph
from headrace.model.trace import LinearStep
from headrace.stream import WeightStream
from headrace.stream.weights import Batch

_aten = torch.ops.aten
_COMBINING = {_aten.add.out: "add", _aten.sub.out: "sub", _aten.mul.out: "mul", _aten.div.out: "div"}


class _FusedMatmul(NamedTuple):
    """A matmul in a fused graph, and the place of its weights at fusion."""

    step: LinearStep
    stream: WeightStream
    place: int  # index of its weight group in the stream
    weights: Batch


class CallOwner(Protocol):
    """The runtime's interface for fused graphs."""

    def multiply(self, step: LinearStep, rows: torch.Tensor, outputs: Sequence[torch.Tensor], invariant: int) -> None:
        """The function of captured matmuls."""

    def record_fused(self, steps: Sequence[LinearStep], start: float, end: float) -> None:
        """Record steps that were computed in one fused call."""


class Fuser:
    """Fuses the captured steps of one engine."""

    def __init__(self, kernels: Backend, weights: ModelWeights, attention: PackedAttention, owner: CallOwner):
        """`owner` made the calls."""
        self._place = weights.place
        self._kernels = kernels
        self._attention = attention
        self._owner = owner
        self._multiply = owner.multiply

    def __call__(self, calls: Sequence[Call]) -> list[Call]:
        """The same calls, fused where possible."""
        done: list[Call] = []
        for likely, together in groupby(calls, self._is_likely):
            run = list(together)
            done += self._fused(run) if likely else run
        return done

    def _is_likely(self, call: Call) -> bool:
        """True if ggml supports the call, as far as can be seen without trying."""
        function, arguments, _ = call
        if function == self._multiply:
            return self._weights(arguments[0]) is not None
        if function is put_all:
            return arguments[1] is _aten.index_select.default
        own = (self._attention.attend, self._kernels.rms_norm, self._kernels.silu)
        return function in own or function in (*_COMBINING, _aten.neg.out, _aten.cat.out)

    def _operations(self, call: Call) -> int:
        """Max ggml operations of the call."""
        function, arguments, _ = call
        if function == self._multiply:
            return sum(len(weights) for weights in [self._weights(arguments[0])] if weights)
        if function == self._attention.attend:
            return AttentionNodes.OPERATIONS
        return len(arguments[0]) if function is _aten.cat.out else 2

    def _weights(self, step: LinearStep) -> Batch | None:
        stream, place = self._place(step)
        return stream.resident_batch(place)

    def _fused(self, run: list[Call]) -> list[Call]:
        done: list[Call] = []
        while len(run) > 1 and any(call.function == self._multiply for call in run):
            graph, parts = self._kernels.fused_graph(sum(map(self._operations, run))), FusedInputs()
            if graph is None:
                break
            count = next((i for i, call in enumerate(run) if not self._add(graph, call, parts)), len(run))
            if parts.matmuls and count > 1:
                graph.finalize(self._kernels.row_invariant)
                done.append(Call(FusedCall(run[:count], graph, parts, self._owner), (), {}))
            else:
                done += run[:count]
            done += run[count : count + 1]
            run = run[count + 1 :]
        return done + run

    def _add(self, graph: FusedGraph, call: Call, parts: "FusedInputs") -> bool:
        """Add the call to the graph; False: ggml does not support it."""
        function, arguments, named = call
        if function == self._multiply:
            return self._add_matmul(graph, parts, *arguments)
        if function == self._attention.attend:
            return self._add_attention(graph, parts, *arguments)
        if function == self._kernels.rms_norm:
            return graph.rms_norm(*arguments)
        if function == self._kernels.silu:
            return graph.silu(*arguments)
        if function is put_all and arguments[1] is _aten.index_select.default:
            (out,), _, (x, dim, order), _ = arguments
            return dim in (-1, x.dim() - 1) and graph.select(out, x, order)
        if named.keys() != {"out"}:
            return False
        out = named["out"]
        if function in _COMBINING:
            return graph.combine(_COMBINING[function], out, *arguments)
        if function is _aten.neg.out:
            return graph.combine("mul", out, arguments[0], -1.0)
        if function is _aten.cat.out:
            tensors, dim = (*arguments, 0)[:2]
            places = torch.split(out, [tensor.shape[dim] for tensor in tensors], dim)
            return all(graph.copy(place, tensor) for place, tensor in zip(places, tensors, strict=True))
        return False

    def _add_matmul(
        self,
        graph: FusedGraph,
        parts: "FusedInputs",
        step: LinearStep,
        x: torch.Tensor,
        outputs: Sequence[torch.Tensor],
        _: int,
    ) -> bool:
        stream, place = self._place(step)
        weights = stream.resident_batch(place)
        if weights is None or len(x) != 1:
            return False
        cached = self._kernels.cached_matmul(x, weights, outputs)
        if cached is None:
            return False
        parts.matmuls.append(_FusedMatmul(step, stream, place, weights))
        return graph.matmul(cached.graph.parts, cached.operands)

    def _add_attention(
        self,
        graph: FusedGraph,
        parts: "FusedInputs",
        out: torch.Tensor,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> bool:
        cache = self._attention.cache_of_one_row(layer)
        if cache is None or softcap is not None or sinks is not None:
            return False
        if any(one.stride(3) != 1 for one in (query, key, value)):
            return False
        heads = Heads(query.shape[1], key.shape[1], key.shape[3], value.shape[3])
        scale = heads.key_width**-0.5 if scaling is None else scaling
        attending = graph.attend(heads, cache.capacity, scale)
        rows = ((key.data_ptr(), 4 * key.stride(1)), (value.data_ptr(), 4 * value.stride(1)))
        queries = query.data_ptr(), 4 * query.stride(1)
        parts.attentions.append(_Attended(attending, self._attention, layer, window, queries, out.data_ptr(), rows))
        return True


class _Attended(NamedTuple):
    """Attention in a fused graph: addresses of rows, and the bytes between their heads."""

    attending: AttentionNodes
    attention: PackedAttention
    layer: int
    window: int | None
    query: tuple[int, int]
    out: int
    rows: tuple[tuple[int, int], tuple[int, int]]  # new key and value

    def prepare(self) -> bool:
        """Set address and length of this pass's cache. False: the graph does not fit it."""
        attending, heads = self.attending, self.attending.heads
        cache = self.attention.cache_of_one_row(self.layer)
        if cache is None or cache.capacity > attending.most:
            return False
        halves = cache.halves(self.layer)
        assert halves is not None
        first = max(0, cache.length + 1 - self.window) if self.window else 0
        shapes = [(heads.kv, cache.capacity, width) for width in (heads.key_width, heads.value_width)]
        wide = [Positions(one.data_ptr(), 4 * one.stride(0)) for one in self.attention.buffers.take(*shapes)]
        kept = [Positions(one.data_ptr() + 2 * first * one.stride(1), 2 * one.stride(0)) for one in halves]
        attending.set(cache.length + 1 - first, self.query, self.out, *wide)
        attending.set_packed(cache.length + 1 - first, self.rows, *kept)
        return True


class FusedInputs:
    """Inputs of a fused graph that are checked before it is computed."""

    def __init__(self) -> None:
        self.matmuls: list[_FusedMatmul] = []
        self.attentions: list[_Attended] = []


class FusedCall:
    """A run of calls fused into one."""

    def __init__(self, run: Sequence[Call], graph: FusedGraph, parts: FusedInputs, owner: CallOwner):
        self._run = run
        self._graph = graph
        self._parts = parts
        self._owner = owner
        self._steps = [matmul.step for matmul in parts.matmuls]

    def __call__(self) -> None:
        """Compute the graph, or the run call by call if its inputs have moved."""
        # Weights may have been read again, to be sure that they are intact; a cache may have another type.
        same = all(stream.resident_batch(place) is weights for _, stream, place, weights in self._parts.matmuls)
        if not same or not all(one.prepare() for one in self._parts.attentions):
            for function, arguments, named in self._run:
                function(*arguments, **named)
            return
        start = time.perf_counter()
        for matmul in self._parts.matmuls:
            matmul.stream.advance(matmul.place)
        self._graph.compute()
        self._owner.record_fused(self._steps, start, time.perf_counter())
