"""The stream of weights: reader threads fill the pinned memory once and the ring for ever, in execution order.

The readers prefetch as much as the ring holds, into the next pass, and while the engine samples. The first pass reads the
pinned rows: nothing is read twice, and the first token waits for no loading phase. Decode-pinned rows come with the first
pass after `reuse_prefill_memory`. With no reader threads the consumer reads for itself: load, compute, release. That serial
twin runs the same code and reads the same bytes.

A slot is never overwritten while in use: unit n is read once n - slots + 1 units are released. A reader's error
is never lost (it is raised in the consumer). A consumer never waits for ever (a silent disk is an error).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeAlias

from headrace.checkpoint import Tensor
from headrace.kernels import WeightSlice
from headrace.stream.arena import Arena
from headrace.stream.files import File
from headrace.stream.layout import Layout, Resident, Unit, rows_that_fit
from headrace.stream.readers import STALL_LIMIT_S, ReadCounters, Readers, Spans

# Bytes of pinned rows multiplied between two streamed units. In their 3 ms of compute the disk fills a fifth of the ring.
PINNED_SLICE_BYTES = 32 << 20
# Max units multiplied in one call, if a quarter of the ring holds them. One takes 0.1 ms, as long as threads take to wake.
MAX_UNITS_PER_CALL = 4

Batch: TypeAlias = Sequence[tuple[int, WeightSlice]]  # a tuple, if the next pass delivers the same one


def weight_slice_of(tensor: Tensor, first: int, rows: int, address: int) -> WeightSlice:
    """The slice of a tensor's rows at an address."""
    if not tensor.k_splits:
        return WeightSlice(tensor.type, rows, address, first)
    return WeightSlice(tensor.type, rows, address, first, k_split_rows=tensor.outputs, k_split_columns=tensor.columns)


@dataclass(frozen=True, slots=True)
class _Load:
    unit: Unit
    number: int | None  # of a streamed unit, counted over all passes; None: it is pinned
    arena: Arena | None = None  # if pinned


