"""Learn from runs: measured over probed rates of this machine, by resource.

    seconds = max(D, C + io_cpu * D)        D = disk * predicted disk seconds
                                            C = kernel * predicted kernel seconds + layer * predicted layer seconds

A machine has four factors, the same for every model. A pattern search on their logarithms minimises the mean of a robust
error over models, not over passes. A model that ran often therefore weighs no more than one that ran once. A weak prior
keeps a factor unchanged where no run constrains it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from headrace.errors import UsageError
from headrace.plan.profile import IO_CPU_SHARE, Profile
from headrace.plan.record import PassGroup, RunRecord

FACTORS = {"disk": 1.0, "kernel": 1.0, "layer": 1.0, "io_cpu": IO_CPU_SHARE}
PULL = 0.01  # weight of the prior on a factor's squared logarithm; the mean error is about a tenth
LEAST_GROUPS = 3


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Factors, their error on the runs, and the number of runs. `spread`: measured / predicted, middle 80 %."""

    factors: Mapping[str, float]
    spread: tuple[float, float]
    median_error: float
    runs: int
    groups: int


def fit_runs(
    records: Sequence[RunRecord], machine: str, probed_at: str | None = None, io_cpu: float = IO_CPU_SHARE
) -> Fit:
    """Find the factors of one machine.

    Args:
        records: runs, of any machine.
        machine: only its runs count.
        probed_at: only runs predicted with the rates of this probe count; None: all.
        io_cpu: measured I/O CPU share, where the search starts.

    Raises:
        UsageError: too few passes of this machine to learn from.
    """
    own = [r for r in records if r.machine == machine and probed_at in (None, r.probed_at)]
    pairs = [(record, group) for record in own for group in record.passes]
    if len(pairs) < LEAST_GROUPS:
        others = len(records) - len(own)
        hint = (
            f"{others} records are of another machine, or of before its last probe"
            if others
            else "run a few prompts first, best with several --memory"
        )
        raise UsageError(
            f"{len(pairs)} groups of passes of this machine are too few to fit {len(FACTORS)} constants", hint=hint
        )
    counts: dict[str, int] = {}
    for record, _ in pairs:
        counts[record.model] = counts.get(record.model, 0) + 1

    def loss(factors: Mapping[str, float]) -> float:
        error = sum(
            _robust(math.log(pass_seconds(record, group, factors) / group.seconds)) / counts[record.model]
            for record, group in pairs
        )
        pull = sum(math.log(factors[name] / usual) ** 2 for name, usual in start.items())
        return error / len(counts) + PULL * pull

    start = FACTORS | {"io_cpu": io_cpu}
    factors = minimise(loss, start)
    ratios = sorted(group.seconds / pass_seconds(record, group, factors) for record, group in pairs)
    errors = sorted(abs(1 / ratio - 1) for ratio in ratios)
    return Fit(
        factors=factors,
        spread=(quantile(ratios, 0.1), quantile(ratios, 0.9)),
        median_error=quantile(errors, 0.5),
        runs=len(own),
        groups=len(pairs),
    )


def pass_seconds(record: RunRecord, group: PassGroup, factors: Mapping[str, float]) -> float:
    """Predicted seconds of a pass under other factors than the recorded ones."""
    was = FACTORS | dict(record.factors)
    disk_s = group.disk_s * factors["disk"] / was["disk"]
    kernel_s = group.kernel_s * factors["kernel"] / was["kernel"]
    compute_s = kernel_s + group.layer_s * factors["layer"] / was["layer"]
    return max(disk_s, compute_s + factors["io_cpu"] * disk_s)


def apply_fit(profile: Profile, fit: Fit) -> Profile:
    """The profile with rates scaled to the fit; the factors of an earlier fit are undone first."""
    was = FACTORS | dict(profile.factors)
    ratio = {name: value / was[name] for name, value in fit.factors.items()}

    def slower(rates: Mapping[str, float], by: float) -> dict[str, float]:
        return {key: rate / by for key, rate in rates.items()}

    kernel = ratio["kernel"]
    date = profile.source.split(",")[0]
    return replace(
        profile,
        source=f"{date}, fitted to {fit.runs} runs",
        disk_bytes_per_s=slower(profile.disk_bytes_per_s, ratio["disk"]),
        kernel_weights_per_s={kind: slower(rates, kernel) for kind, rates in profile.kernel_weights_per_s.items()},
        repacked_weights_per_s={k: slower(rates, kernel) for k, rates in profile.repacked_weights_per_s.items()},
        unpack_weights_per_s=slower(profile.unpack_weights_per_s, kernel),
        bf16_flop_per_s=slower(profile.bf16_flop_per_s, kernel),
        fp32_flop_per_s=slower(profile.fp32_flop_per_s, kernel),
        layer_s=profile.layer_s * ratio["layer"],
        layer_row_s=profile.layer_row_s * ratio["layer"],
        factors=dict(fit.factors),
        spread=fit.spread,
    )


def minimise(loss: Callable[[Mapping[str, float]], float], start: Mapping[str, float]) -> dict[str, float]:
    """The positive numbers of least loss, by pattern search (Hooke, Jeeves 1961): one number at a time, shrinking steps."""
    best, least, step = dict(start), loss(start), 1.5
    while step > 1.001:
        before = least
        for name in best:
            for factor in (step, 1 / step):
                tried = best | {name: best[name] * factor}
                if (found := loss(tried)) < least:
                    best, least = tried, found
        if before - least < 1e-6 * max(1.0, before):
            step = math.sqrt(step)
    return best


def quantile(ordered: Sequence[float], share: float) -> float:
    """The quantile `share` of sorted numbers, interpolated linearly."""
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def _robust(error: float) -> float:
    """Error that is absolute when large and quadratic when small: a disturbed run should not dominate."""
    return math.sqrt(error * error + 0.01**2)
