"""Plans of synthetic models: properties of every model, machine and budget."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given, reject, settings
from hypothesis import strategies as st

from headrace.checkpoint import Checkpoint, Tensor
from headrace.errors import BudgetError, CheckpointError, ContextError, HeadraceError
from headrace.plan import (
    Plan,
    Profile,
    RunConfig,
    given_budget,
    guessed_profile,
    load_profile,
    make_plan,
)
from headrace.plan.cost import DECODE_MAX_ROWS
from headrace.plan.memory_plan import ROW_MULTIPLE, SCORES_BYTES, UNIT_BYTES, plan_memory
from headrace.plan.plan import Suggestion
from headrace.plan.profile import machine_name, profile_path, save_profile
from headrace.plan.shape import shape_of
from headrace.units import GB, GIB, MIB, gib, parse_bytes
from support.zoo.headers import BLOCKS, FAST_DISK, MEASURED, NO_FILE, SLOW_DISK, model, tensor

pytestmark = pytest.mark.zoo

PROPERTY = settings(max_examples=120, deadline=None)

# Arguments of `model`. Rows of K-quants fill blocks of 256: so does every hidden size below.
SHAPES = st.fixed_dictionaries(
    {
        "layers": st.integers(1, 24),
        "heads": st.sampled_from([4, 8, 16]),
        "head_dim": st.sampled_from([64, 128, 256]),
        "feed_forward": st.integers(1, 64).map(lambda blocks: 256 * blocks),
        "kv_heads": st.sampled_from([1, 2, 4]),
        "vocab": st.integers(256, 256_000),
        "kind": st.sampled_from(sorted(BLOCKS)),
        "tied": st.booleans(),
    }
)
# Large enough that scarce memory is possible: 128 MiB are not all of it.
LARGE = SHAPES.filter(
    lambda shape: shape["layers"] * shape["heads"] * shape["head_dim"] * shape["feed_forward"] > 1 << 26
)
SHARES = st.floats(0, 1)
Shape = dict[str, Any]


@st.composite
def requests(draw: st.DrawFn) -> RunConfig:
    context = draw(st.integers(16, 8192))
    return RunConfig(prompt_tokens=draw(st.integers(1, context)), context_tokens=context)


PROFILES = {"unmeasured": guessed_profile(), "measured": MEASURED, "fast disk": FAST_DISK}
MACHINES = st.sampled_from(sorted(PROFILES))
BUDGETS = st.integers(450 * MIB, 12 * GIB)


def planned(checkpoint: Checkpoint, profile: Profile, nbytes: int, run_config: RunConfig) -> Plan:
    """The plan; a budget below the floor does not count as an example."""
    try:
        return make_plan(checkpoint, profile, given_budget(nbytes), run_config)
    except BudgetError as error:
        # The error of the plan itself, not of a plan made for a suggestion.
        if f"the budget is {gib(nbytes)} " in str(error):
            reject()
        raise


def scarce(checkpoint: Checkpoint, profile: Profile, run_config: RunConfig, share: float) -> int:
    """A budget that leaves about this share of the weights to be pinned, so that most of these plans stream."""
    plan = make_plan(checkpoint, profile, given_budget(1 << 40), run_config)
    return plan.runtime_bytes + plan.kv_bytes + 128 * MIB + int(share * plan.weights_bytes)


def linears(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Matrices multiplied in every pass: all but the embedding, which counts if it is also the head."""
    matrices = {name: one for name, one in checkpoint.tensors.items() if len(one.shape) == 2}
    if "output.weight" in matrices:
        del matrices["token_embd.weight"]
    return matrices


def used_bytes(plan: Plan) -> int:
    return plan.pinned_bytes + plan.ring_bytes + plan.kv_bytes + plan.activation_bytes + plan.runtime_bytes


def rounding_bytes(checkpoint: Checkpoint) -> int:
    """Max bytes that a plan leaves unused or spends otherwise, because slots and rows are integers.

    The ring grows by a slot, taken from pinned rows; every tensor is pinned by multiples of `ROW_MULTIPLE` rows.
    """
    matrices = linears(checkpoint).values()
    return UNIT_BYTES + max(one.row_bytes for one in matrices) + ROW_MULTIPLE * sum(one.row_bytes for one in matrices)


