"""An executable claim: inputs with units, a formula, the stated number and the computed number.

Each file in `data/` is one claim; its numbers are not trusted. `evaluate` recomputes the number, compares it with the stated
one, and varies every input over its range. This shows the assumptions that the verdict depends on.
"""

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from inspect import signature
from typing import Any

from headrace.claims import formulas
from headrace.errors import UsageError, did_you_mean

VERDICTS = {
    "holds": True,
    "holds, with a nuance": True,
    "right sum, ideal assumption": True,
    "imprecise": False,
    "wrong": False,
    "superseded": False,
    "measured": None,  # a measurement relevant to a claim
    "unchecked": None,  # cannot be checked from public facts
}
LABELS = ("stated", "measured", "table", "guessed")


@dataclass(frozen=True, kw_only=True)
class Input:
    """One number of a formula. `low` and `high` bound its plausible values."""

    value: float
    unit: str
    label: str  # one of `LABELS`; "stated" means in the claim
    low: float | None = None
    high: float | None = None
    source: str = ""

    def __post_init__(self) -> None:
        if self.label not in LABELS:
            raise ValueError(f"an input is one of {', '.join(LABELS)}, not {self.label}")
        if (self.low is None) != (self.high is None):
            raise ValueError("a range has two ends")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A test of the claim's formula or another one: other inputs, and the expected result."""

    name: str
    expected: float
    inputs: Mapping[str, float] = field(default_factory=dict)
    tolerance: float = 0.0005
    formula: str | None = None


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim. `said` is the stated number, `agrees_within` the factor within which ours agrees."""

    id: str
    title: str
    section: str
    statement: str
    verdict: str
    why: str
    sources: tuple[str, ...]
    unit: str = ""
    formula: str | None = None
    said: float | None = None
    compare: str = "equal"  # relation of ours to the stated number: equal, at least, at most
    agrees_within: float = 1.05
    inputs: Mapping[str, Input] = field(default_factory=dict)
    cases: tuple[Case, ...] = ()

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"{self.id}: no such verdict: {self.verdict}")
        if self.formula is not None and self.formula not in formulas.ALL:
            raise ValueError(f"{self.id}: no such formula: {self.formula}")


@dataclass(frozen=True, kw_only=True)
class Swing:
    """The effect of one input over its range on the result, and on the verdict."""

    name: str
    low: float
    high: float
    at_low: float
    at_high: float
    flips: bool

    @property
    def size(self) -> float:
        """The factor between the results at both ends."""
        small, large = sorted((abs(self.at_low), abs(self.at_high)))
        return large / small if small > 0 else float("inf") if large > 0 else 1.0


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The computed number, its agreement with the stated number, and its sensitivities, largest first."""

    claim: Claim
    value: float | None
    agrees: bool | None
    swings: tuple[Swing, ...]

    def as_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        claim = self.claim
        return {
            "id": claim.id,
            "title": claim.title,
            "section": claim.section,
            "statement": claim.statement,
            "formula": claim.formula,
            "unit": claim.unit,
            "said": claim.said,
            "found": self.value,
            "agrees": self.agrees,
            "verdict": claim.verdict,
            "why": claim.why,
            "sources": list(claim.sources),
            "inputs": {
                name: {
                    "value": i.value,
                    "unit": i.unit,
                    "label": i.label,
                    "low": i.low,
                    "high": i.high,
                    "source": i.source,
                }
                for name, i in claim.inputs.items()
            },
            "sensitivity": [
                {
                    "input": s.name,
                    "low": s.low,
                    "high": s.high,
                    "at_low": s.at_low,
                    "at_high": s.at_high,
                    "flips": s.flips,
                }
                for s in self.swings
            ],
        }


def evaluate(claim: Claim) -> Evaluation:
    """Compute a claim's number, compare it with the stated one, and vary the inputs."""
    if claim.formula is None:
        return Evaluation(claim=claim, value=None, agrees=None, swings=())
    formula = formulas.ALL[claim.formula]
    values = {name: entry.value for name, entry in claim.inputs.items()}
    found = formula(**values)
    swings = [swing for name in claim.inputs if (swing := _swing(claim, formula, values, name)) is not None]
    swings.sort(key=lambda swing: (not swing.flips, -swing.size))
    return Evaluation(claim=claim, value=found, agrees=agrees(claim, found), swings=tuple(swings))


def agrees(claim: Claim, found: float) -> bool | None:
    """True if a number agrees with the claim; None if the claim states no number."""
    if claim.said is None:
        return None
    slack = claim.agrees_within
    low, high = sorted((claim.said / slack, claim.said * slack))
    if claim.compare == "at least":
        return found >= low
    if claim.compare == "at most":
        return found <= high
    return low <= found <= high


def run_case(claim: Claim, case: Case) -> float:
    """The formula's result with a case's inputs; the claim supplies the others."""
    name = case.formula or claim.formula
    assert name is not None
    formula = formulas.ALL[name]
    values = {key: entry.value for key, entry in claim.inputs.items() if key in signature(formula).parameters}
    return formula(**(values | dict(case.inputs)))


def _swing(claim: Claim, formula: Callable[..., float], values: Mapping[str, float], name: str) -> Swing | None:
    entry = claim.inputs[name]
    if entry.low is None or entry.high is None:
        return None
    at_low, at_high = (formula(**(dict(values) | {name: end})) for end in (entry.low, entry.high))
    now = agrees(claim, formula(**values))
    flips = any(agrees(claim, end) != now for end in (at_low, at_high))
    return Swing(name=name, low=entry.low, high=entry.high, at_low=at_low, at_high=at_high, flips=flips)


@cache
def all_claims() -> tuple[Claim, ...]:
    """All claims in order of their numbers."""
    folder = files("headrace.claims") / "data"
    found = [
        _load(item.name[: -len(".toml")], tomllib.loads(item.read_text()))
        for item in folder.iterdir()
        if item.name.endswith(".toml")
    ]
    return tuple(sorted(found, key=lambda claim: _order(claim.id)))


def find_claim(id: str) -> Claim:
    """One claim by its number.

    Raises:
        UsageError: no claim has that number.
    """
    for claim in all_claims():
        if claim.id == id:
            return claim
    raise UsageError(f"there is no claim {id}", hint=did_you_mean(id, [claim.id for claim in all_claims()]))


def _order(id: str) -> tuple[int, str]:
    digits = "".join(c for c in id if c.isdigit())
    return int(digits), id


def _load(id: str, values: Mapping[str, Any]) -> Claim:
    fields = dict(values)
    fields["inputs"] = {name: Input(**entry) for name, entry in fields.get("inputs", {}).items()}
    fields["cases"] = tuple(Case(**case) for case in fields.get("cases", []))
    fields["sources"] = tuple(fields.get("sources", []))
    return Claim(id=id.lstrip("0"), **fields)
