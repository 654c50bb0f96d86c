"""Experts that a pass uses, and the hit rate of a cache."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.forecast.expert_hits import chosen, distinct, hit_rate, popularity, skew_of

PROPERTY = settings(max_examples=80, deadline=None)
SKEWS = st.floats(0, 2)
LOCALITIES = st.floats(0, 1)
ROWS = st.integers(1, 200)


@st.composite
def moe_sizes(draw: st.DrawFn) -> tuple[int, int]:
    experts = draw(st.integers(2, 128))
    return experts, draw(st.integers(1, experts))


@PROPERTY
@given(moe_sizes(), ROWS)
def test_uniform_routing_uses_the_experts_of_the_formula(moe: tuple[int, int], rows: int) -> None:
    n, k = moe
    assert distinct(n, k, rows) == pytest.approx(n * (1 - (1 - k / n) ** rows), rel=1e-6)


@PROPERTY
@given(moe_sizes(), SKEWS)
def test_the_probabilities_of_a_row_add_up_to_its_experts(moe: tuple[int, int], skew: float) -> None:
    n, k = moe
    chances = chosen(n, k, skew)

    assert len(chances) == n
    assert sum(chances) == pytest.approx(k, rel=1e-6)
    assert all(0 <= chance <= 1 for chance in chances)
    assert list(chances) == sorted(chances, reverse=True)


@PROPERTY
@given(moe_sizes(), ROWS, SKEWS, LOCALITIES)
def test_more_rows_use_more_experts_but_never_more_than_exist(
    moe: tuple[int, int], rows: int, skew: float, locality: float
) -> None:
    n, k = moe
    few, many = (distinct(n, k, number, skew=skew, locality=locality) for number in (rows, rows + 1))

    assert k * (1 - 1e-6) <= few <= many + 1e-9
    assert many <= n * (1 + 1e-9)


@PROPERTY
@given(moe_sizes(), ROWS, SKEWS, SKEWS)
def test_more_skew_uses_fewer_experts(moe: tuple[int, int], rows: int, one: float, other: float) -> None:
    n, k = moe
    even, skewed = (distinct(n, k, rows, skew=skew) for skew in sorted((one, other)))
    assert skewed <= even * (1 + 1e-6)


@PROPERTY
@given(moe_sizes(), ROWS, SKEWS, LOCALITIES, LOCALITIES)
def test_rows_with_temporal_locality_use_fewer_experts(
    moe: tuple[int, int], rows: int, skew: float, one: float, other: float
) -> None:
    n, k = moe
    independent, alike = (distinct(n, k, rows, skew=skew, locality=locality) for locality in sorted((one, other)))
    assert alike <= independent + 1e-9
    assert distinct(n, k, rows, skew=skew, locality=1) == pytest.approx(k, rel=1e-6)


@PROPERTY
@given(moe_sizes(), SKEWS, LOCALITIES, st.floats(0, 1), st.floats(0, 1))
def test_a_larger_cache_is_hit_more_often(
    moe: tuple[int, int], skew: float, locality: float, one: float, other: float
) -> None:
    n, k = moe
    small, large = (hit_rate(n, k, share * n, skew=skew, locality=locality) for share in sorted((one, other)))
    assert 0 <= small <= large + 1e-9
    assert large <= 1 + 1e-9


@PROPERTY
@given(moe_sizes(), SKEWS, LOCALITIES)
def test_a_cache_of_all_experts_always_hits(moe: tuple[int, int], skew: float, locality: float) -> None:
    n, k = moe
    assert hit_rate(n, k, n, skew=skew, locality=locality) == 1
    assert hit_rate(n, k, 2 * n, skew=skew, locality=locality) == 1


def test_an_empty_cache_never_hits() -> None:
    assert hit_rate(64, 6, 0, skew=0.5, locality=0.5) == 0


def test_uniform_routing_hits_the_cached_share() -> None:
    assert hit_rate(64, 6, 16) == pytest.approx(0.25, rel=1e-6)


@PROPERTY
@given(st.integers(1, 128), SKEWS)
def test_popularities_are_shares_of_one(experts: int, skew: float) -> None:
    shares = popularity(experts, skew)
    assert sum(shares) == pytest.approx(1)
    assert list(shares) == sorted(shares, reverse=True)


@pytest.mark.parametrize("skew", [0.0, 0.5, 1.2])
def test_the_skew_of_measured_hits_is_found_again(skew: float) -> None:
    hits = [(cached, hit_rate(32, 4, cached, skew=skew, locality=0.2)) for cached in (4, 8, 16)]
    assert skew_of(hits, 32, 4, locality=0.2) == pytest.approx(skew)