def floor_named(error: BudgetError) -> int:
    match = re.search(r"use --memory (\d+MiB)", str(error.hint))
    assert match is not None
    return parse_bytes(match.group(1))


# Memory


@PROPERTY
@given(SHAPES, MACHINES, BUDGETS, requests())
def test_used_bytes_fit_into_the_budget(shape: Shape, machine: str, nbytes: int, run_config: RunConfig) -> None:
    checkpoint, profile = model(**shape), PROFILES[machine]
    plan = planned(checkpoint, profile, nbytes, run_config)

    assert used_bytes(plan) <= nbytes
    parts = (plan.pinned_bytes, plan.ring_bytes, plan.kv_bytes, plan.activation_bytes, plan.runtime_bytes)
    assert all(part >= 0 for part in parts)
    assert plan.floor_bytes <= nbytes


@PROPERTY
@given(SHAPES, MACHINES, BUDGETS, requests())
def test_pinned_and_streamed_are_all_weights(shape: Shape, machine: str, nbytes: int, run_config: RunConfig) -> None:
    checkpoint, profile = model(**shape), PROFILES[machine]
    plan = planned(checkpoint, profile, nbytes, run_config)
    matrices = linears(checkpoint)

    assert set(plan.pinned_rows) == set(matrices)
    assert all(0 <= rows <= matrices[name].rows for name, rows in plan.pinned_rows.items())
    assert plan.weights_bytes == sum(one.nbytes for one in matrices.values())
    assert plan.pinned_bytes == sum(rows * matrices[name].row_bytes for name, rows in plan.pinned_rows.items())
    assert plan.decode_pinned_bytes == sum(
        rows * matrices[name].row_bytes for name, rows in plan.decode_pinned_rows.items()
    )
    assert plan.held_bytes + plan.streamed_bytes_per_pass == plan.weights_bytes
    assert plan.decode_pinned_bytes <= plan.activation_bytes
    assert all(plan.pinned_rows[name] + rows <= matrices[name].rows for name, rows in plan.decode_pinned_rows.items())


@PROPERTY
@given(SHAPES, MACHINES, BUDGETS, requests())
def test_a_streaming_plan_has_a_ring_and_a_pinned_one_has_none(
    shape: Shape, machine: str, nbytes: int, run_config: RunConfig
) -> None:
    checkpoint, profile = model(**shape), PROFILES[machine]
    plan = planned(checkpoint, profile, nbytes, run_config)

    if plan.pinned_bytes < plan.weights_bytes:
        widest = max(one.row_bytes for one in linears(checkpoint).values())
        assert plan.ring_slots >= 3
        assert plan.ring_bytes >= (plan.ring_slots - plan.decode_only_slots) * (plan.unit_bytes + widest)
    else:
        assert plan.ring_slots == plan.ring_bytes == 0


@PROPERTY
@given(SHAPES, MACHINES, requests())
def test_a_model_that_fits_is_not_streamed(shape: Shape, machine: str, run_config: RunConfig) -> None:
    checkpoint, profile = model(**shape), PROFILES[machine]
    plan = make_plan(checkpoint, profile, given_budget(128 * GIB), run_config)

    assert plan.streamed_bytes_per_pass == 0
    assert plan.ring_slots == plan.ring_bytes == 0
    assert plan.pinned_bytes == plan.weights_bytes
    assert plan.pinned_rows == {name: one.rows for name, one in linears(checkpoint).items()}
    assert plan.decode.disk_s == 0
    assert plan.binding == "compute"
    assert "nothing streamed" in plan.line()


@PROPERTY
@given(LARGE, MACHINES, SHARES, requests())
def test_a_plan_that_streams_could_not_have_pinned_everything(
    shape: Shape, machine: str, share: float, run_config: RunConfig
) -> None:
    checkpoint, profile = model(**shape), PROFILES[machine]
    nbytes = scarce(checkpoint, profile, run_config, share)
    plan = planned(checkpoint, profile, nbytes, run_config)
    assume(plan.streamed_bytes_per_pass > 0)

    # The margin is 24 MiB and a hundredth of the budget. Pinned rows begin and end on whole pages: 8 KiB per tensor.
    margin = 24 * MIB + nbytes // 100 + 8192 * len(linears(checkpoint))
    without_ring = plan.weights_bytes + plan.kv_bytes + plan.activation_bytes + plan.runtime_bytes + margin
    assert without_ring > nbytes


