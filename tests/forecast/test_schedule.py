"""The schedule of a streamed pass: simulation against closed form, and properties of every schedule."""

from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from headrace.forecast.schedule import ScheduledUnit, closed_form, grouped, period, simulate, slots_needed

PROPERTY = settings(max_examples=80, deadline=None)

SECONDS = st.one_of(st.just(0.0), st.floats(1e-4, 5.0))
UNITS = st.builds(ScheduledUnit, latency_s=SECONDS, transfer_s=SECONDS, compute_s=SECONDS)
MIXED = st.lists(
    st.builds(ScheduledUnit, latency_s=SECONDS, transfer_s=SECONDS, compute_s=SECONDS, pinned=st.booleans()),
    min_size=1,
    max_size=20,
)
COUNTS = st.integers(1, 60)
SLOTS = st.integers(1, 12)
PASSES = st.integers(1, 3)

DISCUSSION = ScheduledUnit(latency_s=0.040, transfer_s=0.0, compute_s=0.010)
BUSY_LINK = ScheduledUnit(latency_s=0.040, transfer_s=0.010, compute_s=0.010)


@PROPERTY
@given(UNITS, COUNTS, SLOTS)
def test_the_closed_form_equals_the_simulation(unit: ScheduledUnit, count: int, slots: int) -> None:
    assert closed_form(unit, count, slots) == pytest.approx(simulate([unit] * count, slots).seconds, rel=1e-9)


@pytest.mark.parametrize(
    ("unit", "slots", "expected"),
    [(DISCUSSION, 5, 1.04), (BUSY_LINK, 5, 1.24), (BUSY_LINK, 6, 1.05)],
    ids=["an idle link", "a busy link", "a busy link and one slot more"],
)
def test_a_hundred_layers_take_the_claimed_time(unit: ScheduledUnit, slots: int, expected: float) -> None:
    assert closed_form(unit, 100, slots) == pytest.approx(expected)
    assert simulate([unit] * 100, slots).seconds == pytest.approx(expected)


def test_groups_of_five_without_overlap_take_the_claimed_time() -> None:
    assert grouped([DISCUSSION] * 100, 5) == pytest.approx(1.8)


def test_a_last_group_may_be_smaller() -> None:
    assert grouped([DISCUSSION] * 7, 5) == pytest.approx(2 * 0.040 + 7 * 0.010)


@PROPERTY
@given(MIXED, SLOTS, PASSES)
def test_more_slots_are_never_slower(units: list[ScheduledUnit], slots: int, passes: int) -> None:
    few, many = (simulate(units, number, passes=passes).seconds for number in (slots, slots + 1))
    assert many <= few + 1e-9


@PROPERTY
@given(MIXED, SLOTS, SLOTS, PASSES)
def test_more_readers_are_never_slower(units: list[ScheduledUnit], slots: int, readers: int, passes: int) -> None:
    few, many = (simulate(units, slots, readers=number, passes=passes).seconds for number in (readers, readers + 1))
    assert many <= few + 1e-9


@PROPERTY
@given(MIXED, SLOTS)
def test_readers_beyond_the_slots_change_nothing(units: list[ScheduledUnit], slots: int) -> None:
    assert simulate(units, slots, readers=slots + 5) == simulate(units, slots)


@PROPERTY
@given(MIXED, SLOTS, PASSES)
def test_pinning_everything_leaves_the_compute(units: list[ScheduledUnit], slots: int, passes: int) -> None:
    pinned = [ScheduledUnit(unit.latency_s, unit.transfer_s, unit.compute_s, pinned=True) for unit in units]
    timeline = simulate(pinned, slots, passes=passes)

    assert timeline.seconds == pytest.approx(passes * sum(unit.compute_s for unit in units))
    assert timeline.stall_s == pytest.approx(0)
    assert all(span.transfer_s == 0 for span in timeline.spans)


def test_a_pinned_unit_needs_neither_slot_nor_link() -> None:
    pinned = ScheduledUnit(latency_s=9.0, transfer_s=9.0, compute_s=0.0, pinned=True)
    without = simulate([BUSY_LINK] * 6, 2).seconds

    assert simulate([pinned, *[BUSY_LINK, pinned] * 6], 2).seconds == pytest.approx(without)


