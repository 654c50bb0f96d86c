"""Chooses the rows of each pass: prompt chunks, decoded tokens and draft tokens of all running sequences.

A sequence is a list of tokens; the KV cache holds a prefix of it. Each pass computes the uncomputed rest: a prompt in chunks,
a decoded token as one row, draft tokens behind it. The pass yields the accepted draft tokens and one more token. So
prefill, decode and verification are the same code, for one sequence as for many. Sequences come and go between passes.

Prompts that are computed at the same time get chunks in turn. Memory for keys and values is one pool, counted in tokens.
Where it runs out, idle caches are dropped; then the sequence that started last is preempted and later computed again.

Chunk boundaries do not depend on other work, and a chunk's results depend on its sequence alone. Only whole chunks of
prompts are reused. So the same prompt gives the same tokens after any earlier work and beside any other sequences.
The price: a chunk that a prompt shares in part is computed again. So are generated tokens that have become part of a
prompt, because decode kernels round differently. `deterministic=False` reuses both.
"""

import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from headrace.engine.chunks import ChunkRules
from headrace.engine.drafters import Draft
from headrace.engine.kv_pool import KvPool, Slot
from headrace.engine.sampler import Sampler, TokenLogprobs
from headrace.engine.speculation import Speculation
from headrace.engine.step import PrefixCopy, RowsInput, RunnerInfo, StepInput, StepOutput
from headrace.engine.timeline import PassStats
from headrace.kernels.thresholds import KV_BLOCK_TOKENS

# Min length of a common prefix to wait for; a shorter one is computed again.
MIN_SHARED_PREFIX_TOKENS = 16


@dataclass(eq=False)
class SequenceState:
    """A prompt and the tokens generated so far. It has a slot while it runs."""

    sequence_id: int
    tokens: list[int]
    prompt_tokens: int
    max_tokens: int  # max tokens to generate
    sampler: Sampler
    running_slot: Slot | None = None
    prefix_source: "SequenceState | None" = None  # sequence that computes the common prefix
    shared_prefix_tokens: int = 0
    # Tokens of the prompt from a KV cache, or from a sequence that computes them; None: not started.
    cached_tokens: int | None = None
    last_prefill: int = 0  # number of the last step with a prompt chunk
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)  # of each generated token

    @property
    def slot(self) -> Slot:
        """The slot of a running sequence."""
        assert self.running_slot is not None, "the sequence runs"
        return self.running_slot

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def num_uncomputed(self) -> int:
        """Number of tokens that are not computed yet."""
        return len(self.tokens) - (0 if self.running_slot is None else len(self.running_slot.tokens))


@dataclass(eq=False)
class ScheduledSequence:
    """The rows of one sequence in a step: chunks, and draft tokens behind them."""

    sequence: SequenceState
    start: int
    draft: Draft
    chunks: list[Sequence[int]] = field(default_factory=list)

    @property
    def end(self) -> int:
        """Position behind the chunks."""
        return self.start + sum(map(len, self.chunks))

    @property
    def is_complete(self) -> bool:
        """True if all tokens are computed after the step, so that the next one can be drawn."""
        return self.end == len(self.sequence.tokens)


@dataclass(eq=False)
class ScheduledStep:
    """A step, and what is needed to go on with its output."""

    step: StepInput
    sequences: list[ScheduledSequence]
    start_s: float
    draft_s: float
    all_row_invariant: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceResult:
    """New tokens of a sequence, or why it failed."""

    sequence: SequenceState
    tokens: list[int]  # empty if its prompt is not computed completely
    drafted: int = 0
    error: Exception | None = None