@PROPERTY
@given(LARGE, MACHINES, SHARES, requests())
def test_a_streaming_plan_leaves_little_of_the_budget_unused(
    shape: Shape, machine: str, share: float, run_config: RunConfig
) -> None:
    checkpoint, profile = model(**shape), PROFILES[machine]
    nbytes = scarce(checkpoint, profile, run_config, share)
    plan = planned(checkpoint, profile, nbytes, run_config)
    assume(plan.streamed_bytes_per_pass > 0)

    margin = 24 * MIB + nbytes // 100 + 8192 * len(linears(checkpoint))
    assert nbytes - used_bytes(plan) <= margin + rounding_bytes(checkpoint)


def test_every_large_tensor_is_pinned_by_the_same_share() -> None:
    checkpoint = model()
    plan = make_plan(checkpoint, MEASURED, given_budget(4 * GIB))
    shares = {name: plan.pinned_rows[name] / one.rows for name, one in linears(checkpoint).items()}
    partial = [share for share in shares.values() if share < 1]

    assert 0.1 < plan.pinned_bytes / plan.weights_bytes < 0.9
    assert max(partial) - min(partial) < ROW_MULTIPLE / 1024  # of the smallest tensor


# The floor


@PROPERTY
@given(SHAPES, st.integers(0, 400 * MIB), requests(), st.sampled_from([None, 100 * MIB]))
@example({}, 0, RunConfig(), None)
def test_below_the_floor_is_an_error_that_names_a_budget_which_works(
    shape: Shape, nbytes: int, run_config: RunConfig, runtime_bytes: int | None
) -> None:
    checkpoint = model(**shape)
    try:
        make_plan(checkpoint, MEASURED, given_budget(nbytes), run_config, runtime_bytes=runtime_bytes)
    except BudgetError as error:
        refusal = error
    else:
        assume(False)
    floor = floor_named(refusal)

    assert floor > nbytes
    plan = make_plan(checkpoint, MEASURED, given_budget(floor), run_config, runtime_bytes=runtime_bytes)
    assert used_bytes(plan) <= floor
    # No larger than it must be: the hint is rounded up to a MiB.
    with pytest.raises(BudgetError):
        make_plan(checkpoint, MEASURED, given_budget(floor - MIB - 1), run_config, runtime_bytes=runtime_bytes)


def test_the_message_of_a_small_budget_has_both_numbers() -> None:
    with pytest.raises(BudgetError) as caught:
        make_plan(model(), MEASURED, given_budget(400 * MIB))

    match = re.fullmatch(r"the model needs at least (\d\.\d\d GiB), the budget is 0\.39 GiB \(.*\)", str(caught.value))
    assert match is not None
    # Written with two digits, and as whole MiB in the hint.
    assert parse_bytes(match.group(1)) == pytest.approx(floor_named(caught.value), abs=0.005 * GIB + MIB)


@pytest.mark.parametrize("sequences", [1, 2, 8, 32])
def test_at_the_floor_all_parts_and_the_margin_fit_for_any_number_of_sequences(sequences: int) -> None:
    run_config = RunConfig(prompt_tokens=100, context_tokens=400, sequences=sequences)
    with pytest.raises(BudgetError) as caught:
        make_plan(model(), MEASURED, given_budget(600 * MIB), run_config)
    floor = floor_named(caught.value)
    plan = make_plan(model(), MEASURED, given_budget(floor), run_config)
    assert floor - used_bytes(plan) >= 24 * MIB + floor // 100


def test_the_floor_is_the_same_for_every_budget() -> None:
    floors = {make_plan(model(), MEASURED, given_budget(size * GIB)).floor_bytes for size in (1, 2, 8, 64)}

    assert len(floors) == 1
    assert make_plan(model(), MEASURED, given_budget(floors.pop()))


