"""Experts on demand: read when the router asks for them, kept as long as they are worth it.

All experts that a layer needs are asked for at once. Those in memory are multiplied first, while reader threads fetch the
others with the queue deep; each is handed over as it arrives. An expert is read once per layer and pass, however many
rows chose it, and its slot in memory may go to another as soon as its product is done.

What must never happen: a slot is overwritten while it is read into or multiplied (it is held); a reader's error is lost
(it is raised in the consumer); a consumer waits for ever (a silent disk is an error).
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from headrace.checkpoint.tensor import Slice
from headrace.kernels import DECODE_MAX_ROWS, WeightSlice
from headrace.stream.arena import Arena, aligned
from headrace.stream.expert_cache import ExpertCache
from headrace.stream.files import File
from headrace.stream.readers import STALL_LIMIT_S, ReadCounters, Readers, Spans
from headrace.stream.weights import weight_slice_of

# Experts under way at a time: enough to keep the disk busy, few enough that a prompt does not empty the memory.
MAX_PREFETCHED = 12

# Memory of slots is taken from the system this much at a time, ahead of the reads into it.
_TAKEN_AT_ONCE = 4 << 20
_LOW_PRIORITY = 10  # of `nice`; at the lowest of all it would be made to wait while it holds the interpreter's lock

# Experts in memory, each with its address.
Ready: TypeAlias = list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Read:
    """One range of a file, page-aligned, and where it goes in the slot."""

    part: Slice
    start: int
    length: int
    needed: int
    place: int  # of `start` in the slot


@dataclass(frozen=True, slots=True)
class Bundle:
    """All that is read for one expert."""

    reads: tuple[Read, ...]
    offsets: tuple[int, ...]  # of each slice's first row, in the slot
    nbytes: int  # in its slot

    def slices(self, address: int) -> tuple[WeightSlice, ...]:
        """Of each slice, where the slot has that address."""
        found = []
        for read, offset in zip(self.reads, self.offsets, strict=True):
            part = read.part
            rows = part.tensor.rows if part.tensor.k_splits else part.rows
            found.append(weight_slice_of(part.tensor, 0, rows, address + offset))
        return tuple(found)


def bundle_of(slices: Sequence[Slice]) -> Bundle:
    """Lay out an expert's slices one after another."""
    reads, offsets, place = [], [], 0
    for part in slices:
        offset = part.tensor.offset + part.first * part.tensor.row_bytes
        size = part.tensor.nbytes if part.tensor.k_splits else part.rows * part.tensor.row_bytes
        start, length = aligned(offset, size)
        reads.append(Read(part, start, length, offset - start + size, place))
        offsets.append(place + offset - start)
        place += length
    return Bundle(tuple(reads), tuple(offsets), place)


@dataclass(slots=True)
class ExpertCounters(ReadCounters):
    """And how experts were found."""

    hits: int = 0  # experts that were in memory when their layer asked for them
    ahead: int = 0  # that had been ordered before: read ahead, or under way
    misses: int = 0
    wasted_bytes: int = 0  # read ahead and not needed by the layer


@dataclass(eq=False, slots=True)
class _ExpertLoad:
    layer: int
    expert: int
    slot: int
    left: int  # reads that have not come yet
    unwanted: bool = False  # read ahead, and then not asked for


