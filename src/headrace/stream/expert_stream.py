"""Experts on demand: read when the router chooses them, kept while they are likely to be routed again.

All experts that a layer needs are requested at once. Those in memory are multiplied first, while reader threads fetch the
others with a deep queue; each is handed over as it arrives. An expert is read once per layer and pass, whatever the number
of rows that chose it. Its slot may go to another as soon as its matmuls are done.

A slot is never overwritten while it is read into or multiplied (it is held). A reader's error is never lost (it is raised
in the consumer). A consumer never waits for ever (a silent disk is an error).
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

# Max experts in flight, requested or prefetched: enough for the disk, too few for a prompt to evict all others.
MAX_PREFETCHED = 12

# Bytes of slots that are populated at a time, before the reads into them.
_POPULATE_BYTES = 4 << 20
_LOW_PRIORITY = 10  # `nice` value; at the lowest priority the thread would wait while it holds the interpreter's lock

# Experts in memory: (expert, address).
Ready: TypeAlias = list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Read:
    """One page-aligned range of a file, and its place in the slot."""

    part: Slice
    start: int
    length: int
    needed: int
    place: int  # offset of `start` in the slot


@dataclass(frozen=True, slots=True)
class Bundle:
    """All reads of one expert, and the place of its slices in a slot."""

    reads: tuple[Read, ...]
    offsets: tuple[int, ...]  # offset of each slice's first row in the slot
    nbytes: int  # bytes that it takes in a slot

    def slices(self, address: int) -> tuple[WeightSlice, ...]:
        """The expert's slices, in a slot at this address."""
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
    """Counters of reads, and of the experts requested."""

    hits: int = 0  # experts in memory, or in a dropped prefetch, when requested
    prefetched: int = 0  # experts prefetched before: in memory, or in flight
    misses: int = 0  # experts read on request
    wasted_bytes: int = 0  # bytes prefetched and not needed by the layer


