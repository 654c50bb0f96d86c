"""The plan: pinned and streamed weights, the size of every buffer, and the predicted time per token.

It is made from a checkpoint's header, a profile and a budget, before torch is imported. The engine executes it, and the
timeline is compared with it.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from math import ceil
from typing import Any, NamedTuple

from headrace.checkpoint import Checkpoint
from headrace.checkpoint.tensor import bits_per_weight
from headrace.errors import ContextError
from headrace.plan.budget import Budget
from headrace.plan.cost import PassCost, Weights, compute_seconds, layers_of, pass_cost
from headrace.plan.draft import DecodePrediction, Drafting, predict_decode
from headrace.plan.expert_cost import Experts
from headrace.plan.memory_plan import READERS, UNIT_BYTES, MemoryPlan, plan_memory
from headrace.plan.profile import Profile
from headrace.plan.routing import load_routing
from headrace.plan.run_config import RunConfig
from headrace.plan.shape import Built, Shape, shape_of
from headrace.units import gib, gigabytes, seconds


@dataclass(frozen=True, kw_only=True)
class Range:
    """A prediction: lower bound, expected value, and a likely upper bound."""

    low: float
    expected: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """A change the user could make, and the predicted seconds per token."""

    what: str
    s_per_token: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All sizes that the engine needs, and the predictions it is measured against. Sizes in bytes."""

    model: str
    type_bits: float
    budget: Budget
    floor_bytes: int
    weights_bytes: int
    pinned_rows: Mapping[str, int]
    pinned_bytes: int
    decode_pinned_rows: Mapping[str, int]
    decode_pinned_bytes: int  # bytes pinned in prefill memory during decode
    streamed_bytes_per_pass: int
    prefill_only_bytes: int  # bytes of the weights used only at the start of a sequence: an encoder
    streamed_bytes_per_prompt: int  # prefill-only bytes streamed once per prompt
    unit_bytes: int
    ring_slots: int
    decode_only_slots: int  # ring slots in reused prefill memory, part of `ring_slots`
    prefill_only_slots: int  # slots of the encoder's ring
    ring_bytes: int
    readers: int
    threads: int
    bf16_prefill: bool
    pad_decode_rows_to_tiles: bool
    repacked_types: frozenset[str]
    repack_in_place: bool
    map_pinned: bool  # pinned rows are pages of the file, not a copy
    repacked_bytes: int
    kv_bytes: int
    kv_bits: int
    context_tokens: int
    kv_tokens: int  # tokens that all KV caches hold together
    sequences: int
    prefill_rows: int
    prefill_passes: int
    drafting: Drafting
    max_draft_tokens: int  # max per sequence in a pass
    draft_bytes: int  # bytes of the draft model, its caches and activations
    decode_prediction: DecodePrediction
    activation_bytes: int
    runtime_bytes: int
    disk_bytes_per_s: float
    prefill: PassCost
    decode_s_per_token: Range
    ttft_s: Range
    profile: Profile
    weights: Weights
    expert_slots: int
    expert_bytes: int  # bytes of the expert cache
    shape: Shape = field(repr=False)
    reasons: tuple[str, ...]
    changes: tuple[Suggestion, ...] = ()

    @property
    def held_bytes(self) -> int:
        """Bytes of weights in memory during decode."""
        return self.pinned_bytes + self.decode_pinned_bytes

    @property
    def decode(self) -> PassCost:
        """A decode pass with the draft tokens it verifies."""
        return self.decode_prediction.cost

    @property
    def decode_rows(self) -> int:
        """Rows of a decode pass with its draft tokens."""
        return self.sequences * (1 + self.decode_prediction.draft_tokens)

    @property
    def pass_bytes(self) -> int:
        """Bytes of the weights that every pass multiplies."""
        return self.weights_bytes - self.prefill_only_bytes

    @property
    def binding(self) -> str:
        """The bottleneck of decode: disk, compute or drafting."""
        return self.decode_prediction.binding

    def line(self) -> str:
        """The plan in one line."""
        streamed = (
            f"streamed {gigabytes(self.streamed_bytes_per_pass)} per pass at {gigabytes(self.disk_bytes_per_s)}/s"
            if self.streamed_bytes_per_pass
            else "nothing streamed"
        )
        if self.streamed_bytes_per_prompt:
            streamed += f" and {gigabytes(self.streamed_bytes_per_prompt)} once per prompt"
        draft = "" if self.drafting.name == "none" else f", {self.draft_line()}"
        experts = f", {self.expert_line()}" if self.experts is not None else ""
        return (
            f"{gib(self.budget.nbytes)} ({self.budget.reason}): pinned {gigabytes(self.held_bytes)}"
            f" of {gigabytes(self.weights_bytes)}, {streamed}{experts}{draft}; {self.binding}-bound,"
            f" {seconds(self.decode_s_per_token.expected)} per token,"
            f" first token in {seconds(self.ttft_s.expected)} (rates {self.profile.source})"
        )

    @property
    def experts(self) -> Experts | None:
        """The routed experts, if the model has any."""
        return self.weights.experts

    def expert_line(self) -> str:
        """The number of experts in memory and the predicted hit rate, in words."""
        assert self.experts is not None
        missed = gigabytes(self.experts.missed_bytes(1))
        return (
            f"{self.expert_slots} of {self.experts.total} experts in memory: {self.experts.hit_rate:.0%} of the choices"
            f" hit ({self.experts.source}), {missed} read per token"
        )

    def cost(self, rows: int) -> PassCost:
        """The cost of a pass of `rows` row-invariant rows."""
        return pass_cost(
            self.profile,
            self.disk_bytes_per_s,
            self.streamed_bytes_per_pass,
            self.weights,
            layers_of(self.shape),
            rows,
            row_invariant=True,
        )

    def draft_line(self) -> str:
        """The drafter and its predicted tokens per pass."""
        tokens = self.decode_prediction.tokens_per_pass / self.sequences
        memory = f" ({gib(self.draft_bytes)})" if self.draft_bytes else ""
        return f"draft {self.drafting.name}{memory}: about {tokens:.1f} tokens per pass"

    def as_json(self) -> dict[str, Any]:
        """The prediction as JSON-ready values."""
        return {
            "binding": self.binding,
            "decode_s_per_token": asdict(self.decode_s_per_token),
            "ttft_s": asdict(self.ttft_s),
            "reasons": list(self.reasons),
            "memory": {
                "budget_bytes": self.budget.nbytes,
                "floor_bytes": self.floor_bytes,
                "weights_bytes": self.weights_bytes,
                "pinned_bytes": self.pinned_bytes,
                "decode_pinned_bytes": self.decode_pinned_bytes,
                "streamed_bytes_per_pass": self.streamed_bytes_per_pass,
                "streamed_bytes_per_prompt": self.streamed_bytes_per_prompt,
                "ring_bytes": self.ring_bytes,
                "repacked_bytes": self.repacked_bytes,
                "kv_bytes": self.kv_bytes,
                "draft_bytes": self.draft_bytes,
                "activation_bytes": self.activation_bytes,
                "runtime_bytes": self.runtime_bytes,
            },
            "experts": None
            if self.experts is None
            else {
                "slots": self.expert_slots,
                "total": self.experts.total,
                "cache_bytes": self.expert_bytes,
                "hit_rate": self.experts.hit_rate,
                "bytes_per_token": self.experts.missed_bytes(1),
                "source": self.experts.source,
            },
            "context_tokens": self.context_tokens,
            "kv_tokens": self.kv_tokens,
            "kv_bits": self.kv_bits,
            "sequences": self.sequences,
            "draft": {
                "name": self.drafting.name,
                "draft_tokens": self.decode_prediction.draft_tokens,
                "tokens_per_pass": self.decode_prediction.tokens_per_pass,
                "draft_s_per_pass": self.decode_prediction.draft_s,
            },
            "prefill": {"rows_per_pass": self.prefill_rows, "passes": self.prefill_passes},
            "disk_bytes_per_s": self.disk_bytes_per_s,
            "profile": self.profile.source,
            "changes": [{"what": change.what, "s_per_token": change.s_per_token} for change in self.changes],
        }


