"""Decode steps are captured and replayed.

For a small batch the sequence of tensor operations is the same for every token: some forty a layer. Through modules, hooks
and the interpreter they take 0.5 ms a layer; from a flat list a quarter less. A `CapturedStep` is such a list. It holds
torch's operations and the engine's own calls (matmul, attention, experts, embedding lookup), with all operands at fixed
addresses. Replay is bit-identical.

A captured step must not depend on tensor values or on numbers that change from token to token. An operation that reads a value
makes the step uncapturable. Two captures of successive tokens must be identical before the second is replayed.
"""

import ctypes
import gc
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from headrace.engine.buffer_pool import BufferPool, is_dense
from headrace.engine.pooled_allocation import ELEMENTWISE, buffer_for_cat, buffer_for_elementwise, rms_norm_into

_aten = torch.ops.aten
# Tags of operations whose result is a number, has an unknown shape, or is drawn at random.
_UNCAPTURABLE_TAGS = {
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.nondeterministic_seeded,
}
# Operations that always return a view. (`reshape` and `to` may copy.)
_VIEWS = {"alias", "chunk", "detach", "expand", "narrow", "permute", "select", "slice", "split", "split_with_sizes"}
_VIEWS |= {"squeeze", "t", "transpose", "unbind", "unsqueeze", "view"}