def test_the_hint_is_a_shorter_context_if_the_kv_cache_is_large() -> None:
    checkpoint, run_config = model(kv_heads=32, context=1 << 17), RunConfig(prompt_tokens=16, context_tokens=1 << 16)

    with pytest.raises(BudgetError) as caught:
        make_plan(checkpoint, MEASURED, given_budget(GIB), run_config)
    assert "or a smaller --ctx-size" in str(caught.value.hint)
    with pytest.raises(BudgetError) as caught:
        make_plan(checkpoint, MEASURED, given_budget(MIB), RunConfig(prompt_tokens=16, context_tokens=32))
    assert "--ctx-size" not in str(caught.value.hint)


# Time


@PROPERTY
@given(SHAPES, MACHINES, BUDGETS, BUDGETS, st.integers(1, DECODE_MAX_ROWS))
def test_more_memory_never_makes_decode_slower(
    shape: Shape, machine: str, one: int, other: int, prompt_tokens: int
) -> None:
    checkpoint, profile = model(**shape), PROFILES[machine]
    # A short prompt, so that the rows of a prefill are the same for both.
    run_config = RunConfig(prompt_tokens=prompt_tokens, context_tokens=1024)
    small = planned(checkpoint, profile, min(one, other), run_config)
    large = planned(checkpoint, profile, max(one, other), run_config)

    slack_s = rounding_bytes(checkpoint) / large.disk_bytes_per_s
    assert large.decode.seconds <= small.decode.seconds + slack_s


@PROPERTY
@given(SHAPES, MACHINES, BUDGETS, BUDGETS, requests())
def test_more_memory_makes_decode_slower_by_no_more_than_it_gives_to_prefill(
    shape: Shape, machine: str, one: int, other: int, run_config: RunConfig
) -> None:
    checkpoint, profile = model(**shape), PROFILES[machine]
    small = planned(checkpoint, profile, min(one, other), run_config)
    large = planned(checkpoint, profile, max(one, other), run_config)

    given_bytes = max(0, large.activation_bytes - small.activation_bytes)
    slack_s = (rounding_bytes(checkpoint) + given_bytes) / large.disk_bytes_per_s
    assert large.decode.seconds <= small.decode.seconds + slack_s
    assert large.prefill_passes <= small.prefill_passes


@PROPERTY
@given(SHAPES, MACHINES, BUDGETS, requests())
def test_a_faster_disk_never_makes_anything_slower(
    shape: Shape, machine: str, nbytes: int, run_config: RunConfig
) -> None:
    checkpoint, profile = model(**shape), PROFILES[machine]
    slow = planned(checkpoint, replace(profile, disk_bytes_per_s={"1": 1e9}), nbytes, run_config)
    fast = planned(checkpoint, replace(profile, disk_bytes_per_s={"1": 2e9}), nbytes, run_config)

    assert fast.decode.seconds <= slow.decode.seconds
    assert fast.ttft_s.expected <= slow.ttft_s.expected
    assert fast.decode.disk_s == pytest.approx(slow.decode.disk_s / 2)


@PROPERTY
@given(SHAPES, MACHINES, BUDGETS, requests())
def test_every_prediction_is_a_range_around_the_expected_value(
    shape: Shape, machine: str, nbytes: int, run_config: RunConfig
) -> None:
    checkpoint, profile = model(**shape), PROFILES[machine]
    plan = planned(checkpoint, profile, nbytes, run_config)

    for spread in (plan.decode_s_per_token, plan.ttft_s):
        assert 0 < spread.low < spread.expected < spread.high
    cores = plan.decode.compute_s + profile.io_cpu * plan.decode.disk_s
    assert plan.decode_s_per_token.expected == pytest.approx(max(plan.decode.disk_s, cores))
    assert plan.decode.disk_s == pytest.approx(plan.streamed_bytes_per_pass / plan.disk_bytes_per_s)
    assert plan.prefill.disk_s == pytest.approx(plan.weights_bytes / plan.disk_bytes_per_s)
    # The first pass reads everything, so the first token takes no less than that.
    assert plan.ttft_s.expected >= plan.prefill.seconds >= plan.weights_bytes / plan.disk_bytes_per_s


