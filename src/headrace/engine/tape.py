"""A pass of few rows, taken down operation by operation and played back for the next tokens.

For a row, a model's modules do the same from token to token: some forty small operations a layer on tensors of the same
shapes. Through modules, hooks and the interpreter they take 0.5 ms a layer, from a flat list a quarter less. A tape is such
a list: torch's operations, and the calls of the engine's own (products, attention, experts, rows of a table) between them,
all on tensors whose places are fixed.

What a model does must not depend on the values of its tensors or on numbers that change from token to token. An operation
that brings a value into the interpreter spoils a tape, and two tapes of successive tokens must be alike before one is played.
"""

import ctypes
import gc
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from headrace.engine.blocks import Blocks, is_dense
from headrace.engine.recycling import ELEMENTWISE, rms_norm_into, room_for_cat, room_for_elementwise

_aten = torch.ops.aten
# Of an operation on varying tensors: its result is a number or of unknown shape, or drawn at random.
_SPOILING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded}
# What always looks at its operand in another way. (`reshape` and `to` may, or not.)
_VIEWS = {"alias", "chunk", "detach", "expand", "narrow", "permute", "select", "slice", "split", "split_with_sizes"}
_VIEWS |= {"squeeze", "t", "transpose", "unbind", "unsqueeze", "view"}