@PROPERTY
@given(UNITS, st.integers(1, 20), SLOTS)
def test_consecutive_passes_take_the_period_of_each_unit(unit: ScheduledUnit, count: int, slots: int) -> None:
    # The pattern repeats after `slots` units. One pass may be longer than the next, so the passes are averaged.
    timeline = simulate([unit] * count, slots, passes=2 * slots + 2)
    steady = [timeline.pass_s(number) for number in range(slots + 2, 2 * slots + 2)]

    assert sum(steady) / slots == pytest.approx(period(unit, slots) * count, rel=1e-9)


@PROPERTY
@given(UNITS, st.integers(1, 20))
def test_with_enough_slots_all_steady_passes_take_equal_time(unit: ScheduledUnit, count: int) -> None:
    assume(max(unit.transfer_s, unit.compute_s) > 0)
    slots = min(slots_needed(unit), 40)
    assume(slots == slots_needed(unit))
    timeline = simulate([unit] * count, slots, passes=slots + 4)

    expected = max(unit.transfer_s, unit.compute_s) * count
    assert timeline.pass_s(slots + 3) == pytest.approx(expected, rel=1e-6)


@PROPERTY
@given(MIXED, SLOTS, PASSES)
def test_the_passes_add_up_to_the_total(units: list[ScheduledUnit], slots: int, passes: int) -> None:
    timeline = simulate(units, slots, passes=passes)
    assert sum(timeline.pass_s(number) for number in range(passes)) == pytest.approx(timeline.seconds)


@PROPERTY
@given(UNITS)
def test_slots_needed_is_the_smallest_sufficient_number(unit: ScheduledUnit) -> None:
    each = max(unit.transfer_s, unit.compute_s)
    assume(each > 0)
    slots = slots_needed(unit)

    assert period(unit, slots) == pytest.approx(each)
    assert slots == 1 or period(unit, slots - 1) > each


def test_the_claimed_example_needs_five_slots_and_six_with_a_busy_link() -> None:
    assert slots_needed(DISCUSSION) == 5
    assert slots_needed(BUSY_LINK) == 6


def test_one_slot_is_enough_for_units_without_time() -> None:
    assert slots_needed(ScheduledUnit(0, 0, 0)) == 1


@PROPERTY
@given(MIXED, SLOTS, SLOTS, PASSES)
def test_time_without_compute_is_stall(units: list[ScheduledUnit], slots: int, readers: int, passes: int) -> None:
    timeline = simulate(units, slots, readers=readers, passes=passes)
    computed = passes * sum(unit.compute_s for unit in units)

    assert timeline.stall_s + computed == pytest.approx(timeline.seconds)
    assert timeline.stall_s >= -1e-9


@PROPERTY
@given(MIXED, SLOTS, SLOTS, PASSES)
def test_no_resource_is_used_twice_at_a_time(units: list[ScheduledUnit], slots: int, readers: int, passes: int) -> None:
    spans = simulate(units, slots, readers=readers, passes=passes).spans
    loaded = [span for span in spans if not units[span.unit % len(units)].pinned]

    assert [span.unit for span in spans] == list(range(passes * len(units)))
    assert all(before.done_s <= after.compute_s + 1e-9 for before, after in pairwise(spans))
    assert all(before.start_s + before.transfer_s <= after.start_s + 1e-9 for before, after in pairwise(loaded))
    assert all(old.done_s <= new.start_s + 1e-9 for old, new in zip(loaded, loaded[slots:], strict=False))
    assert all(old.arrive_s <= new.start_s + 1e-9 for old, new in zip(loaded, loaded[readers:], strict=False))


def test_an_empty_schedule_takes_no_time() -> None:
    assert simulate([], 1).seconds == 0


@pytest.mark.parametrize("numbers", [{"slots": 0}, {"slots": 1, "readers": 0}, {"slots": 1, "passes": 0}])
def test_without_a_slot_a_reader_or_a_pass_there_is_no_schedule(numbers: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        simulate([DISCUSSION], **numbers)


def test_an_empty_group_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one unit"):
        grouped([DISCUSSION], 0)
