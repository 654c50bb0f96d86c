"""The schedule of a streamed pass: units pass through ring slots and are computed in order.

    start[i]  = max(done[i - slots], start[i - 1] + transfer[i - 1], arrive[i - readers])
    arrive[i] = start[i] + latency[i] + transfer[i]
    done[i]   = max(done[i - 1], arrive[i]) + compute[i]

A unit occupies a slot from its request until it is computed. The link carries one transfer at a time, while latencies
overlap. A pinned unit needs neither slot nor link. Passes follow each other without a break: the first units of the next
are requested while the last of this one are computed. `closed_form` solves the recurrence for equal units. There the longest
path waits for a slot either never or as often as possible. Tests compare the two.

Source: the recurrence extends an example of claim 3 (100 layers, latency 40 ms, 10 ms of compute) by the time of the
link. The number of slots is Little's law (Little 1961): work in progress = rate * time in the system.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True)
class ScheduledUnit:
    """A unit loaded and computed as a whole: seconds to its first byte, of transfer, and of compute."""

    latency_s: float
    transfer_s: float
    compute_s: float
    pinned: bool = False  # True if the unit is in memory and needs compute only


@dataclass(frozen=True)
class Span:
    """Times of one unit: request, arrival, start of compute, end. A pinned unit arrives at once."""

    unit: int
    start_s: float
    arrive_s: float
    compute_s: float
    done_s: float
    transfer_s: float = 0.0  # seconds on the link, just before arrival


@dataclass(frozen=True)
class Timeline:
    """All spans of a run, in order of compute."""

    spans: tuple[Span, ...]
    units_per_pass: int

    @property
    def seconds(self) -> float:
        """End of the last unit."""
        return self.spans[-1].done_s if self.spans else 0.0

    @property
    def stall_s(self) -> float:
        """Seconds that compute waited for a unit."""
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
        units: units of one pass, in order of compute.
        slots: buffers for units that are not pinned.
        readers: max requests in flight; None: the number of slots.
        passes: number of passes over the units.

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
    """Seconds until `count` equal units are computed; equals `simulate` without simulating.

    With t = latency + transfer + compute and m = max(transfer, compute): t + (count - 1) m with enough slots,
    else every round of `slots` units takes t.
    """
    if count < 1:
        return 0.0
    unit_s = unit.latency_s + unit.transfer_s + unit.compute_s
    each = max(unit.transfer_s, unit.compute_s)
    rounds, rest = divmod(count - 1, slots)
    return unit_s + rounds * max(unit_s, slots * each) + rest * each


def period(unit: ScheduledUnit, slots: int) -> float:
    """Seconds per unit with a full pipeline."""
    unit_s = unit.latency_s + unit.transfer_s + unit.compute_s
    return max(unit.transfer_s, unit.compute_s, unit_s / slots)


def slots_needed(unit: ScheduledUnit) -> int:
    """Fewest slots at which bandwidth or compute is the bottleneck, not latency (Little's law).

    Units with latency only have no such number, because more slots always help. For those, and for units without any
    time, the result is 1.
    """
    each = max(unit.transfer_s, unit.compute_s)
    if each <= 0:
        return 1
    return max(1, ceil((unit.latency_s + unit.transfer_s + unit.compute_s) / each - 1e-9))
