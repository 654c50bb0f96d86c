"""Experts on demand: the right bytes in every slot, whatever the memory, the readers and the disk do."""

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from headrace.checkpoint import Tensor
from headrace.checkpoint.tensor import Slice
from headrace.errors import ReadError
from headrace.process import resident_bytes
from headrace.stream.arena import PAGE_BYTES
from headrace.stream.expert_cache import ExpertCache
from headrace.stream.expert_stream import ExpertStream
from headrace.stream.files import WeightFile

LAYERS, EXPERTS, ROWS, COLUMNS = 3, 8, 24, 64
Layers = Sequence[Sequence[Sequence[Slice]]]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Layers, np.ndarray]:
    """A file with two matrices for every expert, and their values: (layers, experts, 2, rows, columns)."""
    values = np.random.default_rng(0).standard_normal((LAYERS, EXPERTS, 2, ROWS, COLUMNS)).astype(np.float32)
    path = tmp_path_factory.mktemp("experts") / "weights"
    path.write_bytes(b"header" + values.tobytes())
    size = ROWS * COLUMNS * 4

    def part(layer: int, expert: int, which: int) -> Slice:
        offset = 6 + ((layer * EXPERTS + expert) * 2 + which) * size
        name = f"{layer}.{expert}.{which}"
        return Slice(
            Tensor(name=name, shape=(ROWS, COLUMNS), type="F32", path=str(path), offset=offset, nbytes=size), 0, ROWS
        )

    layers = [[[part(i, e, 0), part(i, e, 1)] for e in range(EXPERTS)] for i in range(LAYERS)]
    return layers, values


def stream_of(layers: Layers, slots: int, readers: int, **options: object) -> ExpertStream:
    cache = ExpertCache(layers=LAYERS, experts=EXPERTS, slots=slots)
    options = {"file_of": WeightFile} | options
    return ExpertStream(layers, cache=cache, slots=slots, readers=readers, **options)  # type: ignore[arg-type]


def contents(address: int) -> np.ndarray:
    import ctypes

    return np.frombuffer((ctypes.c_float * (ROWS * COLUMNS)).from_address(address), np.float32).reshape(ROWS, COLUMNS)


def check(stream: ExpertStream, values: np.ndarray, layer: int, wanted: Sequence[int], rows: int = 1) -> None:
    """Fetch some experts of a layer: each comes once, with its own bytes, which stay while it is used."""
    counts = np.zeros(EXPERTS, np.int64)
    counts[list(wanted)] = 1
    seen = []
    for ready in stream.fetch(layer, counts, rows):
        for expert, address in ready:
            seen.append(expert)
            for which, weight_slice in enumerate(stream.bundles[layer][expert].slices(address)):
                assert np.array_equal(contents(weight_slice.address), values[layer, expert, which])
    assert sorted(seen) == sorted(wanted)


@pytest.mark.parametrize("readers", [0, 1, 4])
@pytest.mark.parametrize("slots", [1, 2, 5, LAYERS * EXPERTS])
def test_every_expert_comes_with_its_own_bytes(stored: tuple[Layers, np.ndarray], slots: int, readers: int) -> None:
    layers, values = stored
    random = np.random.default_rng(slots)
    with stream_of(layers, slots, readers) as stream:
        for _ in range(12):
            for layer in range(LAYERS):
                wanted = random.choice(EXPERTS, size=random.integers(1, EXPERTS + 1), replace=False).tolist()
                check(stream, values, layer, wanted, rows=int(random.integers(1, 40)))
        requested = stream.counters.hits + stream.counters.prefetched + stream.counters.misses
        assert stream.counters.reads == 2 * stream.counters.misses
        if slots == LAYERS * EXPERTS:
            assert stream.counters.misses <= slots
        assert requested > 0


