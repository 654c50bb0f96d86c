"""Fit the constants of `forecast.passes.Rates` to measurements, by family of software, and score them on held-out sources.

A family's constants are pulled towards those of the other families (in logarithms, with the strength below). A family with
little data is therefore predicted like the rest, and an unmeasured one exactly like it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from math import exp, log

import numpy as np
from measurements import Case
from scipy.optimize import least_squares

from headrace.forecast.passes import Rates

NAMES = tuple(field.name for field in fields(Rates) if field.name != "chain_bytes")
# Standard deviation of a family in logarithms: shares of a peak are alike everywhere, launches are not.
SPREAD = {
    "memory_share": 0.15,
    "flop_share": 0.3,
    "die_share": 0.15,
    "layer_s": 1.0,
    "routing_s": 0.7,
    "start_s": 0.7,
    "hop_s": 0.7,
    "unhidden": 0.4,
}
BOUNDS = {
    "memory_share": (0.2, 1.0),
    "flop_share": (0.05, 1.0),
    "unhidden": (0.02, 1.0),
    "die_share": (0.4, 1.0),
    "routing_s": (1e-6, 5e-3),
    "layer_s": (1e-6, 5e-3),
    "start_s": (1e-6, 1e-3),
    "hop_s": (5e-7, 1e-3),
}
NOISE = 0.1
# Launching one operation after another from Python: between 0.1 ms a layer (vLLM without graphs, Llama-3.1-8B on H100)
# and 0.9 (the baseline of "Accelerating generative AI with PyTorch II": 25.5 tok/s where bandwidth alone would give 150).
LAUNCHES_FROM_PYTHON_S = 3e-4


def fit(cases: Sequence[Case], prior: Rates) -> Rates:
    """The constants that fit the cases best, near the prior. Sources count by the square root of their rows."""
    if not cases:
        return prior
    count: dict[str, int] = {}
    for case in cases:
        count[case.source] = count.get(case.source, 0) + 1
    weight = np.array([count[case.source] ** -0.5 for case in cases])
    start = np.array([log(getattr(prior, name)) for name in NAMES])
    spread = np.array([SPREAD.get(name, 0.5) for name in NAMES])
    low = np.array([log(BOUNDS[name][0]) for name in NAMES])
    high = np.array([log(BOUNDS[name][1]) for name in NAMES])

    def residuals(values: np.ndarray) -> np.ndarray:
        rates = rates_of(values)
        errors = np.array([log(case.predict(rates) / case.seconds) for case in cases])
        errors = np.sign(errors) * np.sqrt(2 * (np.sqrt(1 + (errors / NOISE) ** 2) - 1))  # robust: linear in large ones
        return np.concatenate([weight * errors, (values - start) / spread])

    found = least_squares(residuals, np.clip(start, low + 1e-6, high - 1e-6), bounds=(low, high), max_nfev=30)
    return rates_of(found.x)


def rates_of(values: Sequence[float] | np.ndarray) -> Rates:
    return Rates(**{name: exp(value) for name, value in zip(NAMES, values, strict=True)})


def middle(all_rates: Sequence[Rates]) -> Rates:
    """The geometric mean of several families."""
    if not all_rates:
        return Rates()
    return rates_of([sum(log(getattr(rates, name)) for rates in all_rates) / len(all_rates) for name in NAMES])


def fit_families(cases: Sequence[Case], start: Rates | None = None) -> dict[str, Rates]:
    """Each family's constants: alone first, then again towards the middle of the others."""
    families = sorted({case.family for case in cases})
    groups = {family: [case for case in cases if case.family == family] for family in families}
    found = {family: fit(group, start or Rates()) for family, group in groups.items()}
    for _ in range(2):
        found = {f: fit(groups[f], prior_of(f, found)) for f in families}
    return found


def prior_of(family: str, rates: Mapping[str, Rates]) -> Rates:
    """Prior of a family: the mean of the others, but for known facts of its software."""
    prior = middle([r for f, r in rates.items() if f not in (family, "eager")])
    if family == "eager":
        return replace(prior, layer_s=LAUNCHES_FROM_PYTHON_S)
    if (
        family == "tpu"
    ):  # one program per step, no launches; a hop takes about a microsecond ("How to scale your model", 2025)
        return replace(prior, layer_s=1e-5, start_s=2e-6, hop_s=4e-6)
    return prior


def leave_one_source_out(
    cases: Sequence[Case], all_rates: dict[str, Rates], say: Callable[[str], None]
) -> dict[str, float]:
    """Predictions for each case by constants fitted without its source."""
    predicted: dict[str, float] = {}
    for source in sorted({case.source for case in cases}):
        held = [case for case in cases if case.source == source]
        for family in sorted({case.family for case in held}):
            rest = [case for case in cases if case.family == family and case.source != source]
            # If this source is the whole family, only the other families set the prior; they have not seen it.
            rates = fit(rest, prior_of(family, all_rates))
            for case in held:
                if case.family == family:
                    predicted[case.id] = case.predict(rates)
        say(source)
    return predicted
