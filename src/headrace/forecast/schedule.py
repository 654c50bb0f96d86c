"""The schedule of a streamed pass: units flow through a few slots, and are computed in order.

    start[i]  = max(done[i - slots], start[i - 1] + transfer[i - 1], arrive[i - readers])
    arrive[i] = start[i] + latency[i] + transfer[i]
    done[i]   = max(done[i - 1], arrive[i]) + compute[i]

A slot is taken from the request until its unit is computed; the link carries one transfer after another, while
latencies overlap; a pinned unit needs neither slot nor link. Passes follow each other without a break: the first units
of the next are requested while the last of this one are computed. `closed_form` solves it for equal units, where the
longest path has either no slot in it or as many as there can be; tests hold the two against each other.

Source: the recurrence is the discussion's own example (100 layers, latency 40 ms, 10 ms of compute) with the time of
the link added; the number of slots is Little's law (Little 1961): work in progress = rate * time in the system.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True)
class ScheduledUnit:
    """What is loaded and computed as one: seconds until the first byte comes, of transfer, and of compute."""

    latency_s: float
    transfer_s: float
    compute_s: float
    pinned: bool = False  # is there already: needs compute only


@dataclass(frozen=True)
class Span:
    """When one unit was requested, had arrived, began to be computed and was done. A pinned one arrives at once."""

    unit: int
    start_s: float
    arrive_s: float
    compute_s: float
    done_s: float
    transfer_s: float = 0.0  # on the link, just before it had arrived


@dataclass(frozen=True)
class Timeline:
    """All spans of a run, in order of compute."""

    spans: tuple[Span, ...]
    units_per_pass: int

    @property
    def seconds(self) -> float:
        """When the last unit is done."""
        return self.spans[-1].done_s if self.spans else 0.0

    @property
    def stall_s(self) -> float:
        """Seconds in which the compute waited for a unit."""
        waited, done = 0.0, 0.0
        for span in self.spans:
            waited += span.compute_s - done
            done = span.done_s
        return waited

    def pass_s(self, number: int) -> float:
        """Length of one pass: from the end of the pass before to its own end."""
        end = self.spans[(number + 1) * self.units_per_pass - 1].done_s
        return end - (self.spans[number * self.units_per_pass - 1].done_s if number else 0.0)


def simulate(units: Sequence[ScheduledUnit], slots: int, *, readers: int | None = None, passes: int = 1) -> Timeline:
    """Run the schedule.

    Args:
        units: of one pass, in order of compute.
        slots: buffers for units that are not pinned.
        readers: requests on their way at the same time; None: as many as there are slots.
        passes: how often the units are visited.

    Raises:
        ValueError: no slot, reader or pass.
    """
    if slots < 1 or passes < 1 or (readers is not None and readers < 1):
        raise ValueError("a schedule needs at least one slot, one reader and one pass")
    depth = min(slots, readers or slots)
    spans: list[Span] = []
    released: list[float] = []  # when the slot of each loaded unit became free
    arrivals: list[float] = []
    link_s = done_s = 0.0
    for number in range(passes):
        for index, unit in enumerate(units):
            if unit.pinned:
                start_s = arrive_s = done_s
            else:
                loaded = len(released)
                start_s = link_s
                if loaded >= slots:
                    start_s = max(start_s, released[loaded - slots])
                if loaded >= depth:
                    start_s = max(start_s, arrivals[loaded - depth])
                link_s = start_s + unit.transfer_s
                arrive_s = link_s + unit.latency_s
                arrivals.append(arrive_s)
            begin_s = max(done_s, arrive_s)
            done_s = begin_s + unit.compute_s
            if not unit.pinned:
                released.append(done_s)
            spans.append(
                Span(
                    number * len(units) + index,
                    start_s,
                    arrive_s,
                    begin_s,
                    done_s,
                    0.0 if unit.pinned else unit.transfer_s,
                )
            )
    return Timeline(spans=tuple(spans), units_per_pass=len(units))


def grouped(units: Sequence[ScheduledUnit], size: int) -> float:
    """Seconds of a pass without overlap: load a group of units (one latency), compute it, load the next."""
    if size < 1:
        raise ValueError("a group has at least one unit")
    groups = [units[at : at + size] for at in range(0, len(units), size)]
    return sum(max(u.latency_s for u in g) + sum(u.transfer_s + u.compute_s for u in g) for g in groups)


def closed_form(unit: ScheduledUnit, count: int, slots: int) -> float:
    """Seconds until `count` equal units are computed: what `simulate` gives, without simulating.

    With t = latency + transfer + compute and m = max(transfer, compute): t + (count - 1) m where there are slots enough,
    else every round of `slots` units takes t.
    """
    if count < 1:
        return 0.0
    whole = unit.latency_s + unit.transfer_s + unit.compute_s
    each = max(unit.transfer_s, unit.compute_s)
    rounds, rest = divmod(count - 1, slots)
    return whole + rounds * max(whole, slots * each) + rest * each


def period(unit: ScheduledUnit, slots: int) -> float:
    """Seconds per unit once the pipe is full."""
    whole = unit.latency_s + unit.transfer_s + unit.compute_s
    return max(unit.transfer_s, unit.compute_s, whole / slots)


def slots_needed(unit: ScheduledUnit) -> int:
    """Fewest slots with which only bandwidth or compute binds, never latency (Little's law).

    Units that are nothing but latency have no such number, as more slots always help: for those, as for units that take
    no time at all, one.
    """
    each = max(unit.transfer_s, unit.compute_s)
    if each <= 0:
        return 1
    return max(1, ceil((unit.latency_s + unit.transfer_s + unit.compute_s) / each - 1e-9))
