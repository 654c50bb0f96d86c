"""A statement of the discussion as something that runs: inputs with units, a formula, the number said and the number found.

Each file in `data/` is one statement. Nothing in it is trusted: `evaluate` computes the number anew, compares it with
the one that was said, and varies every input over its range, so that one sees which assumption the verdict hangs on.
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
    "measured": None,  # a measurement that bears on a statement
    "unchecked": None,  # nobody can check it from what is known
}
LABELS = ("stated", "measured", "table", "guessed")


@dataclass(frozen=True, kw_only=True)
class Input:
    """One number that goes into a formula. `low` and `high` are what it might as well be."""

    value: float
    unit: str
    label: str  # stated (by the discussion), measured, table, guessed
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
    """The formula, or another, with other inputs, and what it must then give."""

    name: str
    expected: float
    inputs: Mapping[str, float] = field(default_factory=dict)
    tolerance: float = 0.0005
    formula: str | None = None


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One statement. `said` is the discussion's number, `agrees_within` the factor up to which ours counts as the same."""

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
    compare: str = "equal"  # ours must be: equal, at least, at most
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
    """What one input does to the answer over its range, and whether the verdict turns."""

    name: str
    low: float
    high: float
    at_low: float
    at_high: float
    flips: bool

    @property
    def size(self) -> float:
        """By which factor the answer moves."""
        small, large = sorted((abs(self.at_low), abs(self.at_high)))
        return large / small if small > 0 else float("inf") if large > 0 else 1.0


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The number found, whether it agrees with the number said, and what it hangs on, largest first."""

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
    """Compute a statement's number, compare it, and vary what it rests on."""
    if claim.formula is None:
        return Evaluation(claim=claim, value=None, agrees=None, swings=())
    formula = formulas.ALL[claim.formula]
    values = {name: entry.value for name, entry in claim.inputs.items()}
    found = formula(**values)
    swings = [swing for name in claim.inputs if (swing := _swing(claim, formula, values, name)) is not None]
    swings.sort(key=lambda swing: (not swing.flips, -swing.size))
    return Evaluation(claim=claim, value=found, agrees=agrees(claim, found), swings=tuple(swings))


def agrees(claim: Claim, found: float) -> bool | None:
    """Whether a number bears the statement out; None where nothing was said in numbers."""
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
    """The formula with a case's inputs; those that it does not name are the claim's own."""
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
    turns = any(agrees(claim, end) != now for end in (at_low, at_high))
    return Swing(name=name, low=entry.low, high=entry.high, at_low=at_low, at_high=at_high, flips=turns)


@cache
def all_claims() -> tuple[Claim, ...]:
    """Every statement, in the order of their numbers."""
    folder = files("headrace.claims") / "data"
    found = [
        _load(item.name[: -len(".toml")], tomllib.loads(item.read_text()))
        for item in folder.iterdir()
        if item.name.endswith(".toml")
    ]
    return tuple(sorted(found, key=lambda claim: _order(claim.id)))


def find_claim(id: str) -> Claim:
    """One statement by its number.

    Raises:
        UsageError: there is none of that number.
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
