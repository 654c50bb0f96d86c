"""Compares eviction policies of an expert cache: hit rates on routing traces, against the best in hindsight.

    python benchmarks/expert_traces.py [--trace route.csv ...] [--layers 24] [--tokens 160] [--only GROUP,...]

A request is one expert of one layer in one pass, from any number of rows; the hit rate is the share found in memory. Every
cache starts empty. Synthetic traces are counted after a quarter of their tokens (warm). Recorded ones are short and counted
whole, first misses included. Sizes are shares of all experts.

    fixed       the most requested experts of the counted part, in memory from the start; on independent draws no online policy
                can beat it, but for chance
    MIN         Belady's optimum, which may also bypass the cache: keep the experts requested soonest
    ours        headrace.stream.expert_cache.ExpertCache itself

Recorded traces: CSV with the columns turn, phase (0 prefill, 1 decode), step, layer, slot, expert; the steps of phase 0 of a turn
are one pass. Synthetic: per layer a Zipf law over shuffled experts, a share of the choices repeated from the token before, and
two experts of a layer exchanging their popularity at a given rate per token.
"""

import argparse
import csv
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from headrace.stream.expert_cache import ExpertCache

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Scores = npt.NDArray[np.float32]
SIZES = (0.1, 0.2, 0.3, 0.5, 0.7)
NEVER = np.inf


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Routed experts: `choices` (rows, layers, chosen), -1 for none; `passes` has the number of rows of each pass."""

    name: str
    experts: int
    choices: Ints
    passes: tuple[int, ...]
    warm: int = 0  # passes not counted

    @property
    def layers(self) -> int:
        return int(self.choices.shape[1])

    def groups(self) -> "Iterator[WeightGroup]":
        row = 0
        for number, rows in enumerate(self.passes):
            for layer in range(self.layers):
                chosen = self.choices[row : row + rows, layer].ravel()
                counts = np.bincount(chosen[chosen >= 0], minlength=self.experts)
                requested = np.flatnonzero(counts) + layer * self.experts
                yield WeightGroup(number=number, layer=layer, requested=requested, counts=counts, rows=rows)
            row += rows


@dataclass(frozen=True, kw_only=True)
class WeightGroup:
    """One layer in one pass: requested experts, numbered through all layers, and `counts` of rows per expert of the layer."""

    number: int
    layer: int
    requested: Ints
    counts: Ints
    rows: int


def zipf(
    *,
    name: str,
    layers: int,
    tokens: int,
    skew: float,
    locality: float,
    drift: float = 0.0,
    prefill: int = 0,
    turns: int = 1,
    seed: int = 0,
) -> Trace:
    """Turns of `prefill` rows in one pass and `tokens` single rows; a new turn exchanges three tenths of the popularities."""
    experts, chosen, rng = 128, 8, np.random.default_rng(seed)
    weight = -skew * np.log(np.arange(1, experts + 1))
    home = np.stack([rng.permutation(experts) for _ in range(layers)])  # rank -> expert
    rows, passes = [], []
    for _ in range(turns):
        ranks, last = home.copy(), None
        for own in ranks if turns > 1 else ():
            some = rng.choice(experts, experts * 3 // 10, replace=False)
            own[some] = own[rng.permutation(some)]
        for _ in range(prefill + tokens):
            for layer in np.flatnonzero(rng.random(layers) < drift):
                one, other = rng.integers(0, experts, 2)
                ranks[layer, [one, other]] = ranks[layer, [other, one]]
            drawn = np.empty((layers, experts))  # the largest are draws without replacement
            np.put_along_axis(drawn, ranks, weight + rng.gumbel(size=(layers, experts)), 1)
            if last is not None:
                kept = np.where(rng.random((layers, chosen)) < locality, 1e6, 0.0)
                np.put_along_axis(drawn, last, np.take_along_axis(drawn, last, 1) + kept, 1)
            last = np.argpartition(-drawn, chosen, 1)[:, :chosen]
            rows.append(last)
        passes += ([prefill] if prefill else []) + [1] * tokens
    return Trace(name=name, experts=experts, choices=np.array(rows), passes=tuple(passes), warm=len(passes) // 4)


def batched(trace: Trace, rows: int) -> Trace:
    """The trace cut into `rows` sequences that are decoded together."""
    length = len(trace.choices) // rows
    apart = trace.choices[: rows * length].reshape(rows, length, trace.layers, -1)
    choices = apart.swapaxes(0, 1).reshape(rows * length, trace.layers, -1)
    return Trace(
        name=f"{trace.name}, {rows} rows",
        experts=trace.experts,
        choices=choices,
        passes=(rows,) * length,
        warm=length // 4,
    )


def recorded(path: Path, experts: int = 128) -> Trace:
    """A trace in the CSV format above."""
    with path.open() as lines:
        table = csv.DictReader(line for line in lines if not line.startswith("#"))
        names = ("turn", "phase", "step", "layer", "slot", "expert")
        cells = np.array([[int(row[name]) for name in names] for row in table])
    tokens, row = np.unique(cells[:, [0, 2, 1]], axis=0, return_inverse=True)  # in the order of turns and steps
    choices = np.full((len(tokens), cells[:, 3].max() + 1, cells[:, 4].max() + 1), -1)
    choices[row.ravel(), cells[:, 3], cells[:, 4]] = cells[:, 5]
    passes: list[int] = []
    for number, (turn, _, phase) in enumerate(tokens):
        together = number and phase == 0 and tuple(tokens[number - 1][[0, 2]]) == (turn, 0)
        passes[-1:] = [passes[-1] + 1] if together else [*passes[-1:], 1]
    return Trace(name=path.stem.split(".")[0], experts=experts, choices=choices, passes=tuple(passes))


class Worth:
    """A policy that keeps the experts of most `worth`, one value per expert of all layers, updated by `note`."""

    def __init__(self, trace: Trace):
        self.worth: Floats = np.zeros(trace.layers * trace.experts)
        self.experts = trace.experts

    def note(self, group: WeightGroup) -> None:
        raise NotImplementedError


class LRU(Worth):
    """Least recently used."""

    clock = 0

    def note(self, group: WeightGroup) -> None:
        self.clock += 1
        self.worth[group.requested] = self.clock


class Decay(Worth):
    """Least frequently used, uses forgotten by half every `half_life` passes."""

    half_life = NEVER
    last = -1

    def note(self, group: WeightGroup) -> None:
        if group.number != self.last:
            self.worth *= 0.5 ** (1 / self.half_life)
            self.last = group.number
        self.worth[group.requested] += 1


class Decay8(Decay):
    half_life = 8.0


class Decay32(Decay):
    half_life = 32.0


class EwmaAndLast(Worth):
    """The policy of headrace.stream.expert_cache, with parts to vary. A pass counts as `ticks(rows)` tokens."""

    half_life = 24.0
    locality: float | None = None  # None: measured

    def __init__(self, trace: Trace):
        super().__init__(trace)
        self.frequency, self.last = np.zeros_like(self.worth), np.zeros_like(self.worth)
        self.up, self.down = 0.0, 16.0

    def ticks(self, rows: int) -> float:
        return float(rows**0.5)

    def note(self, group: WeightGroup) -> None:
        own = slice(group.layer * self.experts, (group.layer + 1) * self.experts)
        frequency, last, requested = self.frequency[own], self.last[own], group.counts / group.rows
        self.up = self.up * (1 - 1 / 2000) + float((last - frequency) @ (requested - frequency))
        self.down = self.down * (1 - 1 / 2000) + float((last - frequency) @ (last - frequency))
        a = float(np.clip(self.up / self.down, 0, 0.9)) if self.locality is None else self.locality
        frequency += (1 - 0.5 ** (self.ticks(group.rows) / self.half_life)) * (requested - frequency)
        last[:] = requested
        self.worth[own] = frequency + a * (requested - frequency)


class NoLast(EwmaAndLast):
    locality = 0.0


class Cyclic(NoLast):
    """The expected time to the next use, with the distance of the layer: the layer just computed is needed last."""

    def note(self, group: WeightGroup) -> None:
        super().note(group)
        layers = len(self.frequency) // self.experts
        away = ((np.arange(layers) - group.layer - 1) % layers + 1) / layers
        self.worth = -(1 / np.clip(self.frequency, 1e-4, 1) - 1 + np.repeat(away, self.experts))


class PassClock(EwmaAndLast):
    def ticks(self, rows: int) -> float:
        return 1


class RowClock(EwmaAndLast):
    def ticks(self, rows: int) -> float:
        return rows


class MIN(Worth):
    """Belady's optimum."""

    def __init__(self, trace: Trace):
        super().__init__(trace)
        groups, following = list(trace.groups()), np.full(len(self.worth), NEVER)
        self.upcoming = []
        for clock in range(len(groups) - 1, -1, -1):
            self.upcoming.append(following[groups[clock].requested].copy())
            following[groups[clock].requested] = clock

    def note(self, group: WeightGroup) -> None:
        self.worth[group.requested] = -self.upcoming.pop()


