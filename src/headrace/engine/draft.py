"""What might come next: drafters guess tokens that the model then verifies, all in one pass.

A drafter looks at a sequence and names a token with a `Grade`: what kind of guess it is and how sure. How good guesses of
a grade are is not assumed but counted (see `depth`). Drafters never have to be told what became of their guesses: they
look at the sequence again, and forget what no longer agrees with it.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from headrace.engine.attention import CacheOverflow, KVCache
from headrace.engine.engine import Engine, Rows
from headrace.engine.model_cache import ModelCache
from headrace.engine.sampling import Sampler
from headrace.errors import CheckpointError
from headrace.plan.rooms import DRAFT_PROMPT_ROWS


class Grade(NamedTuple):
    """Guesses that are counted together: who made them, and how sure, from 0 to `SURE`."""

    source: str
    level: int


class Guess(NamedTuple):
    """A token, and the grade of the guess."""

    token: int
    grade: Grade


SURE = 9


@dataclass(eq=False)
class Draft:
    """One sequence to guess for: its tokens so far, how it draws, and the guesses made."""

    tokens: Sequence[int]
    sampler: Sampler
    guesses: list[Guess] = field(default_factory=list)


class PromptLookup:
    """Guesses that the text goes on as it did the last time: the longest suffix that occurred before, and what followed.

    Costs nothing, and is right where text is edited, quoted or repeated (Saxena: Prompt Lookup Decoding, 2023).
    """

    SHORTEST, LONGEST, CANDIDATES = 2, 32, 24
    source = "prompt"

    def guess(self, draft: Draft) -> bool:
        """Append a guess to the draft, if its suffix occurred before."""
        found = self._continuation([*draft.tokens, *(guess.token for guess in draft.guesses)])
        if found is None:
            return False
        token, length = found
        draft.guesses.append(Guess(token, Grade(self.source, min(SURE, length.bit_length() * 2 - 2))))
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
        """How many tokens before `after` equal those at the end."""
        length = self.SHORTEST
        while length < self.LONGEST and length < after and tokens[after - 1 - length] == tokens[-1 - length]:
            length += 1
        return length


@dataclass
class _Held:
    """What the draft model has computed of one sequence."""

    cache: KVCache | ModelCache
    tokens: list[int]


class ModelDrafter:
    """A small model that stays in memory guesses. It draws as the sequence does, so that it hits the same token."""

    def __init__(self, engine: Engine, context_tokens: int, source: str = "model"):
        """`engine` holds the draft model, `context_tokens` is the most that a sequence has."""
        self.engine = engine
        self.source = source
        self._context_tokens = context_tokens
        self._held: dict[int, _Held] = {}  # by the identity of the sequence's list of tokens
        self._is_broken = False  # whether the draft model computes values that are not finite
        self._left: list[_Held] = []  # of sequences that have ended: the next may begin alike

    def guess(self, drafts: Sequence[Draft]) -> int:
        """Append a guess to each draft, in one pass over the draft model; returns the rows that were computed."""
        work = []
        if self._is_broken:
            return 0
        before = len(self.engine.passes)
        for draft in drafts:
            tokens = [*draft.tokens, *(guess.token for guess in draft.guesses)]
            if len(tokens) < self._context_tokens:
                work.append((draft, self._agreed(draft, tokens), tokens))
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
            token, confidence = draft.sampler.draw_with_confidence(row, len(tokens))
            draft.guesses.append(Guess(token, Grade(self.source, min(SURE, int(confidence * (SURE + 1))))))
        return sum(stats.rows for stats in self.engine.passes[before:])

    def forget(self, tokens: Sequence[int]) -> None:
        """The sequence has ended."""
        held = self._held.pop(id(tokens), None)
        if held is not None:
            self._left.append(held)

    def _agreed(self, draft: Draft, tokens: list[int]) -> _Held:
        """What is computed of this sequence, cut where it no longer agrees; at least one token is left to compute."""
        held = self._held.get(id(draft.tokens))
        if held is None:
            held = self._held[id(draft.tokens)] = self._take(tokens)
        length = min(common_length(held.tokens, tokens[:-1]), held.cache.length)
        held.cache.truncate(length)
        held.tokens = held.tokens[:length]
        return held

    def _take(self, tokens: list[int]) -> _Held:
        """For a new sequence: of those that have ended the one that it shares most with, so that there are never more caches
        than there were sequences at a time."""
        if not self._left:
            return _Held(self.engine.new_cache(self._context_tokens), [])
        best = max(self._left, key=lambda held: common_length(held.tokens, tokens))
        self._left.remove(best)
        return best

    def _step(self, held: Sequence[_Held], tokens: Sequence[list[int]]) -> torch.Tensor | None:
        """Logits of the last tokens; None: there is no guess this time."""
        try:
            logits = self.engine.step(
                [Rows(cache=h.cache, tokens=t[h.cache.length :], exact=True) for h, t in zip(held, tokens, strict=True)]
            )
        except CacheOverflow as overflow:  # the next guess begins from the start, in a type that holds large values
            overflow.cache.widen()
            return None
        except CheckpointError:  # the answer goes on without guesses
            self._is_broken = True
            return None
        for h, t in zip(held, tokens, strict=True):
            h.tokens = list(t)
        return logits


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    if other[: len(one)] == one:
        return len(one)
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count