@PROPERTY
@given(SHAPES, MACHINES, BUDGETS, requests())
# Near the floor 65 rows do not fit: stepping down from a prompt of 513 tokens by 64 must not end at one row.
@example({}, "measured", 700 * MIB, RunConfig(prompt_tokens=513, context_tokens=1024))
def test_a_prefill_takes_no_more_passes_than_the_fewest_rows_need(
    shape: Shape, machine: str, nbytes: int, run_config: RunConfig
) -> None:
    checkpoint, profile = model(**shape), PROFILES[machine]
    plan = planned(checkpoint, profile, nbytes, run_config)

    assert plan.prefill_rows * plan.prefill_passes >= run_config.prompt_tokens
    assert plan.prefill_rows * (plan.prefill_passes - 1) < run_config.prompt_tokens
    assert plan.prefill_rows >= DECODE_MAX_ROWS


def test_an_assumed_profile_is_less_certain_than_a_measured_one_and_says_so() -> None:
    unmeasured = make_plan(model(), guessed_profile(), given_budget(4 * GIB))
    measured = make_plan(model(), MEASURED, given_budget(4 * GIB))

    assert "rates guessed" in unmeasured.line()
    assert "rates measured 2025-01-01" in measured.line()
    ratio = [plan.ttft_s.high / plan.ttft_s.low for plan in (unmeasured, measured)]
    assert ratio[0] > 5 > 2 > ratio[1]


# Requests and models that cannot be planned


@PROPERTY
@given(st.integers(1, 1 << 20), st.integers(1, 1 << 20))
def test_a_context_above_the_models_is_an_error_that_names_the_limit(limit: int, more: int) -> None:
    checkpoint = model(layers=1, head_dim=64, heads=4, kv_heads=1, vocab=256, feed_forward=256, context=limit)

    with pytest.raises(
        ContextError, match=f"{limit + more} tokens is asked for, the model was made for {limit}$"
    ) as caught:
        make_plan(checkpoint, MEASURED, given_budget(64 * GIB), RunConfig(prompt_tokens=1, context_tokens=limit + more))
    hint = re.search(r"--ctx-size (\d+)", str(caught.value.hint))
    assert hint is not None
    run_config = RunConfig(prompt_tokens=1, context_tokens=int(hint.group(1)))
    assert make_plan(checkpoint, MEASURED, given_budget(64 * GIB), run_config).context_tokens == limit


def test_a_context_above_the_models_is_refused_before_memory_is() -> None:
    with pytest.raises(ContextError):
        make_plan(model(context=512), MEASURED, given_budget(1), RunConfig(prompt_tokens=1, context_tokens=513))


@pytest.mark.parametrize(
    "missing", ["llama.attention.head_count", "llama.embedding_length", "llama.block_count", "general.architecture"]
)
def test_missing_metadata_is_an_error_that_names_it(missing: str) -> None:
    with pytest.raises(CheckpointError, match=missing.removeprefix("llama.")):
        make_plan(model(without=(missing,)), MEASURED, given_budget(8 * GIB))


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_without_an_embedding_is_an_error(tied: bool) -> None:
    with pytest.raises(CheckpointError, match=r"token_embd\.weight"):
        make_plan(model(tied=tied, without=("token_embd.weight",)), MEASURED, given_budget(8 * GIB))


def test_a_model_without_matrices_is_an_error() -> None:
    checkpoint = model(layers=0)
    tensors = checkpoint.tensors | {"output.weight": tensor("output.weight", (4096,))}

    with pytest.raises(CheckpointError):
        make_plan(replace(checkpoint, tensors=tensors), MEASURED, given_budget(8 * GIB))


NUMBERS = st.sampled_from([None, 0, 1, -1, 2, 7, 8, 64, 1 << 31, (1 << 64) - 1, -(1 << 63), 0.5, True, "8"])


