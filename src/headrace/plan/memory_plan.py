"""The memory plan: parts of the process's memory, whose sum is the budget:

budget = runtime + small tensors + KV caches + draft model + activations + rings + margin + pinned weights + experts

Decode-pinned rows lie in the memory of the activations. The second ring is that of prefill-only weights.
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
from headrace.plan.run_config import RunConfig
from headrace.plan.shape import PAGE_BYTES, Shape, page_slack
from headrace.units import MIB, gib, option

UNIT_BYTES = 2 * MIB
RING_SLOTS = 16
PROMPT_SLOTS = 8  # ring slots during prefill, which is compute-bound
MAX_RING_SLOTS = 48  # max ring slots (docs/LEARNED.md)
RING_SHARE = 1 / 16  # max share of the memory for weights; counts beyond `RING_SLOTS` slots only
MIN_RING_SLOTS = 3
MIN_EXPERT_SLOTS = 4
READERS = 4
# Min streamed bytes of a tensor; below it the tensor is fully pinned, because each read has a fixed cost.
MIN_STREAMED_BYTES = 512 << 10
TOKENIZER_BYTES_PER_TOKEN = 450
# Memory to build the tokenizer from the metadata, before any weights: 1400 bytes measured for Gemma's 262,144 tokens.
TOKENIZER_BUILD_BYTES_PER_TOKEN = 1500
DRAFT_PROMPT_ROWS = 128  # prompt rows in one pass of a draft model
DRAFT_RUNTIME_BYTES = 24 * MIB  # modules of a draft model and its first passes
PREFILL_SCRATCH_BYTES = 64 * MIB  # dequantised weights, oneDNN's copies and code, memory retained by the allocator
SCORES_BYTES = 32 * MIB  # attention scores of heads that are computed together
KEPT_BYTES = 32 * MIB  # prefill memory that the allocator and oneDNN retain
MARGIN_BYTES = 24 * MIB
MARGIN_SHARE = 0.01
PREFILL_ROWS_STEP = 64
ROW_MULTIPLE = 16  # multiple of pinned rows: kernels process these together


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes by purpose, and the sizes they imply: prefill rows per pass, ring slots, pinned rows of every tensor."""

    floor_bytes: int
    runtime_bytes: int  # includes the model's small tensors
    kv_bytes: int
    draft_bytes: int
    activation_bytes: int
    prefill_rows: int
    slots: int
    decode_only_slots: int  # ring slots in reused prefill memory, part of `slots`
    prefill_only_slots: int  # ring slots of the prefill-only weights
    slot_bytes: int
    pinned_rows: Mapping[str, int]
    pinned_bytes: int
    decode_pinned_rows: Mapping[str, int]  # rows after the pinned ones, in prefill memory reused during decode
    decode_pinned_bytes: int
    streamed_bytes: int  # bytes per decode pass
    prefill_only_streamed_bytes: int  # bytes once per prompt
    expert_slots: int
    spare_bytes: int  # bytes left when everything is pinned


