"""Chooses the rows of each pass: prompt chunks, decoded tokens and draft tokens of all running sequences.

A sequence is a list of tokens; the KV cache holds a prefix of it. Each pass computes the uncomputed rest: a prompt in chunks,
a decoded token as one row, draft tokens behind it. The pass yields the accepted draft tokens and one more token. So
prefill, decode and verification are the same code, for one sequence as for many. Sequences come and go between passes.

Chunk boundaries do not depend on other work, and a chunk's results depend on its sequence alone. Only whole chunks of
prompts are reused. So the same prompt gives the same tokens after any earlier work and beside any other sequences.
The price: a chunk that a prompt shares in part is computed again. So are generated tokens that have become part of a
prompt, because decode kernels round differently. `deterministic=False` reuses both.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from headrace.engine.attention import CacheOverflow, KVCache
from headrace.engine.drafters import Draft, common_length
from headrace.engine.engine import Engine, Rows
from headrace.engine.native_cache import NativeCache
from headrace.engine.sampler import Sampler, TokenLogprobs
from headrace.engine.speculation import Speculation
from headrace.kernels import DECODE_MAX_ROWS
from headrace.kernels.thresholds import CHUNK_ROWS, SMALL_CHUNK_ROWS

# Min length of a common prefix to wait for; a shorter one is computed again.
MIN_SHARED_PREFIX_TOKENS = 16


@dataclass(frozen=True)
class Chunks:
    """Prompts are cut into chunks at multiples of `first` up to position `tokens`, then at multiples of `tokens`.

    `first` divides `tokens`, so that `whole` is always the end of a chunk.
    """

    first: int
    tokens: int

    def end(self, start: int) -> int:
        """End of the chunk that holds position `start`."""
        step = self.first if start < self.tokens else self.tokens
        return (start // step + 1) * step

    def whole(self, count: int) -> int:
        """Number of the first `count` tokens that lie in whole chunks."""
        step = self.first if count < self.tokens else self.tokens
        return count // step * step


@dataclass(eq=False)
class Slot:
    """A KV cache and its tokens. Kept after its sequence ends, for prefix caching."""

    cache: KVCache | NativeCache
    tokens: list[int] = field(default_factory=list)
    prompt_tokens: int = 0  # number of tokens computed as a prompt

    def cached_prefix_len(self, prompt: Sequence[int], chunks: "Chunks | None") -> int:
        """Number of a prompt's tokens that need not be computed again, never its last.

        `chunks`: only whole chunks of a prompt are reused; None: all tokens in the cache.
        """
        if self.is_wide:
            return 0  # a wide cache is not reused by other prompts
        common = min(common_length(self.tokens, prompt[:-1]), self.cache.length)
        if not self.cache.accepts_multiple_rows and (chunks is not None or common < len(prompt) - 1):
            return 0  # this cache cannot resume in the middle of a prompt
        return common if chunks is None else chunks.whole(min(common, self.prompt_tokens))

    @property
    def is_wide(self) -> bool:
        """True if the cache stores keys and values in its wide type."""
        return isinstance(self.cache, KVCache) and self.cache.is_wide

    def truncate(self, count: int) -> None:
        """Forget all but the first `count` tokens."""
        self.cache.truncate(count)
        del self.tokens[count:]
        self.prompt_tokens = min(self.prompt_tokens, count)


@dataclass(eq=False)
class SequenceState:
    """One running sequence: the prompt and the tokens generated so far."""

    tokens: list[int]
    prompt_tokens: int
    max_tokens: int  # max tokens to generate
    sampler: Sampler
    slot: Slot
    prefix_source: "SequenceState | None" = None  # sequence that computes the common prefix
    shared_prefix_tokens: int = 0
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)  # of each generated token

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def uncomputed(self) -> list[int]:
        """Tokens that are not computed yet."""
        return self.tokens[self.slot.cache.length :]


class Scheduler:
    """Makes passes for sequences that come and go. `speculation=None`: one token per sequence and pass."""

    def __init__(
        self,
        engine: Engine,
        slots: Sequence[Slot],
        prefill_rows: int,
        max_draft_tokens: int = 0,
        deterministic: bool = True,
    ):
        """Set the options that hold for all sequences.

        Args:
            engine: makes the passes.
            slots: one for each concurrent sequence.
            prefill_rows: max prompt rows of a pass.
            max_draft_tokens: max draft tokens of one sequence in a pass.
            deterministic: reuse nothing whose reuse could change the last bits of a result.
        """
        self.engine = engine
        self.speculation: Speculation | None = None
        self.sequences: list[SequenceState] = []
        self._slots = list(slots)
        self._free = list(slots)
        self._prefill_rows = prefill_rows
        # In other attention modes than packed, a pass takes one chunk of a sequence.
        self._one_chunk = engine.attention_mode != "packed"
        tokens = prefill_rows if self._one_chunk else min(CHUNK_ROWS, prefill_rows)
        # Small chunks let more of a prefix be reused; they cost nothing if prefill is row-invariant.
        self._small_chunks = not self._one_chunk and engine.prefill_is_row_invariant and prefill_rows > DECODE_MAX_ROWS
        if self._small_chunks:
            self._chunks = Chunks(SMALL_CHUNK_ROWS, tokens // SMALL_CHUNK_ROWS * SMALL_CHUNK_ROWS)
        else:
            self._chunks = Chunks(tokens, tokens)
        self._reused_chunks = self._chunks if deterministic else None
        self._max_draft_tokens = max_draft_tokens

    @property
    def has_free_slot(self) -> bool:
        """True if another sequence can be added."""
        return bool(self._free)

    def add(self, prompt: list[int], max_tokens: int, sampler: Sampler) -> SequenceState:
        """Start a sequence. A prefix of its prompt that a cache holds is not computed again."""
        slot = max(self._free, key=lambda slot: slot.cached_prefix_len(prompt, self._reused_chunks))
        own = slot.cached_prefix_len(prompt, self._reused_chunks)
        sequence = SequenceState(
            tokens=list(prompt), prompt_tokens=len(prompt), max_tokens=max_tokens, sampler=sampler, slot=slot
        )
        prefix_source = max(self.sequences, key=lambda other: common_length(other.tokens, prompt[:-1]), default=None)
        shared = 0 if prefix_source is None else self._shareable_prefix(prefix_source, prompt)
        if shared >= own + MIN_SHARED_PREFIX_TOKENS:
            sequence.prefix_source, sequence.shared_prefix_tokens = prefix_source, shared
        slot.truncate(own)
        if slot.is_wide and isinstance(slot.cache, KVCache):
            slot.cache.restore()
        slot.prompt_tokens = len(prompt)
        self._free.remove(slot)
        self.sequences.append(sequence)
        return sequence

    def _shareable_prefix(self, prefix_source: SequenceState, prompt: Sequence[int]) -> int:
        """Number of a prompt's reusable tokens that another sequence has computed or will compute."""
        common = common_length(prefix_source.tokens, prompt[:-1])
        return common if self._reused_chunks is None else self._chunks.whole(min(common, prefix_source.prompt_tokens))

    def reset(self) -> None:
        """Free all slots after any interruption; the caches of unfinished sequences are dropped."""
        for slot in self._slots:
            if slot not in self._free:
                slot.cache.rollback()
                slot.truncate(0)
        self.sequences.clear()
        self._free = list(self._slots)

    def remove(self, sequence: SequenceState) -> None:
        """End a sequence, finished or not. Its cache is kept for prefix caching. Safe to call twice."""
        if sequence not in self.sequences:
            return
        self.sequences.remove(sequence)
        for other in self.sequences:
            if other.prefix_source is sequence:
                other.prefix_source = None  # the other one computes the prefix itself
        sequence.slot.truncate(min(sequence.slot.cache.length, len(sequence.tokens)))
        self._free.append(sequence.slot)
        if self.speculation is not None:
            self.speculation.forget(sequence.tokens)

    def step(self) -> list[tuple[SequenceState, list[int]]]:
        """Run one pass for all sequences that can go on; return new tokens of those whose prompt is computed."""
        start = time.perf_counter()
        loads = not self.engine.passes  # the first pass reads the pinned weights
        try:
            chunks = self._pending_chunks()
            drafts = [Draft(sequence.tokens, sequence.sampler) for sequence, _ in chunks]
            if self.speculation is not None:
                self._propose(self.speculation, chunks, drafts)
            draft_s = time.perf_counter() - start
            batch = [
                rows
                for (sequence, own), draft in zip(chunks, drafts, strict=True)
                for rows in self._rows(sequence, own, draft)
            ]
            try:
                found = self.engine.step(batch)
            except CacheOverflow as overflow:
                self._widen(overflow.cache)
                return []
            logits = torch.split(found, [1 + len(draft.draft_tokens) for draft in drafts])
        except BaseException:  # before the pass as well: some caches may already include a prefix that is not computed
            for sequence in self.sequences:
                sequence.slot.cache.rollback()
            raise
        news = []
        for (sequence, _), draft, part in zip(chunks, drafts, logits, strict=True):
            sequence.slot.tokens = sequence.tokens[: sequence.slot.cache.length]
            if len(sequence.slot.tokens) == len(sequence.tokens):
                news.append((sequence, self._verify(sequence, draft, part)))
        stats = replace(
            self.engine.passes[-1],
            draft_s=draft_s,
            drafted=sum(len(draft.draft_tokens) for draft in drafts),
            accepted=sum(len(new) - 1 for _, new in news),
        )
        self.engine.passes.replace_last(stats)
        if self.speculation is not None and not loads and all(rows.is_row_invariant for rows in batch):
            self.speculation.step_times.record_pass(stats)
            self.speculation.step_times.record_step(sum(len(new) for _, new in news), time.perf_counter() - start)
        if self.engine.trace is not None:
            self.engine.trace.add("draft", f"{stats.drafted} draft tokens", start, start + draft_s)
            self.engine.trace.add("step", f"bound by {stats.bound_by}", start, time.perf_counter())
        return news

    def _widen(self, cache: KVCache) -> None:
        """Compute a sequence again from its start in the wide type, after a key or value overflowed FP16."""
        for sequence in self.sequences:
            sequence.slot.cache.rollback()
            if sequence.slot.cache is cache:
                sequence.slot.tokens.clear()
        cache.widen()

    def _pending_chunks(self) -> list[tuple[SequenceState, list[list[int]]]]:
        """Chunks of each sequence to compute in this pass, in order of arrival: whole chunks, as many as fit.

        A chunk of one row always fits.
        """
        budget = self._prefill_rows - 1
        chunks: list[tuple[SequenceState, list[list[int]]]] = []
        computed: dict[SequenceState, int] = {}  # positions after this pass
        for sequence in self.sequences:
            start, prefix_source = sequence.slot.cache.length, sequence.prefix_source
            if prefix_source is not None:
                if computed.get(prefix_source, prefix_source.slot.cache.length) < sequence.shared_prefix_tokens:
                    continue  # the source's prompt takes several passes
                if prefix_source.slot.cache.type == sequence.slot.cache.type:
                    start = sequence.shared_prefix_tokens
            own: list[list[int]] = []
            taken = 0
            for chunk in self._cut(sequence, start):
                if (own and self._one_chunk) or (taken + len(chunk) > 1 + budget and (own or chunks)):
                    break
                own.append(chunk)
                taken += len(chunk)
            if not own:
                continue
            if prefix_source is not None and start > sequence.slot.cache.length:
                mine, theirs = sequence.slot.cache, prefix_source.slot.cache
                assert isinstance(mine, KVCache)
                assert isinstance(theirs, KVCache)
                mine.copy_prefix(theirs, start)
            sequence.prefix_source = None
            budget = max(0, budget - (taken - 1))
            chunks.append((sequence, own))
            computed[sequence] = start + taken
        return chunks

    def _cut(self, sequence: SequenceState, start: int) -> Iterator[list[int]]:
        """Chunks of a sequence's tokens from `start` on. They end at multiples of their size and at the end of the prompt."""
        tokens = sequence.tokens
        if not sequence.slot.cache.accepts_multiple_rows:
            yield tokens[start:]
            return
        while start < len(tokens):
            end = min(
                self._chunks.end(start), sequence.prompt_tokens if start < sequence.prompt_tokens else len(tokens)
            )
            yield tokens[start:end]
            start = end

    def _rows(self, sequence: SequenceState, chunks: Sequence[list[int]], draft: Draft) -> Iterator[Rows]:
        """The chunks of a sequence, with its draft tokens behind the last chunk, whose last rows alone need logits."""
        cache, draft_tokens = sequence.slot.cache, [draft_token.token for draft_token in draft.draft_tokens]
        # With small chunks the prompt's length, not the chunk's, decides between decode and prefill kernels. So all reusable
        # rows come from the prefill kernels.
        prefill = self._small_chunks and not sequence.generated and sequence.prompt_tokens >= self._chunks.first
        row_invariant = False if prefill else None
        for chunk in chunks[:-1]:
            yield Rows(cache=cache, tokens=chunk, logits=0, row_invariant=row_invariant)
        yield Rows(
            cache=cache,
            tokens=chunks[-1] + draft_tokens,
            logits=1 + len(draft_tokens),
            row_invariant=True if draft_tokens else row_invariant,
        )

    def _propose(
        self, speculation: Speculation, chunks: Sequence[tuple[SequenceState, list[list[int]]]], drafts: Sequence[Draft]
    ) -> None:
        prefills = self._small_chunks and any(not sequence.generated for sequence, _ in chunks)
        if prefills or any(len(chunk) > DECODE_MAX_ROWS for _, own in chunks for chunk in own):
            return  # a prompt is computed: the pass is long anyway, and rates are not those of decoding
        limits = []
        for (sequence, own), draft in zip(chunks, drafts, strict=True):
            ready = sum(map(len, own)) == len(sequence.uncomputed)
            free = sequence.slot.cache.capacity - len(sequence.tokens)
            limit = min(self._max_draft_tokens, sequence.max_tokens - sequence.generated - 1, free) if ready else 0
            limits.append((draft, limit))
        speculation.propose(limits, sum(len(chunk) for _, own in chunks for chunk in own))

    def _verify(self, sequence: SequenceState, draft: Draft, logits: torch.Tensor) -> list[int]:
        """Sample from each row's logits while the draft tokens agree; truncate the cache behind them."""
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
        sequence.slot.cache.truncate(len(sequence.tokens) - 1)
        return new
