"""The plan: what is pinned, what is streamed, how large every buffer is, what a token will cost, and what would help.

Made from a checkpoint's header, a profile and a budget, before torch is imported. The engine executes it, the trace is
compared with it. The memory of the whole process adds up to the budget:

    budget = runtime + tokenizer + small tensors + ring + KV cache + activations + margin + pinned weights
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

from headrace.checkpoint import Checkpoint, Tensor
from headrace.checkpoint.architectures import check_architecture
from headrace.checkpoint.gguf import bits_per_weight
from headrace.errors import BudgetError, CheckpointError, ContextError
from headrace.kernels import FEW_ROWS
from headrace.plan.cost import PassCost, compute_seconds, pass_cost
from headrace.plan.draft import NO_DRAFT, Drafting, Expectation, expect
from headrace.plan.memory import Budget
from headrace.plan.profile import Profile
from headrace.units import MIB, gib, gigabytes, option, rate, seconds

UNIT_BYTES = 2 * MIB
RING_SLOTS = 16
LEAST_SLOTS = 3
READERS = 3
# A tensor whose streamed rest would be smaller than this is pinned whole: a read has a price beside its bytes.
SMALLEST_READ_BYTES = 512 << 10
TOKENIZER_BYTES_PER_TOKEN = 450
# While the tokenizer is built from the metadata, before any weights: 1400 bytes were measured for Gemma's 262,144 tokens.
TOKENIZER_BUILD_BYTES_PER_TOKEN = 1500
DRAFT_PROMPT_ROWS = 128  # of a prompt in one pass of a draft model
DRAFT_RUNTIME_BYTES = 24 * MIB  # modules of a draft model and its first passes
MANY_ROWS_BYTES = 128 * MIB  # unpacked weights, oneDNN's copies and code, what the allocator keeps
MARGIN_BYTES = 24 * MIB
MARGIN_SHARE = 0.01
KV_BYTES = 2  # fp16
ROW_CHUNK = 64
SEQUENCES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # that may run together in a batch

# Bits per weight of whole files as llama.cpp's quantiser makes them.
USUAL_FILES = (("Q8_0", 8.5), ("Q6_K", 6.56), ("Q4_K_M", 4.85), ("Q3_K_M", 3.9), ("Q2_K", 3.16))


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of the model: how many tokens go in, how many the context must hold in all, and how to go about it."""

    prompt_tokens: int = 512
    context_tokens: int = 1024
    sequences: int = 1  # computed together in every pass
    drafting: Drafting = NO_DRAFT

    @property
    def verify_rows(self) -> int:
        """The most exact rows of a pass: of every sequence its token and all guesses."""
        return max(FEW_ROWS, self.sequences * (1 + self.drafting.most_guesses))


