"""Draft length is chosen token by token: another draft token is added while it pays.

A draft token costs a pass of the draft model, and one more row in the pass that verifies it. A row is nearly free while the
disk binds, and costs kernel time while compute binds. The draft token is worth P, the probability that it and all draft
tokens before it are accepted. With `rate` tokens per second so far, a draft token that costs `t` seconds pays if

    P >= rate * t

This rule maximises tokens per second in the long run (Dinkelbach, On Nonlinear Fractional Programming, 1967). All four
quantities are measured while generating: acceptance per confidence bucket, pass time by rows, draft time, the rate.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headrace.engine.drafters import MAX_BUCKET, ConfidenceBucket, Draft, ModelDrafter, PromptLookup
from headrace.engine.timeline import PassStats
from headrace.plan.cost import PassCost

# Weight of the past against one new observation: the last twenty count.
_MEMORY = 0.95
# Draft tokens that are accepted less often are dropped, even if rows are free.
_MIN_PROBABILITY = 0.02


@dataclass
class _Count:
    accepted: float
    tested: float


class Acceptance:
    """Acceptance rates by confidence bucket, and by position for the report, if all draft tokens before were accepted."""

    def __init__(self) -> None:
        self._buckets: dict[ConfidenceBucket, _Count] = {}
        self._sources: dict[str, _Count] = {}
        self.positions: list[tuple[int, int]] = []  # (tested, accepted) of the first draft token, the second, ...

    def rate(self, confidence: ConfidenceBucket) -> float:
        """Recent acceptance rate of a bucket; before anything was verified, the middle of the bucket."""
        count = self._buckets.setdefault(confidence, _Count(4 * (confidence.bucket + 0.5) / (MAX_BUCKET + 1), 4.0))
        return count.accepted / count.tested

    def source_rate(self, source: str) -> float:
        """Recent acceptance rate of a drafter over all buckets, for a draft token that is not yet proposed."""
        count = self._sources.setdefault(source, _Count(3.0, 4.0))
        return count.accepted / count.tested

    def record(self, position: int, confidence: ConfidenceBucket, accepted: bool) -> None:
        """Count a verified draft token. All draft tokens before it were accepted."""
        self.rate(confidence)
        self.source_rate(confidence.source)
        for count in (self._buckets[confidence], self._sources[confidence.source]):
            count.accepted = count.accepted * _MEMORY + accepted
            count.tested = count.tested * _MEMORY + 1
        while len(self.positions) <= position:
            self.positions.append((0, 0))
        tested, hits = self.positions[position]
        self.positions[position] = (tested + 1, hits + accepted)


class StepTimeModel:
    """Seconds of passes and draft tokens: the planned cost, corrected by running measurements."""

    def __init__(self, cost: Callable[[int], PassCost], draft_token_s: float = 0.0):
        """`cost` predicts a pass by its rows, `draft_token_s` one draft token of the draft model."""
        self._cost = cost
        self._disk_s = cost(1).disk_s
        self._compute_factor = 1.0
        self.draft_token_s = draft_token_s
        self._tokens, self._seconds = 1.0, self.pass_s(1)

    def pass_s(self, rows: int, prefill_rows: int = 0) -> float:
        """Seconds of a pass of `rows` row-invariant rows and `prefill_rows` others."""
        compute_s = self._cost(rows).compute_s + (self._cost(prefill_rows).compute_s if prefill_rows else 0.0)
        return max(self._disk_s, self._compute_factor * compute_s)

    @property
    def rate(self) -> float:
        """Recent tokens per second."""
        return self._tokens / self._seconds

    def record_pass(self, stats: PassStats) -> None:
        """Correct the model by a finished pass."""
        computed = stats.seconds - stats.stall_s
        factor = computed / self._cost(stats.rows).compute_s
        self._compute_factor += 0.2 * (factor - self._compute_factor)
        waited = stats.stall_s > 0.05 * stats.seconds
        if waited or stats.seconds < self._disk_s:
            self._disk_s += 0.3 * (stats.seconds - self._disk_s)

    def record_draft_token(self, seconds: float) -> None:
        """Correct the model by a pass of the draft model."""
        self.draft_token_s += 0.2 * (seconds - self.draft_token_s)

    def record_step(self, tokens: int, seconds: float) -> None:
        """Count the tokens that drafting and its pass produced together, in `seconds`."""
        self._tokens = 0.9 * self._tokens + tokens
        self._seconds = 0.9 * self._seconds + seconds


@dataclass(eq=False)
class _Open:
    """A draft that may still grow, and the probability that all its tokens so far are accepted."""

    draft: Draft
    max_tokens: int
    num_tokens: int = 0
    probability: float = 1.0


class Speculation:
    """Proposes draft tokens for all sequences of a pass. Prompt lookup and a draft model complete each other."""

    def __init__(
        self, step_times: StepTimeModel, lookup: PromptLookup | None = None, model: ModelDrafter | None = None
    ):
        self.step_times = step_times
        self.acceptance = Acceptance()
        self._lookup = lookup
        self._model = model
        self._prefill_rows = 0  # of the pass that is being made

    def propose(self, drafts: Sequence[tuple[Draft, int]], rows: int, prefill_rows: int = 0) -> None:
        """Fill drafts with draft tokens.

        Args:
            drafts: each with its max draft tokens.
            rows: row-invariant rows of the pass before any draft token is added.
            prefill_rows: its other rows. If they let a pass wait for the disk, rows of draft tokens are free.
        """
        self._prefill_rows = prefill_rows
        growing = [_Open(draft, max_tokens) for draft, max_tokens in drafts if max_tokens > 0]
        while growing:
            self._ask_model([one for one in growing if not self._look_up(one)], rows)
            still = []
            for one in growing:
                if self._keep(one, rows):
                    rows += 1
                    if one.num_tokens < one.max_tokens:
                        still.append(one)
            growing = still

    def record_accepted(self, draft: Draft, accepted: int) -> None:
        """Count a verified draft: its first `accepted` tokens were accepted, the next one, if any, was rejected."""
        for position, draft_token in enumerate(draft.draft_tokens[: accepted + 1]):
            self.acceptance.record(position, draft_token.confidence, position < accepted)

    def forget(self, sequence_id: int) -> None:
        """Tell the draft model that a sequence has ended."""
        if self._model is not None:
            self._model.forget(sequence_id)

    def _look_up(self, one: _Open) -> bool:
        """Propose by prompt lookup, unless the draft model's token is worth more, even minus its price."""
        if self._lookup is None or not self._lookup.propose(one.draft):
            return False
        if self._model is not None:
            found = one.probability * self.acceptance.rate(one.draft.draft_tokens[-1].confidence)
            asked = one.probability * self.acceptance.source_rate(self._model.source)
            if asked - self.step_times.rate * self.step_times.draft_token_s > found:
                one.draft.draft_tokens.pop()
                return False
        return True

    def _ask_model(self, some: Sequence[_Open], rows: int) -> None:
        """Let the draft model propose for all of these, if together they are worth its pass and their rows."""
        if self._model is None or not some:
            return
        worth = sum(one.probability for one in some) * self.acceptance.source_rate(self._model.source)
        price = self.step_times.draft_token_s + self._row_price(rows, len(some))
        if worth < self.step_times.rate * price:
            return
        start = time.perf_counter()
        computed = self._model.propose([one.draft for one in some])
        if 0 < computed <= 3 * len(some):  # not if it had to compute a prompt first, or proposed nothing
            self.step_times.record_draft_token(time.perf_counter() - start)

    def _row_price(self, rows: int, more: int) -> float:
        """Seconds that `more` further rows add to the pass."""
        before = self.step_times.pass_s(rows, self._prefill_rows)
        return self.step_times.pass_s(rows + more, self._prefill_rows) - before

    def _keep(self, one: _Open, rows: int) -> bool:
        """True if a new draft token was proposed and is worth its row; if not, it is dropped."""
        draft_tokens = one.draft.draft_tokens
        if len(draft_tokens) == one.num_tokens:
            return False
        probability = one.probability * self.acceptance.rate(draft_tokens[-1].confidence)
        price = self._row_price(rows, 1)
        if probability < max(_MIN_PROBABILITY, self.step_times.rate * price):
            draft_tokens.pop()
            return False
        one.probability = probability
        one.num_tokens += 1
        return True