@settings(PROPERTY, max_examples=200)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            f"llama.{key}": NUMBERS
            for key in (
                "block_count",
                "embedding_length",
                "attention.head_count",
                "attention.head_count_kv",
                "attention.key_length",
                "context_length",
                "expert_count",
            )
        },
    ),
    BUDGETS,
)
def test_nonsense_in_the_metadata_is_planned_or_refused(metadata: dict[str, object], nbytes: int) -> None:
    checkpoint = model(layers=2, metadata=metadata)
    try:
        plan = make_plan(checkpoint, MEASURED, given_budget(nbytes))
    except HeadraceError:
        return
    assert plan.kv_bytes >= 0
    assert plan.activation_bytes > 0
    assert used_bytes(plan) <= nbytes


# Suggestions


def check_changes(plan: Plan) -> None:
    times = [change.s_per_token for change in plan.changes]
    assert len(times) <= 3
    assert times == sorted(times)
    assert all(0 < time < plan.decode.seconds for time in times)
    assert len({change.what for change in plan.changes}) == len(times)


@PROPERTY
@given(SHAPES, MACHINES, BUDGETS, requests())
def test_changes_are_three_at_most_and_each_is_faster(
    shape: Shape, machine: str, nbytes: int, run_config: RunConfig
) -> None:
    checkpoint, profile = model(**shape), PROFILES[machine]
    check_changes(planned(checkpoint, profile, nbytes, run_config))


def test_a_disk_bound_plan_has_changes_and_a_fully_pinned_one_asks_for_no_memory() -> None:
    slow = make_plan(model(), MEASURED, given_budget(2 * GIB))
    pinned = make_plan(model(), MEASURED, given_budget(64 * GIB))

    assert slow.binding == "disk"
    assert len(slow.changes) == 3
    assert not any("--memory" in change.what or "disk" in change.what for change in pinned.changes)


def everything_pinned(plan: Plan) -> Suggestion | None:
    return next((change for change in plan.changes if change.what.endswith("everything pinned")), None)


@PROPERTY
@given(LARGE, SHARES, requests())
@example({}, 0.3, RunConfig())
@example({}, 0.3, RunConfig(prompt_tokens=4096, context_tokens=8192))
def test_the_suggested_memory_for_pinning_everything_does_so(shape: Shape, share: float, run_config: RunConfig) -> None:
    checkpoint, profile = model(**shape), SLOW_DISK
    nbytes = scarce(checkpoint, profile, run_config, share)
    change = everything_pinned(planned(checkpoint, profile, nbytes, run_config))
    assume(change is not None)
    assert change is not None
    match = re.match(r"--memory (\S+ ?[GM]iB): everything pinned", change.what)
    assert match is not None

    plan = make_plan(checkpoint, profile, given_budget(parse_bytes(match.group(1))), run_config)

    assert plan.streamed_bytes_per_pass == 0
    assert plan.decode.seconds == pytest.approx(change.s_per_token)


def test_the_memory_of_a_change_is_one_word_on_the_command_line() -> None:
    plan = make_plan(model(), MEASURED, given_budget(2 * GIB))
    options = [change.what for change in plan.changes if change.what.startswith("--memory")]

    assert options
    assert all(re.match(r"--memory [\d.]+[GM]iB(:|$)", option) for option in options)


@pytest.mark.parametrize("limit", [100, 8192])
def test_a_short_context_with_a_heavy_cache_is_planned(limit: int) -> None:
    # 2.6 MB of KV cache per token: 100 tokens are more than a tenth of a budget near the floor.
    checkpoint = model(layers=80, heads=64, kv_heads=64, feed_forward=1024, vocab=32_000, context=limit)
    plan = make_plan(checkpoint, MEASURED, given_budget(1040 * MIB), RunConfig(prompt_tokens=16, context_tokens=100))

    assert plan.kv_bytes > plan.budget.nbytes // 10
    check_changes(plan)
    assert not any("--ctx-size 256" in change.what for change in plan.changes)


def test_a_shorter_context_is_suggested_for_a_large_kv_cache() -> None:
    checkpoint = model(kv_heads=32, feed_forward=4096, vocab=32_000, kind="Q4_K", context=8192)
    plan = make_plan(checkpoint, FAST_DISK, given_budget(5 * GIB), RunConfig(prompt_tokens=16, context_tokens=8192))
    slow = make_plan(checkpoint, MEASURED, given_budget(5 * GIB), RunConfig(prompt_tokens=16, context_tokens=8192))

    assert "--ctx-size 4096" in {change.what for change in slow.changes}
    assert "--ctx-size 4096" not in {change.what for change in plan.changes}


