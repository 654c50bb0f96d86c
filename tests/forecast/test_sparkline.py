"""A timeline as text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.forecast.sparkline import LEVELS, busy, sparkline, sparklines

PROPERTY = settings(max_examples=80, deadline=None)


@PROPERTY
@given(st.lists(st.floats(0, 10), max_size=12), st.integers(1, 70))
def test_the_columns_show_the_share_covered_by_spans(edges: list[float], columns: int) -> None:
    ordered = sorted(edges[: len(edges) // 2 * 2])
    spans = list(zip(ordered[::2], ordered[1::2], strict=True))
    shares = busy(spans, 2.0, 8.0, columns)
    covered = sum(max(0.0, min(end, 8.0) - max(begin, 2.0)) for begin, end in spans)

    assert len(shares) == columns
    assert all(0 <= share <= 1 for share in shares)
    assert sum(shares) * 6.0 / columns == pytest.approx(covered, abs=1e-9)


def test_a_span_fills_its_columns() -> None:
    assert busy([(1, 2.5)], 0, 4, 4) == pytest.approx([0, 1, 0.5, 0])


def test_no_time_is_not_busy() -> None:
    assert busy([(0, 1)], 3, 3, 5) == [0.0] * 5


def test_a_fuller_column_is_drawn_higher() -> None:
    assert sparkline([0, 0.5, 1]) == LEVELS[0] + LEVELS[4] + LEVELS[-1]


def test_every_row_has_its_name_and_its_share() -> None:
    lines = sparklines({"link": [(0, 2)], "compute": [(0, 4)]}, 0, 4, columns=8)
    assert lines == ["link     |████    |  50%", "compute  |████████|  100%"]
