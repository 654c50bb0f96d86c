"""Which rows a pass carries: prompts, decoded tokens and guesses of all answers in the making.

An answer is a list of tokens, of which the cache holds the first so many. What is pending is computed by the next pass,
in chunks where it is a long prompt; when nothing is pending but the last tokens, guesses follow them, and the pass yields
as many tokens as were guessed right and one more. So prefill, decode and verification are the same thing, for one answer
as for many, and answers come and go between any two passes.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from headrace.engine.attention import KVCache
from headrace.engine.depth import Speculation
from headrace.engine.draft import Draft, common_length
from headrace.engine.engine import Engine, Rows
from headrace.engine.model_cache import ModelCache
from headrace.engine.sampling import Sampler
from headrace.kernels import FEW_ROWS

# A shared beginning shorter than this is computed again rather than waited for.
WORTH_SHARING = 16


@dataclass(eq=False)
class Slot:
    """A cache, and the tokens whose keys and values it holds. Kept when its answer has ended: the next may begin alike."""

    cache: KVCache | ModelCache
    tokens: list[int] = field(default_factory=list)

    def holds(self, prompt: Sequence[int]) -> int:
        """How many tokens of a prompt, all but its last at most, need not be computed again."""
        common = min(common_length(self.tokens, prompt[:-1]), self.cache.length)
        if isinstance(self.cache, ModelCache) and not self.cache.continues and common < len(prompt) - 1:
            return 0  # several rows after others: sooner from the beginning
        return common

    def keep(self, count: int) -> None:
        """Forget all but the first `count` tokens."""
        self.cache.truncate(count)
        del self.tokens[count:]


@dataclass(eq=False)
class Answer:
    """One sequence in the making: the prompt and what was generated so far."""

    tokens: list[int]
    prompt_tokens: int
    most_tokens: int  # to generate
    sampler: Sampler
    slot: Slot
    donor: "Answer | None" = None  # computes a beginning that both share
    shared: int = 0

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def pending(self) -> list[int]:
        """Tokens that are not computed yet."""
        return self.tokens[self.slot.cache.length :]


class Scheduler:
    """Makes passes for answers that come and go. `speculation=None`: one token per answer and pass."""

    def __init__(self, engine: Engine, slots: Sequence[Slot], prefill_rows: int, most_guesses: int = 0):
        """`prefill_rows` is the most prompt rows of a pass, `most_guesses` the most guesses for one answer."""
        self.engine = engine
        self.speculation: Speculation | None = None
        self.answers: list[Answer] = []
        self._free = list(slots)
        self._prefill_rows = prefill_rows
        self._most_guesses = most_guesses

    @property
    def has_room(self) -> bool:
        """Whether another answer can be added."""
        return bool(self._free)

    def add(self, prompt: list[int], most_tokens: int, sampler: Sampler) -> Answer:
        """Begin an answer. What its prompt shares with what a cache holds is not computed again."""
        slot = max(self._free, key=lambda slot: slot.holds(prompt))
        own = slot.holds(prompt)
        answer = Answer(
            tokens=list(prompt), prompt_tokens=len(prompt), most_tokens=most_tokens, sampler=sampler, slot=slot
        )
        donor = max(self.answers, key=lambda other: common_length(other.tokens, prompt[:-1]), default=None)
        shared = 0 if donor is None else common_length(donor.tokens, prompt[:-1])
        if shared >= own + WORTH_SHARING:
            answer.donor, answer.shared = donor, shared
        slot.keep(own)
        self._free.remove(slot)
        self.answers.append(answer)
        return answer

    def remove(self, answer: Answer) -> None:
        """End an answer, finished or not. Its cache is kept for what comes next."""
        self.answers.remove(answer)
        for other in self.answers:
            if other.donor is answer:
                other.donor = None  # it computes the beginning itself
        answer.slot.keep(min(answer.slot.cache.length, len(answer.tokens)))
        self._free.append(answer.slot)
        if self.speculation is not None:
            self.speculation.forget(answer.tokens)

    def step(self) -> list[tuple[Answer, list[int]]]:
        """One pass over the weights for all answers that can go on; the new tokens of those whose prompt is computed."""
        start = time.perf_counter()
        loads = not self.engine.passes  # the first pass reads what will be pinned
        try:
            chunks = self._chunks()
            drafts = [Draft(answer.tokens, answer.sampler) for answer, _ in chunks]
            if self.speculation is not None:
                self._propose(self.speculation, chunks, drafts)
            draft_s = time.perf_counter() - start
            batch = [_rows(answer, chunk, draft) for (answer, chunk), draft in zip(chunks, drafts, strict=True)]
            logits = torch.split(self.engine.step(batch), [rows.logits for rows in batch])
        except BaseException:  # before the pass as well: some caches may already count on what others are to compute
            for answer in self.answers:
                answer.slot.cache.abandon()
            raise
        news = []
        for (answer, _), draft, part in zip(chunks, drafts, logits, strict=True):
            answer.slot.tokens = answer.tokens[: answer.slot.cache.length]
            if len(answer.slot.tokens) == len(answer.tokens):
                news.append((answer, self._verify(answer, draft, part)))
        stats = replace(
            self.engine.passes[-1],
            draft_s=draft_s,
            drafted=sum(len(draft.guesses) for draft in drafts),
            accepted=sum(len(new) - 1 for _, new in news),
        )
        self.engine.passes.replace_last(stats)
        if self.speculation is not None and not loads and all(rows.is_exact for rows in batch):
            self.speculation.pace.note_pass(stats)
            self.speculation.pace.note_step(sum(len(new) for _, new in news), time.perf_counter() - start)
        if self.engine.trace is not None:
            self.engine.trace.add("draft", f"{stats.drafted} guesses", start, start + draft_s)
            self.engine.trace.add("step", f"bound by {stats.bound_by}", start, time.perf_counter())
        return news

    def _chunks(self) -> list[tuple[Answer, list[int]]]:
        """What of each answer is computed in this pass: a row at least, and the room for prompts in order of arrival."""
        room = self._prefill_rows - 1
        chunks: list[tuple[Answer, list[int]]] = []
        computed: dict[Answer, int] = {}  # positions after this pass
        for answer in self.answers:
            if answer.donor is not None:
                if computed.get(answer.donor, 0) < answer.shared:
                    continue  # the donor's prompt takes several passes
                mine, theirs = answer.slot.cache, answer.donor.slot.cache
                assert isinstance(mine, KVCache)
                assert isinstance(theirs, KVCache)
                mine.share(theirs, answer.shared)
                answer.donor = None
            chunk = answer.pending[: 1 + room] if answer.slot.cache.continues else answer.pending
            room -= len(chunk) - 1
            chunks.append((answer, chunk))
            computed[answer] = answer.slot.cache.length + len(chunk)
        return chunks

    def _propose(
        self, speculation: Speculation, chunks: Sequence[tuple[Answer, list[int]]], drafts: Sequence[Draft]
    ) -> None:
        if any(len(chunk) > FEW_ROWS for _, chunk in chunks):
            return  # a prompt is on its way: the pass is long as it is, and rates are not those of decoding
        limits = []
        for (answer, chunk), draft in zip(chunks, drafts, strict=True):
            ready = len(chunk) == len(answer.pending)
            room = answer.slot.cache.capacity - len(answer.tokens)
            most = min(self._most_guesses, answer.most_tokens - answer.generated - 1, room) if ready else 0
            limits.append((draft, most))
        speculation.propose(limits, sum(len(chunk) for _, chunk in chunks))

    def _verify(self, answer: Answer, draft: Draft, logits: torch.Tensor) -> list[int]:
        """Draw from the logits of each row as long as the guesses agree; forget what was computed beyond."""
        new: list[int] = []
        for row, guess in enumerate([*draft.guesses, None]):
            new.append(answer.sampler.draw(logits[row], len(answer.tokens) + row))
            if guess is None or guess.token != new[-1]:
                break
        if self.speculation is not None:
            self.speculation.verified(draft, len(new) - 1)
        answer.slot.tokens += new[:-1]
        answer.tokens += new
        answer.slot.cache.truncate(len(answer.tokens) - 1)
        return new


def _rows(answer: Answer, chunk: list[int], draft: Draft) -> Rows:
    guesses = [guess.token for guess in draft.guesses]
    return Rows(
        cache=answer.slot.cache,
        tokens=chunk + guesses,
        logits=1 + len(guesses),
        exact=True if guesses else None,
    )
