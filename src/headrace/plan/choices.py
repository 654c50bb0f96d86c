"""Choices between plans: how to draft, how many sequences together, and what the user could change."""

from collections.abc import Sequence
from dataclasses import replace
from math import ceil

from headrace.checkpoint import Checkpoint
from headrace.errors import BudgetError
from headrace.plan.budget import Budget
from headrace.plan.draft import Drafting
from headrace.plan.memory_plan import MARGIN_BYTES, MARGIN_SHARE
from headrace.plan.plan import Plan, Suggestion, plan_for
from headrace.plan.profile import Profile
from headrace.plan.request import Request
from headrace.plan.shape import Built, shape_of
from headrace.units import MIB, gigabytes, option, seconds

SEQUENCES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # that may run together in a batch

# Bits per weight of whole files as llama.cpp's quantiser makes them.
USUAL_FILES = (("Q8_0", 8.5), ("Q6_K", 6.56), ("Q4_K_M", 4.85), ("Q3_K_M", 3.9), ("Q2_K", 3.16))


def make_plan(
    checkpoint: Checkpoint,
    profile: Profile,
    budget: Budget,
    request: Request | None = None,
    *,
    runtime_bytes: int | None = None,
    built: Built | None = None,
) -> Plan:
    """Plan a run.

    Args:
        checkpoint: the header of a model.
        profile: what the machine can do.
        budget: the ceiling for the whole process.
        request: what is asked; None: one answer to a prompt of 512 tokens.
        runtime_bytes: what the process takes without weights, if it is already known; else the profile's word.
        built: what the built model asks for, if it is already there; else the header's word.

    Raises:
        UnsupportedError: the architecture does not run.
        BudgetError: the budget is below the floor, which the message names.
        ContextError: the context is longer than the model's.
    """
    request = request or Request()
    plan = plan_for(checkpoint, profile, budget, request, runtime_bytes, built)
    return replace(plan, changes=_changes(plan, checkpoint, profile, request, runtime_bytes, built))


def choose_drafting(
    checkpoint: Checkpoint, profile: Profile, budget: Budget, request: Request, options: Sequence[Drafting]
) -> tuple[Drafting, str]:
    """(the best way to draft, the comparison in words). The first option must fit; a later one must gain a twentieth."""
    if len(options) > 1 and shape_of(checkpoint).single_sequence:
        options = options[:1]  # recurrent states cannot be rolled back
    best, least = options[0], float("inf")
    words = []
    for drafting in options:
        try:
            plan = plan_for(checkpoint, profile, budget, replace(request, drafting=drafting))
        except BudgetError:
            if drafting is options[0]:
                raise
            words.append(f"{drafting.name} does not fit")
            continue
        answers = request.sequences * max(1, request.context_tokens - request.prompt_tokens)
        found = plan.decode_prediction.s_per_token + drafting.prepare_s / answers
        words.append(f"{drafting.name} {seconds(found)}")
        if found < 0.95 * least:
            best, least = drafting, found
    return best, f"draft {best.name}, from predicted time per token: {', '.join(words)}"


def choose_sequences(
    checkpoint: Checkpoint,
    profile: Profile,
    budget: Budget,
    request: Request,
    options: Sequence[Drafting],
    most: int,
) -> Request:
    """The request with as many sequences and the way to draft that bring the most tokens per second.

    More sequences share a pass; their caches take memory from pinned weights, and their rows take compute.
    """
    best, least = None, float("inf")
    for count in sorted({min(most, count) for count in ((1,) if shape_of(checkpoint).single_sequence else SEQUENCES)}):
        wanted = replace(request, sequences=count)
        try:
            drafting, _ = choose_drafting(checkpoint, profile, budget, wanted, options)
        except BudgetError:
            if best is None:
                raise
            break
        wanted = replace(wanted, drafting=drafting)
        found = plan_for(checkpoint, profile, budget, wanted, None).decode_prediction.s_per_token
        if found < 0.98 * least:
            best, least = wanted, found
    assert best is not None
    return best


def _changes(
    plan: Plan,
    checkpoint: Checkpoint,
    profile: Profile,
    request: Request,
    runtime_bytes: int | None,
    built: Built | None,
) -> tuple[Suggestion, ...]:
    """The three changes that save most time per token, each by planning again with it."""
    now = plan.decode_prediction.s_per_token
    # With memory for everything no buffer is cut short, so its sum is what is enough.
    roomy = plan_for(checkpoint, profile, Budget(nbytes=1 << 50, reason="what if"), request, runtime_bytes, built)
    parts = roomy.runtime_bytes + roomy.kv_bytes + roomy.draft_bytes + roomy.activation_bytes
    parts += roomy.weights_bytes + roomy.expert_bytes + MARGIN_BYTES
    enough = ceil((parts + plan.shape.page_slack_bytes) / (1 - MARGIN_SHARE)) + MIB

    def with_memory(nbytes: int) -> float:
        budget = Budget(nbytes=nbytes, reason="what if")
        return plan_for(checkpoint, profile, budget, request, runtime_bytes, built).decode_prediction.s_per_token

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
        shorter = replace(request, context_tokens=min(request.context_tokens, max(256, request.context_tokens // 2)))
        s = plan_for(checkpoint, profile, plan.budget, shorter, runtime_bytes, built).decode_prediction.s_per_token
        candidates.append(Suggestion(what=f"--ctx-size {shorter.context_tokens}", s_per_token=s))
    better = sorted((c for c in candidates if c.s_per_token < 0.97 * now), key=lambda c: c.s_per_token)
    return tuple(better[:3])


def _smaller_files(plan: Plan) -> list[Suggestion]:
    """The next smaller quantisations: the same budget holds a larger share of fewer bytes. They need no low-bit copy."""
    smaller = [(name, bits) for name, bits in USUAL_FILES if bits < 0.92 * plan.type_bits][:2]
    expected = plan.decode_prediction
    cost, tokens, draft_s, room = plan.decode, expected.tokens_per_pass, expected.draft_s, plan.held_bytes
    if plan.drafting.name == "self":
        cost, tokens, draft_s = plan.cost(plan.sequences), float(plan.sequences), 0.0
        room += plan.draft_bytes
    changes = []
    for name, bits in smaller:
        share = bits / plan.type_bits
        read = max(0.0, plan.shape.weights_bytes * share - room)
        if plan.experts is not None:
            held = plan.experts.with_cached(int(plan.expert_slots / share))
            read += share * held.missed_bytes(plan.decode_rows)
        # Kernels of two to four bits are bound by their arithmetic: fewer bytes do not make them faster.
        compute_s = cost.compute_s * (share if plan.type_bits > 9 else 1.0)
        found = replace(cost, disk_s=read / plan.disk_bytes_per_s, compute_s=compute_s).seconds + draft_s
        size = gigabytes(plan.shape.all_bytes * share)
        changes.append(Suggestion(what=f"the same model as {name} ({size})", s_per_token=found / tokens))
    return changes
