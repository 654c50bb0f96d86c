"""The stream of weights: reader threads fill the pinned memory once and the ring for ever, in execution order.

The readers run ahead of the compute by as much as the ring holds, over the end of a pass into the next one, and while
the engine samples. The reads of pinned rows are part of the first pass, so nothing is read twice and the first token
waits for no loading phase; rows that are lent memory come with the first pass after `lend`. With no reader threads the
consumer reads for itself: load, compute, release. That serial twin runs the same code and reads the same bytes.

What must never happen: a slot is overwritten while in use (a unit's number may exceed the released ones by the slots at
most); a reader's error is lost (it is raised in the consumer); a consumer waits for ever (a silent disk is an error).
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from headrace.checkpoint import Tensor
from headrace.errors import ReadError
from headrace.kernels import Piece
from headrace.stream.files import File, WeightFile
from headrace.stream.layout import Layout, Resident, Unit, rows_that_fit
from headrace.stream.memory import Arena

STALL_LIMIT_S = 60.0
# Pinned rows multiplied between two streamed units: 3 ms of compute, in which the disk fills a fifth of the ring.
SLICE_BYTES = 32 << 20

Batch: TypeAlias = Sequence[tuple[int, Piece]]  # a tuple, if the same will come again in the next pass


class Spans(Protocol):
    """Where spans of time are recorded: a kind, a label, start and end by `time.perf_counter`."""

    def add(self, kind: str, label: str, start: float, end: float) -> None:
        """Record one span."""


@dataclass(slots=True)
class StreamCounters:
    """What the stream did so far. Differences of two copies describe a pass."""

    read_bytes: int = 0
    reads: int = 0
    read_s: float = 0.0  # summed over readers, so it can exceed the time that passed
    stall_s: float = 0.0  # the consumer waited for a read


def piece_of(tensor: Tensor, first: int, rows: int, address: int) -> Piece:
    """Rows of a tensor that lie at an address."""
    if not tensor.slabs:
        return Piece(tensor.type, rows, address, first)
    return Piece(tensor.type, rows, address, first, slab_rows=tensor.outputs, slab_columns=tensor.columns)


@dataclass(frozen=True, slots=True)
class _Load:
    unit: Unit
    number: int | None  # of its slot in the ring, counted over all passes; None: it stays
    arena: Arena | None = None  # where it stays


class WeightStream:
    """Delivers the weights of each visit of a pass, in order, pass after pass. A context manager."""

    def __init__(
        self,
        layout: Layout,
        *,
        slots: int,
        readers: int,
        file_of: Callable[[str], File] = WeightFile,
        lent_slots: int = 0,
        spans: Spans | None = None,
        stall_limit_s: float = STALL_LIMIT_S,
        settle: Callable[[Piece, Tensor], Piece] | None = None,
    ):
        """`readers=0` is the serial twin. `slots` is the size of the ring in units, `lent_slots` of them only while memory is
        lent. `file_of` gives the open file of a path.

        `settle` is called once with each pinned piece (and its tensor) when it has come; what it returns is delivered
        from then on.
        """
        self.layout = layout
        self.counters = StreamCounters()
        self.spans = spans
        self._most_slots = slots
        self._slots = slots - lent_slots  # at the moment
        self._lent_slots = lent_slots
        self._readers = readers
        self._stall_limit_s = stall_limit_s
        self._settle = settle
        self._pinned = Arena(layout.pinned_bytes)
        self._lent = Arena(layout.lent_bytes)
        self.lends = False  # whether lent rows have their memory
        self._ring = Arena(slots * layout.slot_bytes if layout.streamed_units else 0)
        paths = {tensor.path for visit in layout.visits for tensor in visit.tensors}
        self._files = {path: file_of(path) for path in sorted(paths)}
        # One lock, two reasons to wait. A release wakes one reader and an arrival the consumer: waking everybody each time
        # cost 50 ms of a pass of 500 units, in turns of the interpreter.
        lock = threading.Lock()
        self._room = threading.Condition(lock)
        self._arrived = threading.Condition(lock)
        self._threads: list[threading.Thread] = []
        self._loaded: set[int] = set()  # ids of pinned units in memory
        self._complete: dict[int, list[Batch]] = {}  # pinned pieces of visits, once all are in memory
        self._complete_lent: dict[int, list[Batch]] = {}
        self._error: BaseException | None = None
        self._next_visit = 0
        self._released = 0
        self._begin_pass()

    def __enter__(self) -> "WeightStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the consumer -------------------------------------------------------------------------------------------

    def visit(self, index: int) -> Iterator[Batch]:
        """The weights of visit `index` of the pass, in batches of (index of the tensor, piece).

        Pinned rows and streamed units take turns, so that the ring empties while pinned rows are multiplied. The slot of
        a unit is released when the next batch is asked for. Visits must be made in order; after the last one follows the
        first of the next pass.

        Raises:
            ReadError: a read failed or nothing has come from the disk for `stall_limit_s`.
        """
        assert index == self._next_visit, f"visit {index} asked for, {self._next_visit} is next"
        self._next_visit = (index + 1) % len(self.layout.visits)
        self._start()
        visit = self.layout.visits[index]
        pinned = self._delivered(index, self._complete, visit.pinned, self._pinned, self._settle)
        if self.lends:  # never settled: what a row's product is must not depend on what is lent
            pinned = pinned + self._delivered(index, self._complete_lent, visit.lent, self._lent, None)
        streamed = visit.streamed if self.lends else visit.streamed_unlent
        done = 0
        if visit.in_order:  # pinned rows are the first ones
            yield from pinned
            done = len(pinned)
        for count, (i, unit) in enumerate(streamed):
            while done * len(streamed) <= count * len(pinned) and done < len(pinned):
                yield pinned[done]
                done += 1
            number = self._released
            self._wait(lambda n=number: n in self._filled, unit.tensor.name)  # type: ignore[misc]
            slot = self._ring.address + number % self._slots * self.layout.slot_bytes
            yield [(i, piece_of(unit.tensor, unit.first, unit.rows, slot + unit.delta))]
            with self._room:
                self._filled.discard(number)
                self._released += 1
                self._room.notify()
        yield from pinned[done:]

    @property
    def lendable_bytes(self) -> int:
        """The memory that `lend` gives to weights."""
        return self.layout.lent_bytes + self._lent_slots * self.layout.slot_bytes

    def lend(self, lends: bool) -> None:
        """Give lent rows and slots their memory, or take it back; between passes only. What had been read ahead is read again."""
        if lends == self.lends or not self.lendable_bytes:
            return
        assert self._next_visit == 0, "memory is lent between passes"
        self._stop()
        if not lends:
            self._loaded.difference_update(
                id(unit) for visit in self.layout.visits for rows in visit.lent for unit in rows.units
            )
            self._complete_lent.clear()
            self._lent.give_back()
            self._ring.give_back()
        self.lends = lends
        self._slots = self._most_slots if lends else self._most_slots - self._lent_slots
        self._begin_pass()

    def rewind(self) -> None:
        """Give up the pass in progress: the next visit is the first one again. What is pinned stays."""
        self._stop()
        self._error = None
        self._begin_pass()

    def close(self) -> None:
        """Stop the readers. The files belong to whoever opened them. Safe to call twice."""
        self._stop()

    def _wait(self, ready: Callable[[], bool], label: str) -> None:
        if ready() and self._error is None:
            return
        start = last_news = time.perf_counter()
        reads = self.counters.reads
        while not self._readers and not ready():
            self._run(self._take())
        while True:
            with self._arrived:
                if self._error is not None:
                    raise self._error
                if ready():
                    break
                self._arrived.wait(timeout=min(1.0, self._stall_limit_s))
                now = time.perf_counter()
                if self.counters.reads != reads:
                    reads, last_news = self.counters.reads, now
                if now - last_news > self._stall_limit_s:
                    raise ReadError(
                        f"the disk has delivered nothing for {self._stall_limit_s:.0f} s while {label} was read",
                        hint="check the disk or the network share, then run the same command again",
                    )
        end = time.perf_counter()
        self.counters.stall_s += end - start
        if self.spans is not None:
            self.spans.add("stall", label, start, end)

    def _delivered(
        self,
        index: int,
        complete: dict[int, list[Batch]],
        residents: Sequence[Resident],
        arena: Arena,
        settle: Callable[[Piece, Tensor], Piece] | None,
    ) -> list[Batch]:
        """The rows of a visit that stay in an arena, once they have come."""
        batches = complete.get(index)
        if batches is None:
            try:
                batches = complete[index] = self._resident_batches(index, residents, arena, settle)
            except BaseException:  # an interrupt may have left pieces half settled: they are read again
                with self._arrived:
                    self._loaded.difference_update(id(unit) for rows in residents for unit in rows.units)
                raise
        return batches

    def _resident_batches(
        self, index: int, residents: Sequence[Resident], arena: Arena, settle: Callable[[Piece, Tensor], Piece] | None
    ) -> list[Batch]:
        """As one batch, or in slices where others stream beside them."""
        visit = self.layout.visits[index]
        units = [id(unit) for rows in residents for unit in rows.units]
        if units:
            self._wait(lambda: self._loaded.issuperset(units), f"visit {index}")
        pieces: list[tuple[int, Piece]] = []
        for i, (tensor, found) in enumerate(zip(visit.tensors, residents, strict=True)):
            step = rows_that_fit(tensor, SLICE_BYTES) if visit.streamed_unlent else max(1, found.rows)
            for row in range(0, found.rows, step):
                address = arena.address + found.address + row * tensor.row_bytes
                pieces.append((i, piece_of(tensor, found.first + row, min(step, found.rows - row), address)))
        if settle is not None:
            pieces = [(i, settle(piece, visit.tensors[i])) for i, piece in pieces]
        if not visit.streamed_unlent:
            return [tuple(pieces)] if pieces else []
        return [(piece,) for piece in pieces]

    # -- the readers --------------------------------------------------------------------------------------------

    def _begin_pass(self) -> None:
        self._next_visit = 0
        self._released = 0
        self._filled: set[int] = set()
        self._issued = set(self._loaded)
        self._loads = self._sequence()
        self._next: _Load | None = next(self._loads, None)
        self._stopping = False

    def _sequence(self) -> Iterator[_Load]:
        """All loads, for ever: rows that stay and were not issued yet, and every streamed unit, pass after pass."""
        number = 0
        while True:
            before = number, len(self._issued)
            for visit in self.layout.visits:
                staying = [(unit, self._pinned) for rows in visit.pinned for unit in rows.units]
                if self.lends:
                    staying += [(unit, self._lent) for rows in visit.lent for unit in rows.units]
                for unit, arena in staying:
                    if id(unit) not in self._issued:
                        self._issued.add(id(unit))
                        yield _Load(unit, None, arena)
                for _, unit in visit.streamed if self.lends else visit.streamed_unlent:
                    yield _Load(unit, number)
                    number += 1
            if before == (number, len(self._issued)):
                return  # everything is pinned

    def _start(self) -> None:
        if self._threads or not self._readers or self._next is None:
            return
        self._threads = [
            threading.Thread(target=self._read_ahead, name=f"headrace-reader-{i}", daemon=True)
            for i in range(self._readers)
        ]
        for thread in self._threads:
            thread.start()

    def _stop(self) -> None:
        with self._room:
            self._stopping = True
            self._room.notify_all()
        for thread in self._threads:
            thread.join(timeout=self._stall_limit_s)
        self._threads = []

    def _read_ahead(self) -> None:
        try:
            while (load := self._take()) is not None:
                self._run(load)
        except BaseException as error:
            with self._arrived:
                self._error = error
                self._arrived.notify_all()
                self._room.notify_all()

    def _take(self) -> _Load | None:
        """The next load, once the ring has room for it. None when there is nothing more to do."""
        with self._room:
            while not self._stopping and self._error is None and (load := self._next) is not None:
                if self._fits(load):
                    self._next = next(self._loads, None)
                    if self._next is not None and self._fits(self._next):
                        self._room.notify()
                    return load
                self._room.wait()
            return None

    def _fits(self, load: _Load) -> bool:
        return load.number is None or load.number < self._released + self._slots

    def _run(self, load: _Load | None) -> None:
        if load is None:
            return
        unit = load.unit
        start = time.perf_counter()
        self._files[unit.tensor.path].read(unit.start, self._target(load), unit.needed)
        end = time.perf_counter()
        if self.spans is not None:
            self.spans.add("read", unit.tensor.name, start, end)
        with self._arrived:
            self.counters.read_bytes += unit.length
            self.counters.reads += 1
            self.counters.read_s += end - start
            if load.number is None:
                self._loaded.add(id(unit))
            else:
                self._filled.add(load.number)
            self._arrived.notify()

    def _target(self, load: _Load) -> memoryview:
        unit = load.unit
        if load.number is None:
            assert load.arena is not None
            assert unit.at is not None
            return load.arena.view[unit.at : unit.at + unit.length]
        start = load.number % self._slots * self.layout.slot_bytes
        return self._ring.view[start : start + unit.length]
