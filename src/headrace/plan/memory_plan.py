"""How the memory of the process is divided, so that it adds up to the budget:

budget = runtime + small tensors + KV caches + draft model + activations + ring + margin + pinned weights
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from headrace.checkpoint import Tensor
from headrace.errors import BudgetError
from headrace.kernels import DECODE_MAX_ROWS
from headrace.plan.budget import Budget
from headrace.plan.expert_cost import Experts, most_slots
from headrace.plan.profile import Profile
from headrace.plan.request import Request
from headrace.plan.shape import Shape, page_slack
from headrace.units import MIB, gib, option

UNIT_BYTES = 2 * MIB
RING_SLOTS = 16
PROMPT_SLOTS = 8  # while rows are many: then reads are not waited for
MOST_RING_SLOTS = 48  # where they take no more than this share of the memory for weights (docs/LEARNED.md)
RING_SHARE = 1 / 16
LEAST_SLOTS = 3
LEAST_EXPERT_SLOTS = 4
READERS = 4
# A tensor whose streamed rest would be smaller than this is pinned whole: a read has a price beside its bytes.
SMALLEST_READ_BYTES = 512 << 10
TOKENIZER_BYTES_PER_TOKEN = 450
# While the tokenizer is built from the metadata, before any weights: 1400 bytes were measured for Gemma's 262,144 tokens.
TOKENIZER_BUILD_BYTES_PER_TOKEN = 1500
DRAFT_PROMPT_ROWS = 128  # of a prompt in one pass of a draft model
DRAFT_RUNTIME_BYTES = 24 * MIB  # modules of a draft model and its first passes
PREFILL_SCRATCH_BYTES = 64 * MIB  # unpacked weights, oneDNN's copies and code, what the allocator keeps
SCORES_BYTES = 32 * MIB  # of heads whose scores are computed together
KEPT_BYTES = 32 * MIB  # of what prompts took, the allocator and oneDNN keep so much
MARGIN_BYTES = 24 * MIB
MARGIN_SHARE = 0.01
ROW_CHUNK = 64
ROW_MULTIPLE = 16  # of pinned rows: what kernels take together


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes by purpose, and what they decide: rows of a prompt in a pass, slots of the ring, pinned rows of every tensor."""

    floor: int
    runtime: int  # small tensors of the model included
    kv: int
    draft: int
    activations: int
    prefill_rows: int
    slots: int
    decode_only_slots: int  # of these, in the memory of prompts
    prefill_only_slots: int  # of a ring for what is multiplied once for a prompt
    slot: int
    pinned_rows: Mapping[str, int]
    pinned: int
    decode_pinned_rows: Mapping[str, int]  # behind the pinned ones, in the memory of prompts while there is none
    decode_pinned: int
    streamed: int  # per pass that decodes
    prefill_only_streamed: int  # once for a prompt
    expert_slots: int
    spare: int  # left over when everything is pinned


