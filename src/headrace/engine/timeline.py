"""Records of a run: one per pass, and on request every span of time as a Chrome trace."""

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from headrace.errors import HeadraceError


@dataclass(frozen=True, kw_only=True, slots=True)
class PassStats:
    """One pass over the weights, and the drafting before it."""

    rows: int
    start_s: float  # by time.perf_counter
    seconds: float
    read_bytes: int  # bytes that arrived during the pass, for this pass or the next
    stall_s: float  # time that compute waited for the disk
    kernel_s: float  # time of matmuls with packed weights
    draft_s: float = 0.0  # drafting time before the pass
    drafted: int = 0  # draft tokens among its rows
    accepted: int = 0  # accepted draft tokens
    expert_read_bytes: int = 0  # part of `read_bytes` for experts
    expert_hits: int = 0  # experts that a layer needed and found in memory
    expert_prefetched: int = 0  # needed experts that were prefetched
    expert_misses: int = 0
    expert_wasted_bytes: int = 0  # bytes prefetched and not needed

    @property
    def bound_by(self) -> str:
        """Bottleneck of the pass: disk, compute or drafting."""
        waited = {"disk": self.stall_s, "drafting": self.draft_s, "compute": 0.0}
        # A pass that hardly waited for the disk was as long as its compute.
        if self.stall_s < 0.1 * self.seconds:
            waited = {"compute": self.seconds, "drafting": self.draft_s}
        return max(waited, key=lambda kind: waited[kind])


class PassLog(Sequence[PassStats]):
    """Passes by their number since loading. Only the latest are kept: a run of days makes millions."""

    MOST = 20_000

    def __init__(self) -> None:
        self._kept: list[PassStats] = []
        self._dropped = 0

    def append(self, stats: PassStats) -> None:
        """Add a pass."""
        self._kept.append(stats)
        if len(self._kept) >= 2 * self.MOST:
            self._dropped += len(self._kept) - self.MOST
            del self._kept[: -self.MOST]

    def replace_last(self, stats: PassStats) -> None:
        """Replace the record of the latest pass."""
        self._kept[-1] = stats

    def __len__(self) -> int:
        """Number of passes since loading."""
        return self._dropped + len(self._kept)

    @overload
    def __getitem__(self, which: int) -> PassStats: ...

    @overload
    def __getitem__(self, which: slice) -> list[PassStats]: ...

    def __getitem__(self, which: int | slice) -> PassStats | list[PassStats]:
        """A pass by its number; for a slice, those that are kept."""
        if isinstance(which, slice):
            first, last, step = which.indices(len(self))
            assert step == 1
            return self._kept[max(0, first - self._dropped) : max(0, last - self._dropped)]
        place = which + len(self._kept) if which < 0 else which - self._dropped
        if not 0 <= place < len(self._kept):
            raise IndexError(which)
        return self._kept[place]

    def __iter__(self) -> Iterator[PassStats]:
        """The passes that are kept."""
        return iter(self._kept)


class Trace:
    """Spans of time by kind (read, stall, compute, pass) and thread. Thread-safe."""

    def __init__(self) -> None:
        self._spans: list[tuple[str, str, float, float, str]] = []
        self._lock = threading.Lock()

    def add(self, kind: str, label: str, start: float, end: float) -> None:
        """Record one span; times by `time.perf_counter`."""
        with self._lock:
            self._spans.append((kind, label, start, end, threading.current_thread().name))

    def spans(self, kind: str) -> list[tuple[float, float]]:
        """(start, end) of the spans of a kind, by `time.perf_counter`."""
        with self._lock:
            return [(start, end) for name, _, start, end, _ in self._spans if name == kind]

    def events(self) -> Sequence[dict[str, Any]]:
        """The spans as Chrome trace events, in microseconds from the first."""
        with self._lock:
            spans = list(self._spans)
        zero = min((span[2] for span in spans), default=0.0)
        threads = {name: number for number, name in enumerate(sorted({span[4] for span in spans}))}
        names = [
            {"ph": "M", "pid": 1, "tid": number, "name": "thread_name", "args": {"name": name}}
            for name, number in threads.items()
        ]
        return names + [
            {"ph": "X", "pid": 1, "tid": threads[thread], "cat": kind, "name": f"{kind} {label}",
             "ts": (start - zero) * 1e6, "dur": (end - start) * 1e6}
            for kind, label, start, end, thread in spans
        ]  # fmt: skip

    def write(self, path: Path) -> None:
        """Write a file that chrome://tracing and Perfetto open."""
        try:
            path.write_text(json.dumps({"traceEvents": list(self.events())}))
        except OSError as error:
            raise HeadraceError(f"cannot write the trace to {path}: {error.strerror}") from error