class Scheduler:
    """Makes steps for sequences that come and go. `speculation=None`: one token per sequence and pass."""

    def __init__(
        self,
        info: RunnerInfo,
        prefill_rows: int,
        max_draft_tokens: int = 0,
        deterministic: bool = True,
        kv_tokens: int | None = None,
    ):
        """Set the options that hold for all sequences.

        Args:
            info: facts about the runner.
            prefill_rows: max prompt rows of a pass; the first row of each sequence does not count.
            max_draft_tokens: max draft tokens of one sequence in a pass.
            deterministic: reuse nothing whose reuse could change the last bits of a result.
            kv_tokens: tokens that all KV caches hold together; None: all caches may be full.
        """
        self.info = info
        self.speculation: Speculation | None = None
        self.running: list[SequenceState] = []  # in the order in which they started
        self.waiting: deque[SequenceState] = deque()
        self.prefill_rows = prefill_rows
        self.pool = KvPool(info.num_slots, info.capacity, kv_tokens)
        self._rules = ChunkRules(info, prefill_rows, deterministic)
        self._max_draft_tokens = max_draft_tokens
        self._numbers = itertools.count()
        self._step = 0

    @property
    def has_work(self) -> bool:
        """True if a sequence runs or waits."""
        return bool(self.running or self.waiting)

    def add(self, prompt: Sequence[int], max_tokens: int, sampler: Sampler) -> SequenceState:
        """Queue a sequence. It starts with the first step that has a slot and memory for it."""
        sequence = SequenceState(next(self._numbers), list(prompt), len(prompt), max_tokens, sampler)
        self.waiting.append(sequence)
        return sequence

    def remove(self, sequence: SequenceState) -> None:
        """End a sequence, finished or not. Its cache is kept for prefix caching. Safe to call twice."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence in self.running:
            slot = sequence.slot
            slot.truncate(len(sequence.tokens))
            self._stop(sequence)
        if self.speculation is not None:
            self.speculation.forget(sequence.sequence_id)

    def fail(self, scheduled: ScheduledStep) -> list[SequenceState]:
        """End the sequences of a step that failed; their caches are dropped."""
        failed = [one.sequence for one in scheduled.sequences]
        for sequence in failed:
            if sequence in self.running:
                self.pool.release(sequence.slot)
            self.remove(sequence)
        return failed

    def reset(self) -> list[SequenceState]:
        """End all running sequences after a failure; their caches are dropped."""
        failed = list(self.running)
        for sequence in failed:
            self.pool.release(sequence.slot)
            self.remove(sequence)
        return failed

    def _stop(self, sequence: SequenceState) -> None:
        """Take a sequence's slot."""
        self.running.remove(sequence)
        for other in self.running:
            if other.prefix_source is sequence:
                other.prefix_source = None  # the other one computes the prefix itself
        self.pool.free.append(sequence.slot)
        sequence.running_slot = sequence.prefix_source = None

    # -- starting ---------------------------------------------------------------------------------------------------

    def _start_waiting(self) -> None:
        while self.waiting and self.pool.free:
            sequence = self.waiting[0]
            prompt = sequence.tokens[: sequence.prompt_tokens]
            slot = self.pool.best_free(lambda slot, prompt=prompt: self._rules.cached_prefix(slot, prompt))  # type: ignore[misc]
            needed = len(sequence.tokens) + min(KV_BLOCK_TOKENS, sequence.max_tokens - sequence.generated)
            ends = {one.slot: len(one.tokens) for one in self.running}
            if self.running and not self.pool.reserve(slot, needed, ends):
                return
            self.waiting.popleft()
            self._start(sequence, slot, prompt)

    def _start(self, sequence: SequenceState, slot: Slot, prompt: Sequence[int]) -> None:
        def shareable(other: SequenceState) -> int:
            return self._rules.shareable_prefix(other.tokens, other.prompt_tokens, prompt)

        own = self._rules.cached_prefix(slot, prompt)
        source = max(self.running, key=shareable, default=None)
        shared = 0 if source is None else shareable(source)
        if shared >= own + MIN_SHARED_PREFIX_TOKENS:
            sequence.prefix_source, sequence.shared_prefix_tokens = source, shared
        self.pool.truncate(slot, own)
        slot.is_wide = False
        slot.prompt_tokens = len(prompt)
        sequence.running_slot = slot
        self.pool.free.remove(slot)
        self.running.append(sequence)

    def _preempt(self, sequence: SequenceState) -> None:
        """Stop a sequence to take its memory. Its tokens are computed again, by the same kernels."""
        self.pool.release(sequence.slot)
        self._stop(sequence)
        self.waiting.appendleft(sequence)
        if self.speculation is not None:
            self.speculation.forget(sequence.sequence_id)

    def _reserve(self, sequence: SequenceState, end: int, scheduled: "dict[SequenceState, ScheduledSequence]") -> bool:
        """Reserve memory for a sequence of `end` tokens, if necessary by preempting sequences that started after it."""
        ends = {other.slot: one.end for other, one in scheduled.items()}
        while not self.pool.reserve(sequence.slot, end, ends):
            last = self.running[-1]
            copied = any(one.sequence.prefix_source is last for one in scheduled.values())
            if last is sequence or last in scheduled or copied:
                return False
            self._preempt(last)
        return True

    # -- one step ---------------------------------------------------------------------------------------------------

    def schedule(self) -> ScheduledStep | None:
        """The next step; None if no sequence runs or waits."""
        start = time.perf_counter()
        self._step += 1
        self._start_waiting()
        if not self.running:
            return None
        scheduled = self._take_chunks()
        if self.speculation is not None:
            self._propose(self.speculation, scheduled)
        draft_s = time.perf_counter() - start
        copies, rows = [], list[RowsInput]()
        for one in scheduled:
            sequence = one.sequence
            source = sequence.prefix_source
            if source is not None and one.start > len(sequence.slot.tokens):
                copies.append(PrefixCopy(source=source.slot.number, target=sequence.slot.number, length=one.start))
            sequence.prefix_source = None
            sequence.slot.last_used = self._step
            rows += self._rows(one)
        wide = frozenset(slot.number for slot in self.pool.slots if slot.is_wide)
        step = StepInput(rows=tuple(rows), copies=tuple(copies), truncated=self.pool.take_truncated(), wide=wide)
        return ScheduledStep(step, scheduled, start, draft_s, all(row.row_invariant for row in rows))

    def update(self, scheduled: ScheduledStep, output: StepOutput) -> list[SequenceResult]:
        """Take the logits of a step: draw tokens, accept draft tokens up to the first that differs."""
        if output.overflowed is not None:
            # A key or value overflowed FP16: the sequence is computed again from its start, in the wide type.
            slot = self.pool.slots[output.overflowed]
            slot.is_wide = True
            slot.tokens.clear()
            return []
        if output.failed:  # the others are computed again
            return self._end_failed(scheduled, output)
        assert output.logits is not None
        parts = torch.split(output.logits, [1 + len(one.draft.draft_tokens) for one in scheduled.sequences])
        results = []
        for one, logits in zip(scheduled.sequences, parts, strict=True):
            sequence, drafted = one.sequence, len(one.draft.draft_tokens)
            if sequence.running_slot is None:
                continue  # removed while the pass ran
            sequence.slot.tokens = sequence.tokens[: one.end]
            if not one.is_complete:
                results.append(SequenceResult(sequence=sequence, tokens=[]))
                continue
            try:
                tokens = self._verify(sequence, one.draft, logits)
                results.append(SequenceResult(sequence=sequence, tokens=tokens, drafted=drafted))
            except Exception as error:
                results.append(SequenceResult(sequence=sequence, tokens=[], error=error))
        return results

    def _end_failed(self, scheduled: ScheduledStep, output: StepOutput) -> list[SequenceResult]:
        """Drop the caches of sequences that failed."""
        failed = [one.sequence for one in scheduled.sequences if one.sequence.slot.number in output.failed]
        for sequence in failed:
            self.pool.release(sequence.slot)
        return [SequenceResult(sequence=sequence, tokens=[], error=output.error) for sequence in failed]

    def record(self, scheduled: ScheduledStep, stats: PassStats, tokens: int) -> None:
        """Learn from the time of a step that gave `tokens` tokens."""
        if self.speculation is not None and scheduled.all_row_invariant:
            self.speculation.step_times.record_pass(stats)
            self.speculation.step_times.record_step(tokens, time.perf_counter() - scheduled.start_s)

    def _take_chunks(self) -> list[ScheduledSequence]:
        """Whole chunks of each sequence, as many as fit. Prompts take one in turn.

        First come decoded tokens, then the prompts that have waited longest. A chunk of one row always fits.
        """
        scheduled: dict[SequenceState, ScheduledSequence] = {}
        chunks: dict[SequenceState, Iterator[Sequence[int]]] = {}
        budget, full = self.prefill_rows - 1, set[SequenceState]()
        order = sorted(self.running, key=lambda one: (not one.generated, 0 if one.generated else one.last_prefill))
        progress = True
        while progress:
            progress = False
            for sequence in order:
                if sequence in full or sequence.running_slot is None:
                    continue
                if sequence not in chunks:
                    start = self._start_of(sequence, scheduled)
                    if start is None:
                        continue  # the source of its prefix is not there yet
                    draft = Draft(sequence.sequence_id, sequence.tokens, sequence.sampler)
                    one = ScheduledSequence(sequence, start, draft)
                    if sequence.cached_tokens is None:
                        sequence.cached_tokens = start
                    chunks[sequence] = self._rules.of(sequence.tokens, sequence.prompt_tokens, start)
                else:
                    one = scheduled[sequence]
                chunk = next(chunks[sequence], None)
                if chunk is None:
                    full.add(sequence)
                    continue
                cost = len(chunk) - (not one.chunks)
                fits = cost <= budget or not scheduled
                if not fits or not self._reserve(sequence, one.end + len(chunk), scheduled):
                    full.add(sequence)
                    continue
                one.chunks.append(chunk)
                scheduled[sequence] = one
                budget -= cost
                progress = True
                if self.info.one_chunk:
                    full.add(sequence)
                if not sequence.generated:
                    sequence.last_prefill = self._step
        # A prefix's source comes before the sequences that copy it.
        return [scheduled[sequence] for sequence in self.running if sequence in scheduled]

    def _start_of(self, sequence: SequenceState, scheduled: dict[SequenceState, ScheduledSequence]) -> int | None:
        """First position to compute; None while another sequence still computes the common prefix."""
        source = sequence.prefix_source
        if source is None:
            return len(sequence.slot.tokens)
        reached = scheduled[source].end if source in scheduled else len(source.slot.tokens)
        if reached < sequence.shared_prefix_tokens:
            return None
        same_type = source.slot.is_wide == sequence.slot.is_wide
        return sequence.shared_prefix_tokens if same_type else len(sequence.slot.tokens)

    def _rows(self, one: ScheduledSequence) -> Iterator[RowsInput]:
        """The chunks of a sequence, with its draft tokens behind the last chunk, whose last rows alone need logits."""
        position = one.start
        draft_tokens = tuple(draft_token.token for draft_token in one.draft.draft_tokens)
        for number, chunk in enumerate(one.chunks, 1):
            is_last = number == len(one.chunks)
            drafted = draft_tokens if is_last else ()
            yield RowsInput(
                slot=one.sequence.slot.number,
                start=position,
                token_ids=(*chunk, *drafted),
                num_logits=1 + len(drafted) if is_last else 0,
                row_invariant=bool(drafted)
                or self._rules.is_row_invariant(one.sequence.prompt_tokens, position, len(chunk)),
            )
            position += len(chunk)

    def _propose(self, speculation: Speculation, scheduled: Sequence[ScheduledSequence]) -> None:
        """Add draft tokens to sequences that decode, where their rows pay."""
        free = self.pool.free_tokens({one.sequence.slot: one.end for one in scheduled}) // max(1, len(scheduled))
        limits, rows, prefill_rows = [], 0, 0
        for one in scheduled:
            sequence, position, verifies = one.sequence, one.start, one.is_complete
            for chunk in one.chunks:
                if self._rules.is_row_invariant(sequence.prompt_tokens, position, len(chunk)):
                    rows += len(chunk)
                else:
                    prefill_rows += len(chunk)
                    verifies = False
                position += len(chunk)
            most = min(self.info.capacity - len(sequence.tokens), free)
            limit = min(self._max_draft_tokens, sequence.max_tokens - sequence.generated - 1, most) if verifies else 0
            limits.append((one.draft, limit))
        if any(limit > 0 for _, limit in limits):
            speculation.propose(limits, rows, prefill_rows)

    def _verify(self, sequence: SequenceState, draft: Draft, logits: torch.Tensor) -> list[int]:
        """Sample from each row's logits while the draft tokens agree; forget the rows behind them."""
        first = len(sequence.tokens)
        for row, draft_token in enumerate([*draft.draft_tokens, None]):
            token = sequence.sampler.draw(logits[row], sequence.tokens)
            sequence.logprobs.append(sequence.sampler.logprobs(logits[row], token))
            sequence.tokens.append(token)
            if draft_token is None or draft_token.token != token:
                break
        new = sequence.tokens[first:]
        if self.speculation is not None:
            self.speculation.record_accepted(draft, len(new) - 1)
        sequence.slot.tokens += new[:-1]
        return new