class Call(NamedTuple):
    """One call of a tape."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    named: dict[str, Any]


Link: TypeAlias = Callable[[list[Call]], list[Call]]  # calls that do the same, sooner

MOST_TAPES = 32
_MOST_SEEN = 4096


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, takes down what varies: all that is computed from its inputs."""

    def __init__(self, blocks: Blocks) -> None:
        """`blocks` may be shared by tapes that are not played at the same time."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.spoilt: str | None = None
        self._blocks = blocks
        self._calls: list[Call] = []
        self._aliases: dict[tuple[Any, ...], torch.Tensor] = {}
        self._places: set[int] = set()  # their identities
        self._inputs: list[torch.Tensor] = []
        self._output: torch.Tensor | None = None
        self._off = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # torch asks whether its compiler is to be kept out, at some us an operation
        return False

    # -- taking down ----------------------------------------------------------------------------------------------

    def input(self, value: torch.Tensor) -> torch.Tensor:
        """The same numbers at a fixed place, to be given to the model."""
        with self._paused():
            placed = self._blocks.empty(value.shape, value.dtype)
            self._inputs.append(self._alias(placed))
            return placed.copy_(value)

    def output(self, value: torch.Tensor) -> torch.Tensor:
        """What the model has returned."""
        if not self._blocks.holds(value):
            self.spoil("the result does not depend on the input")
        elif self.spoilt is None:
            self._output = self._alias(value)
        with self._paused():
            return value.clone()

    def call(self, function: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
        """A call of the engine's own, which may do as it likes: its result is put in its place whenever it is played."""
        with self._paused():
            result = function(*arguments)
            place = self._blocks.empty(result.shape, result.dtype)
            self._note(_put, (self._alias(place), function, *map(self._fixed, arguments)), {})
            return place.copy_(result)

    def do(self, function: Callable[..., None], *arguments: Any) -> None:
        """The same for a call that writes to tensors among its arguments."""
        with self._paused():
            function(*arguments)
            self._note(function, tuple(map(self._fixed, arguments)), {})

    @property
    def listens(self) -> bool:
        """Whether what happens now is taken down: not within a call of the engine's own."""
        return not self._off

    def spoil(self, why: str) -> None:
        """What happens now cannot be played back."""
        self.spoilt = self.spoilt or why

    def empty(self, shape: Sequence[int]) -> torch.Tensor:
        """A place for what such a call writes, fp32."""
        with self._paused():
            return self._blocks.empty(shape)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Called by torch for every operation."""
        kwargs = kwargs or {}
        if self._off or self.spoilt is not None or _makes_views(func):
            return func(*args, **kwargs)
        given = [*_tensors(args), *_tensors(kwargs.values())]
        varying = [tensor for tensor in given if self._blocks.holds(tensor)]
        if not varying:
            return func(*args, **kwargs)
        if func is _aten.dropout.default and not args[2]:  # which is none but in training
            return args[0]
        if _SPOILING & set(func.tags) and not _by_numbers(func, args):
            self.spoil(f"{func} depends on values")
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            return self._in_place(func, args, kwargs)
        out, variant = None, func
        if func in ELEMENTWISE:
            out, variant = room_for_elementwise(self._blocks, args), ELEMENTWISE[func]
        elif func is _aten.cat.default:
            out, variant = room_for_cat(self._blocks, args), _aten.cat.out
        if out is not None:
            variant(*args, **kwargs, out=out)
            self._note(variant, args, {**kwargs, "out": out})
            return out
        if func is _aten.rms_norm.default and args[0].dtype == torch.float32 and len(args[1]) == 1:
            x, _, weight, eps = (*args, None, None)[:4]
            out = self._blocks.empty(x.shape)
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
        if not all(self._blocks.holds(tensor) for tensor in _tensors(written)):
            self.spoil(f"{func} depends on values")
            return func(*args, **kwargs)
        self._note(func, args, kwargs)
        return func(*args, **kwargs)

    def _elsewhere(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """An operation that makes its results wherever it likes, or a view."""
        results = func(*args, **kwargs)
        made = list(results) if isinstance(results, (list, tuple)) else [results]
        if not all(isinstance(result, torch.Tensor) for result in made):
            self.spoil(f"{func} gives something else than tensors")
            return results
        if all(self._blocks.holds(result) for result in made):
            return results
        if not all(map(is_dense, made)):
            self.spoil(f"{func} gives tensors with holes")
            return results
        places = [self._blocks.empty(one.shape, one.dtype, one.stride()).copy_(one) for one in made]
        self._note(put_all, (places, func, args, kwargs), {})
        return places[0] if isinstance(results, torch.Tensor) else type(results)(places)

    def _note(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if self.spoilt is None:
            named = {name: self._fixed(value) for name, value in kwargs.items()}
            self._calls.append(Call(function, tuple(map(self._fixed, args)), named))

    def _fixed(self, value: Any) -> Any:
        """The argument as it is when it is played: of varying tensors their place."""
        if isinstance(value, torch.Tensor):
            return self._alias(value) if self._blocks.holds(value) else value
        if type(value) in (list, tuple):
            return type(value)(map(self._fixed, value))
        if type(value) is dict:
            return {name: self._fixed(one) for name, one in value.items()}
        return value

    def _alias(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor at the same place that does not keep the place from being used again."""
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
        """What the engine does itself is not taken down."""
        self._off += 1
        try:
            yield
        finally:
            self._off -= 1

    # -- playing --------------------------------------------------------------------------------------------------

    def is_like(self, other: "Tape") -> bool:
        """Whether two tapes do the same, whatever the values and the places."""

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

        return self.spoilt is None and other.spoilt is None and same(self._calls, other._calls)

    def play(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The result for other inputs."""
        assert self._output is not None
        for place, value in zip(self._inputs, inputs, strict=True):
            place.copy_(value)
        for function, arguments, named in self._calls:
            function(*arguments, **named)
        return self._output.clone()

    def link(self, link: Link) -> None:
        """From now on do what `link` makes of the calls."""
        self._calls = link(self._calls)


class Tapes:
    """The tapes of an engine, by what a pass consists of."""

    def __init__(self, link: Link = list) -> None:
        self._link = link
        self._blocks = Blocks()
        self._ready: dict[Hashable, Tape] = {}
        self._first: dict[Hashable, Tape] = {}  # the latest last
        self._seen: set[Hashable] = set()
        self._spoilt: dict[Hashable, str] = {}

    def tape(self, key: Hashable) -> Tape | None:
        """One that can be played."""
        return self._ready.get(key)

    @contextmanager
    def taking_down(self, key: Hashable, at_once: bool = False) -> Iterator[Tape | None]:
        """Within it a pass is taken down, unless that was in vain before. The second tape is played from then on.

        Not the first of its kind, unless `at_once`: batches with draft tokens have passes of so many kinds that most never come again.
        """
        if (key not in self._seen and not at_once) or key in self._spoilt or len(self._ready) >= MOST_TAPES:
            if len(self._seen) >= _MOST_SEEN:
                self._seen.clear()
            self._seen.add(key)
            yield None
            return
        tape = Tape(self._blocks)
        with _without_collections():
            with tape:
                yield tape
            self._keep(key, tape)

    def _keep(self, key: Hashable, tape: Tape) -> None:
        first = self._first.pop(key, None)
        if tape.spoilt is not None:
            self._spoilt[key] = tape.spoilt
        elif first is None:
            self._first[key] = tape
            if len(self._first) > MOST_TAPES:
                del self._first[next(iter(self._first))]
        elif tape.is_like(first):
            tape.link(self._link)
            self._ready[key] = tape
        else:
            self._spoilt[key] = "it differs from token to token"


@contextmanager
def _without_collections() -> Iterator[None]:
    """Ten thousand new objects that stay would have Python look for garbage among all that there are, for 0.1 s and more."""
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collected:
            gc.enable()


@cache
def _makes_views(func: Any) -> bool:
    """Whether it always looks at its operand in another way: of what varies the result varies, at a place as fixed as that."""
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
    """Whether an operation only looks as if its shape depended on values: it would, indexed by a mask."""
    return func is _aten.index.Tensor and all(index.dtype != torch.bool for index in _tensors(args[1]))


def _put(place: torch.Tensor, function: Callable[..., torch.Tensor], *arguments: Any) -> None:
    place.copy_(function(*arguments))


def put_all(places: Sequence[torch.Tensor], function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Do an operation of torch and put its results in their places."""
    results = function(*args, **kwargs)
    for place, result in zip(places, [results] if isinstance(results, torch.Tensor) else results, strict=True):
        place.copy_(result)
