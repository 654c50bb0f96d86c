"""Choices between plans: drafting method, number of concurrent sequences, and suggestions to the user."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil

from headrace.checkpoint import Checkpoint
from headrace.errors import BudgetError
from headrace.plan.budget import Budget
from headrace.plan.draft import Drafting
from headrace.plan.memory_plan import MARGIN_BYTES, MARGIN_SHARE
from headrace.plan.plan import Plan, Suggestion, plan_for
from headrace.plan.profile import Profile
from headrace.plan.run_config import RunConfig
from headrace.plan.shape import Built, shape_of
from headrace.units import MIB, gigabytes, option, seconds

SEQUENCES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # numbers of sequences tried for a batch

# Bits per weight of whole files from llama.cpp's quantiser.
USUAL_FILES = (("Q8_0", 8.5), ("Q6_K", 6.56), ("Q4_K_M", 4.85), ("Q3_K_M", 3.9), ("Q2_K", 3.16))


def make_plan(
    checkpoint: Checkpoint,
    profile: Profile,
    budget: Budget,
    run_config: RunConfig | None = None,
    *,
    runtime_bytes: int | None = None,
    built: Built | None = None,
) -> Plan:
    """Plan a run.

    Args:
        checkpoint: the header of a model.
        profile: measured rates of the machine.
        budget: max memory of the whole process.
        run_config: prompt, context and sequences; None: one sequence with a prompt of 512 tokens.
        runtime_bytes: memory of the process without weights, if already known; None: the profile's value.
        built: facts from the built model, if it exists; None: from the header.

    Raises:
        UnsupportedError: the architecture does not run.
        BudgetError: the budget is below the floor, given in the message.
        ContextError: the context is longer than the model's.
    """
    run_config = run_config or RunConfig()
    plan = plan_for(checkpoint, profile, budget, run_config, runtime_bytes, built)
    return replace(plan, changes=_changes(plan, checkpoint, profile, run_config, runtime_bytes, built))


def choose_drafting(
    checkpoint: Checkpoint, profile: Profile, budget: Budget, run_config: RunConfig, options: Sequence[Drafting]
) -> tuple[Drafting, str]:
    """(the best drafting method, the comparison in words). The first option must fit; a later one must gain 5 %."""
    if len(options) > 1 and shape_of(checkpoint).single_sequence:
        options = options[:1]  # recurrent states cannot be rolled back
    best, least = options[0], float("inf")
    words = []
    for drafting in options:
        try:
            plan = plan_for(checkpoint, profile, budget, replace(run_config, drafting=drafting))
        except BudgetError:
            if drafting is options[0]:
                raise
            words.append(f"{drafting.name} does not fit")
            continue
        output_tokens = run_config.sequences * max(1, run_config.context_tokens - run_config.prompt_tokens)
        s_per_token = plan.decode_prediction.s_per_token + drafting.prepare_s / output_tokens
        words.append(f"{drafting.name} {seconds(s_per_token)}")
        if s_per_token < 0.95 * least:
            best, least = drafting, s_per_token
    return best, f"draft {best.name}, from predicted time per token: {', '.join(words)}"


def choose_sequences(
    checkpoint: Checkpoint,
    profile: Profile,
    budget: Budget,
    run_config: RunConfig,
    options: Sequence[Drafting],
    most: int,
    kv_tokens_of: Callable[[int], int | None] = lambda _: None,
) -> RunConfig:
    """The run configuration with the number of sequences and the drafting method that give the most tokens per second.

    More sequences share a pass; their caches take memory from pinned weights, and their rows take compute.
    `kv_tokens_of`: tokens that the caches of a number of sequences need together; None: every cache may be full.
    """
    best, least = None, float("inf")
    for count in sorted({min(most, count) for count in ((1,) if shape_of(checkpoint).single_sequence else SEQUENCES)}):
        wanted = replace(run_config, sequences=count, kv_tokens=kv_tokens_of(count))
        try:
            drafting, _ = choose_drafting(checkpoint, profile, budget, wanted, options)
        except BudgetError:
            if best is None:
                raise
            break
        wanted = replace(wanted, drafting=drafting)
        s_per_token = plan_for(checkpoint, profile, budget, wanted, None).decode_prediction.s_per_token
        if s_per_token < 0.98 * least:
            best, least = wanted, s_per_token
    assert best is not None
    return best


def _changes(
    plan: Plan,
    checkpoint: Checkpoint,
    profile: Profile,
    run_config: RunConfig,
    runtime_bytes: int | None,
    built: Built | None,
) -> tuple[Suggestion, ...]:
    """The three changes that save the most time per token, each predicted by a new plan."""
    now = plan.decode_prediction.s_per_token
    # With memory for everything no buffer is reduced, so the sum of the buffers is the memory needed.
    roomy = plan_for(checkpoint, profile, Budget(nbytes=1 << 50, reason="what if"), run_config, runtime_bytes, built)
    parts = roomy.runtime_bytes + roomy.kv_bytes + roomy.draft_bytes + roomy.activation_bytes
    parts += roomy.weights_bytes + roomy.expert_bytes + MARGIN_BYTES
    enough = ceil((parts + plan.shape.page_slack_bytes) / (1 - MARGIN_SHARE)) + MIB

    def with_memory(nbytes: int) -> float:
        budget = Budget(nbytes=nbytes, reason="what if")
        return plan_for(checkpoint, profile, budget, run_config, runtime_bytes, built).decode_prediction.s_per_token

    candidates: list[Suggestion] = []
    streams = plan.streamed_bytes_per_pass or (plan.experts is not None and plan.expert_slots < plan.experts.total)
    if streams:
        candidates.append(
            Suggestion(what=f"--memory {option(enough)}: everything pinned", s_per_token=with_memory(enough))
        )
        half = (plan.budget.nbytes + enough) // 2
        candidates.append(Suggestion(what=f"--memory {option(half)}", s_per_token=with_memory(half)))
        expected = plan.decode_prediction
        faster = replace(plan.decode, disk_s=plan.decode.disk_s / 2).seconds + expected.draft_s
        what = "a disk twice as fast (or the file on two)"
        candidates.append(Suggestion(what=what, s_per_token=faster / expected.tokens_per_pass))
    candidates += _smaller_files(plan)
    if plan.kv_bytes > plan.budget.nbytes // 10 and streams:
        shorter = replace(
            run_config, context_tokens=min(run_config.context_tokens, max(256, run_config.context_tokens // 2))
        )
        s = plan_for(checkpoint, profile, plan.budget, shorter, runtime_bytes, built).decode_prediction.s_per_token
        candidates.append(Suggestion(what=f"--ctx-size {shorter.context_tokens}", s_per_token=s))
    better = sorted((c for c in candidates if c.s_per_token < 0.97 * now), key=lambda c: c.s_per_token)
    return tuple(better[:3])


def _smaller_files(plan: Plan) -> list[Suggestion]:
    """The next smaller quantisations: the same budget pins a larger share of them. `self` drafts are left out."""
    smaller = [(name, bits) for name, bits in USUAL_FILES if bits < 0.92 * plan.type_bits][:2]
    expected = plan.decode_prediction
    cost, tokens, draft_s, pinned_bytes = plan.decode, expected.tokens_per_pass, expected.draft_s, plan.held_bytes
    if plan.drafting.name == "self":
        cost, tokens, draft_s = plan.cost(plan.sequences), float(plan.sequences), 0.0
        pinned_bytes += plan.draft_bytes
    changes = []
    for name, bits in smaller:
        share = bits / plan.type_bits
        read = max(0.0, plan.shape.weights_bytes * share - pinned_bytes)
        if plan.experts is not None:
            cached = plan.experts.with_cached(int(plan.expert_slots / share))
            read += share * cached.missed_bytes(plan.decode_rows)
        # 2- to 4-bit kernels are compute-bound: fewer bytes do not make them faster.
        compute_s = cost.compute_s * (share if plan.type_bits > 9 else 1.0)
        pass_s = replace(cost, disk_s=read / plan.disk_bytes_per_s, compute_s=compute_s).seconds + draft_s
        size = gigabytes(plan.shape.all_bytes * share)
        changes.append(Suggestion(what=f"the same model as {name} ({size})", s_per_token=pass_s / tokens))
    return changes