@dataclass(frozen=True, kw_only=True)
class Range:
    """A prediction: what it cannot be faster than, what is expected, and what is likely not exceeded."""

    low: float
    expected: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Change:
    """Something the user could change, and the seconds per token it would give."""

    what: str
    s_per_token: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every number that the engine needs, and every prediction it will be held to. Sizes in bytes."""

    model: str
    type_bits: float
    budget: Budget
    floor_bytes: int
    weights_bytes: int
    pinned_rows: Mapping[str, int]
    pinned_bytes: int
    streamed_bytes_per_pass: int
    unit_bytes: int
    ring_slots: int
    ring_bytes: int
    readers: int
    threads: int
    bf16_many_rows: bool
    interleaved_types: frozenset[str]
    interleaved_bytes: int
    kv_bytes: int
    context_tokens: int
    sequences: int
    prefill_rows: int
    prefill_passes: int
    drafting: Drafting
    draft_bytes: int  # the draft model, its caches and activations
    expectation: Expectation
    activation_bytes: int
    runtime_bytes: int
    disk_bytes_per_s: float
    prefill: PassCost
    decode_s_per_token: Range
    ttft_s: Range
    profile: Profile
    weights: Mapping[str, int]  # multiplied weights by type
    layers: int
    reasons: tuple[str, ...]
    changes: tuple[Change, ...] = ()

    @property
    def decode(self) -> PassCost:
        """A pass that decodes, with the guesses it verifies."""
        return self.expectation.cost

    @property
    def binding(self) -> str:
        """What a decoded token waits for: disk, compute or drafting."""
        return self.expectation.binding

    def line(self) -> str:
        """The plan in one line."""
        streamed = (
            f"streamed {gigabytes(self.streamed_bytes_per_pass)} per pass at {gigabytes(self.disk_bytes_per_s)}/s"
            if self.streamed_bytes_per_pass
            else "nothing streamed"
        )
        draft = "" if self.drafting.name == "none" else f", {self.draft_line()}"
        return (
            f"{gib(self.budget.nbytes)} ({self.budget.reason}): pinned {gigabytes(self.pinned_bytes)}"
            f" of {gigabytes(self.weights_bytes)}, {streamed}{draft}; {self.binding}-bound,"
            f" {seconds(self.decode_s_per_token.expected)} per token,"
            f" first token in {seconds(self.ttft_s.expected)} (rates {self.profile.source})"
        )

    def cost(self, rows: int) -> PassCost:
        """A pass of so many exact rows."""
        return pass_cost(
            self.profile,
            self.disk_bytes_per_s,
            self.streamed_bytes_per_pass,
            self.weights,
            self.layers,
            rows,
            self.interleaved_types,
            exact=True,
        )

    def draft_line(self) -> str:
        """How tokens are guessed, and what is expected of it."""
        tokens = self.expectation.tokens_per_pass / self.sequences
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
                "streamed_bytes_per_pass": self.streamed_bytes_per_pass,
                "ring_bytes": self.ring_bytes,
                "interleaved_bytes": self.interleaved_bytes,
                "kv_bytes": self.kv_bytes,
                "draft_bytes": self.draft_bytes,
                "activation_bytes": self.activation_bytes,
                "runtime_bytes": self.runtime_bytes,
            },
            "context_tokens": self.context_tokens,
            "sequences": self.sequences,
            "draft": {
                "name": self.drafting.name,
                "guesses": self.expectation.guesses,
                "tokens_per_pass": self.expectation.tokens_per_pass,
                "draft_s_per_pass": self.expectation.draft_s,
            },
            "prefill": {"rows_per_pass": self.prefill_rows, "passes": self.prefill_passes},
            "disk_bytes_per_s": self.disk_bytes_per_s,
            "profile": self.profile.source,
            "changes": [{"what": change.what, "s_per_token": change.s_per_token} for change in self.changes],
        }


@dataclass(frozen=True, kw_only=True)
class _Model:
    """What the plan needs to know of a checkpoint."""

    checkpoint: Checkpoint
    linears: tuple[Tensor, ...]
    small_bytes: int
    layers: int
    hidden: int
    feed_forward: int
    attention_width: int
    kv_bytes_per_token: int
    context_limit: int

    @property
    def weights_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.linears)

    @property
    def page_slack_bytes(self) -> int:
        """What pinned rows may take beside their own bytes, because reads begin and end at pages."""
        return 2 * 4096 * len(self.linears)

    @property
    def weights(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for tensor in self.linears:
            counts[tensor.type] = counts.get(tensor.type, 0) + tensor.rows * tensor.columns
        return counts


def make_plan(
    checkpoint: Checkpoint,
    profile: Profile,
    budget: Budget,
    request: Request = Request(),
    *,
    runtime_bytes: int | None = None,
) -> Plan:
    """Plan a run.

    Args:
        checkpoint: the header of a model.
        profile: what the machine can do.
        budget: the ceiling for the whole process.
        request: tokens in, and tokens in all.
        runtime_bytes: what the process takes without weights, if it is already known; else the profile's word.

    Raises:
        UnsupportedError: the architecture does not run.
        BudgetError: the budget is below the floor, which the message names.
        ContextError: the context is longer than the model's.
    """
    plan = _plan(checkpoint, profile, budget, request, runtime_bytes)
    return replace(plan, changes=_changes(plan, checkpoint, profile, request, runtime_bytes))


def choose_drafting(
    checkpoint: Checkpoint, profile: Profile, budget: Budget, request: Request, options: Sequence[Drafting]
) -> tuple[Drafting, str]:
    """(the best way to draft, the comparison in words). The first option must fit; a later one must gain a twentieth."""
    best, least = options[0], float("inf")
    words = []
    for drafting in options:
        try:
            found = _plan(
                checkpoint, profile, budget, replace(request, drafting=drafting), None
            ).expectation.s_per_token
        except BudgetError:
            if drafting is options[0]:
                raise
            words.append(f"{drafting.name} does not fit")
            continue
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
    for count in sorted({min(most, count) for count in SEQUENCES}):
        wanted = replace(request, sequences=count)
        try:
            drafting, _ = choose_drafting(checkpoint, profile, budget, wanted, options)
        except BudgetError:
            if best is None:
                raise
            break
        wanted = replace(wanted, drafting=drafting)
        found = _plan(checkpoint, profile, budget, wanted, None).expectation.s_per_token
        if found < 0.98 * least:
            best, least = wanted, found
    assert best is not None
    return best


def _plan(
    checkpoint: Checkpoint, profile: Profile, budget: Budget, request: Request, runtime_bytes: int | None
) -> Plan:
    model = _describe(checkpoint)
    if request.context_tokens > model.context_limit:
        raise ContextError(
            f"a context of {request.context_tokens} tokens is asked for, the model was made for {model.context_limit}",
            hint=f"use --ctx-size {model.context_limit} or less",
        )
    runtime = runtime_bytes or profile.runtime_bytes + checkpoint.vocab_size * TOKENIZER_BYTES_PER_TOKEN
    kv = model.kv_bytes_per_token * request.context_tokens * request.sequences
    draft = _describe(request.drafting.checkpoint) if request.drafting.checkpoint is not None else None
    draft_bytes = _draft_bytes(draft, request, known_runtime=runtime_bytes is not None) if draft is not None else 0
    slot = UNIT_BYTES + max(tensor.row_bytes for tensor in model.linears)
    margin = MARGIN_BYTES + int(MARGIN_SHARE * budget.nbytes)
    base = runtime + model.small_bytes + kv + draft_bytes + margin
    least = base - margin + MARGIN_BYTES + LEAST_SLOTS * slot
    exact = _activations(model, request.verify_rows, request.context_tokens, exact=True)
    floor = ceil((least + exact) / (1 - MARGIN_SHARE))
    if runtime_bytes is None:
        floor = max(floor, profile.runtime_bytes + checkpoint.vocab_size * TOKENIZER_BUILD_BYTES_PER_TOKEN)
    if budget.nbytes < floor:
        raise BudgetError(
            f"the model needs at least {gib(floor)}, the budget is {gib(budget.nbytes)} ({budget.reason})",
            hint=_floor_hint(floor, kv),
        )
    room = budget.nbytes - base
    rows = _prefill_rows(model, request, budget.nbytes, room - LEAST_SLOTS * slot)
    activations = max(exact, _activations(model, rows, request.context_tokens))
    if budget.pinned_limit_bytes is not None:
        room = min(room, activations + RING_SLOTS * slot + budget.pinned_limit_bytes)
    fits = room - activations >= model.weights_bytes + model.page_slack_bytes
    slots = 0 if fits else max(LEAST_SLOTS, min(RING_SLOTS, (room - activations) // slot))
    pinned_rows = _pin(model, room - activations - slots * slot)
    pinned = sum(pinned_rows[tensor.name] * tensor.row_bytes for tensor in model.linears)
    if pinned == model.weights_bytes:
        slots = 0
    streamed = model.weights_bytes - pinned
    types, copied = _interleave(model, profile, room - activations - pinned - model.page_slack_bytes if fits else 0)
    disk = profile.disk(checkpoint.paths[0])
    passes = -(-request.prompt_tokens // rows)
    guess_s = 0.0
    if draft is not None:
        woven = profile.types_to_interleave
        guess_s = compute_seconds(profile, draft.weights, draft.layers, request.sequences, woven, exact=True)

    def cost(rows: int) -> PassCost:
        return pass_cost(profile, disk, streamed, model.weights, model.layers, rows, types, exact=True)

    drafting = request.drafting
    expectation = expect(drafting.chance, drafting.most_guesses, request.sequences, guess_s, cost)
    first = pass_cost(profile, disk, model.weights_bytes, model.weights, model.layers, min(rows, request.prompt_tokens))
    later = pass_cost(profile, disk, streamed, model.weights, model.layers, rows)
    ttft = first.seconds + (passes - 1) * later.seconds
    reasons = [
        budget.reason,
        f"{slots} ring slots of {gib(slot)}" if slots else "everything is pinned, no ring",
        f"{passes} weight pass{'es' if passes > 1 else ''} of up to {rows} rows for {request.prompt_tokens} prompt tokens",
    ]
    if copied:
        reasons.append(
            f"a second, interleaved copy of {', '.join(sorted(types))} ({gib(copied)}): there is room for it"
        )
    return Plan(
        model=checkpoint.name,
        type_bits=8 * model.weights_bytes / sum(model.weights.values()),
        budget=budget,
        floor_bytes=floor,
        weights_bytes=model.weights_bytes,
        pinned_rows=pinned_rows,
        pinned_bytes=pinned,
        streamed_bytes_per_pass=streamed,
        unit_bytes=UNIT_BYTES,
        ring_slots=slots,
        ring_bytes=slots * slot,
        readers=READERS,
        threads=profile.threads,
        bf16_many_rows=profile.bf16_pays,
        interleaved_types=types,
        interleaved_bytes=copied,
        kv_bytes=kv,
        context_tokens=request.context_tokens,
        sequences=request.sequences,
        prefill_rows=rows,
        prefill_passes=passes,
        drafting=drafting,
        draft_bytes=draft_bytes,
        expectation=expectation,
        activation_bytes=activations,
        runtime_bytes=runtime + model.small_bytes,
        disk_bytes_per_s=disk,
        prefill=first,
        decode_s_per_token=_spread(expectation.s_per_token, profile),
        ttft_s=_spread(ttft, profile),
        profile=profile,
        weights=model.weights,
        layers=model.layers,
        reasons=tuple(reasons),
    )


def _spread(expected: float, profile: Profile) -> Range:
    """Shared machines vary by a fifth from hour to hour; a guessed profile is worth a factor of three."""
    low, high = (0.33, 3.0) if profile.source == "guessed" else (0.9, 1.25)
    return Range(low=expected * low, expected=expected, high=expected * high)


def _describe(checkpoint: Checkpoint) -> _Model:
    check_architecture(checkpoint.architecture, checkpoint.number("expert_count", 0), checkpoint.path)
    tensors = checkpoint.tensors
    linears = [t for t in tensors.values() if is_linear(t)]
    if "output.weight" not in tensors:
        if "token_embd.weight" not in tensors:
            raise CheckpointError(
                f"{checkpoint.path} has no tensor `token_embd.weight`", hint="it is no language model"
            )
        linears.append(tensors["token_embd.weight"])  # tied: gathered by row and multiplied as the head
    if not linears:
        raise CheckpointError(f"{checkpoint.path} has no weight matrices", hint="it is no language model")
    names = {tensor.name for tensor in linears} | {"token_embd.weight"}
    heads = checkpoint.number("attention.head_count")
    hidden = checkpoint.number("embedding_length")
    head_dim = checkpoint.number("attention.key_length", hidden // max(1, heads))
    kv_heads = checkpoint.number("attention.head_count_kv", heads)
    layers = checkpoint.number("block_count")
    if min(heads, hidden, head_dim, kv_heads, layers) < 1:
        raise CheckpointError(
            f"{checkpoint.path}: the metadata gives {layers} layers, width {hidden}, {heads} heads, {kv_heads} KV heads,"
            f" head width {head_dim}",
            hint="the file is damaged; get it from another source",
        )
    return _Model(
        checkpoint=checkpoint,
        linears=tuple(linears),
        small_bytes=sum(t.rows * t.columns * 4 for t in tensors.values() if t.name not in names),
        layers=layers,
        hidden=hidden,
        feed_forward=max((t.rows for t in linears if ".ffn_" in t.name), default=hidden),
        attention_width=heads * head_dim,
        kv_bytes_per_token=2 * layers * kv_heads * head_dim * KV_BYTES,
        context_limit=checkpoint.number("context_length", 1 << 20),
    )


def is_linear(tensor: Tensor) -> bool:
    """Whether a tensor is multiplied in every pass: a matrix, and not a table of embeddings."""
    tables = ("token_embd.weight", "position_embd.weight", "token_types.weight")
    return len(tensor.shape) == 2 and tensor.name not in tables


def _draft_bytes(draft: _Model, request: Request, known_runtime: bool) -> int:
    """What a draft model takes: its weights, all of them, its caches and activations; its modules, if not yet built."""
    kv = draft.kv_bytes_per_token * request.context_tokens * request.sequences
    activations = _activations(draft, DRAFT_PROMPT_ROWS, request.context_tokens) - MANY_ROWS_BYTES
    built = 0 if known_runtime else draft.small_bytes + DRAFT_RUNTIME_BYTES
    return draft.weights_bytes + draft.page_slack_bytes + kv + activations + built


def _activations(model: _Model, rows: int, context_tokens: int, exact: bool = False) -> int:
    """The most that a pass of this many rows holds at once, in fp32: the wider of MLP and attention, and logits.

    Exact rows may all need logits; of a prompt only the last row does.
    """
    # Twice what the tensors alive at once would take: the allocator keeps holes, oneDNN copies its operands. 386 MiB were
    # measured for 512 rows of an 8B model.
    narrow = 10 * model.hidden
    mlp = 8 * model.feed_forward
    attention = 10 * model.attention_width
    logits = (4 + (rows if exact else 0)) * model.checkpoint.vocab_size * 4
    if rows <= FEW_ROWS or exact:
        return rows * 4 * (narrow + max(mlp, attention)) + logits
    # Many rows: weights unpacked beside them, and the cache repeated for grouped heads, in fp16.
    repeated = 2 * context_tokens * model.attention_width * KV_BYTES + rows * context_tokens
    return rows * 4 * (narrow + max(mlp, attention)) + logits + repeated + MANY_ROWS_BYTES


def _prefill_rows(model: _Model, request: Request, budget_bytes: int, room: int) -> int:
    """As many prompt rows per pass as fit into an eighth of the budget: passes cost more than pins until then."""
    limit = min(room, max(budget_bytes // 8, 192 * MIB))
    rows = max(1, request.prompt_tokens)
    if rows <= FEW_ROWS:
        return FEW_ROWS
    while rows > ROW_CHUNK and _activations(model, rows, request.context_tokens) > limit:
        rows -= ROW_CHUNK
    rows = max(rows, FEW_ROWS)  # the last step down may have gone below
    return rows if _activations(model, rows, request.context_tokens) <= limit else FEW_ROWS


def _pin(model: _Model, room: int) -> dict[str, int]:
    """Rows to pin by tensor: the same share of each, except that small rests are pinned too."""
    room = max(0, room)
    if room >= model.weights_bytes + model.page_slack_bytes:
        return {tensor.name: tensor.rows for tensor in model.linears}
    room = max(0, room - model.page_slack_bytes)
    whole: set[str] = set()
    while True:
        rest = [tensor for tensor in model.linears if tensor.name not in whole]
        spent = model.weights_bytes - sum(tensor.nbytes for tensor in rest)
        share = max(0.0, (room - spent) / max(1, sum(tensor.nbytes for tensor in rest)))
        more = {t.name for t in rest if (1 - share) * t.nbytes < SMALLEST_READ_BYTES}
        cost = sum(t.nbytes for t in rest if t.name in more)
        if not more or spent + cost > room:
            break
        whole |= more
    rows = {tensor.name: int(share * tensor.rows) for tensor in rest}
    return rows | {tensor.name: tensor.rows for tensor in model.linears if tensor.name in whole}


def _interleave(model: _Model, profile: Profile, room: int) -> tuple[frozenset[str], int]:
    """(formats to copy into the interleaved layout, bytes of the copies), as far as there is room beside everything else."""
    chosen: set[str] = set()
    spent = 0
    for kind in sorted(profile.types_to_interleave):
        tensors = [tensor for tensor in model.linears if tensor.type == kind]
        size = sum(tensor.nbytes + 4096 for tensor in tensors)
        if tensors and spent + size <= room:
            chosen.add(kind)
            spent += size
    return frozenset(chosen), spent


def _floor_hint(floor: int, kv: int) -> str:
    hint = f"use --memory {option(floor)}"
    return f"{hint}, or a smaller --ctx-size (the KV cache takes {gib(kv)} of it)" if kv > floor // 4 else hint


def _changes(
    plan: Plan, checkpoint: Checkpoint, profile: Profile, request: Request, runtime_bytes: int | None
) -> tuple[Change, ...]:
    """The three changes that save most time per token, each by planning again with it."""
    now = plan.expectation.s_per_token
    # With memory for everything no buffer is cut short, so its sum is what is enough.
    roomy = _plan(checkpoint, profile, Budget(nbytes=1 << 50, reason="what if"), request, runtime_bytes)
    parts = roomy.runtime_bytes + roomy.kv_bytes + roomy.activation_bytes + roomy.weights_bytes + MARGIN_BYTES
    enough = ceil((parts + _describe(checkpoint).page_slack_bytes) / (1 - MARGIN_SHARE)) + MIB

    def with_memory(nbytes: int) -> float:
        budget = Budget(nbytes=nbytes, reason="what if")
        return _plan(checkpoint, profile, budget, request, runtime_bytes).expectation.s_per_token

    candidates: list[Change] = []
    if plan.streamed_bytes_per_pass:
        candidates.append(Change(what=f"--memory {option(enough)}: everything pinned", s_per_token=with_memory(enough)))
        half = (plan.budget.nbytes + enough) // 2
        candidates.append(Change(what=f"--memory {option(half)}", s_per_token=with_memory(half)))
        faster = max(plan.decode.disk_s / 2, plan.decode.compute_s) / plan.expectation.tokens_per_pass
        candidates.append(Change(what="a disk twice as fast (or the file on two)", s_per_token=faster))
    candidates += _smaller_files(plan)
    if plan.kv_bytes > plan.budget.nbytes // 10 and plan.streamed_bytes_per_pass:
        shorter = replace(request, context_tokens=min(request.context_tokens, max(256, request.context_tokens // 2)))
        s = _plan(checkpoint, profile, plan.budget, shorter, runtime_bytes).expectation.s_per_token
        candidates.append(Change(what=f"--ctx-size {shorter.context_tokens}", s_per_token=s))
    better = sorted((c for c in candidates if c.s_per_token < 0.97 * now), key=lambda c: c.s_per_token)
    return tuple(better[:3])


def _smaller_files(plan: Plan) -> list[Change]:
    """The next smaller quantisations: the same budget holds a larger share of fewer bytes."""
    smaller = [(name, bits) for name, bits in USUAL_FILES if bits < 0.92 * plan.type_bits][:2]
    changes = []
    for name, bits in smaller:
        size = plan.weights_bytes * bits / plan.type_bits
        streamed = max(0.0, size - plan.pinned_bytes)
        # Kernels of two to four bits are bound by their arithmetic: fewer bytes do not make them faster.
        compute = plan.decode.compute_s * (bits / plan.type_bits if plan.type_bits > 9 else 1.0)
        changes.append(
            Change(
                what=f"the same model as {name} ({gigabytes(size)})",
                s_per_token=max(streamed / plan.disk_bytes_per_s, compute) / plan.expectation.tokens_per_pass,
            )
        )
    return changes


def describe(plan: Plan, checkpoint: Checkpoint) -> list[tuple[str, str, str]]:
    """The plan as rows of (name, value, remark), for a terminal."""
    decode, ttft = plan.decode_s_per_token, plan.ttft_s
    kinds = sorted({t.type for t in checkpoint.tensors.values() if is_linear(t)}, key=bits_per_weight)
    buffers = f"ring {gib(plan.ring_bytes)}, activations {gib(plan.activation_bytes)}"
    measured = plan.profile.source != "guessed"
    passes = f"{plan.prefill_passes} pass{'es' if plan.prefill_passes > 1 else ''} of {plan.prefill_rows} rows"
    return [
        ("model", plan.model, f"{checkpoint.architecture}, {plan.type_bits:.2f} bits/weight ({', '.join(kinds)})"),
        ("memory", gib(plan.budget.nbytes), f"{plan.budget.reason}; floor {gib(plan.floor_bytes)}"),
        ("weights", gigabytes(plan.weights_bytes), "read in the first pass"),
        (
            "pinned",
            gigabytes(plan.pinned_bytes),
            f"{plan.pinned_bytes / plan.weights_bytes:.0%}, of every large tensor its share",
        ),
        ("streamed", gigabytes(plan.streamed_bytes_per_pass), f"per pass, disk {gigabytes(plan.disk_bytes_per_s)}/s"),
        ("KV cache", gib(plan.kv_bytes), f"{plan.sequences} x {plan.context_tokens} tokens"),
        ("draft", plan.drafting.name, plan.reasons[-1]),
        ("buffers", gib(plan.ring_bytes + plan.activation_bytes), buffers),
        ("runtime", gib(plan.runtime_bytes), "interpreter, libraries, tokenizer, small tensors"),
        ("prefill", seconds(ttft.expected), f"{plan.prefill.binding}-bound, {passes}  {_interval(ttft)}"),
        (
            "decode",
            f"{seconds(decode.expected)}/token",
            f"{plan.binding}-bound = {rate(1 / decode.expected)}  {_interval(decode)}",
        ),
        (
            "rates",
            plan.profile.source,
            "by `headrace probe`" if measured else "run `headrace probe` to measure this machine",
        ),
    ]


def _interval(prediction: Range) -> str:
    return f"[{seconds(prediction.low)} .. {seconds(prediction.high)}]"
