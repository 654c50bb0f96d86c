"""Drafters propose tokens that the model verifies, all in one pass.

A drafter proposes a token with a `ConfidenceBucket`: which drafter, and how confident. The acceptance rate of each bucket is
counted, not assumed (`speculation.py`). Drafters need no result: they read the sequence again and rewind to the common prefix.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from headrace.engine.runner import ModelRunner
from headrace.engine.sampler import Sampler
from headrace.engine.step import RowsInput, StepInput
from headrace.errors import CheckpointError
from headrace.plan.memory_plan import DRAFT_PROMPT_ROWS


class ConfidenceBucket(NamedTuple):
    """Draft tokens that are counted together: their drafter, and a bucket of confidence from 0 to `MAX_BUCKET`."""

    source: str
    bucket: int


class DraftToken(NamedTuple):
    """A proposed token and its confidence."""

    token: int
    confidence: ConfidenceBucket


MAX_BUCKET = 9


@dataclass(eq=False)
class Draft:
    """The draft of one sequence: its tokens so far, its sampler, and the draft tokens proposed."""

    sequence_id: int
    tokens: Sequence[int]
    sampler: Sampler
    draft_tokens: list[DraftToken] = field(default_factory=list)


class PromptLookup:
    """Proposes the token that followed the last occurrence of the longest suffix.

    Costs nothing, and is accepted where text is edited, quoted or repeated (Saxena: Prompt Lookup Decoding, 2023).
    """

    SHORTEST, LONGEST, CANDIDATES = 2, 32, 24
    source = "prompt"

    def propose(self, draft: Draft) -> bool:
        """Append a draft token, if the suffix occurred before."""
        found = self._continuation([*draft.tokens, *(draft_token.token for draft_token in draft.draft_tokens)])
        if found is None:
            return False
        token, length = found
        draft.draft_tokens.append(
            DraftToken(token, ConfidenceBucket(self.source, min(MAX_BUCKET, length.bit_length() * 2 - 2)))
        )
        return True

    def _continuation(self, tokens: list[int]) -> tuple[int, int] | None:
        """(the next token, length of the match), or None. Of equally long matches the latest."""
        if len(tokens) <= self.SHORTEST:
            return None
        packed = array("I", tokens)
        text, size = packed.tobytes(), packed.itemsize
        suffix = text[-self.SHORTEST * size :]
        best: tuple[int, int] | None = None
        end = len(text) - size  # a match must end before the last token
        for _ in range(self.CANDIDATES):
            at = text.rfind(suffix, 0, end)
            if at < 0:
                break
            end = at + len(suffix) - 1
            if at % size:
                continue
            after = at // size + self.SHORTEST
            length = self._matching(tokens, after)
            if best is None or length > best[1]:
                best = tokens[after], length
            if length >= self.LONGEST:
                break
        return best

    def _matching(self, tokens: list[int], after: int) -> int:
        """Number of tokens before `after` that equal those at the end."""
        length = self.SHORTEST
        while length < self.LONGEST and length < after and tokens[after - 1 - length] == tokens[-1 - length]:
            length += 1
        return length


@dataclass(eq=False)
class _DraftCache:
    """A KV cache of the draft model, and the tokens in it."""

    slot: int
    tokens: list[int] = field(default_factory=list)
    is_wide: bool = False


class ModelDrafter:
    """A small resident model drafts. It samples with the sequence's own sampler, so that it often draws the same token."""

    def __init__(self, runner: ModelRunner, source: str = "model"):
        """`runner` holds the draft model, with as many slots as sequences run at the same time."""
        self.runner = runner
        self.source = source
        self._active: dict[int, _DraftCache] = {}  # by the sequence's id
        self._is_broken = False  # True after the draft model computed values that are not finite
        # Caches of sequences that have ended, for prefix caching.
        self._idle = [_DraftCache(slot) for slot in range(runner.info.num_slots)]

    def propose(self, drafts: Sequence[Draft]) -> int:
        """Append a draft token to each draft in one pass of the draft model; return the rows computed."""
        work, computed = [], 0
        if self._is_broken:
            return 0
        for draft in drafts:
            tokens = [*draft.tokens, *(draft_token.token for draft_token in draft.draft_tokens)]
            if len(tokens) < self.runner.info.capacity:
                work.append((draft, self._rewind_to_common_prefix(draft, tokens), tokens))
        while behind := [(cache, t) for _, cache, t in work if len(t) - len(cache.tokens) > DRAFT_PROMPT_ROWS]:
            cache, tokens = behind[0]
            computed += DRAFT_PROMPT_ROWS
            if self._step([cache], [tokens[: len(cache.tokens) + DRAFT_PROMPT_ROWS]]) is None:
                return 0
        if not work:
            return 0
        computed += sum(len(tokens) - len(cache.tokens) for _, cache, tokens in work)
        logits = self._step([cache for _, cache, _ in work], [tokens for _, _, tokens in work])
        if logits is None:
            return 0
        for (draft, _, tokens), row in zip(work, logits, strict=True):
            token, confidence = draft.sampler.draw_with_confidence(row, tokens)
            draft.draft_tokens.append(
                DraftToken(token, ConfidenceBucket(self.source, min(MAX_BUCKET, int(confidence * (MAX_BUCKET + 1)))))
            )
        return computed

    def forget(self, sequence_id: int) -> None:
        """Keep the cache of an ended sequence for prefix caching."""
        cache = self._active.pop(sequence_id, None)
        if cache is not None:
            self._idle.append(cache)

    def _rewind_to_common_prefix(self, draft: Draft, tokens: list[int]) -> _DraftCache:
        """The sequence's cache, truncated to the common prefix with `tokens`; at least one token is left to compute."""
        cache = self._active.get(draft.sequence_id)
        if cache is None:
            cache = max(self._idle, key=lambda one: common_length(one.tokens, tokens))
            self._idle.remove(cache)
            self._active[draft.sequence_id] = cache
        del cache.tokens[common_length(cache.tokens, tokens[:-1]) :]
        return cache

    def _step(self, caches: Sequence[_DraftCache], tokens: Sequence[list[int]]) -> torch.Tensor | None:
        """Logits of the last tokens; None: no draft token this time."""
        rows = [
            RowsInput(
                slot=cache.slot,
                start=len(cache.tokens),
                token_ids=tuple(t[len(cache.tokens) :]),
                row_invariant=True,
            )
            for cache, t in zip(caches, tokens, strict=True)
        ]
        wide = frozenset(cache.slot for cache in caches if cache.is_wide)
        try:
            output = self.runner.execute(StepInput(rows=tuple(rows), wide=wide))
        except CheckpointError:
            output = None
        if output is None or output.failed:  # decoding goes on without drafts
            self._is_broken = True
            return None
        if output.overflowed is not None:  # the next draft starts over, with a wider cache
            wider = next(cache for cache in caches if cache.slot == output.overflowed)
            wider.is_wide = True
            wider.tokens.clear()
            return None
        for cache, t in zip(caches, tokens, strict=True):
            cache.tokens = list(t)
        return output.logits


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix of two token lists."""
    if other[: len(one)] == one:
        return len(one)
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count
