"""Every claim, computed anew."""

import pytest

from headrace.claims import all_claims, evaluate, find_claim, formulas
from headrace.claims.claim import VERDICTS, Case, Claim, run_case
from headrace.errors import UsageError

pytestmark = pytest.mark.zoo

CASES = [(claim, case) for claim in all_claims() for case in claim.cases]


@pytest.mark.parametrize("claim", all_claims(), ids=lambda claim: claim.id)
def test_the_verdict_follows_from_the_numbers(claim: Claim) -> None:
    evaluation = evaluate(claim)
    expected = VERDICTS[claim.verdict]
    if evaluation.agrees is not None and expected is not None:
        assert evaluation.agrees == expected, (evaluation.value, claim.said)


@pytest.mark.parametrize(("claim", "case"), CASES, ids=lambda value: getattr(value, "id", getattr(value, "name", "")))
def test_the_formula_gives_the_known_number(claim: Claim, case: Case) -> None:
    assert run_case(claim, case) == pytest.approx(case.expected, rel=case.tolerance)


def test_an_unknown_claim_is_an_error_with_a_hint() -> None:
    with pytest.raises(UsageError) as error:
        find_claim("99")
    assert error.value.hint


def test_claims_are_numbered_1_to_55_without_gaps() -> None:
    numbered = [claim for claim in all_claims() if claim.id.isdigit()]
    assert [int(claim.id) for claim in numbered] == list(range(1, 56))


def test_every_claim_says_where_its_numbers_are_from() -> None:
    for claim in all_claims():
        assert claim.sources or claim.verdict == "unchecked", claim.id
        assert claim.why, claim.id
        for name, entry in claim.inputs.items():
            assert entry.source or entry.label in ("stated", "guessed"), (claim.id, name)


def test_inputs_that_flip_the_verdict_come_first() -> None:
    swings = evaluate(find_claim("3")).swings
    assert [swing.flips for swing in swings] == sorted((swing.flips for swing in swings), reverse=True)


def test_a_range_contains_its_value() -> None:
    for claim in all_claims():
        for name, entry in claim.inputs.items():
            if entry.low is not None and entry.high is not None:
                assert entry.low <= entry.value <= entry.high, (claim.id, name)


def test_every_formula_of_a_claim_has_a_test_case() -> None:
    for claim in all_claims():
        assert (claim.formula is not None) == bool(claim.cases), claim.id
        assert claim.section in ("streaming", "parallelism", "money", "size", "efficiency"), claim.id


def test_every_formula_is_used() -> None:
    used = {claim.formula for claim in all_claims()} | {case.formula for _, case in CASES}
    assert set(formulas.ALL) == used - {None}


def test_a_case_of_another_formula_takes_its_inputs_from_the_claim() -> None:
    claim = find_claim("3")
    assert run_case(claim, Case(name="seconds", formula="pipelined_pass", expected=1.04)) == pytest.approx(1.04)