class ExpertStream:
    """The experts of all layers, some of them in memory. Owns the memory and the readers; a context manager."""

    def __init__(
        self,
        layers: Sequence[Sequence[Sequence[Slice]]],
        *,
        cache: ExpertCache,
        slots: int,
        readers: int,
        file_of: Callable[[str], File],
        spans: Spans | None = None,
        stall_limit_s: float = STALL_LIMIT_S,
    ):
        """What is fixed.

        Args:
            layers: of every expert of every layer, the slices it consists of.
            cache: which experts stay in memory.
            slots: experts that fit into it.
            readers: threads, and so reads under way at a time. 0: the consumer reads for itself.
            file_of: the open file of a path.
            spans: where reads and stalls are recorded.
            stall_limit_s: silence of the disk that is an error.
        """
        self.counters = ExpertCounters()
        self.cache = cache
        self.bundles = [[bundle_of(slices) for slices in experts] for experts in layers]
        self._slot_bytes = max(bundle.nbytes for experts in self.bundles for bundle in experts)
        self.reads_always = slots < sum(map(len, self.bundles))  # for ever: memory cannot hold all experts
        self._arena = Arena(slots * self._slot_bytes)
        paths = {part.tensor.path for experts in layers for slices in experts for part in slices}
        self._files = {path: file_of(path) for path in sorted(paths)}
        self._readers = Readers(
            readers, name="headrace-expert-reader", counters=self.counters, spans=spans, stall_limit_s=stall_limit_s
        )
        self._queue: deque[tuple[_ExpertLoad, Read]] = deque()
        self._later: deque[tuple[_ExpertLoad, Read]] = deque()  # reads ahead: only when nothing is waited for
        self._loading: dict[int, _ExpertLoad] = {}  # by expert, of the layer at hand
        self._ahead: dict[int, dict[int, _ExpertLoad]] = {}  # by layer and expert
        self._strays: dict[tuple[int, int], _ExpertLoad] = {}  # read ahead in vain, and still under way
        self._populated = 0  # bytes of the arena

    def __enter__(self) -> "ExpertStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the consumer -------------------------------------------------------------------------------------------

    def fetch(
        self,
        layer: int,
        counts: npt.NDArray[np.integer],
        rows: int,
        ordered: Callable[[], None] = lambda: None,
    ) -> Iterator[Ready]:
        """The experts of a layer that some of its rows have chosen, in groups: those in memory first, then as they come.

        `counts[e]` of `rows` rows chose expert e. `ordered` is called when what is missing has been ordered. The memory
        of a group may be used until the next one is asked for.

        Raises:
            ReadError: a read failed or nothing has come from the disk for `stall_limit_s`.
        """
        self._readers.start([self._read] * self._readers.count + [self._populate])
        held: list[int] = []
        try:
            with self._readers.space:
                self.cache.note(layer, counts, rows)
                ready, missing = self._look_up(layer, np.flatnonzero(counts).tolist(), held)
                self._issue(layer, missing, held)
            ordered()
            if ready:
                yield self._placed(ready)
                self._let_go([slot for _, slot in ready], held)
            while missing or self._loading:
                ready = self._wait(layer, missing, held, together=rows <= DECODE_MAX_ROWS)
                yield self._placed(ready)
                self._let_go([slot for _, slot in ready], held)
        finally:
            self._rollback(held)

    def _look_up(self, layer: int, wanted: Sequence[int], held: list[int]) -> tuple[list[tuple[int, int]], deque[int]]:
        ready: list[tuple[int, int]] = []
        missing: deque[int] = deque()
        ahead = self._ahead.pop(layer, {})
        early = sum(expert in ahead for expert in wanted)
        self.counters.ahead += early
        for expert in wanted:
            load = ahead.pop(expert, None)
            if load is not None:  # it comes held
                held.append(load.slot)
                if load.left:
                    self._loading[expert] = load
                else:
                    ready.append((expert, load.slot))
                continue
            stray = self._strays.pop((layer, expert), None)
            if stray is not None:
                stray.unwanted = False
                held.append(stray.slot)
                self._loading[expert] = stray
                continue
            slot = self.cache.find(layer, expert)
            if slot is None:
                missing.append(expert)
                continue
            self.cache.hold(slot)
            held.append(slot)
            ready.append((expert, slot))
        self.counters.hits += len(wanted) - len(missing) - early
        self.counters.misses += len(missing)
        self._promote()
        self._drop(ahead.values())
        return ready, missing

    def _promote(self) -> None:
        """Reads ahead that are waited for now go before all others."""
        if self._loading:
            wanted = set(map(id, self._loading.values()))
            mine = [one for one in self._later if id(one[0]) in wanted]
            self._later = deque(one for one in self._later if id(one[0]) not in wanted)
            self._queue.extendleft(reversed(mine))

    def _drop(self, ahead: Iterable[_ExpertLoad]) -> None:
        """What was read ahead and is not needed: what has not begun is not read, the rest may go when it has come."""
        for load in ahead:
            load.unwanted = True
            waiting = [one for one in self._later if one[0] is load]
            load.left -= len(waiting)
            read = len(self.bundles[load.layer][load.expert].reads)
            self.counters.wasted_bytes += self.bundles[load.layer][load.expert].nbytes * (read - len(waiting)) // read
            if waiting:
                self._later = deque(one for one in self._later if one[0] is not load)
                self.cache.forget(load.slot)
            if not load.left:
                self.cache.release(load.slot)
            elif not waiting:
                self._strays[load.layer, load.expert] = load

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Read these experts of a layer ahead, whenever nothing else is to be read, if they are not in memory."""
        with self._readers.space:
            ahead = self._ahead.setdefault(layer, {})
            under_way = sum(map(len, self._ahead.values()))
            for expert in experts[: max(0, MAX_PREFETCHED - under_way)]:
                if self.cache.find(layer, expert) is not None:
                    continue
                slot = self.cache.place(layer, expert)
                if slot is None:
                    return
                reads = self.bundles[layer][expert].reads
                load = ahead[expert] = _ExpertLoad(layer, expert, slot, len(reads))
                self._later.extend((load, read) for read in reads)
                self._readers.space.notify(len(reads))

    def _issue(self, layer: int, missing: deque[int], held: list[int]) -> None:
        """Order missing experts, a few at a time: each takes the slot of another, until its product is done."""
        while missing and len(self._loading) < MAX_PREFETCHED:
            slot = self.cache.place(layer, missing[0])
            if slot is None:
                return
            held.append(slot)
            expert = missing.popleft()
            reads = self.bundles[layer][expert].reads
            load = _ExpertLoad(layer, expert, slot, len(reads))
            self._loading[expert] = load
            self._queue.extend((load, read) for read in reads)
            self._readers.space.notify(len(reads))

    def _wait(self, layer: int, missing: deque[int], held: list[int], together: bool) -> list[tuple[int, int]]:
        """Order what there are slots for; then the experts that have come: one at least, or, `together`, the last of all."""
        if not self._readers.count:
            with self._readers.space:
                self._issue(layer, missing, held)
            while self._queue:
                self._run(*self._queue.popleft())
        done: list[_ExpertLoad] = []

        def ready() -> bool:
            self._issue(layer, missing, held)  # a slot may have come free since, of what was read ahead in vain
            done[:] = [load for load in self._loading.values() if not load.left]
            return bool(done) and (bool(missing) or not together or len(done) == len(self._loading))

        self._readers.wait(ready, "experts")
        for load in done:
            del self._loading[load.expert]
        return [(load.expert, load.slot) for load in done]

    def _placed(self, ready: Sequence[tuple[int, int]]) -> Ready:
        return [(expert, self._arena.address + slot * self._slot_bytes) for expert, slot in ready]

    def _let_go(self, slots: Sequence[int], held: list[int]) -> None:
        with self._readers.space:
            for slot in slots:
                self.cache.release(slot)
                held.remove(slot)

    def _rollback(self, held: list[int]) -> None:
        """The layer is done, or its pass has failed: what is still under way is awaited and forgotten."""
        if not held and not self._loading:
            return
        with self._readers.space:
            self._queue.clear()
            for ahead in self._ahead.values():
                self._drop(ahead.values())
            self._ahead.clear()
            unfinished = list(self._loading.values())
            self._loading.clear()
            stops = bool(unfinished or self._strays or self._readers.error is not None)
        if stops:
            self._readers.stop()  # no reader may write into a slot that is given away
            self._readers.reset()
        with self._readers.space:
            for load in unfinished:
                self.cache.forget(load.slot)
            for stray in self._strays.values():  # its reader has failed
                self.cache.forget(stray.slot)
                self.cache.release(stray.slot)
            self._strays.clear()
            for slot in held:
                self.cache.release(slot)
            held.clear()

    def rewind(self) -> None:
        """Give up the layer in progress, which may have been broken off anywhere. What is in memory stays."""
        if self._readers.stopping:
            self._readers.stop()
            self._readers.reset()

    def close(self) -> None:
        """Stop the readers, give the memory back. Safe to call twice."""
        self._readers.close()
        self._arena.give_back()

    # -- the readers --------------------------------------------------------------------------------------------

    def _populate(self) -> bool:
        """Take some more of the slots' memory, at a low priority: a read into pages that are not there yet waits for each."""
        with suppress(OSError, AttributeError):  # only Linux has priorities of threads
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOW_PRIORITY)
        if self._populated >= self._arena.nbytes or not self._arena.populate(self._populated, _TAKEN_AT_ONCE):
            return False
        self._populated += _TAKEN_AT_ONCE
        return True

    def _read(self) -> bool:
        """What is ordered, as soon as something is; False when the readers stop."""
        with self._readers.space:
            while not (self._queue or self._later or self._readers.stopping):
                self._readers.space.wait()
            if self._readers.stopping:
                return False
            load, read = (self._queue or self._later).popleft()
        self._run(load, read)
        return True

    def _run(self, load: _ExpertLoad, read: Read) -> None:
        place = load.slot * self._slot_bytes + read.place
        target = self._arena.view[place : place + read.length]
        file = self._files[read.part.tensor.path]
        count = self._readers.read(file, read.start, target, read.needed, read.part.tensor.name)
        with self._readers.arrived:
            self._readers.came(count)
            load.left -= 1
            if not load.left:
                if load.unwanted:
                    self._strays.pop((load.layer, load.expert), None)
                    self.cache.release(load.slot)
                self._readers.wake()