def test_the_memory_of_all_slots_is_populated_beforehand(stored: tuple[Layers, np.ndarray]) -> None:
    layers, values = stored
    with stream_of(layers, 8000, 2) as stream:
        before = resident_bytes()
        check(stream, values, 0, [1, 2, 3])
        until = time.perf_counter() + 30
        while resident_bytes() - before < 8000 * 3 * PAGE_BYTES and time.perf_counter() < until:
            time.sleep(0.01)
        assert resident_bytes() - before >= 8000 * 3 * PAGE_BYTES  # an expert's two matrices touch three pages at least
        check(stream, values, 0, [3, 1])
        assert (stream.counters.hits, stream.counters.misses) == (2, 3)


def test_experts_in_memory_are_not_read_again(stored: tuple[Layers, np.ndarray]) -> None:
    layers, values = stored
    with stream_of(layers, LAYERS * EXPERTS, 2) as stream:
        check(stream, values, 0, [1, 2, 3])
        before = stream.counters.read_bytes
        check(stream, values, 0, [3, 1])
        assert stream.counters.read_bytes == before
        assert (stream.counters.hits, stream.counters.misses) == (2, 3)


@pytest.mark.parametrize("readers", [0, 1, 3])
def test_prefetch_gives_the_same_bytes_and_counts_wasted_bytes(stored: tuple[Layers, np.ndarray], readers: int) -> None:
    layers, values = stored
    random = np.random.default_rng(1)
    with stream_of(layers, 12, readers) as stream:
        for _ in range(20):
            for layer in range(LAYERS):
                check(stream, values, layer, random.choice(EXPERTS, size=3, replace=False).tolist())
                if layer + 1 < LAYERS:
                    stream.prefetch(layer + 1, random.choice(EXPERTS, size=4, replace=False).tolist())
        counters = stream.counters
        assert counters.prefetched > 0
        bundle = 2 * ROWS * COLUMNS * 4
        assert counters.wasted_bytes <= counters.read_bytes
        if readers:
            assert counters.reads >= 2 * counters.misses
        assert counters.read_bytes >= bundle


def test_an_unused_prefetch_in_flight_is_not_used_before_it_has_arrived(stored: tuple[Layers, np.ndarray]) -> None:
    layers, values = stored
    going, gate = threading.Event(), threading.Event()

    class Slow(WeightFile):
        def read(self, offset: int, target: memoryview, needed: int) -> int:
            if not going.is_set():
                going.set()
                gate.wait(10)
            return super().read(offset, target, needed)

    with stream_of(layers, 12, 2, file_of=Slow) as stream:
        stream._readers.start([stream._read] * stream._readers.count)
        stream.prefetch(1, [0])
        assert going.wait(10)  # one of its reads is in flight, and stays so
        check(stream, values, 1, [5])  # the layer requests another
        threading.Timer(0.3, gate.set).start()
        check(stream, values, 1, [0, 5])  # and now for this one


def test_slots_full_of_unused_prefetches_come_free_again(stored: tuple[Layers, np.ndarray]) -> None:
    layers, values = stored
    gate = threading.Event()

    class Slow(WeightFile):
        def read(self, offset: int, target: memoryview, needed: int) -> int:
            gate.wait(10)
            return super().read(offset, target, needed)

    with stream_of(layers, 2, 4, file_of=Slow) as stream:
        stream._readers.start([stream._read] * stream._readers.count)
        stream.prefetch(1, [0, 1])  # both slots, all four reads in flight
        threading.Timer(0.3, gate.set).start()
        check(stream, values, 1, [4, 5, 6])


def test_prefetching_more_than_the_slots_leaves_slots_for_requested_experts(
    stored: tuple[Layers, np.ndarray],
) -> None:
    layers, values = stored
    with stream_of(layers, 2, 2) as stream:
        stream.prefetch(1, [0, 1, 2, 3])
        check(stream, values, 1, [4, 5, 6])
        check(stream, values, 2, [0])


def faulty(error: Callable[[], None], after: int) -> Callable[[str], WeightFile]:
    count = iter(range(1 << 30))

    class Faulty(WeightFile):
        def read(self, offset: int, target: memoryview, needed: int) -> int:
            if next(count) == after:
                error()
            return super().read(offset, target, needed)

    return Faulty


