"""Eviction of experts: against a reference implementation that recomputes every probability from the whole history."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import BudgetError, UsageError
from headrace.stream.expert_cache import HALF_LIFE, ExpertCache

LAYERS, EXPERTS = 3, 6


def counts(*chosen: int) -> np.ndarray:
    return np.bincount(chosen, minlength=EXPERTS)


class Twin:
    """The same predictions in plain Python and double precision, from the whole history at every call."""

    def __init__(self) -> None:
        self.history: list[tuple[int, list[float], int]] = []

    def probabilities(self) -> list[list[float]]:
        frequency = [[0.0] * EXPERTS for _ in range(LAYERS)]
        last = [[0.0] * EXPERTS for _ in range(LAYERS)]
        probability = [[0.0] * EXPERTS for _ in range(LAYERS)]
        covariance, variance = 0.0, 16.0
        for layer, routed, rows in self.history:
            pairs = list(zip(routed, last[layer], frequency[layer], strict=True))
            covariance = covariance * (1 - 1 / 2000) + sum((r - f) * (b - f) for r, b, f in pairs)
            variance = variance * (1 - 1 / 2000) + sum((b - f) ** 2 for _, b, f in pairs)
            locality = min(max(covariance / variance, 0.0), 0.9)
            kept = 0.5 ** (rows**0.5 / HALF_LIFE)
            frequency[layer] = [kept * f + (1 - kept) * r for r, _, f in pairs]
            last[layer] = routed
            probability[layer] = [
                (1 - locality) * f + locality * r for r, f in zip(routed, frequency[layer], strict=True)
            ]
        return probability


rows_of_a_pass = st.lists(st.sets(st.integers(0, EXPERTS - 1), min_size=2, max_size=2), min_size=1, max_size=4)
steps = st.lists(st.tuples(rows_of_a_pass, st.sets(st.integers(0, EXPERTS - 1))), max_size=30)


@settings(deadline=None)
@given(steps, st.integers(1, LAYERS * EXPERTS))
def test_the_evicted_expert_is_the_least_likely_of_those_not_held(passes: list, slots: int) -> None:
    cache, twin = ExpertCache(layers=LAYERS, experts=EXPERTS, slots=slots), Twin()
    inside: dict[int, tuple[int, int]] = {}
    for step, (rows, failing) in enumerate(passes):
        layer = step % LAYERS
        chosen = counts(*(expert for row in rows for expert in row))
        cache.note(layer, chosen, len(rows))
        twin.history.append((layer, [int(c) / len(rows) for c in chosen], len(rows)))
        probability = twin.probabilities()
        routed = [int(e) for e in np.flatnonzero(chosen)]
        held = [slot for slot in (cache.find(layer, e) for e in routed) if slot is not None]
        assert held == [slot for e in routed for slot, what in inside.items() if what == (layer, e)]
        for slot in held:
            cache.hold(slot)
        for expert in [e for e in routed if (layer, e) not in inside.values()]:
            evictable = {slot: probability[i][e] for slot, (i, e) in inside.items() if slot not in held}
            slot = cache.place(layer, expert)
            if len(inside) < slots:
                assert slot is not None
                assert slot not in inside
            elif not evictable:
                assert slot is None
                continue
            else:
                # single precision of the fast path, double of the twin: near ties may go either way
                assert evictable[slot] == pytest.approx(min(evictable.values()), abs=1e-5)
            assert slot not in held
            held.append(slot)
            inside[slot] = (layer, expert)
        for slot in held:
            if inside[slot][1] in failing:
                cache.forget(slot)
                del inside[slot]
            cache.release(slot)
        for i in range(LAYERS):
            for e in range(EXPERTS):
                assert cache.find(i, e) == next((slot for slot, what in inside.items() if what == (i, e)), None)


def test_a_slot_held_twice_stays_until_both_have_released_it() -> None:
    cache = ExpertCache(layers=1, experts=EXPERTS, slots=1)
    slot = cache.place(0, 0)
    assert slot is not None
    cache.hold(slot)
    cache.release(slot)
    assert cache.place(0, 1) is None
    cache.release(slot)
    assert cache.place(0, 1) == slot
    assert cache.find(0, 0) is None


def test_a_failed_read_is_not_found_and_its_slot_is_free_after_the_last_release() -> None:
    cache = ExpertCache(layers=1, experts=EXPERTS, slots=1)
    slot = cache.place(0, 0)
    assert slot is not None
    cache.hold(slot)
    cache.forget(slot)
    assert cache.find(0, 0) is None
    cache.release(slot)
    assert cache.place(0, 1) is None
    cache.release(slot)
    assert cache.place(0, 1) == slot


def test_the_temporal_locality_of_neighbouring_tokens_is_measured() -> None:
    rng = np.random.default_rng(0)
    for repeated in (0.0, 0.4, 1.0):
        cache = ExpertCache(layers=1, experts=64, slots=8)
        chosen = rng.permutation(64)[:8]
        for _ in range(1500):
            keep = chosen[rng.random(8) < repeated]
            chosen = np.concatenate([keep, rng.permutation(np.setdiff1d(np.arange(64), keep))[: 8 - len(keep)]])
            cache.note(0, np.bincount(chosen, minlength=64), 1)
        assert cache.locality == pytest.approx(min(repeated, 0.9), abs=0.06)


def test_a_prefill_counts_as_the_root_of_its_rows_in_tokens() -> None:
    tokens, prefill = (ExpertCache(layers=1, experts=EXPERTS, slots=1) for _ in range(2))
    for _ in range(10):
        tokens.note(0, counts(1, 2), 1)
    prefill.note(0, 100 * counts(1, 2), 100)
    np.testing.assert_allclose(tokens.scores, prefill.scores, rtol=1e-4)  # ten roundings against one


def test_remembered_scores_choose_the_evicted_expert_before_the_first_step() -> None:
    scores = np.array([[0.5, 0.1, 0.9, 0.0, 0.0, 0.0]], np.float32)
    cache = ExpertCache(layers=1, experts=EXPERTS, slots=2, scores=scores)
    for expert in (0, 1):
        slot = cache.place(0, expert)
        assert slot is not None
        cache.release(slot)
    assert cache.worthy(0, 2)
    assert not cache.worthy(0, 3)
    cache.place(0, 2)
    assert (cache.find(0, 0) is None, cache.find(0, 1) is None) == (False, True)
    np.testing.assert_array_equal(cache.scores, scores)


@pytest.mark.parametrize("wrong", [np.zeros((2, EXPERTS)), np.full((1, EXPERTS), np.nan), np.full((1, EXPERTS), 2.0)])
def test_scores_of_another_model_or_damaged_ones_are_refused(wrong: np.ndarray) -> None:
    with pytest.raises(UsageError, match="1 layers x 6 experts"):
        ExpertCache(layers=1, experts=EXPERTS, slots=1, scores=wrong)


def test_no_slot_is_an_error() -> None:
    with pytest.raises(BudgetError, match="at least 1"):
        ExpertCache(layers=1, experts=EXPERTS, slots=0)


def lines_of_a_token(slots: int) -> int:
    """Lines of Python that run for one token of a full cache, for 8 of 512 experts in each of 4 layers."""
    cache = ExpertCache(layers=4, experts=512, slots=slots)
    for number in range(4 * 512):
        if (slot := cache.place(number // 512, number % 512)) is not None:
            cache.release(slot)
    missing = [(layer, e) for layer in range(4) for e in range(512) if cache.find(layer, e) is None][:32]
    lines = 0

    def count(frame: object, event: str, argument: object) -> object:
        nonlocal lines
        lines += event == "line"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        for layer, expert in missing:
            cache.note(layer, np.eye(512, dtype=int)[expert], 1)
            cache.release(cache.place(layer, expert))
    finally:
        sys.settrace(before)
    return lines


def test_the_work_of_a_token_does_not_grow_with_the_slots() -> None:
    assert lines_of_a_token(2000) == lines_of_a_token(20)
