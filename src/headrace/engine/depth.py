"""How many tokens to guess: as many as pay for themselves, decided anew for every guess.

A pass with one more row takes longer by little or nothing while the disk is what it waits for, and by the kernels' time
when it is not. A guess of the draft model costs a pass of that model. A guess is worth the chance that it and all before
it are right. With `rate` tokens per second so far, a guess that costs `t` seconds pays if

    chance >= rate * t

which is the rule that maximises tokens per second in the long run (Dinkelbach: On Nonlinear Fractional Programming,
1967: the best ratio is the one at which further parts are worth exactly that ratio). All four quantities are measured
while generating: the chance by grade of guess, the time of a pass by rows, the time of a guess, the rate.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headrace.engine.draft import SURE, Draft, Grade, ModelDrafter, PromptLookup
from headrace.engine.trace import PassStats
from headrace.plan.cost import PassCost

# Weight of the past against one new observation: the last twenty count.
_MEMORY = 0.95
# A chance below this is not worth a row, whatever rows cost.
_LEAST_CHANCE = 0.02


@dataclass
class _Count:
    right: float
    tested: float


class Acceptance:
    """How often guesses were right when all guesses before them were: by grade, and by position for the report."""

    def __init__(self) -> None:
        self._grades: dict[Grade, _Count] = {}
        self._sources: dict[str, _Count] = {}
        self.positions: list[tuple[int, int]] = []  # (tested, right) of the first guess, the second, ...

    def chance(self, grade: Grade) -> float:
        """The share that was right of late; before there are any, what the grade itself says."""
        count = self._grades.setdefault(grade, _Count(4 * (grade.level + 0.5) / (SURE + 1), 4.0))
        return count.right / count.tested

    def usual(self, source: str) -> float:
        """The same over all grades of a source: what to expect of a guess not made yet."""
        count = self._sources.setdefault(source, _Count(3.0, 4.0))
        return count.right / count.tested

    def note(self, position: int, grade: Grade, right: bool) -> None:
        """A guess was verified, all before it having been right."""
        self.chance(grade)
        self.usual(grade.source)
        for count in (self._grades[grade], self._sources[grade.source]):
            count.right = count.right * _MEMORY + right
            count.tested = count.tested * _MEMORY + 1
        while len(self.positions) <= position:
            self.positions.append((0, 0))
        tested, hits = self.positions[position]
        self.positions[position] = (tested + 1, hits + right)


class Pace:
    """What passes and guesses take on this machine now: the plan's cost, corrected by what was measured."""

    def __init__(self, cost: Callable[[int], PassCost], guess_s: float = 0.0):
        """`cost` predicts a pass by its rows, `guess_s` one guess of the draft model."""
        self._cost = cost
        self._disk_s = cost(1).disk_s
        self._compute_factor = 1.0
        self.guess_s = guess_s
        self._tokens, self._seconds = 1.0, self.pass_s(1)

    def pass_s(self, rows: int) -> float:
        """Seconds of a pass with so many rows."""
        return max(self._disk_s, self._compute_factor * self._cost(rows).compute_s)

    @property
    def rate(self) -> float:
        """Tokens per second of late."""
        return self._tokens / self._seconds

    def note_pass(self, stats: PassStats) -> None:
        """A pass was made."""
        computed = stats.seconds - stats.stall_s
        factor = computed / self._cost(stats.rows).compute_s
        self._compute_factor += 0.2 * (factor - self._compute_factor)
        waited = stats.stall_s > 0.05 * stats.seconds
        if waited or stats.seconds < self._disk_s:
            self._disk_s += 0.3 * (stats.seconds - self._disk_s)

    def note_guess(self, seconds: float) -> None:
        """The draft model made a pass for one more guess."""
        self.guess_s += 0.2 * (seconds - self.guess_s)

    def note_step(self, tokens: int, seconds: float) -> None:
        """Drafting and a pass together brought so many tokens."""
        self._tokens = 0.9 * self._tokens + tokens
        self._seconds = 0.9 * self._seconds + seconds


@dataclass(eq=False)
class _Open:
    """A draft that may still grow, and the chance that all its guesses so far are right."""

    draft: Draft
    most: int
    kept: int = 0
    chance: float = 1.0


class Speculation:
    """Guesses for all sequences of a pass, as many as pay. Prompt lookup and a draft model complete each other."""

    def __init__(self, pace: Pace, lookup: PromptLookup | None = None, model: ModelDrafter | None = None):
        self.pace = pace
        self.acceptance = Acceptance()
        self._lookup = lookup
        self._model = model

    def propose(self, drafts: Sequence[tuple[Draft, int]], rows: int) -> None:
        """Fill drafts with guesses.

        Args:
            drafts: each with the most guesses it may take.
            rows: of the pass before any guess is added.
        """
        growing = [_Open(draft, most) for draft, most in drafts if most > 0]
        while growing:
            self._ask_model([one for one in growing if not self._look_up(one)], rows)
            still = []
            for one in growing:
                if self._keep(one, rows):
                    rows += 1
                    if one.kept < one.most:
                        still.append(one)
            growing = still

    def verified(self, draft: Draft, accepted: int) -> None:
        """The first `accepted` guesses were right, the next one, if there was one, was not."""
        for position, guess in enumerate(draft.guesses[: accepted + 1]):
            self.acceptance.note(position, guess.grade, position < accepted)

    def forget(self, tokens: Sequence[int]) -> None:
        """The sequence with this list of tokens has ended."""
        if self._model is not None:
            self._model.forget(tokens)

    def _look_up(self, one: _Open) -> bool:
        """Guess by prompt lookup, unless the draft model's guess is worth more even less its price."""
        if self._lookup is None or not self._lookup.guess(one.draft):
            return False
        if self._model is not None:
            found = one.chance * self.acceptance.chance(one.draft.guesses[-1].grade)
            asked = one.chance * self.acceptance.usual(self._model.source)
            if asked - self.pace.rate * self.pace.guess_s > found:
                one.draft.guesses.pop()
                return False
        return True

    def _ask_model(self, some: Sequence[_Open], rows: int) -> None:
        """Let the draft model guess for all of these, if together they are worth its pass and their rows."""
        if self._model is None or not some:
            return
        worth = sum(one.chance for one in some) * self.acceptance.usual(self._model.source)
        price = self.pace.guess_s + self.pace.pass_s(rows + len(some)) - self.pace.pass_s(rows)
        if worth < self.pace.rate * price:
            return
        start = time.perf_counter()
        computed = self._model.guess([one.draft for one in some])
        if computed <= 3 * len(some):  # not where it had to read a prompt first
            self.pace.note_guess(time.perf_counter() - start)

    def _keep(self, one: _Open, rows: int) -> bool:
        """Whether a new guess was made and is worth its row; if not, it is dropped."""
        guesses = one.draft.guesses
        if len(guesses) == one.kept:
            return False
        chance = one.chance * self.acceptance.chance(guesses[-1].grade)
        price = self.pace.pass_s(rows + 1) - self.pace.pass_s(rows)
        if chance < max(_LEAST_CHANCE, self.pace.rate * price):
            guesses.pop()
            return False
        one.chance = chance
        one.kept += 1
        return True