def plan_for(
    checkpoint: Checkpoint,
    profile: Profile,
    budget: Budget,
    run_config: RunConfig,
    runtime_bytes: int | None = None,
    built: Built | None = None,
) -> Plan:
    """A plan without suggestions. Arguments and errors as for `choices.make_plan`."""
    shape = shape_of(checkpoint, built)
    if run_config.context_tokens > shape.context_limit:
        raise ContextError(
            f"a context of {run_config.context_tokens} tokens is asked for, the model was made for {shape.context_limit}",
            hint=f"use --ctx-size {shape.context_limit} or less",
        )
    draft = shape_of(run_config.drafting.checkpoint) if run_config.drafting.checkpoint is not None else None
    memory = plan_memory(shape, draft, profile, budget, run_config, runtime_bytes)
    disk = profile.disk(checkpoint.paths[0])
    rows = memory.prefill_rows
    passes = -(-run_config.prompt_rows // rows)
    draft_token_s = 0.0
    if draft is not None:
        repacked = _repacked(draft, {tensor.name: tensor.rows for tensor in draft.linears}, profile, in_place=True)
        draft_token_s = compute_seconds(profile, repacked, layers_of(draft), run_config.sequences, row_invariant=True)
    drafting, layers = run_config.drafting, layers_of(shape)
    experts = shape.experts
    if experts is not None:
        experts = experts.with_cached(memory.expert_slots).with_routing(load_routing(checkpoint))

    def predict(weights: Weights) -> _Prediction:
        def cost(rows: int) -> PassCost:
            return pass_cost(profile, disk, memory.streamed_bytes, weights, layers, rows, row_invariant=True)

        decode_prediction = predict_decode(
            drafting.acceptance_rate, run_config.max_draft_tokens, run_config.sequences, draft_token_s, cost
        )
        cold = weights if experts is None else replace(weights, experts=experts.with_cached(0))
        decoded = 1 if shape.prefill_only else min(rows, run_config.prompt_rows)
        first = pass_cost(profile, disk, shape.weights_bytes, cold, layers, decoded)
        if shape.prefill_only:
            read = replace(weights, plain=shape.prefill_only_weights, repacked={}, experts=None)
            encoder = layers._replace(number=checkpoint.number("block_count"))
            first += pass_cost(profile, disk, shape.prefill_only_bytes, read, encoder, run_config.prompt_rows)
        later = pass_cost(profile, disk, memory.streamed_bytes + memory.decode_pinned_bytes, weights, layers, rows)
        ttft = first.seconds + (passes - 1) * later.seconds
        output_tokens = run_config.sequences * max(1, run_config.context_tokens - run_config.prompt_tokens)
        total_s = ttft + output_tokens * decode_prediction.s_per_token
        return _Prediction(weights, decode_prediction, first, ttft, total_s)

    best, copied = _best_layout(shape, memory, profile, run_config, experts, predict)
    types = frozenset(best.weights.repacked)
    decode_prediction, first, ttft = best.decode_prediction, best.first, best.ttft_s
    reasons = [
        budget.reason,
        _rings(memory),
        f"{passes} weight pass{'es' if passes > 1 else ''} of up to {rows} rows for {run_config.prompt_rows} prompt tokens",
    ]
    if types:
        how = f"a second, repacked copy of {', '.join(sorted(types))} ({gib(copied)}): spare memory holds it"
        reasons.append(
            how if copied else f"pinned {', '.join(sorted(types))} repacked in place: the rows of a batch pay for it"
        )
    if best.weights.pad_decode_rows_to_tiles:
        reasons.append("single rows padded to tiles of eight: draft tokens and other sequences pay for it")
    top_k = checkpoint.number("attention.indexer.top_k", 0)
    if 0 < top_k < run_config.context_tokens:
        reasons.append(f"the model's indexer would choose {top_k} positions; here a token attends to all before it")
    return Plan(
        model=checkpoint.name,
        type_bits=8 * shape.all_bytes / shape.weights_count,
        budget=budget,
        floor_bytes=memory.floor_bytes,
        weights_bytes=shape.weights_bytes + shape.prefill_only_bytes,
        pinned_rows=memory.pinned_rows,
        pinned_bytes=memory.pinned_bytes,
        decode_pinned_rows=memory.decode_pinned_rows,
        decode_pinned_bytes=memory.decode_pinned_bytes,
        streamed_bytes_per_pass=memory.streamed_bytes,
        prefill_only_bytes=shape.prefill_only_bytes,
        streamed_bytes_per_prompt=memory.prefill_only_streamed_bytes,
        unit_bytes=UNIT_BYTES,
        ring_slots=memory.slots,
        prefill_only_slots=memory.prefill_only_slots,
        decode_only_slots=memory.decode_only_slots,
        ring_bytes=(memory.slots - memory.decode_only_slots + memory.prefill_only_slots) * memory.slot_bytes,
        readers=READERS,
        threads=profile.threads,
        bf16_prefill=profile.bf16_pays,
        pad_decode_rows_to_tiles=best.weights.pad_decode_rows_to_tiles,
        repacked_types=types,
        repack_in_place=bool(types) and not copied,
        # Its pages are small: decode from them alone is 6 % slower. A disk hides that, and so do repacked copies.
        map_pinned=bool(memory.streamed_bytes or copied),
        repacked_bytes=copied,
        kv_bytes=memory.kv_bytes,
        kv_bits=run_config.kv_bits,
        context_tokens=run_config.context_tokens,
        kv_tokens=run_config.kv_pool_tokens,
        sequences=run_config.sequences,
        prefill_rows=rows,
        prefill_passes=passes,
        drafting=drafting,
        max_draft_tokens=run_config.max_draft_tokens,
        draft_bytes=memory.draft_bytes,
        decode_prediction=decode_prediction,
        activation_bytes=memory.activation_bytes,
        runtime_bytes=memory.runtime_bytes,
        disk_bytes_per_s=disk,
        prefill=first,
        decode_s_per_token=_spread(decode_prediction.s_per_token, profile),
        ttft_s=_spread(ttft, profile),
        profile=profile,
        weights=best.weights,
        expert_slots=memory.expert_slots,
        expert_bytes=memory.expert_slots * (experts.slot_bytes if experts is not None else 0),
        shape=shape,
        reasons=tuple(reasons),
    )


def _rings(memory: MemoryPlan) -> str:
    slots = memory.slots + memory.prefill_only_slots
    if not slots:
        return "everything is pinned, no ring"
    apart = (
        f", {memory.prefill_only_slots} of them for what is read once per prompt" if memory.prefill_only_slots else ""
    )
    return f"{slots} ring slots of {gib(memory.slot_bytes)}{apart}"


def _spread(expected: float, profile: Profile) -> Range:
    """A range from measured over predicted; before any fit, 0.9 to 1.25 with measured rates, a factor of 3 with assumed."""
    low, high = (0.33, 3.0) if profile.source == "guessed" else profile.spread or (0.9, 1.25)
    return Range(low=expected * low, expected=expected, high=expected * high)


class _Prediction(NamedTuple):
    """Predicted times of one layout of the weights."""

    weights: Weights
    decode_prediction: DecodePrediction
    first: PassCost
    ttft_s: float
    total_s: float  # seconds of all prompts and output tokens


def _best_layout(
    shape: Shape,
    memory: MemoryPlan,
    profile: Profile,
    run_config: RunConfig,
    experts: Experts | None,
    predict: Callable[[Weights], _Prediction],
) -> tuple[_Prediction, int]:
    """(the prediction of the fastest layout, bytes of repacked copies)."""
    decoding = shape.decoding_core_s / max(1, shape.weights_bytes)
    share = shape.read_share
    plain = Weights(
        plain=shape.weights,
        experts=experts,
        decoding_core_s_per_byte=decoding,
        read_share=share,
        row_invariant=run_config.row_invariant,
    )
    best, copied = predict(plain), 0
    if run_config.row_invariant and profile.tiled & shape.weights.keys():
        found = predict(replace(plain, pad_decode_rows_to_tiles=True))
        if found.total_s < 0.97 * best.total_s:
            best = found
    # In place only for batches: the last bits of a single sequence should not depend on the budget.
    for in_place in (False, True) if run_config.sequences > 1 else (False,):
        repacked = _repacked(shape, memory.pinned_rows, profile, in_place)
        repacked = replace(best.weights, plain=repacked.plain, repacked=repacked.repacked, in_place=in_place)
        size = 0 if in_place else sum(ceil(n * bits_per_weight(kind) / 8) for kind, n in repacked.repacked.items())
        if not repacked.repacked or (size + len(shape.linears) * 4096 > memory.spare_bytes and not in_place):
            continue
        found = predict(repacked)
        if found.total_s < (0.97 if in_place else 0.99) * best.total_s:  # the memory for a copy is spare
            best, copied = found, size
    return best, copied


def _repacked(shape: Shape, pinned_rows: Mapping[str, int], profile: Profile, in_place: bool) -> Weights:
    """The weights with pinned rows repacked where the format gains by it."""
    plain, repacked = dict(shape.weights), dict[str, int]()
    for tensor in shape.linears:
        if tensor.type in profile.types_to_repack:
            count = pinned_rows[tensor.name] * tensor.columns
            plain[tensor.type] -= count
            repacked[tensor.type] = repacked.get(tensor.type, 0) + count
    return Weights(plain=plain, repacked={kind: n for kind, n in repacked.items() if n}, in_place=in_place)