Policy = Callable[[Trace, int], Iterable[tuple[WeightGroup, int]]]  # hits of each weight group, given a number of slots


def keeping(kind: type[Worth], *, bypass: bool = False, quota: bool = False) -> Policy:
    """Keep the worthiest of all layers, or of each (`quota`). A requested expert enters always, or only if worthy (`bypass`)."""

    def run(trace: Trace, slots: int) -> Iterable[tuple[WeightGroup, int]]:
        policy, inside = kind(trace), np.zeros(trace.layers * trace.experts, bool)
        for group in trace.groups():
            yield group, int(inside[group.requested].sum())
            policy.note(group)
            inside[group.requested] = True
            own = slice(group.layer * trace.experts, (group.layer + 1) * trace.experts) if quota else slice(None)
            present = np.flatnonzero(inside[own]) + (own.start or 0)
            surplus = len(present) - (slots // trace.layers if quota else slots)
            if surplus > 0:
                worth = policy.worth[present]
                if not bypass:
                    worth[np.isin(present, group.requested)] += 1e9
                inside[present[np.argpartition(worth, surplus - 1)[:surplus]]] = False

    return run


def ours(
    trace: Trace, slots: int, *, scores: Scores | None = None, filled: bool = False, bypass: bool = False
) -> Iterable[tuple[WeightGroup, int]]:
    """The cache that ships; `filled` with the experts of the highest scores before the first request."""
    cache = ExpertCache(layers=trace.layers, experts=trace.experts, slots=slots, scores=scores)
    if filled and scores is not None:
        for number in np.argsort(-scores, axis=None)[:slots].tolist():
            cache.release(cache.place(*divmod(number, trace.experts)) or 0)
    for group in trace.groups():
        cache.note(group.layer, group.counts, group.rows)
        ids = [int(number) % trace.experts for number in group.requested]
        held = [slot for slot in (cache.find(group.layer, expert) for expert in ids) if slot is not None]
        yield group, len(held)
        for slot in held:
            cache.hold(slot)
        for expert in ids:
            if cache.find(group.layer, expert) is None and (not bypass or cache.worthy(group.layer, expert)):
                placed = cache.place(group.layer, expert)
                held += [] if placed is None else [placed]
        for slot in held:
            cache.release(slot)


def ours_bypass(trace: Trace, slots: int) -> Iterable[tuple[WeightGroup, int]]:
    """The cache that ships; unworthy experts bypass it."""
    return ours(trace, slots, bypass=True)


def s3_fifo(trace: Trace, slots: int) -> Iterable[tuple[WeightGroup, int]]:
    """S3-FIFO (Yang et al. 2023): a small queue of a tenth, a main one, and a ghost of the main one's length."""
    small: OrderedDict[int, int] = OrderedDict()
    main: OrderedDict[int, int] = OrderedDict()
    ghost: OrderedDict[int, None] = OrderedDict()
    tenth = max(slots // 10, 1)

    def evict() -> None:
        while len(small) + len(main) >= slots:
            if len(small) >= tenth or not main:
                number, uses = small.popitem(last=False)
                if uses > 1:
                    main[number] = 0
                else:
                    ghost[number] = None
                    while len(ghost) > slots:
                        ghost.popitem(last=False)
            else:
                number, uses = main.popitem(last=False)
                if uses:
                    main[number] = uses - 1

    for group in trace.groups():
        hits = 0
        for number in group.requested.tolist():
            queue = small if number in small else main if number in main else None
            if queue is not None:
                queue[number], hits = min(queue[number] + 1, 3), hits + 1
                continue
            evict()
            (main if ghost.pop(number, 0) is None else small)[number] = 0
        yield group, hits


def arc(trace: Trace, slots: int) -> Iterable[tuple[WeightGroup, int]]:
    """ARC (Megiddo and Modha 2003)."""
    once, often, ghost_once, ghost_often = (OrderedDict[int, None]() for _ in range(4))
    target = 0.0

    def replace(number: int) -> None:
        if once and (len(once) > target or (number in ghost_often and len(once) == int(target))):
            ghost_once[once.popitem(last=False)[0]] = None
        elif often:
            ghost_often[often.popitem(last=False)[0]] = None

    for group in trace.groups():
        hits = 0
        for number in group.requested.tolist():
            if number in once or number in often:
                hits += 1
                once.pop(number, None)
                often.pop(number, None)
            elif number in ghost_once:
                target = min(target + max(len(ghost_often) / len(ghost_once), 1), slots)
                replace(number)
                del ghost_once[number]
            elif number in ghost_often:
                target = max(target - max(len(ghost_once) / len(ghost_often), 1), 0)
                replace(number)
                del ghost_often[number]
            else:
                if len(once) + len(ghost_once) == slots:
                    if len(once) < slots:
                        ghost_once.popitem(last=False)
                        replace(number)
                    else:
                        once.popitem(last=False)
                elif len(once) + len(often) + len(ghost_once) + len(ghost_often) >= slots:
                    if len(once) + len(often) + len(ghost_once) + len(ghost_often) == 2 * slots:
                        ghost_often.popitem(last=False)
                    replace(number)
                once[number] = None
                continue
            often[number] = None
        yield group, hits


POLICIES: dict[str, Policy] = {
    "MIN": keeping(MIN, bypass=True),
    "LRU": keeping(LRU),
    "LRU, quotas": keeping(LRU, quota=True),
    "LFU": keeping(Decay),
    "LFU, half-life 8": keeping(Decay8),
    "LFU, half-life 32": keeping(Decay32),
    "S3-FIFO": s3_fifo,
    "ARC": arc,
    "EWMA alone": keeping(NoLast),
    "EWMA, cyclic": keeping(Cyclic),
    "EWMA and last, quotas": keeping(EwmaAndLast, quota=True),
    "ours": ours,
    "ours, bypass": ours_bypass,
}


def hit_rate(runs: Iterable[tuple[WeightGroup, int]], trace: Trace, until: float = NEVER) -> float:
    """Hits per request of the counted passes."""
    counted = [(hits, len(group.requested)) for group, hits in runs if trace.warm <= group.number < until]
    return sum(hits for hits, _ in counted) / sum(requested for _, requested in counted)


def best_fixed(trace: Trace, slots: int) -> float:
    """Hit rate of the best set in hindsight."""
    requests = np.zeros(trace.layers * trace.experts)
    for group in trace.groups():
        requests[group.requested] += group.number >= trace.warm
    return float(np.sort(requests)[::-1][:slots].sum() / requests.sum())


def show(name: str, rates: Sequence[float], *, of: Sequence[float] = ()) -> None:
    shares = " ".join(f"{rate / best:6.3f}" for rate, best in zip(rates, of, strict=False)) if of else ""
    print(f"  {name:20s}", " ".join(f"{rate:6.3f}" for rate in rates), "  of MIN" * bool(of), shares, flush=True)


def compare(trace: Trace, policies: dict[str, Policy]) -> None:
    """A table: policies down, sizes across."""
    slots = [int(size * trace.layers * trace.experts) for size in SIZES]
    print(
        f"{trace.name}: {trace.layers} layers x {trace.experts}, {len(trace.passes)} passes, counted from {trace.warm}"
    )
    show("fixed", [best_fixed(trace, n) for n in slots])
    best = [hit_rate(policies["MIN"](trace, n), trace) for n in slots]
    show("MIN", best)
    for name, policy in policies.items():
        if name != "MIN":
            show(name, [hit_rate(policy(trace, n), trace) for n in slots], of=best)


def warm_start(trace: Trace, tokens: int = 50) -> None:
    """Compare starts on a trace's second half: without scores, with scores of the first half, and filled by them."""
    half = len(trace.passes) // 2
    rows = sum(trace.passes[:half])
    first = Trace(name="", experts=trace.experts, choices=trace.choices[:rows], passes=trace.passes[:half])
    second = Trace(name="", experts=trace.experts, choices=trace.choices[rows:], passes=trace.passes[half:])
    cache = ExpertCache(layers=trace.layers, experts=trace.experts, slots=1)
    for group in first.groups():
        cache.note(group.layer, group.counts, group.rows)
    slots = [int(size * trace.layers * trace.experts) for size in SIZES]
    print(f"{trace.name}: the first {tokens} passes of its second half, from an empty memory")
    show("without scores", [hit_rate(ours(second, n), second, tokens) for n in slots])
    for name, filled in (("with scores", False), ("filled by scores", True)):
        show(name, [hit_rate(ours(second, n, scores=cache.scores, filled=filled), second, tokens) for n in slots])


def decode_only(trace: Trace, policy: Policy, slots: int) -> float:
    """Hit rate of the passes of one row: the use of the experts that a prefill left in the cache."""
    hits = [(hits, len(group.requested)) for group, hits in policy(trace, slots) if group.rows == 1]
    return sum(hit for hit, _ in hits) / sum(requested for _, requested in hits)


def prefill_clocks(trace: Trace) -> None:
    """Compare numbers of tokens that a prefill counts as."""
    sizes = [int(size * trace.layers * trace.experts) for size in SIZES]
    print(f"{trace.name}: decode after prefill, by the number of tokens that a prefill counts as")
    for name, kind in {"1": PassClock, "root of rows": EwmaAndLast, "rows": RowClock}.items():
        show(name, [decode_only(trace, keeping(kind), slots) for slots in sizes])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, action="append", default=[])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--only", default="recorded,zipf,batch,start,prefill")
    chosen = parser.parse_args()
    size = {"layers": chosen.layers, "tokens": chosen.tokens}
    real = [recorded(path) for path in chosen.trace]
    zipfs = [
        zipf(name=f"zipf {skew}, locality {locality}, drift {drift}", skew=skew, locality=locality, drift=drift, **size)
        for skew in (0.5, 0.8, 1.0, 1.2)
        for locality, drift in ((0.0, 0.0), (0.2, 0.25), (0.4, 0.25))
    ]
    turns = zipf(name="4 turns", layers=chosen.layers, tokens=48, skew=0.8, locality=0.2, prefill=128, turns=4)
    for group in chosen.only.split(","):
        for trace in {"recorded": real, "zipf": zipfs, "batch": [batched(zipfs[4], 8)]}.get(group, ()):
            compare(trace, POLICIES)
        for trace in {"start": [*real, *zipfs[3:6]]}.get(group, ()):
            warm_start(trace)
        for trace in {"prefill": [*real, turns]}.get(group, ()):
            prefill_clocks(trace)


if __name__ == "__main__":
    main()