# Output


@PROPERTY
@given(SHAPES, MACHINES, BUDGETS, requests())
def test_the_plan_is_json_without_nan(shape: Shape, machine: str, nbytes: int, run_config: RunConfig) -> None:
    checkpoint, profile = model(**shape), PROFILES[machine]
    plan = planned(checkpoint, profile, nbytes, run_config)

    values = json.loads(json.dumps(plan.as_json(), allow_nan=False))

    assert values == plan.as_json()
    parts = ("pinned_bytes", "decode_pinned_bytes", "streamed_bytes_per_pass")
    assert sum(values["memory"][part] for part in parts) == plan.weights_bytes
    assert values["memory"]["budget_bytes"] == nbytes
    assert values["decode_s_per_token"] == asdict(plan.decode_s_per_token)
    assert [change["what"] for change in values["changes"]] == [change.what for change in plan.changes]


def test_writing_into_the_json_does_not_change_the_plan() -> None:
    plan = make_plan(model(), MEASURED, given_budget(2 * GIB))
    before = plan.ttft_s.expected
    plan.as_json()["ttft_s"]["expected"] = 0

    assert plan.ttft_s.expected == before


def test_a_known_runtime_replaces_the_profiles() -> None:
    assumed = make_plan(model(), MEASURED, given_budget(2 * GIB))
    known = make_plan(model(), MEASURED, given_budget(2 * GIB), runtime_bytes=200 * MIB)

    norms = 65 * 4096 * 4  # two of every layer and the last one, in fp32
    assert known.runtime_bytes == 200 * MIB + norms
    assert assumed.runtime_bytes == MEASURED.runtime_bytes + 450 * 128_256 + norms
    assert known.pinned_bytes > assumed.pinned_bytes


def test_the_kv_cache_holds_k_and_v_of_every_layer_in_half_precision() -> None:
    plan = make_plan(model(), MEASURED, given_budget(2 * GIB), RunConfig(prompt_tokens=16, context_tokens=1000))

    assert plan.kv_bytes == 2 * 32 * 8 * 128 * 2 * 1000


def test_a_head_that_is_not_the_hidden_size_by_the_heads_counts_in_the_cache() -> None:
    checkpoint = model(metadata={"llama.attention.key_length": 256})

    assert make_plan(checkpoint, MEASURED, given_budget(2 * GIB)).kv_bytes == 2 * 32 * 8 * 256 * 2 * 1024


# The profile


def test_a_profile_that_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "profile.json"

    assert save_profile(MEASURED, path) == path
    assert load_profile(path) == MEASURED
    assert list(path.parent.iterdir()) == [path]


def test_a_profile_is_replaced_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    save_profile(MEASURED, path)
    save_profile(FAST_DISK, path)

    assert load_profile(path) == FAST_DISK


