"""The predicted gain of drafting."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.checkpoint import open_checkpoint
from headrace.errors import BudgetError, UsageError
from headrace.plan import RunConfig, choose_drafting, choose_sequences, draft, drafting_options, given_budget, make_plan
from headrace.plan.cost import PassCost
from headrace.plan.draft import LOOKUP, NO_DRAFT, predict_decode
from headrace.units import GIB, MIB
from support.zoo.gguf_files import random_model, write_gguf
from support.zoo.headers import MEASURED, SLOW_DISK, model, tensor

REQUEST = RunConfig(prompt_tokens=100, context_tokens=400)


def disk_bound(rows: int) -> PassCost:
    return PassCost(disk_s=1.0, compute_s=0.001 * rows)


def compute_bound(rows: int) -> PassCost:
    return PassCost(disk_s=0.0, compute_s=0.5 * rows)


def test_the_formula_matches_published_tokens_per_pass() -> None:
    # A model of a third of the size: 3.4 / 4.5 / 5.9 tokens at 4 / 8 / 16 draft tokens; Q4_0 of the same model 4.4 / 6.8 / 10.8.
    for acceptance_rate, published in ((0.80, (3.4, 4.5, 5.9)), (0.94, (4.4, 6.8, 10.8))):
        for draft_tokens, tokens in zip((4, 8, 16), published, strict=True):
            formula = sum(acceptance_rate**i for i in range(draft_tokens + 1))
            assert formula == pytest.approx(tokens, rel=0.2)


@given(
    acceptance_rate=st.floats(0, 0.99),
    most=st.integers(0, 30),
    sequences=st.integers(1, 32),
    draft_token_s=st.floats(0, 1),
)
def test_the_best_number_of_draft_tokens_is_never_worse_than_none(
    acceptance_rate: float, most: int, sequences: int, draft_token_s: float
) -> None:
    for cost in (disk_bound, compute_bound):
        none = predict_decode(acceptance_rate, 0, sequences, draft_token_s, cost)
        best = predict_decode(acceptance_rate, most, sequences, draft_token_s, cost)
        assert best.s_per_token <= none.s_per_token
        assert best.tokens_per_pass <= sequences * (1 + most)
        assert 0 <= best.draft_tokens <= most


def test_free_draft_tokens_are_used_and_costly_ones_are_not() -> None:
    assert predict_decode(0.9, 20, 1, 0.01, disk_bound).draft_tokens > 8
    assert predict_decode(0.9, 20, 1, 3.0, disk_bound).draft_tokens == 0
    assert predict_decode(0.9, 20, 1, 0.0, compute_bound).draft_tokens == 0
    assert predict_decode(0.9, 20, 1, 0.2, disk_bound).binding in ("disk", "drafting")


def test_a_draft_takes_its_memory_from_pinned_weights() -> None:
    target, draft = model(layers=16, kind="F16"), model(layers=2, kind="Q4_K")
    plain = make_plan(target, MEASURED, given_budget(2 * GIB), REQUEST)
    drafting = replace(LOOKUP, name="small.gguf", acceptance_rate=0.8, checkpoint=draft)
    with_draft = make_plan(target, MEASURED, given_budget(2 * GIB), replace(REQUEST, drafting=drafting))
    assert with_draft.draft_bytes > sum(
        t.nbytes for t in draft.tensors.values() if len(t.shape) == 2 and "blk" in t.name
    )
    assert plain.pinned_bytes - with_draft.pinned_bytes >= with_draft.draft_bytes * 0.9
    assert with_draft.floor_bytes > plain.floor_bytes + with_draft.draft_bytes * 0.9


def test_auto_drafts_if_disk_bound_and_not_if_everything_fits() -> None:
    # An F16 model, so that a 4-bit copy would pay.
    target = model(layers=16, kind="F16", heads=16, head_dim=128, feed_forward=8192)
    options = drafting_options(target, "auto")
    assert [option.name for option in options] == ["none", "prompt", "self"]
    scarce, why = choose_drafting(target, SLOW_DISK, given_budget(1400 * MIB), REQUEST, options)
    assert scarce.name == "self"
    assert "none" in why
    small = model(layers=16, heads=16)
    ample, _ = choose_drafting(small, MEASURED, given_budget(20 * GIB), REQUEST, drafting_options(small, "auto"))
    assert ample.name == "none"


def test_pinned_rows_are_mapped_if_others_are_streamed_or_copies_are_repacked() -> None:
    target = model(layers=16, heads=16, kind="Q4_K")
    repacked = replace(MEASURED, repacked_weights_per_s={"Q4_K": {"1": 60e9, "4": 20e9, "16": 8e9}})
    assert make_plan(target, MEASURED, given_budget(900 * MIB), REQUEST).map_pinned
    assert not make_plan(target, MEASURED, given_budget(20 * GIB), REQUEST).map_pinned
    assert make_plan(target, repacked, given_budget(20 * GIB), REQUEST).map_pinned


@pytest.mark.parametrize(("rate", "kind"), [(0.8, "Q4_K"), (1.0, "Q4_0")])
def test_a_low_bit_copy_has_the_format_that_is_made_fastest_if_it_is_multiplied_as_fast(rate: float, kind: str) -> None:
    target = model(layers=16, kind="F16", heads=16, head_dim=128, feed_forward=8192)
    profile = replace(MEASURED, repacked_weights_per_s={"Q4_K": {"1": 40e9}, "Q4_0": {"1": rate * 40e9}})
    copy = drafting_options(target, "self", profile)[0]
    assert copy.checkpoint is not None
    assert {t.type for t in copy.checkpoint.tensors.values() if len(t.shape) == 2} == {kind}
    seconds = copy.prepare_s / drafting_options(target, "self")[0].prepare_s
    assert seconds == pytest.approx(1 if kind == "Q4_K" else 150 / 350)


def test_a_low_bit_copy_is_not_made_for_a_short_output() -> None:
    target = model(layers=16, kind="F16", heads=16, head_dim=128, feed_forward=8192)
    options = drafting_options(target, "auto")
    assert options[-1].prepare_s > 1
    short = RunConfig(prompt_tokens=100, context_tokens=102)
    profile = replace(SLOW_DISK, disk_bytes_per_s={"1": 2e9})
    assert choose_drafting(target, profile, given_budget(1400 * MIB), short, options)[0].name != "self"
    assert choose_drafting(target, profile, given_budget(1400 * MIB), REQUEST, options)[0].name == "self"


def test_a_draft_that_does_not_fit_is_named_and_skipped() -> None:
    target = model(layers=16, kind="F16", heads=16, head_dim=128, feed_forward=8192)
    floor = make_plan(target, MEASURED, given_budget(20 * GIB), REQUEST).floor_bytes
    chosen, why = choose_drafting(
        target, SLOW_DISK, given_budget(floor + 60 * MIB), REQUEST, drafting_options(target, "auto")
    )
    assert chosen.name in ("none", "prompt")
    assert "self does not fit" in why
    with pytest.raises(BudgetError):
        choose_drafting(target, SLOW_DISK, given_budget(floor + 60 * MIB), REQUEST, drafting_options(target, "self"))


def test_a_copy_of_a_model_in_four_bits_is_refused() -> None:
    with pytest.raises(UsageError, match="saves little"):
        drafting_options(model(kind="Q4_K"), "self")
    assert [option.name for option in drafting_options(model(kind="Q4_K"), "auto")] == ["none", "prompt"]


def test_experts_count_in_the_average_bits() -> None:
    """Attention in F16 beside experts in Q4_K: a copy would hold the experts again."""
    attention = model(kind="F16", layers=1)
    experts = tensor("blk.0.ffn_up_exps.weight", (64, 14336, 4096), "Q4_K")
    mixed = replace(attention, tensors={**attention.tensors, experts.name: experts})
    with pytest.raises(UsageError, match="saves little"):
        drafting_options(mixed, "self")


def test_only_a_model_with_the_same_matrices_is_taken_for_a_copy() -> None:
    target = model(kind="F16")
    assert draft._same_shape(target, model(kind="Q4_K"))
    assert not draft._same_shape(target, model(kind="Q4_K", feed_forward=7168))


def test_a_draft_with_another_vocabulary_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    target = open_checkpoint(tiny_llama)
    other = open_checkpoint(write_gguf(random_model("gpt2"), "gpt2", tmp_path / "other.gguf", "F16"))
    assert drafting_options(target, str(tiny_llama))[0].lookup
    with pytest.raises(UsageError, match="another vocabulary"):
        drafting_options(replace(target, metadata={"general.architecture": "llama"}), other.path)
    with pytest.raises(UsageError, match="no draft model"):
        drafting_options(target, str(tmp_path / "absent.gguf"))


def test_more_sequences_until_compute_binds() -> None:
    target = model(layers=16, kind="F16", heads=16, head_dim=128, feed_forward=8192)
    options = [NO_DRAFT]
    slow = choose_sequences(target, SLOW_DISK, given_budget(2 * GIB), REQUEST, options, 64)
    fast = choose_sequences(
        target, replace(MEASURED, disk_bytes_per_s={"1": 200e9}), given_budget(2 * GIB), REQUEST, options, 64
    )
    assert slow.sequences > fast.sequences >= 1
    assert choose_sequences(target, SLOW_DISK, given_budget(2 * GIB), REQUEST, options, 5).sequences <= 5


def test_8_bit_kv_caches_take_slightly_more_than_half() -> None:
    target = model(layers=4)
    whole, half = (
        make_plan(target, MEASURED, given_budget(2 * GIB), replace(REQUEST, kv_bits=bits)).kv_bytes for bits in (16, 8)
    )
    assert 0.5 < half / whole < 0.55
    four = make_plan(target, MEASURED, given_budget(2 * GIB), replace(REQUEST, sequences=4))
    assert four.kv_bytes == 4 * whole


def test_a_repacked_copy_needs_spare_memory_and_repacking_in_place_needs_a_batch() -> None:
    repacked = replace(
        MEASURED, repacked_weights_per_s={"Q4_K": {"1": 40e9, "4": 20e9, "16": 8e9}}, disk_bytes_per_s={"1": 4e9}
    )
    target = model(layers=16, heads=16, head_dim=128, feed_forward=8192)
    roomy = make_plan(target, repacked, given_budget(8 * GIB), REQUEST)
    assert roomy.repacked_types == {"Q4_K"}
    assert roomy.repacked_bytes > 0
    assert not roomy.repack_in_place
    single = make_plan(target, repacked, given_budget(1100 * MIB), REQUEST)
    assert single.streamed_bytes_per_pass > 0
    assert not single.repacked_types  # the disk binds: nothing to gain
    many = make_plan(
        target, repacked, given_budget(1100 * MIB), RunConfig(prompt_tokens=16, context_tokens=216, sequences=16)
    )
    assert many.repack_in_place
    assert many.repacked_bytes == 0
    plain = replace(single.weights, row_invariant=True)
    assert many.cost(16).compute_s < 0.9 * replace(many, weights=plain).cost(16).compute_s


def test_sequences_of_a_larger_batch_get_fewer_draft_tokens_each() -> None:
    counts = [replace(REQUEST, sequences=n, drafting=LOOKUP).max_draft_tokens for n in (1, 4, 16, 64, 100)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == LOOKUP.max_draft_tokens
    assert counts[-2:] == [0, 0]
    assert all(replace(REQUEST, sequences=n, drafting=LOOKUP).verify_rows <= 64 for n in range(1, 65))


def test_decode_rows_are_padded_to_tiles_at_a_high_acceptance_rate() -> None:
    rates = {"1": 40e9, "2": 24e9, "4": 14e9, "8": 10e9, "16": 10e9, "512": 0.5e9}
    slow = {"32": 100e9, "512": 100e9}
    tiled = replace(
        MEASURED,
        kernel_weights_per_s={"Q4_K": rates},
        disk_bytes_per_s={"1": 4e9},
        bf16_flop_per_s=slow,
        fp32_flop_per_s=slow,
    )
    target = model(layers=16, heads=16, head_dim=128, feed_forward=8192)
    assert tiled.tiled == {"Q4_K"}
    for rate, pays in ((0.05, False), (0.9, True)):
        drafting = replace(LOOKUP, acceptance_rate=rate)
        plan = make_plan(target, tiled, given_budget(1100 * MIB), replace(REQUEST, drafting=drafting))
        assert plan.pad_decode_rows_to_tiles == pays
    alone = make_plan(target, tiled, given_budget(1100 * MIB), REQUEST)
    assert not alone.pad_decode_rows_to_tiles