class WeightStream(AbstractContextManager["WeightStream"]):
    """Delivers the weight groups of a pass, in order, pass after pass. A context manager."""

    def __init__(
        self,
        layout: Layout,
        *,
        slots: int,
        readers: int,
        file_of: Callable[[str], File],
        decode_only_slots: int = 0,
        spans: Spans | None = None,
        stall_limit_s: float = STALL_LIMIT_S,
        on_pinned: Callable[[WeightSlice, Tensor], WeightSlice] | None = None,
        may_map: Callable[[Tensor], bool] = lambda _: False,
    ):
        """`readers=0` is the synchronous mode. `slots` is the size of the ring in units, `decode_only_slots` of them exist
        only while decode reuses prefill memory. `file_of` gives the open file of a path.

        `on_pinned` is called once with each pinned slice (and its tensor) when it has arrived; its result is delivered from
        then on.

        `may_map`: the pinned rows of a tensor are pages of its file, if it can be mapped. `on_pinned` must not write to them.
        """
        self.layout = layout
        self.counters = ReadCounters()
        self._most_slots = slots
        self._slots = slots - decode_only_slots  # in use
        self._decode_only_slots = decode_only_slots
        self._readers = Readers(
            readers, name="headrace-reader", counters=self.counters, spans=spans, stall_limit_s=stall_limit_s
        )
        self._on_pinned = on_pinned
        self._may_map = may_map
        self._pinned = Arena(layout.pinned_bytes)
        self._decode_pinned = Arena(layout.decode_pinned_bytes)
        self.reuses_prefill_memory = False  # decode-pinned rows are in the arena
        self._ring = Arena(slots * layout.slot_bytes if layout.streamed_units else 0)
        paths = {tensor.path for group in layout.groups for tensor in group.tensors}
        self._files = {path: file_of(path) for path in sorted(paths)}
        self._loaded: set[int] = set()  # ids of pinned units in memory
        self._pinned_batches: dict[int, list[Batch]] = {}  # pinned slices of groups, once all are in memory
        self._decode_pinned_batches: dict[int, list[Batch]] = {}
        self._next_group = self._released = 0
        self._begin_pass()

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the consumer -------------------------------------------------------------------------------------------

    def weights_of(self, index: int) -> Iterator[Batch]:
        """The weights of group `index` of the pass, in batches of (index of the tensor, slice).

        Pinned rows and streamed units alternate, so that the ring empties while pinned rows are multiplied. The slots of
        units are released when the next batch is requested. Groups must be requested in order; after the last one follows
        the first of the next pass.

        Raises:
            ReadError: a read failed or nothing has come from the disk for `stall_limit_s`.
        """
        self.advance(index)
        group = self.layout.groups[index]
        pinned = self._batches_of(index, self._pinned_batches, group.pinned, self._pinned, self._on_pinned)
        if self.reuses_prefill_memory:  # never repacked: a row's result must not depend on the reuse
            pinned = pinned + self._batches_of(
                index, self._decode_pinned_batches, group.decode_pinned, self._decode_pinned, None
            )
        streamed = group.streamed if self.reuses_prefill_memory else group.streamed_in_prefill
        done = 0
        if group.in_order:  # pinned rows are the first ones
            yield from pinned
            done = len(pinned)
        together = max(1, min(MAX_UNITS_PER_CALL, self._slots // 4))
        for count in range(0, len(streamed), together):
            while done * len(streamed) <= count * len(pinned) and done < len(pinned):
                yield pinned[done]
                done += 1
            units = streamed[count : count + together]
            numbers = range(self._released, self._released + len(units))
            self._wait(lambda some=numbers: self._filled.issuperset(some), units[0][1].tensor.name)  # type: ignore[misc]
            yield [(i, self._slice_in(number, unit)) for number, (i, unit) in zip(numbers, units, strict=True)]
            with self._readers.slot_free:
                self._filled.difference_update(numbers)
                self._released += len(units)
                self._readers.slot_free.notify(len(units))
        yield from pinned[done:]

    def _slice_in(self, number: int, unit: Unit) -> WeightSlice:
        slot = self._ring.address + number % self._slots * self.layout.slot_bytes
        return weight_slice_of(unit.tensor, unit.first, unit.rows, slot + unit.row_offset)

    def resident_batch(self, index: int) -> Batch | None:
        """The one batch of a fully pinned group, once it has been delivered. The pass does not advance."""
        batches = self._pinned_batches.get(index)
        return batches[0] if batches and not self.layout.groups[index].streamed_in_prefill else None

    def advance(self, index: int) -> None:
        """Advance past a group; its weights are delivered by `weights_of`, or known from `resident_batch`."""
        assert index == self._next_group, f"group {index} requested, {self._next_group} is next"
        self._readers.start([self._read_next] * self._readers.count if self._next is not None else [])
        self._next_group = (index + 1) % len(self.layout.groups)

    @property
    def reusable_prefill_bytes(self) -> int:
        """The prefill memory that `reuse_prefill_memory` gives to weights."""
        return self.layout.decode_pinned_bytes + self._decode_only_slots * self.layout.slot_bytes

    def reuse_prefill_memory(self, reuse: bool) -> None:
        """Give decode-pinned rows and slots their memory, or take it back; between passes only. Prefetched units are reread."""
        if reuse == self.reuses_prefill_memory or not self.reusable_prefill_bytes:
            return
        assert self._next_group == 0, "prefill memory is reused between passes only"
        self._readers.stop()
        if not reuse:
            self._loaded.difference_update(
                id(unit) for group in self.layout.groups for rows in group.decode_pinned for unit in rows.units
            )
            self._decode_pinned_batches.clear()
            self._decode_pinned.give_back()
            self._ring.give_back()
        self.reuses_prefill_memory = reuse
        self._slots = self._most_slots if reuse else self._most_slots - self._decode_only_slots
        self._begin_pass()

    def rewind(self) -> None:
        """Give up the pass in progress: the next group is the first one again. Pinned rows stay."""
        self._readers.stop()
        self._begin_pass()

    def close(self) -> None:
        """Stop the readers, release the memory. The files belong to whoever opened them. Safe to call twice."""
        self._readers.close()
        for arena in (self._pinned, self._decode_pinned, self._ring):
            arena.give_back()

    def _wait(self, ready: Callable[[], bool], label: str) -> None:
        if ready() and self._readers.error is None:
            return
        while not self._readers.count and not ready():
            if not self._read_next():
                raise self._readers.closed_error()
        self._readers.wait(ready, label)

    def _batches_of(
        self,
        index: int,
        complete: dict[int, list[Batch]],
        residents: Sequence[Resident],
        arena: Arena,
        on_pinned: Callable[[WeightSlice, Tensor], WeightSlice] | None,
    ) -> list[Batch]:
        """The rows of a group that stay in an arena, once they have arrived."""
        batches = complete.get(index)
        if batches is None:
            try:
                batches = complete[index] = self._make_batches(index, residents, arena, on_pinned)
            except BaseException:  # an interrupt may have left slices half repacked: they are read again
                with self._readers.data_ready:
                    self._loaded.difference_update(id(unit) for rows in residents for unit in rows.units)
                raise
        return batches

    def _make_batches(
        self,
        index: int,
        residents: Sequence[Resident],
        arena: Arena,
        on_pinned: Callable[[WeightSlice, Tensor], WeightSlice] | None,
    ) -> list[Batch]:
        """One batch of all slices, or one per slice where units stream beside them."""
        group = self.layout.groups[index]
        units = [id(unit) for rows in residents for unit in rows.units]
        if units:
            self._wait(lambda: self._loaded.issuperset(units), f"weight group {index}")
        slices: list[tuple[int, WeightSlice]] = []
        for i, (tensor, found) in enumerate(zip(group.tensors, residents, strict=True)):
            step = rows_that_fit(tensor, PINNED_SLICE_BYTES) if group.streamed_in_prefill else max(1, found.rows)
            for row in range(0, found.rows, step):
                address = arena.address + found.arena_offset + row * tensor.row_bytes
                slices.append((i, weight_slice_of(tensor, found.first + row, min(step, found.rows - row), address)))
        if on_pinned is not None:
            slices = [(i, on_pinned(weight_slice, group.tensors[i])) for i, weight_slice in slices]
        if not group.streamed_in_prefill:
            return [tuple(slices)] if slices else []
        return [(weight_slice,) for weight_slice in slices]

    # -- the readers --------------------------------------------------------------------------------------------

    def _begin_pass(self) -> None:
        self._next_group = 0
        self._released = 0
        self._filled: set[int] = set()
        self._issued = set(self._loaded)
        self._loads = self._sequence()
        self._next: _Load | None = next(self._loads, None)
        self._readers.reset()

    def _sequence(self) -> Iterator[_Load]:
        """All loads, for ever: pinned rows that were not issued yet, and every streamed unit, pass after pass."""
        number = 0
        while True:
            before = number, len(self._issued)
            for group in self.layout.groups:
                pinned = [(unit, self._pinned) for rows in group.pinned for unit in rows.units]
                if self.reuses_prefill_memory:
                    pinned += [(unit, self._decode_pinned) for rows in group.decode_pinned for unit in rows.units]
                for unit, arena in pinned:
                    if id(unit) not in self._issued:
                        self._issued.add(id(unit))
                        yield _Load(unit, None, arena)
                for _, unit in group.streamed if self.reuses_prefill_memory else group.streamed_in_prefill:
                    yield _Load(unit, number)
                    number += 1
            if before == (number, len(self._issued)):
                return  # everything is pinned

    def _read_next(self) -> bool:
        """Run the next load, as soon as the ring has space for it; False if there is none."""
        load = self._take()
        if load is not None:
            self._run(load)
        return load is not None

    def _take(self) -> _Load | None:
        """The next load, once the ring has space for it. None when there is nothing more to read."""
        readers = self._readers
        with readers.slot_free:
            while not readers.stopping and readers.error is None and (load := self._next) is not None:
                if self._fits(load):
                    self._next = next(self._loads, None)
                    if self._next is not None and self._fits(self._next):
                        readers.slot_free.notify()
                    return load
                readers.slot_free.wait()
            return None

    def _fits(self, load: _Load) -> bool:
        return load.number is None or load.number < self._released + self._slots

    def _run(self, load: _Load) -> None:
        unit = load.unit
        file = self._files[unit.tensor.path]
        with self._readers.reading(unit.tensor.name):
            mapped = (
                load.arena is self._pinned
                and unit.arena_offset is not None
                and self._may_map(unit.tensor)
                and file.map(unit.start, self._pinned, unit.arena_offset, unit.length, unit.needed)
            )
            count = unit.length if mapped else file.read(unit.start, self._target(load), unit.needed)
        with self._readers.data_ready:
            self._readers.count_read(count)
            if load.number is None:
                self._loaded.add(id(unit))
            else:
                self._filled.add(load.number)
            self._readers.notify_if_ready()

    def _target(self, load: _Load) -> memoryview:
        unit = load.unit
        if load.number is None:
            assert load.arena is not None
            assert unit.arena_offset is not None
            return load.arena.view[unit.arena_offset : unit.arena_offset + unit.length]
        start = load.number % self._slots * self.layout.slot_bytes
        return self._ring.view[start : start + unit.length]