def plan_memory(
    shape: Shape,
    draft: Shape | None,
    profile: Profile,
    budget: Budget,
    run_config: RunConfig,
    runtime_bytes: int | None,
) -> MemoryPlan:
    """Divide a budget; weights get the rest.

    Raises:
        BudgetError: the budget is below the floor, given in the message.
    """
    runtime = runtime_bytes or profile.runtime_bytes + shape.checkpoint.vocab_size * TOKENIZER_BYTES_PER_TOKEN
    kv = _kv_bytes(shape, run_config)
    draft_bytes = _draft_bytes(draft, run_config, known_runtime=runtime_bytes is not None) if draft is not None else 0
    slot = UNIT_BYTES + max(tensor.row_bytes * tensor.row_multiple for tensor in (*shape.linears, *shape.prefill_only))
    margin = MARGIN_BYTES + int(MARGIN_SHARE * budget.nbytes)
    fixed_bytes = runtime + shape.small_bytes + kv + draft_bytes + margin
    min_expert_bytes = _least_experts(shape.experts)
    min_ring_bytes = MIN_RING_SLOTS * slot * (2 if shape.prefill_only else 1)
    min_bytes = fixed_bytes - margin + MARGIN_BYTES + min_ring_bytes + min_expert_bytes
    decode_activations = _activations(shape, run_config, run_config.verify_rows, row_invariant=True)
    shortest_prefill = _activations(shape, run_config, DECODE_MAX_ROWS)
    decode_activations = max(decode_activations, shortest_prefill)
    if shape.single_sequence:  # prefill is a single pass
        decode_activations = max(
            decode_activations, _activations(shape, run_config, _single_pass_rows(shape, run_config))
        )
    floor = ceil((min_bytes + decode_activations) / (1 - MARGIN_SHARE))
    if runtime_bytes is None:
        floor = max(floor, profile.runtime_bytes + shape.checkpoint.vocab_size * TOKENIZER_BUILD_BYTES_PER_TOKEN)
    if budget.nbytes < floor:
        raise BudgetError(
            f"the model needs at least {gib(floor)}, the budget is {gib(budget.nbytes)} ({budget.reason})",
            hint=_floor_hint(floor, kv),
        )
    free_bytes = budget.nbytes - fixed_bytes - min_expert_bytes
    rows = _prefill_rows(shape, run_config, budget.nbytes, free_bytes - min_ring_bytes)
    activations = max(decode_activations, _activations(shape, run_config, rows))
    if budget.pinned_limit_bytes is not None:
        ring_bytes = _slots(budget.pinned_limit_bytes, slot) * slot
        free_bytes = min(free_bytes, activations + ring_bytes + budget.pinned_limit_bytes)
    free_bytes -= activations
    all_fits = free_bytes >= shape.weights_bytes + shape.prefill_only_bytes + shape.page_slack_bytes
    prefill_only_slots = 0 if all_fits or not shape.prefill_only else _slots(free_bytes // 2, slot)
    left = free_bytes - prefill_only_slots * slot
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
    decode_pinned = sum(decode_pinned_rows.get(tensor.name, 0) * tensor.row_bytes for tensor in shape.linears)
    # Every pass needs all of the dense weights, so prefill-only weights get the rest.
    prefill_only_rows = _pin(shape.prefill_only, left - own_ring - pinned - page_slack(shape.linears))
    prefill_only_pinned = _pinned_bytes(shape.prefill_only, prefill_only_rows)
    spare = free_bytes - pinned - prefill_only_pinned - shape.page_slack_bytes if all_fits else 0
    expert_slots = 0
    if shape.experts is not None:  # a pass needs all dense weights but only some experts, so experts come last
        expert_slots = most_slots(shape.experts, min_expert_bytes + spare)
        spare = 0
    return MemoryPlan(
        floor_bytes=floor,
        runtime_bytes=runtime + shape.small_bytes,
        kv_bytes=kv,
        draft_bytes=draft_bytes,
        activation_bytes=activations,
        prefill_rows=rows,
        slots=slots,
        decode_only_slots=decode_only_slots,
        prefill_only_slots=prefill_only_slots if prefill_only_pinned < shape.prefill_only_bytes else 0,
        slot_bytes=slot,
        pinned_rows={**prefill_only_rows, **pinned_rows},
        pinned_bytes=pinned + prefill_only_pinned,
        decode_pinned_rows=decode_pinned_rows,
        decode_pinned_bytes=decode_pinned,
        streamed_bytes=shape.weights_bytes - pinned - decode_pinned,
        prefill_only_streamed_bytes=shape.prefill_only_bytes - prefill_only_pinned,
        expert_slots=expert_slots,
        spare_bytes=spare,
    )


def _kv_bytes(shape: Shape, run_config: RunConfig) -> int:
    """Bytes of all KV caches. A pool smaller than all caches has partly used pages at the end of every sequence."""
    one = shape.kv_bytes(run_config.context_tokens, run_config.kv_bits)
    full = one * run_config.sequences
    tokens = run_config.kv_pool_tokens
    if tokens == run_config.sequences * run_config.context_tokens:
        return full
    pages = 2 * shape.layers * shape.kv_heads * PAGE_BYTES * run_config.sequences
    return min(full, one * tokens // run_config.context_tokens + pages)


def _slots(free_bytes: int, slot: int) -> int:
    """Ring slots that fit into `free_bytes`."""
    most = max(RING_SLOTS, min(MAX_RING_SLOTS, int(RING_SHARE * free_bytes) // slot))
    return max(MIN_RING_SLOTS, min(most, free_bytes // slot))


def _pinned_bytes(tensors: Sequence[Tensor], pinned_rows: Mapping[str, int]) -> int:
    return sum(pinned_rows[tensor.name] * tensor.row_bytes for tensor in tensors)


def _least_experts(experts: Experts | None) -> int:
    """Bytes of the fewest slots that let one expert be read while another is multiplied."""
    return 0 if experts is None else MIN_EXPERT_SLOTS * experts.slot_bytes


def _draft_bytes(draft: Shape, run_config: RunConfig, known_runtime: bool) -> int:
    """Bytes of a draft model: all its weights, caches and activations; its modules, if not yet built."""
    kv = draft.kv_bytes(run_config.context_tokens, 16) * run_config.sequences
    activations = _activations(draft, run_config, DRAFT_PROMPT_ROWS) - PREFILL_SCRATCH_BYTES
    built = 0 if known_runtime else draft.small_bytes + DRAFT_RUNTIME_BYTES
    return draft.all_bytes + draft.page_slack_bytes + kv + activations + built


def _activations(shape: Shape, run_config: RunConfig, rows: int, row_invariant: bool = False) -> int:
    """Peak fp32 activation bytes of a pass of `rows` rows: the wider of MLP and attention, and logits.

    Row-invariant rows may all need logits. In prefill only the prompt's last row and one row of every other sequence do.
    """
    context_tokens = run_config.context_tokens
    with_logits = rows if row_invariant else run_config.sequences
    packed = row_invariant or rows <= DECODE_MAX_ROWS  # the weights are multiplied as they are, not unpacked first
    rows += 0 if row_invariant else run_config.sequences - 1
    # Three tensors of the MLP's width and two or three of the hidden size are alive at once. The rest covers fragmentation
    # and oneDNN's copies. Measured and counted MiB: 8B, 512 rows 181 and 282; 1.5B, 512 rows 165 and 190;
    # 8B, 64 rows 53 and 92; 1.5B, 64 rows 36 and 80.
    narrow = 5 * shape.hidden
    mlp = 6 * shape.feed_forward + _expert_elements(shape.experts)
    attention = 10 * shape.attention_width
    # K and V of one layer in fp32; for MLA the latents and its kv_b matrix.
    widths = shape.head_dim if shape.latent_elements else 2 * shape.kv_heads * shape.head_dim
    # Attention scores of one row.
    heads = shape.attention_width // shape.head_dim
    wide = 4 * (shape.latent_elements + context_tokens * (widths + 2 * heads))
    copies = 3 if shape.checkpoint.get("final_logit_softcapping") else 1
    logits = (3 + copies * with_logits) * shape.checkpoint.vocab_size * 4
    if shape.scanned is not None and rows > 1 and not row_invariant:  # rows are padded to whole chunks
        # Scores, decays, scores * decays and einsum's result; both factors of a state for every head.
        padded = ceil(rows / shape.scanned.chunk) * shape.scanned.chunk
        wide += 4 * shape.scanned.heads * padded * (4 * shape.scanned.chunk + 2 * shape.scanned.state)
    if packed:
        return rows * 4 * (narrow + max(mlp, attention)) + logits + wide
    # Prefill: dequantised weights and a mask in addition.
    masked = wide + rows * context_tokens + (SCORES_BYTES if shape.makes_scores else 0)
    if shape.single_sequence and shape.cached_elements:  # bidirectional attention: biases, scores and softmax, in fp32
        masked += 4 * 4 * rows**2 * heads
    # Twice for MoE: with once, a run came within 18 MiB of 5000.
    dequantised = PREFILL_SCRATCH_BYTES if shape.experts is None else 2 * PREFILL_SCRATCH_BYTES
    return rows * 4 * (narrow + max(mlp, attention)) + logits + masked + dequantised


def _expert_elements(experts: Experts | None) -> int:
    """Elements per row held by the experts: results twice while they are reordered, and intermediate activations.

    Equal rows choose the same experts, so all their choices may be computed at a time. The sum is doubled: undoubled, 400
    equal rows of a 30B-A3B shape peaked 4 MiB above a budget of 5000.
    """
    return 0 if experts is None else experts.per_token * 8 * (experts.hidden + experts.width)


def _single_pass_rows(shape: Shape, run_config: RunConfig) -> int:
    """Rows of the largest pass of a single-sequence model: the prompt, or without a cache the whole context."""
    return max(DECODE_MAX_ROWS, run_config.prompt_rows if shape.has_cache else run_config.context_tokens)


def _prefill_rows(shape: Shape, run_config: RunConfig, budget_bytes: int, free_bytes: int) -> int:
    """Prompt rows per pass whose activations take at most max(budget / 8, 192 MiB): up to there fewer passes beat more pinning.

    A recurrent model or an encoder computes its prompt in a single pass.
    """
    if shape.single_sequence:
        return _single_pass_rows(shape, run_config)
    limit = min(free_bytes, max(budget_bytes // 8, 192 * MIB))
    rows = run_config.prompt_rows
    if rows <= DECODE_MAX_ROWS:
        return DECODE_MAX_ROWS
    while rows > PREFILL_ROWS_STEP and _activations(shape, run_config, rows) > limit:
        rows -= PREFILL_ROWS_STEP
    rows = max(rows, DECODE_MAX_ROWS)  # the last step may undershoot
    return rows if _activations(shape, run_config, rows) <= limit else DECODE_MAX_ROWS


def _pin(tensors: Sequence[Tensor], free_bytes: int) -> dict[str, int]:
    """Rows to pin by tensor: the same share of each, except that small remainders are pinned too."""
    total = sum(tensor.nbytes for tensor in tensors)
    free_bytes = max(0, free_bytes - page_slack(tensors))
    if free_bytes >= total:
        return {tensor.name: tensor.rows for tensor in tensors}
    full: set[str] = set()
    while True:
        rest = [tensor for tensor in tensors if tensor.name not in full]
        spent = total - sum(tensor.nbytes for tensor in rest)
        share = max(0.0, (free_bytes - spent) / max(1, sum(tensor.nbytes for tensor in rest)))
        more = {t.name for t in rest if (1 - share) * t.nbytes < MIN_STREAMED_BYTES}
        cost = sum(t.nbytes for t in rest if t.name in more)
        if not more or spent + cost > free_bytes:
            break
        full |= more
    rows = {tensor.name: _share_of_rows(tensor, share) for tensor in rest}
    return rows | {tensor.name: tensor.rows for tensor in tensors if tensor.name in full}


def _pin_for_decode(shape: Shape, pinned_rows: Mapping[str, int], free_bytes: int) -> dict[str, int]:
    """Rows after the pinned ones that fit into `free_bytes`: the same share of every streamed tensor."""
    rest = {tensor.name: tensor.rows - pinned_rows[tensor.name] for tensor in shape.linears}
    streamed = sum(rest[tensor.name] * tensor.row_bytes for tensor in shape.linears)
    share = min(1.0, max(0, free_bytes - shape.page_slack_bytes) / max(1, streamed))
    multiple = {tensor.name: max(ROW_MULTIPLE, tensor.row_multiple) for tensor in shape.linears}
    return {name: int(share * rows) // multiple[name] * multiple[name] for name, rows in rest.items() if rows}


def _share_of_rows(tensor: Tensor, share: float) -> int:
    """A share of a tensor's rows, rounded down to a multiple that can be read and repacked."""
    multiple = max(ROW_MULTIPLE, tensor.row_multiple)
    return int(share * tensor.rows) // multiple * multiple


def _floor_hint(floor: int, kv: int) -> str:
    hint = f"use --memory {option(floor)}"
    return f"{hint}, or a smaller --ctx-size (the KV cache takes {gib(kv)} of it)" if kv > floor // 4 else hint