class Call(NamedTuple):
    """One call of a capture."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    named: dict[str, Any]


Fuse: TypeAlias = Callable[[list[Call]], list[Call]]  # (calls) -> faster calls with the same results

MAX_CAPTURED_STEPS = 32
_MAX_SEEN_KEYS = 4096


class CapturedStep(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, records every operation whose operands depend on the step's inputs."""

    def __init__(self, pool: BufferPool) -> None:
        """`pool` may be shared by steps that are not replayed at the same time."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.uncapturable_reason: str | None = None
        self._pool = pool
        self._calls: list[Call] = []
        self._aliases: dict[tuple[Any, ...], torch.Tensor] = {}
        self._places: set[int] = set()  # identities of the aliases
        self._inputs: list[torch.Tensor] = []
        self._output: torch.Tensor | None = None
        self._off = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # saves some us an operation: torch asks if its compiler is to skip the mode
        return False

    # -- capture --------------------------------------------------------------------------------------------------

    def input(self, value: torch.Tensor) -> torch.Tensor:
        """A copy at a fixed address, to be given to the model."""
        with self._paused():
            placed = self._pool.empty(value.shape, value.dtype)
            self._inputs.append(self._alias(placed))
            return placed.copy_(value)

    def output(self, value: torch.Tensor) -> torch.Tensor:
        """Record the model's result."""
        if not self._pool.owns(value):
            self.mark_uncapturable("the result does not depend on the input")
        elif self.uncapturable_reason is None:
            self._output = self._alias(value)
        with self._paused():
            return value.clone()

    def call(self, function: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
        """Record a call of the engine's own. Each replay copies its result to a fixed address."""
        with self._paused():
            result = function(*arguments)
            place = self._pool.empty(result.shape, result.dtype)
            self._note(_put, (self._alias(place), function, *map(self._fixed, arguments)), {})
            return place.copy_(result)

    def do(self, function: Callable[..., None], *arguments: Any) -> None:
        """Record a call that writes to tensors among its arguments."""
        with self._paused():
            function(*arguments)
            self._note(function, tuple(map(self._fixed, arguments)), {})

    @property
    def is_recording(self) -> bool:
        """True while operations are recorded: not within a call of the engine's own."""
        return not self._off

    def mark_uncapturable(self, why: str) -> None:
        """Note why this step cannot be replayed."""
        self.uncapturable_reason = self.uncapturable_reason or why

    def empty(self, shape: Sequence[int]) -> torch.Tensor:
        """An fp32 tensor at a fixed address, for `do` to write to."""
        with self._paused():
            return self._pool.empty(shape)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Called by torch for every operation."""
        kwargs = kwargs or {}
        if self._off or self.uncapturable_reason is not None or _makes_views(func):
            return func(*args, **kwargs)
        given = [*_tensors(args), *_tensors(kwargs.values())]
        varying = [tensor for tensor in given if self._pool.owns(tensor)]
        if not varying:
            return func(*args, **kwargs)
        if func is _aten.dropout.default and not args[2]:  # a no-op outside of training
            return args[0]
        if _UNCAPTURABLE_TAGS & set(func.tags) and not _by_numbers(func, args):
            self.mark_uncapturable(f"{func} depends on values")
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            return self._in_place(func, args, kwargs)
        out, variant = None, func
        if func in ELEMENTWISE:
            out, variant = buffer_for_elementwise(self._pool, args), ELEMENTWISE[func]
        elif func is _aten.cat.default:
            out, variant = buffer_for_cat(self._pool, args), _aten.cat.out
        if out is not None:
            variant(*args, **kwargs, out=out)
            self._note(variant, args, {**kwargs, "out": out})
            return out
        if func is _aten.rms_norm.default and args[0].dtype == torch.float32 and len(args[1]) == 1:
            x, _, weight, eps = (*args, None, None)[:4]
            out = self._pool.empty(x.shape)
            self._note(rms_norm_into, (out, x, weight, eps), {})
            return rms_norm_into(out, x, weight, eps)
        return self._elsewhere(func, args, kwargs)

    def _in_place(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        written = [
            value
            for value, argument in zip(args, func._schema.arguments, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        written += [
            kwargs[argument.name]
            for argument in func._schema.arguments
            if argument.name in kwargs and argument.alias_info is not None and argument.alias_info.is_write
        ]
        if not all(self._pool.owns(tensor) for tensor in _tensors(written)):
            self.mark_uncapturable(f"{func} depends on values")
            return func(*args, **kwargs)
        self._note(func, args, kwargs)
        return func(*args, **kwargs)

    def _elsewhere(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Record an operation that allocates its results, or returns a view."""
        results = func(*args, **kwargs)
        made = list(results) if isinstance(results, (list, tuple)) else [results]
        if not all(isinstance(result, torch.Tensor) for result in made):
            self.mark_uncapturable(f"{func} gives something else than tensors")
            return results
        if all(self._pool.owns(result) for result in made):
            return results
        if not all(map(is_dense, made)):
            self.mark_uncapturable(f"{func} gives tensors with holes")
            return results
        places = [self._pool.empty(one.shape, one.dtype, one.stride()).copy_(one) for one in made]
        self._note(put_all, (places, func, args, kwargs), {})
        return places[0] if isinstance(results, torch.Tensor) else type(results)(places)

    def _note(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if self.uncapturable_reason is None:
            named = {name: self._fixed(value) for name, value in kwargs.items()}
            self._calls.append(Call(function, tuple(map(self._fixed, args)), named))

    def _fixed(self, value: Any) -> Any:
        """The argument as replay passes it: varying tensors by their address."""
        if isinstance(value, torch.Tensor):
            return self._alias(value) if self._pool.owns(value) else value
        if type(value) in (list, tuple):
            return type(value)(map(self._fixed, value))
        if type(value) is dict:
            return {name: self._fixed(one) for name, one in value.items()}
        return value

    def _alias(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor at the same address that does not own the buffer, so that the pool may reuse it."""
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        alias = self._aliases.get(key)
        if alias is None:
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            count = 0 if 0 in tensor.shape else last + 1
            if not count:
                return tensor
            memory = (ctypes.c_uint8 * (count * tensor.dtype.itemsize)).from_address(tensor.data_ptr())
            flat = torch.frombuffer(memory, dtype=tensor.dtype)
            alias = self._aliases[key] = flat.as_strided(tensor.shape, tensor.stride())
            self._places.add(id(alias))
        return alias

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """Record nothing within."""
        self._off += 1
        try:
            yield
        finally:
            self._off -= 1

    # -- replay ---------------------------------------------------------------------------------------------------

    def has_same_structure(self, other: "CapturedStep") -> bool:
        """True if both captures consist of the same calls; values and addresses may differ."""

        def same(mine: Any, theirs: Any) -> bool:
            if mine is theirs:
                return True
            if isinstance(mine, torch.Tensor) and isinstance(theirs, torch.Tensor):
                if (mine.shape, mine.stride(), mine.dtype) != (theirs.shape, theirs.stride(), theirs.dtype):
                    return False
                varies = id(mine) in self._places, id(theirs) in other._places
                return all(varies) or (not any(varies) and torch.equal(mine, theirs))
            if isinstance(mine, dict) and isinstance(theirs, dict):
                return mine.keys() == theirs.keys() and all(same(mine[key], theirs[key]) for key in mine)
            if isinstance(mine, (list, tuple)) and isinstance(theirs, (list, tuple)):
                return len(mine) == len(theirs) and all(map(same, mine, theirs))
            return type(mine) is type(theirs) and bool(mine == theirs)

        return (
            self.uncapturable_reason is None and other.uncapturable_reason is None and same(self._calls, other._calls)
        )

    def replay(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The result for other inputs: (rows, vocab)."""
        assert self._output is not None
        for place, value in zip(self._inputs, inputs, strict=True):
            place.copy_(value)
        for function, arguments, named in self._calls:
            function(*arguments, **named)
        return self._output.clone()

    def fuse(self, fuse: Fuse) -> None:
        """Replace the calls by fused ones."""
        self._calls = fuse(self._calls)


class CaptureCache:
    """The captured steps of an engine, by the shape of the pass."""

    def __init__(self, fuse: Fuse = list) -> None:
        self._fuse = fuse
        self._pool = BufferPool()
        self._ready: dict[Hashable, CapturedStep] = {}
        self._first: dict[Hashable, CapturedStep] = {}  # captures not yet confirmed by a second one, the latest last
        self._seen: set[Hashable] = set()
        self._uncapturable: dict[Hashable, str] = {}

    def find(self, key: Hashable) -> CapturedStep | None:
        """The captured step of this key, if it can be replayed."""
        return self._ready.get(key)

    @contextmanager
    def capturing(self, key: Hashable, at_once: bool = False) -> Iterator[CapturedStep | None]:
        """Capture the pass within, unless this key is uncapturable. The second capture is replayed from then on.

        The first pass of a key is not captured, unless `at_once`. Batches with draft tokens have many keys that never recur.
        """
        if (
            (key not in self._seen and not at_once)
            or key in self._uncapturable
            or len(self._ready) >= MAX_CAPTURED_STEPS
        ):
            if len(self._seen) >= _MAX_SEEN_KEYS:
                self._seen.clear()
            self._seen.add(key)
            yield None
            return
        capture = CapturedStep(self._pool)
        with _without_collections():
            with capture:
                yield capture
            self._keep(key, capture)

    def _keep(self, key: Hashable, capture: CapturedStep) -> None:
        first = self._first.pop(key, None)
        if capture.uncapturable_reason is not None:
            self._uncapturable[key] = capture.uncapturable_reason
        elif first is None:
            self._first[key] = capture
            if len(self._first) > MAX_CAPTURED_STEPS:
                del self._first[next(iter(self._first))]
        elif capture.has_same_structure(first):
            capture.fuse(self._fuse)
            self._ready[key] = capture
        else:
            self._uncapturable[key] = "it differs from token to token"


@contextmanager
def _without_collections() -> Iterator[None]:
    """No garbage collection within: ten thousand new live objects would start one of 0.1 s and more."""
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collected:
            gc.enable()


@cache
def _makes_views(func: Any) -> bool:
    """True if the operation always returns a view: the result then lies at an address as fixed as its operand's."""
    return func.overloadpacket.__name__ in _VIEWS


def _tensors(values: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


def _by_numbers(func: Any, args: Sequence[Any]) -> bool:
    """True for indexing by integers, whose shape does not depend on values as indexing by a mask does."""
    return func is _aten.index.Tensor and all(index.dtype != torch.bool for index in _tensors(args[1]))


def _put(place: torch.Tensor, function: Callable[..., torch.Tensor], *arguments: Any) -> None:
    place.copy_(function(*arguments))


def put_all(places: Sequence[torch.Tensor], function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Run a torch operation and copy its results to `places`."""
    results = function(*args, **kwargs)
    for place, result in zip(places, [results] if isinstance(results, torch.Tensor) else results, strict=True):
        place.copy_(result)