def io_error() -> None:
    raise ReadError("reading failed", hint="check the disk")


@pytest.mark.parametrize("readers", [0, 1, 3])
@pytest.mark.parametrize("after", [0, 3, 9])
def test_a_failing_disk_is_an_error_and_the_next_pass_starts_afresh(
    stored: tuple[Layers, np.ndarray], readers: int, after: int
) -> None:
    layers, values = stored
    with stream_of(layers, 6, readers, file_of=faulty(io_error, after)) as stream:
        with pytest.raises(ReadError, match="reading failed"):
            for layer in range(LAYERS):
                check(stream, values, layer, [0, 1, 2, 3, 4])
        for layer in range(LAYERS):
            check(stream, values, layer, [0, 1, 2, 3, 4])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("headrace-expert")]


def test_a_dropped_prefetch_whose_read_fails_gives_its_slot_back(stored: tuple[Layers, np.ndarray]) -> None:
    layers, values = stored
    going, gate = threading.Event(), threading.Event()

    class Failing(WeightFile):
        def read(self, offset: int, target: memoryview, needed: int) -> int:
            if not going.is_set():
                going.set()
                gate.wait(10)
                io_error()
            return super().read(offset, target, needed)

    with stream_of(layers, 1, 1, file_of=Failing, stall_limit_s=5.0) as stream:
        stream._readers.start([stream._read])
        stream.prefetch(1, [0])
        assert going.wait(10)  # one read is in flight, the other is queued and will be cancelled
        threading.Timer(0.3, gate.set).start()
        with pytest.raises(ReadError, match="reading failed"):
            check(stream, values, 1, [5])
        check(stream, values, 1, [4, 5])  # in the only slot


def test_a_silent_disk_is_an_error(stored: tuple[Layers, np.ndarray]) -> None:
    layers, values = stored
    silence = threading.Event()
    options = {"file_of": faulty(lambda: silence.wait(20) and None, 1), "stall_limit_s": 0.2}
    stream = stream_of(layers, 4, 1, **options)
    try:
        with pytest.raises(ReadError, match="delivered nothing"):
            check(stream, values, 0, [0, 1, 2])
    finally:
        silence.set()
        stream.close()


def test_an_interrupt_between_groups_leaves_nothing_held(stored: tuple[Layers, np.ndarray]) -> None:
    layers, values = stored
    counts = np.ones(EXPERTS, np.int64)
    with stream_of(layers, 3, 2) as stream:
        for _ in range(5):
            groups = stream.fetch(0, counts, 1)
            next(groups)
            groups.close()
        check(stream, values, 0, list(range(EXPERTS)))


def test_an_interrupt_frees_no_slot_that_a_prefetch_still_writes_into(stored: tuple[Layers, np.ndarray]) -> None:
    layers, values = stored
    going, gate = threading.Event(), threading.Event()

    class Slow(WeightFile):
        def read(self, offset: int, target: memoryview, needed: int) -> int:
            if going.is_set():
                gate.wait(10)
            return super().read(offset, target, needed)

    with stream_of(layers, 3, 2, file_of=Slow) as stream:
        check(stream, values, 0, [0])
        going.set()
        groups = stream.fetch(0, np.eye(EXPERTS, dtype=np.int64)[0], 1, lambda: stream.prefetch(1, [3]))
        next(groups)  # the layer's experts are in memory, and a prefetch is in flight
        threading.Timer(0.3, gate.set).start()
        groups.close()
        check(stream, values, 1, [5, 6, 7])  # takes every slot
        check(stream, values, 1, [3])


def test_an_interrupt_while_readers_stop_does_not_close_the_stream(stored: tuple[Layers, np.ndarray]) -> None:
    layers, values = stored
    with stream_of(layers, 4, 2) as stream:
        check(stream, values, 0, [0, 1])
        stream._readers.stop()  # and here came the interrupt
        stream.rewind()
        check(stream, values, 0, [2, 3])