def test_the_profile_is_saved_in_headraces_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "mine"))
    assert load_profile() is None
    assert save_profile(MEASURED) == profile_path() == tmp_path / "mine" / "profile.json"
    assert load_profile() == MEASURED

    monkeypatch.delenv("HEADRACE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert profile_path() == tmp_path / "cache" / "headrace" / "profile.json"


def test_the_profile_of_another_machine_is_ignored(tmp_path: Path) -> None:
    path = save_profile(replace(MEASURED, machine="another, 8 cores, 64 GiB"), tmp_path / "profile.json")

    assert load_profile(path) is None
    assert load_profile(save_profile(replace(MEASURED, machine=machine_name()), path)) is not None


def test_the_profile_of_another_version_is_ignored(tmp_path: Path) -> None:
    path = save_profile(replace(MEASURED, schema=0), tmp_path / "profile.json")

    assert load_profile(path) is None


def test_no_profile_is_none(tmp_path: Path) -> None:
    assert load_profile(tmp_path / "absent.json") is None
    assert load_profile(tmp_path) is None


@pytest.mark.parametrize(
    "content", [b"", b"{", b"null", b"[]", b"{}", b"7", b'"text"', b"\xff\xfe\x00", b"[" * 100_000]
)
def test_an_invalid_profile_is_ignored(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(content)

    assert load_profile(path) is None


def test_a_truncated_profile_is_ignored(tmp_path: Path) -> None:
    path = save_profile(MEASURED, tmp_path / "profile.json")
    content = path.read_bytes()

    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        assert load_profile(path) is None, length


@pytest.mark.parametrize(
    "key", sorted(set(asdict(MEASURED)) - {"schema", "factors", "spread", "probed_at", "io_cpu_share"})
)
def test_an_incomplete_profile_is_ignored(tmp_path: Path, key: str) -> None:
    values = asdict(MEASURED)
    del values[key]
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(values))

    assert load_profile(path) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("disk_bytes_per_s", None),
        ("disk_bytes_per_s", {"1": 0.0}),
        ("disk_bytes_per_s", {"1": -1e9}),
        ("disk_bytes_per_s", {"1": "fast"}),
        ("kernel_weights_per_s", {}),
        ("kernel_weights_per_s", {"Q4_K": {"many": 1e9}}),
        ("unpack_weights_per_s", {}),
        ("fp32_flop_per_s", {"32": 0.0}),
        ("layer_s", None),
        ("layer_s", float("nan")),
        ("runtime_bytes", "420 MiB"),
    ],
)
def test_a_profile_with_impossible_values_is_ignored(tmp_path: Path, key: str, value: object) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(asdict(MEASURED) | {key: value}))

    assert load_profile(path) is None


def test_the_disk_rate_is_the_files_or_else_the_slowest_known(tmp_path: Path) -> None:
    own = replace(MEASURED, disk_bytes_per_s={str(tmp_path.stat().st_dev): 3 * GB, "nothing": 1 * GB})

    assert own.disk(str(tmp_path)) == 3 * GB
    assert own.disk(NO_FILE) == 1 * GB
    assert replace(own, disk_bytes_per_s={"nothing": 2 * GB}).disk(str(tmp_path)) == 2 * GB
    assert guessed_profile().disk(NO_FILE) == 1 * GB


def test_a_rate_between_two_measured_numbers_of_rows_is_interpolated_in_time() -> None:
    assert MEASURED.kernel("Q4_K", 1) == 30e9
    assert MEASURED.kernel("Q4_K", 16) == pytest.approx(3e9)
    assert MEASURED.kernel("Q4_K", 1000) == pytest.approx(3e9 * 16 / 1000)  # beyond it every row takes the same time
    assert 1 / MEASURED.kernel("Q4_K", 10) == pytest.approx((1 / 9e9 + 1 / 3e9) / 2)


def test_an_unmeasured_type_is_as_slow_as_the_slowest() -> None:
    assert MEASURED.kernel("IQ1_S", 1) == MEASURED.kernel("F16", 1)


def test_single_pass_prefill_needs_more_memory() -> None:
    checkpoint = model(
        layers=4, heads=8, head_dim=128, feed_forward=4096, kv_heads=2, vocab=1000, kind="Q4_K", tied=False
    )
    own = shape_of(checkpoint)
    single_pass = replace(own, single_sequence=True)
    run_config = RunConfig(context_tokens=4096, prompt_tokens=2048)
    for shape, fits in ((own, True), (single_pass, False)):
        try:
            found = plan_memory(shape, None, MEASURED, given_budget(700 * MIB), run_config, None)
            assert fits
            assert found.floor_bytes <= 700 * MIB
        except BudgetError:
            assert not fits


def test_materialised_attention_scores_are_counted() -> None:
    shape: Shape = {
        "layers": 4,
        "heads": 8,
        "head_dim": 128,
        "feed_forward": 4096,
        "kv_heads": 2,
        "vocab": 1000,
        "kind": "Q4_K",
    }
    plain = shape_of(model(**shape, tied=False))
    capped = shape_of(model(**shape, tied=False, metadata={"llama.attn_logit_softcapping": 50.0}))
    run_config = RunConfig(context_tokens=4096, prompt_tokens=512)
    budget = given_budget(4 * GIB)
    taken = [plan_memory(one, None, MEASURED, budget, run_config, None).activation_bytes for one in (plain, capped)]
    assert taken[1] - taken[0] == SCORES_BYTES