@dataclass(eq=False, slots=True)
class _ExpertLoad:
    layer: int
    expert: int
    slot: int
    left: int  # reads not finished
    unused: bool = False  # prefetched, but not routed


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
        """Reserve the memory and open the files.

        Args:
            layers: slices of every expert of every layer.
            cache: eviction policy of the experts in memory.
            slots: experts that fit into memory.
            readers: threads, and so reads in flight. 0: the consumer reads for itself.
            file_of: gives the open file of a path.
            spans: recorder of reads and stalls.
            stall_limit_s: silence of the disk that is an error.
        """
        self.counters = ExpertCounters()
        self.cache = cache
        self.bundles = [[bundle_of(slices) for slices in experts] for experts in layers]
        self._slot_bytes = max(bundle.nbytes for experts in self.bundles for bundle in experts)
        self.reads_always = slots < sum(map(len, self.bundles))  # memory cannot hold all experts
        self._arena = Arena(slots * self._slot_bytes)
        paths = {part.tensor.path for experts in layers for slices in experts for part in slices}
        self._files = {path: file_of(path) for path in sorted(paths)}
        self._readers = Readers(
            readers, name="headrace-expert-reader", counters=self.counters, spans=spans, stall_limit_s=stall_limit_s
        )
        self._queue: deque[tuple[_ExpertLoad, Read]] = deque()
        self._prefetch_queue: deque[tuple[_ExpertLoad, Read]] = deque()  # prefetches: run when `_queue` is empty
        self._loading: dict[int, _ExpertLoad] = {}  # by expert, of the layer in progress
        self._prefetches: dict[int, dict[int, _ExpertLoad]] = {}  # by layer and expert
        self._unused_prefetches: dict[tuple[int, int], _ExpertLoad] = {}  # by (layer, expert), in flight
        self._cancelled_prefetches: list[_ExpertLoad] = []  # of which some reads were in flight
        self._populated = 0  # bytes of the arena so far

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
        """The routed experts of a layer, in groups: those in memory first, then the others as they arrive.

        `counts[e]` of `rows` rows chose expert e. `ordered` is called when the missing experts have been requested. The memory
        of a group may be used until the next one is requested.

        Raises:
            ReadError: a read failed or nothing has come from the disk for `stall_limit_s`.
        """
        self._readers.start([self._read] * self._readers.count + [self._populate])
        held: list[int] = []
        try:
            with self._readers.slot_free:
                self.cache.note(layer, counts, rows)
                ready, missing = self._look_up(layer, np.flatnonzero(counts).tolist(), held)
                self._issue(layer, missing, held)
            ordered()
            if ready:
                yield self._placed(ready)
                self._release([slot for _, slot in ready], held)
            while missing or self._loading:
                ready = self._wait(layer, missing, held, together=rows <= DECODE_MAX_ROWS)
                yield self._placed(ready)
                self._release([slot for _, slot in ready], held)
        finally:
            self._rollback(held)

    def _look_up(self, layer: int, wanted: Sequence[int], held: list[int]) -> tuple[list[tuple[int, int]], deque[int]]:
        ready: list[tuple[int, int]] = []
        missing: deque[int] = deque()
        prefetches = self._prefetches.pop(layer, {})
        prefetched = sum(expert in prefetches for expert in wanted)
        self.counters.prefetched += prefetched
        for expert in wanted:
            load = prefetches.pop(expert, None)
            if load is not None:  # its slot is held already
                held.append(load.slot)
                if load.left:
                    self._loading[expert] = load
                else:
                    ready.append((expert, load.slot))
                continue
            in_flight = self._unused_prefetches.pop((layer, expert), None)
            if in_flight is not None:
                in_flight.unused = False
                held.append(in_flight.slot)
                self._loading[expert] = in_flight
                continue
            slot = self.cache.find(layer, expert)
            if slot is None:
                missing.append(expert)
                continue
            self.cache.hold(slot)
            held.append(slot)
            ready.append((expert, slot))
        self.counters.hits += len(wanted) - len(missing) - prefetched
        self.counters.misses += len(missing)
        self._promote()
        self._drop(prefetches.values())
        return ready, missing

    def _promote(self) -> None:
        """Move prefetches that the layer now waits for to the front of the queue."""
        if self._loading:
            wanted = set(map(id, self._loading.values()))
            promoted = [one for one in self._prefetch_queue if id(one[0]) in wanted]
            self._prefetch_queue = deque(one for one in self._prefetch_queue if id(one[0]) not in wanted)
            self._queue.extendleft(reversed(promoted))

    def _drop(self, prefetches: Iterable[_ExpertLoad]) -> None:
        """Drop unused prefetches: reads not begun are cancelled; experts in flight may be evicted once they have arrived."""
        for load in prefetches:
            load.unused = True
            waiting = [one for one in self._prefetch_queue if one[0] is load]
            load.left -= len(waiting)
            read = len(self.bundles[load.layer][load.expert].reads)
            self.counters.wasted_bytes += self.bundles[load.layer][load.expert].nbytes * (read - len(waiting)) // read
            if waiting:
                self._prefetch_queue = deque(one for one in self._prefetch_queue if one[0] is not load)
                self.cache.forget(load.slot)
            if not load.left:
                self.cache.release(load.slot)
            elif waiting:
                self._cancelled_prefetches.append(load)
            else:
                self._unused_prefetches[load.layer, load.expert] = load

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Prefetch these experts of a layer, whenever nothing else is to be read, if they are not in memory."""
        with self._readers.slot_free:
            prefetches = self._prefetches.setdefault(layer, {})
            in_flight = sum(map(len, self._prefetches.values()))
            for expert in experts[: max(0, MAX_PREFETCHED - in_flight)]:
                if self.cache.find(layer, expert) is not None:
                    continue
                slot = self.cache.place(layer, expert)
                if slot is None:
                    return
                reads = self.bundles[layer][expert].reads
                load = prefetches[expert] = _ExpertLoad(layer, expert, slot, len(reads))
                self._prefetch_queue.extend((load, read) for read in reads)
                self._readers.slot_free.notify(len(reads))

    def _issue(self, layer: int, missing: deque[int], held: list[int]) -> None:
        """Request missing experts, a few at a time: each takes the slot of another, until its matmuls are done."""
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
            self._readers.slot_free.notify(len(reads))

    def _wait(self, layer: int, missing: deque[int], held: list[int], together: bool) -> list[tuple[int, int]]:
        """Request missing experts as slots allow; return arrived ones: at least one, or all of them if `together`."""
        if not self._readers.count:
            with self._readers.slot_free:
                self._issue(layer, missing, held)
            while self._queue:
                self._run(*self._queue.popleft())
        done: list[_ExpertLoad] = []

        def ready() -> bool:
            self._issue(layer, missing, held)  # an unused prefetch may have freed its slot
            done[:] = [load for load in self._loading.values() if not load.left]
            return bool(done) and (bool(missing) or not together or len(done) == len(self._loading))

        self._readers.wait(ready, "experts")
        for load in done:
            del self._loading[load.expert]
        return [(load.expert, load.slot) for load in done]

    def _placed(self, ready: Sequence[tuple[int, int]]) -> Ready:
        return [(expert, self._arena.address + slot * self._slot_bytes) for expert, slot in ready]

    def _release(self, slots: Sequence[int], held: list[int]) -> None:
        with self._readers.slot_free:
            for slot in slots:
                self.cache.release(slot)
                held.remove(slot)

    def _rollback(self, held: list[int]) -> None:
        """End a layer that is done, or whose pass has failed: experts in flight are awaited and forgotten."""
        if not held and not self._loading and self._readers.error is None:
            return
        with self._readers.slot_free:
            self._queue.clear()
            for prefetches in self._prefetches.values():
                self._drop(prefetches.values())
            self._prefetches.clear()
            unfinished = list(self._loading.values())
            self._loading.clear()
            in_flight = unfinished or self._unused_prefetches or self._cancelled_prefetches
            stops = bool(in_flight or self._readers.error is not None)
        if stops:
            self._readers.stop()  # no reader may write into a slot of another expert
            self._readers.reset()
        with self._readers.slot_free:
            for load in unfinished:
                self.cache.forget(load.slot)
            for load in self._unused_prefetches.values():  # its reader has failed
                self.cache.forget(load.slot)
                self.cache.release(load.slot)
            self._unused_prefetches.clear()
            for load in self._cancelled_prefetches:
                if load.left:
                    self.cache.release(load.slot)
            self._cancelled_prefetches.clear()
            for slot in held:
                self.cache.release(slot)
            held.clear()

    def rewind(self) -> None:
        """Give up the layer in progress, which may have been interrupted anywhere. Experts in memory stay."""
        if self._readers.stopping:
            self._readers.stop()
            self._readers.reset()

    def close(self) -> None:
        """Stop the readers, release the memory. Safe to call twice."""
        self._readers.close()
        self._arena.give_back()

    # -- the readers --------------------------------------------------------------------------------------------

    def _populate(self) -> bool:
        """Populate some more of the slots, at a low priority: a read into unpopulated pages waits for each of them."""
        with suppress(OSError, AttributeError):  # only Linux has thread priorities
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOW_PRIORITY)
        if self._populated >= self._arena.nbytes or not self._arena.populate(self._populated, _POPULATE_BYTES):
            return False
        self._populated += _POPULATE_BYTES
        return True

    def _read(self) -> bool:
        """Run the next read, as soon as one is queued; False when the readers stop."""
        with self._readers.slot_free:
            while not (self._queue or self._prefetch_queue or self._readers.stopping):
                self._readers.slot_free.wait()
            if self._readers.stopping:
                return False
            load, read = (self._queue or self._prefetch_queue).popleft()
        self._run(load, read)
        return True

    def _run(self, load: _ExpertLoad, read: Read) -> None:
        place = load.slot * self._slot_bytes + read.place
        target = self._arena.view[place : place + read.length]
        file = self._files[read.part.tensor.path]
        with self._readers.reading(read.part.tensor.name):
            count = file.read(read.start, target, read.needed)
        with self._readers.data_ready:
            self._readers.count_read(count)
            load.left -= 1
            if not load.left:
                if load.unused:
                    self._unused_prefetches.pop((load.layer, load.expert), None)
                    self.cache.release(load.slot)
                self._readers.notify_if_ready()