def plan_memory(
    shape: Shape,
    draft: Shape | None,
    profile: Profile,
    budget: Budget,
    request: Request,
    runtime_bytes: int | None,
) -> MemoryPlan:
    """Divide a budget; weights get what nothing else needs.

    Raises:
        BudgetError: the budget is below the floor, which the message names.
    """
    runtime = runtime_bytes or profile.runtime_bytes + shape.checkpoint.vocab_size * TOKENIZER_BYTES_PER_TOKEN
    kv = shape.kv_bytes(request.context_tokens, request.kv_bits) * request.sequences
    draft_bytes = _draft_bytes(draft, request, known_runtime=runtime_bytes is not None) if draft is not None else 0
    slot = UNIT_BYTES + max(tensor.row_bytes * tensor.row_multiple for tensor in (*shape.linears, *shape.prefill_only))
    margin = MARGIN_BYTES + int(MARGIN_SHARE * budget.nbytes)
    base = runtime + shape.small_bytes + kv + draft_bytes + margin
    few_experts = _least_experts(shape.experts)
    least_rings = LEAST_SLOTS * slot * (2 if shape.prefill_only else 1)
    least = base - margin + MARGIN_BYTES + least_rings + few_experts
    decode_activations = _activations(shape, request, request.verify_rows, row_invariant=True)
    if shape.single_sequence:  # it takes its prompt whole
        decode_activations = max(decode_activations, _activations(shape, request, _whole_rows(shape, request)))
    floor = ceil((least + decode_activations) / (1 - MARGIN_SHARE))
    if runtime_bytes is None:
        floor = max(floor, profile.runtime_bytes + shape.checkpoint.vocab_size * TOKENIZER_BUILD_BYTES_PER_TOKEN)
    if budget.nbytes < floor:
        raise BudgetError(
            f"the model needs at least {gib(floor)}, the budget is {gib(budget.nbytes)} ({budget.reason})",
            hint=_floor_hint(floor, kv),
        )
    room = budget.nbytes - base - few_experts
    rows = _prefill_rows(shape, request, budget.nbytes, room - least_rings)
    activations = max(decode_activations, _activations(shape, request, rows))
    if budget.pinned_limit_bytes is not None:
        room = min(room, activations + _slots(budget.pinned_limit_bytes, slot) * slot + budget.pinned_limit_bytes)
    room -= activations
    fits = room >= shape.weights_bytes + shape.prefill_only_bytes + shape.page_slack_bytes
    prefill_only_slots = 0 if fits or not shape.prefill_only else _slots(room // 2, slot)
    left = room - prefill_only_slots * slot
    slots = 0 if left >= shape.weights_bytes + shape.page_slack_bytes else _slots(left, slot)
    reusable = 0 if shape.prefill_only else max(0, activations - decode_activations - KEPT_BYTES)
    decode_only_slots = min(max(0, slots - PROMPT_SLOTS), reusable // slot)
    own_ring = (slots - decode_only_slots) * slot
    pinned_rows = _pin(shape.linears, left - own_ring)
    pinned = _pinned_bytes(shape.linears, pinned_rows)
    if pinned == shape.weights_bytes:
        slots = decode_only_slots = own_ring = 0
    decode_pinned_rows = (
        _pin_for_decode(shape, pinned_rows, reusable - decode_only_slots * slot)
        if slots and not shape.prefill_only
        else {}
    )
    lent = sum(decode_pinned_rows.get(tensor.name, 0) * tensor.row_bytes for tensor in shape.linears)
    # Every pass needs every byte of these, so the encoder gets what they leave.
    opening_rows = _pin(shape.prefill_only, left - own_ring - pinned - page_slack(shape.linears))
    opening_pinned = _pinned_bytes(shape.prefill_only, opening_rows)
    spare = room - pinned - opening_pinned - shape.page_slack_bytes if fits else 0
    expert_slots = 0
    if shape.experts is not None:  # every pass needs every byte of the trunk, but of the experts only some
        expert_slots = most_slots(shape.experts, few_experts + spare)
        spare = 0
    return MemoryPlan(
        floor=floor,
        runtime=runtime + shape.small_bytes,
        kv=kv,
        draft=draft_bytes,
        activations=activations,
        prefill_rows=rows,
        slots=slots,
        decode_only_slots=decode_only_slots,
        prefill_only_slots=prefill_only_slots if opening_pinned < shape.prefill_only_bytes else 0,
        slot=slot,
        pinned_rows={**opening_rows, **pinned_rows},
        pinned=pinned + opening_pinned,
        decode_pinned_rows=decode_pinned_rows,
        decode_pinned=lent,
        streamed=shape.weights_bytes - pinned - lent,
        prefill_only_streamed=shape.prefill_only_bytes - opening_pinned,
        expert_slots=expert_slots,
        spare=spare,
    )


def _slots(room: int, slot: int) -> int:
    """Of a ring in this room."""
    most = max(RING_SLOTS, min(MOST_RING_SLOTS, int(RING_SHARE * room) // slot))
    return max(LEAST_SLOTS, min(most, room // slot))


def _pinned_bytes(tensors: Sequence[Tensor], pinned_rows: Mapping[str, int]) -> int:
    return sum(pinned_rows[tensor.name] * tensor.row_bytes for tensor in tensors)


def _least_experts(experts: Experts | None) -> int:
    """Bytes of the slots without which no expert could be read while another is multiplied."""
    return 0 if experts is None else LEAST_EXPERT_SLOTS * experts.slot_bytes


def _draft_bytes(draft: Shape, request: Request, known_runtime: bool) -> int:
    """What a draft model takes: its weights, all of them, its caches and activations; its modules, if not yet built."""
    kv = draft.kv_bytes(request.context_tokens, 16) * request.sequences
    activations = _activations(draft, request, DRAFT_PROMPT_ROWS) - PREFILL_SCRATCH_BYTES
    built = 0 if known_runtime else draft.small_bytes + DRAFT_RUNTIME_BYTES
    return draft.all_bytes + draft.page_slack_bytes + kv + activations + built


def _activations(shape: Shape, request: Request, rows: int, row_invariant: bool = False) -> int:
    """The most that a pass of this many rows holds at once, in fp32: the wider of MLP and attention, and logits.

    Exact rows may all need logits; of a prompt only the last row does, beside which every other sequence has a row of its own.
    """
    context_tokens = request.context_tokens
    with_logits = rows if row_invariant else request.sequences
    rows += 0 if row_invariant else request.sequences - 1
    # Alive at once are three of the MLP's width and two or three of the model's; the rest is for the allocator's holes and
    # oneDNN's copies. Measured and counted, MiB: 512 rows of an 8B shape 181 and 282, of a 1.5B one 165 and 190; 64 rows 53
    # and 92, 36 and 80.
    narrow = 5 * shape.hidden
    mlp = 6 * shape.feed_forward + _expert_numbers(shape.experts)
    attention = 10 * shape.attention_width
    # Keys and values of one layer in fp32, and of latent attention its matrix.
    widths = shape.head_dim if shape.latent_numbers else 2 * shape.kv_heads * shape.head_dim
    # And a row's scores.
    heads = shape.attention_width // shape.head_dim
    wide = 4 * (shape.latent_numbers + context_tokens * (widths + 2 * heads))
    copies = 3 if shape.checkpoint.get("final_logit_softcapping") else 1
    logits = (3 + copies * with_logits) * shape.checkpoint.vocab_size * 4
    if shape.scanned is not None and rows > 1 and not row_invariant:  # in whole chunks, however few there are
        # Scores, decays, their product and what einsum makes of them; both sides of a state for every head.
        padded = ceil(rows / shape.scanned.chunk) * shape.scanned.chunk
        wide += 4 * shape.scanned.heads * padded * (4 * shape.scanned.chunk + 2 * shape.scanned.state)
    if rows <= DECODE_MAX_ROWS or row_invariant:
        return rows * 4 * (narrow + max(mlp, attention)) + logits + wide
    # Many rows: weights unpacked beside them, and a mask.
    masked = wide + rows * context_tokens + (SCORES_BYTES if shape.makes_scores else 0)
    if (
        shape.single_sequence and shape.cached_numbers
    ):  # all rows see each other: biases, scores and their softmax, in fp32
        masked += 4 * 4 * rows**2 * heads
    unpacked = PREFILL_SCRATCH_BYTES if shape.experts is None else 2 * PREFILL_SCRATCH_BYTES  # once left 18 MiB of 5000
    return rows * 4 * (narrow + max(mlp, attention)) + logits + masked + unpacked


def _expert_numbers(experts: Experts | None) -> int:
    """Numbers for each row that the experts hold: results twice while they are put in order, and what is worked on.

    Rows that are alike choose the same experts, so all their choices may be worked on at a time. Twice that, as below: with
    once, 400 equal rows of a 30B-A3B shape peaked 4 MiB above a budget of 5000.
    """
    return 0 if experts is None else experts.per_token * 8 * (experts.hidden + experts.width)


def _whole_rows(shape: Shape, request: Request) -> int:
    """Rows of the largest pass of a model that takes its prompt whole, or, if it has_cache nothing, the answer as well."""
    return max(DECODE_MAX_ROWS, request.prompt_rows if shape.has_cache else request.context_tokens)


def _prefill_rows(shape: Shape, request: Request, budget_bytes: int, room: int) -> int:
    """As many prompt rows per pass as fit into an eighth of the budget: passes cost more than pins until then.

    A model that keeps states of its own takes a prompt whole, and so does an encoder.
    """
    if shape.single_sequence:
        return _whole_rows(shape, request)
    limit = min(room, max(budget_bytes // 8, 192 * MIB))
    rows = request.prompt_rows
    if rows <= DECODE_MAX_ROWS:
        return DECODE_MAX_ROWS
    while rows > ROW_CHUNK and _activations(shape, request, rows) > limit:
        rows -= ROW_CHUNK
    rows = max(rows, DECODE_MAX_ROWS)  # the last step down may have gone below
    return rows if _activations(shape, request, rows) <= limit else DECODE_MAX_ROWS


def _pin(tensors: Sequence[Tensor], room: int) -> dict[str, int]:
    """Rows to pin by tensor: the same share of each, except that small rests are pinned too."""
    total = sum(tensor.nbytes for tensor in tensors)
    room = max(0, room - page_slack(tensors))
    if room >= total:
        return {tensor.name: tensor.rows for tensor in tensors}
    whole: set[str] = set()
    while True:
        rest = [tensor for tensor in tensors if tensor.name not in whole]
        spent = total - sum(tensor.nbytes for tensor in rest)
        share = max(0.0, (room - spent) / max(1, sum(tensor.nbytes for tensor in rest)))
        more = {t.name for t in rest if (1 - share) * t.nbytes < SMALLEST_READ_BYTES}
        cost = sum(t.nbytes for t in rest if t.name in more)
        if not more or spent + cost > room:
            break
        whole |= more
    rows = {tensor.name: _cut(tensor, share) for tensor in rest}
    return rows | {tensor.name: tensor.rows for tensor in tensors if tensor.name in whole}


def _pin_for_decode(shape: Shape, pinned_rows: Mapping[str, int], room: int) -> dict[str, int]:
    """Rows behind the pinned ones that fit into so many bytes: the same share of all that streams."""
    rest = {tensor.name: tensor.rows - pinned_rows[tensor.name] for tensor in shape.linears}
    streamed = sum(rest[tensor.name] * tensor.row_bytes for tensor in shape.linears)
    share = min(1.0, max(0, room - shape.page_slack_bytes) / max(1, streamed))
    multiple = {tensor.name: max(ROW_MULTIPLE, tensor.row_multiple) for tensor in shape.linears}
    return {name: int(share * rows) // multiple[name] * multiple[name] for name, rows in rest.items() if rows}


def _cut(tensor: Tensor, share: float) -> int:
    """That share of a tensor's rows, in multiples that can be read and repacked."""
    multiple = max(ROW_MULTIPLE, tensor.row_multiple)
    return int(share * tensor.rows) // multiple * multiple


def _floor_hint(floor: int, kv: int) -> str:
    hint = f"use --memory {option(floor)}"
    return f"{hint}, or a smaller --ctx-size (the KV cache takes {gib(kv)} of it)" if kv > floor // 4 else hint
