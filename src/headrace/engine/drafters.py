"""Drafters propose tokens that the model verifies, all in one pass.

A drafter proposes a token with a `ConfidenceBucket`: which drafter, and how confident. The acceptance rate of each bucket is
counted, not assumed (`speculation.py`). Drafters need no result: they read the sequence again and rewind to the common prefix.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from headrace.engine.attention import CacheOverflow, KVCache
from headrace.engine.engine import Engine, Rows
from headrace.engine.native_cache import NativeCache
from headrace.engine.sampler import Sampler
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


@dataclass
class _DraftSequence:
    """The draft model's KV cache of one sequence, and the tokens in it."""

    cache: KVCache | NativeCache
    tokens: list[int]


class ModelDrafter:
    """A small resident model drafts. It samples with the sequence's own sampler, so that it often draws the same token."""

    def __init__(self, engine: Engine, context_tokens: int, source: str = "model"):
        """`engine` holds the draft model, `context_tokens` is the max length of a sequence."""
        self.engine = engine
        self.source = source
        self._context_tokens = context_tokens
        self._active: dict[int, _DraftSequence] = {}  # by the identity of the sequence's list of tokens
        self._is_broken = False  # True after the draft model computed values that are not finite
        self._idle: list[_DraftSequence] = []  # caches of sequences that have ended, for prefix caching

    def propose(self, drafts: Sequence[Draft]) -> int:
        """Append a draft token to each draft in one pass of the draft model; return the rows computed."""
        work = []
        if self._is_broken:
            return 0
        before = len(self.engine.passes)
        for draft in drafts:
            tokens = [*draft.tokens, *(draft_token.token for draft_token in draft.draft_tokens)]
            if len(tokens) < self._context_tokens:
                work.append((draft, self._rewind_to_common_prefix(draft, tokens), tokens))
        while behind := [
            (held, tokens) for _, held, tokens in work if len(tokens) - held.cache.length > DRAFT_PROMPT_ROWS
        ]:
            held, tokens = behind[0]
            if self._step([held], [tokens[: held.cache.length + DRAFT_PROMPT_ROWS]]) is None:
                return 0
        if not work:
            return 0
        logits = self._step([held for _, held, _ in work], [tokens for _, _, tokens in work])
        if logits is None:
            return 0
        for (draft, _, tokens), row in zip(work, logits, strict=True):
            token, confidence = draft.sampler.draw_with_confidence(row, tokens)
            draft.draft_tokens.append(
                DraftToken(token, ConfidenceBucket(self.source, min(MAX_BUCKET, int(confidence * (MAX_BUCKET + 1)))))
            )
        return sum(stats.rows for stats in self.engine.passes[before:])

    def forget(self, tokens: Sequence[int]) -> None:
        """Keep the cache of an ended sequence for prefix caching."""
        held = self._active.pop(id(tokens), None)
        if held is not None:
            self._idle.append(held)

    def _rewind_to_common_prefix(self, draft: Draft, tokens: list[int]) -> _DraftSequence:
        """The sequence's cache, truncated to the common prefix with `tokens`; at least one token is left to compute."""
        held = self._active.get(id(draft.tokens))
        if held is None:
            held = self._active[id(draft.tokens)] = self._take(tokens)
        length = min(common_length(held.tokens, tokens[:-1]), held.cache.length)
        held.cache.truncate(length)
        held.tokens = held.tokens[:length]
        return held

    def _take(self, tokens: list[int]) -> _DraftSequence:
        """The idle cache with the longest common prefix, or a new one if none is idle."""
        if not self._idle:
            return _DraftSequence(self.engine.new_cache(self._context_tokens), [])
        best = max(self._idle, key=lambda held: common_length(held.tokens, tokens))
        self._idle.remove(best)
        return best

    def _step(self, held: Sequence[_DraftSequence], tokens: Sequence[list[int]]) -> torch.Tensor | None:
        """Logits of the last tokens; None: no draft token this time."""
        try:
            logits = self.engine.step(
                [
                    Rows(cache=h.cache, tokens=t[h.cache.length :], row_invariant=True)
                    for h, t in zip(held, tokens, strict=True)
                ]
            )
        except CacheOverflow as overflow:  # the next draft starts over, with a wider cache
            overflow.cache.widen()
            return None
        except CheckpointError:  # decoding goes on without drafts
            self._is_broken = True
            return None
        for h, t in zip(held, tokens, strict=True):
            h.tokens = list(t)
        return logits


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
