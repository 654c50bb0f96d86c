"""Reader threads of one consumer: their start, stop and failures, and the consumer's wait for them.

The stream decides what they read and into which memory. All share one lock: readers wait for `space`, the consumer for what
has `arrived`. A release wakes one reader, and the last awaited arrival wakes the consumer. Waking everybody each time cost
50 ms of a pass of 500 units, in GIL switches.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from headrace.errors import ReadError
from headrace.limits import too_few_threads

STALL_LIMIT_S = 60.0


class Spans(Protocol):
    """Recorder of time spans: a kind, a label, start and end by `time.perf_counter`."""

    def add(self, kind: str, label: str, start: float, end: float) -> None:
        """Record one span."""


@dataclass(slots=True)
class ReadCounters:
    """Reads of a stream so far. The difference of two copies describes a pass."""

    read_bytes: int = 0  # bytes read or mapped; the page cache may hold some of them
    reads: int = 0
    stall_s: float = 0.0  # time the consumer waited for reads


class Readers:
    """The reader threads of a stream. With none of them the consumer reads for itself."""

    def __init__(
        self,
        count: int,
        *,
        name: str,
        counters: ReadCounters,
        spans: Spans | None,
        stall_limit_s: float = STALL_LIMIT_S,
    ):
        """`name` is the threads' name; no completed read for `stall_limit_s` is an error."""
        lock = threading.Lock()
        self.slot_free = threading.Condition(lock)
        self.data_ready = threading.Condition(lock)
        self.count = count
        self.error: BaseException | None = None  # exception of a reader
        self.stopping = False
        self._name = name
        self._counters = counters
        self._spans = spans
        self._stall_limit_s = stall_limit_s
        self._threads: list[threading.Thread] = []
        self._ready: Callable[[], bool] | None = None  # condition that the consumer waits for
        self._stuck = False  # a thread has not come back from a read
        self._closed = False

    def start(self, works: Sequence[Callable[[], bool]]) -> None:
        """Start a thread for each function, to call it until it returns False. Does nothing while threads run.

        Raises:
            ReadError: the stream is closed, or an earlier read has never come back. Such a read could still write into memory
                that has been given to others.
        """
        if self._stuck:
            raise ReadError(
                "an earlier read has not come back, so the weights in memory cannot be relied on",
                hint="check the disk or the network share, then start again",
            )
        if self._closed:
            raise self.closed_error()
        if self._threads or not self.count:
            return
        for i, work in enumerate(works):
            thread = threading.Thread(target=self._work, args=(work,), name=f"{self._name}-{i}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # running threads are stopped with the pass
                raise too_few_threads() from error
            self._threads.append(thread)

    @staticmethod
    def closed_error() -> ReadError:
        """The error of a consumer that asks for weights after `close`."""
        return ReadError("the weights are closed", hint="load the model again")

    def stop(self) -> None:
        """Ask all threads to stop and wait until they have, each after its current read. Safe to call twice."""
        with self.slot_free:
            self.stopping = True
            self.slot_free.notify_all()
        until = time.monotonic() + self._stall_limit_s
        for thread in self._threads:
            thread.join(timeout=max(0.0, until - time.monotonic()))
        self._stuck = self._stuck or any(thread.is_alive() for thread in self._threads)
        self._threads = []

    def close(self) -> None:
        """Stop for good. A consumer that waits gets an error."""
        self._closed = True
        self.stop()
        with self.data_ready:
            self.data_ready.notify_all()

    def reset(self) -> None:
        """Forget errors after `stop`; threads may be started again."""
        self.error, self.stopping = None, False

    def wait(self, ready: Callable[[], bool], label: str) -> None:
        """Wait until `ready()` is true. It is called under the lock, by readers too.

        Raises:
            ReadError: a reader has failed, the readers are closed, or nothing has come from the disk for `stall_limit_s`.
        """
        start = before = time.perf_counter()
        silence, step_s = 0.0, min(1.0, self._stall_limit_s)
        with self.data_ready:
            reads = self._counters.reads
            while True:
                if self.error is not None:
                    raise self.error
                if ready():
                    break
                if self._closed:
                    raise self.closed_error()
                self._ready = ready
                try:
                    self.data_ready.wait(timeout=step_s)
                finally:
                    self._ready = None
                now = time.perf_counter()
                silence += min(now - before, 2 * step_s)  # while the whole process was stopped the disk was not silent
                before = now
                if self._counters.reads != reads:
                    reads, silence = self._counters.reads, 0.0
                if silence > self._stall_limit_s:
                    raise ReadError(
                        f"the disk has delivered nothing for {self._stall_limit_s:.0f} s while {label} was read",
                        hint="check the disk or the network share, then run the same command again",
                    )
        end = time.perf_counter()
        self._counters.stall_s += end - start
        if self._spans is not None:
            self._spans.add("stall", label, start, end)

    @contextmanager
    def reading(self, label: str) -> Iterator[None]:
        """Record the span of a read."""
        start = time.perf_counter()
        yield
        if self._spans is not None:
            self._spans.add("read", label, start, time.perf_counter())

    def count_read(self, nbytes: int) -> None:
        """Count a finished read. Call it under the lock."""
        self._counters.read_bytes += nbytes
        self._counters.reads += 1

    def notify_if_ready(self) -> None:
        """Wake the consumer if all that it waits for has arrived. Call it under the lock."""
        if self._ready is not None and self._ready():
            self.data_ready.notify()

    def _work(self, work: Callable[[], bool]) -> None:
        try:
            while not self.stopping and work():
                pass
        except BaseException as error:
            with self.data_ready:
                self.error = error if self.error is None else self.error  # the first is the cause
                self.data_ready.notify_all()
                self.slot_free.notify_all()
