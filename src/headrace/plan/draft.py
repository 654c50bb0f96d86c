"""What drafting is worth: tokens per pass from how often guesses are right, and the best number of guesses.

With every guess right with the same chance `a`, given that all before it were, a pass with `k` guesses yields

    E(k) = 1 + a + a^2 + ... + a^k                        (Leviathan, Kalman, Matias 2023, equation 1)

tokens and takes `k * guess` and what `cost` says of 1 + k rows. The `a` below are fits of E to published tokens per pass at 4, 8
and 16 guesses over chat prompts of code and prose; the engine replaces them by what it counts while it runs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from headrace.checkpoint import Checkpoint, open_checkpoint
from headrace.checkpoint.low_bit import low_bit_copy
from headrace.errors import UsageError
from headrace.forecast.answer import SMALLER_MODEL_CHANCE
from headrace.paths import exists
from headrace.plan.cost import PassCost

# Guesses for one sequence in a pass, at most: beyond, even a perfect copy gains little, and rows cost memory.
MOST_GUESSES = 24
# E at 4 / 8 / 16 guesses of Q4_0 of the same model: 4.4 / 6.8 / 10.8.
# Of a copy by its bits per weight, up to so many: Q2_K, Q3_K_M, Q4_0.
COPY_CHANCES = ((3.6, 0.80), (4.4, 0.92), (32.0, 0.94))
# A copy of a model with fewer bits than this saves too little.
LEAST_BITS = 8.0
COPIED_WEIGHTS_PER_S = 150e6  # measured with two readers
# Of free text; where text is edited it is far more.
LOOKUP_CHANCE = 0.1


@dataclass(frozen=True, kw_only=True)
class Drafting:
    """One way to draft. `checkpoint` is the draft model's, if there is one; it stays in memory."""

    name: str  # none, prompt, self or the file's name
    chance: float  # that a guess is right, given that those before it were
    most_guesses: int
    lookup: bool = False
    prepare_s: float = 0.0  # to make the draft model, once
    checkpoint: Checkpoint | None = None


NO_DRAFT = Drafting(name="none", chance=0.0, most_guesses=0)
LOOKUP = Drafting(name="prompt", chance=LOOKUP_CHANCE, most_guesses=MOST_GUESSES, lookup=True)


def drafting_options(checkpoint: Checkpoint, name: str) -> list[Drafting]:
    """What `--draft NAME` leaves to choose from, plain decoding first where that is allowed.

    Args:
        checkpoint: the model that verifies.
        name: none, prompt, self, auto, or the path of a draft model.

    Raises:
        UsageError: no such file, another vocabulary, or nothing to make a smaller copy of.
        CheckpointError: the draft model's file is damaged.
    """
    if checkpoint.has_encoder:
        if name not in ("none", "auto"):
            raise UsageError(
                f"{checkpoint.name} has an encoder: its decoder keeps a cache of its own, in which guesses cannot be taken back",
                hint="use --draft none",
            )
        return [NO_DRAFT]
    fixed = {"none": NO_DRAFT, "prompt": LOOKUP}
    if name in fixed:
        return [fixed[name]]
    copies = [_copy(checkpoint)] if _average_bits(checkpoint) >= LEAST_BITS else []
    if name == "auto":
        return [NO_DRAFT, LOOKUP, *copies]
    if name == "self":
        if not copies:
            raise UsageError(
                f"{checkpoint.name} has {_average_bits(checkpoint):.1f} bits per weight: a copy in fewer saves little",
                hint="use --draft prompt, or a smaller model of the same family",
            )
        return copies
    return [_model(checkpoint, name)]


def _copy(checkpoint: Checkpoint) -> Drafting:
    copy = low_bit_copy(checkpoint)
    weights = sum(t.rows * t.columns for t in copy.tensors.values() if t != checkpoint.tensors[t.name])
    return replace(_with_model(copy, "self", _copy_chance(copy)), prepare_s=weights / COPIED_WEIGHTS_PER_S)


def _model(checkpoint: Checkpoint, path: str) -> Drafting:
    """A draft model in a file: a low-bit copy of the same model, or a smaller one with the same vocabulary."""
    if not exists(path):
        raise UsageError(
            f"there is no draft model {path}", hint="use none, prompt, self, auto, a .gguf file or a folder"
        )
    draft = open_checkpoint(path)
    if draft.has_encoder:
        raise UsageError(
            f"{path} has an encoder: it cannot go on with what another model writes",
            hint="use a model that only decodes",
        )
    ours, theirs = checkpoint.tokens(), draft.tokens()
    common = min(len(ours), len(theirs))
    if not common or ours[:common] != theirs[:common]:
        raise UsageError(
            f"{path} has another vocabulary than {checkpoint.path}: its guesses would mean other tokens",
            hint="use a draft model of the same family, or --draft prompt",
        )
    same = all(draft.get(key) == checkpoint.get(key) for key in ("block_count", "embedding_length"))
    return _with_model(draft, Path(path).name, _copy_chance(draft) if same else SMALLER_MODEL_CHANCE)


def _with_model(checkpoint: Checkpoint, name: str, chance: float) -> Drafting:
    """Prompt lookup goes with every draft model: it costs nothing."""
    return Drafting(name=name, chance=chance, most_guesses=MOST_GUESSES, lookup=True, checkpoint=checkpoint)


def _copy_chance(copy: Checkpoint) -> float:
    bits = _average_bits(copy)
    return next(chance for limit, chance in COPY_CHANCES if bits <= limit)


def _average_bits(checkpoint: Checkpoint) -> float:
    matrices = [tensor for tensor in checkpoint.tensors.values() if len(tensor.shape) == 2]
    return 8 * sum(t.nbytes for t in matrices) / max(1, sum(t.rows * t.columns for t in matrices))


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What a pass brings with the best number of guesses."""

    guesses: int
    tokens_per_pass: float  # of all sequences together
    cost: PassCost
    guess_s: float  # of one guess for each sequence

    @property
    def draft_s(self) -> float:
        """Drafting before a pass."""
        return self.guesses * self.guess_s

    @property
    def seconds(self) -> float:
        """Drafting and the pass."""
        return self.cost.seconds + self.draft_s

    @property
    def s_per_token(self) -> float:
        """Seconds for each token of the pass."""
        return self.seconds / self.tokens_per_pass

    @property
    def binding(self) -> str:
        """What most of the time goes to."""
        return "drafting" if self.draft_s > self.cost.seconds else self.cost.binding


def expect(
    chance: float, most_guesses: int, sequences: int, guess_s: float, cost: Callable[[int], PassCost]
) -> Expectation:
    """The best number of guesses for each of `sequences`.

    Args:
        chance: of a guess, given that all before it were right.
        most_guesses: of a sequence in a pass.
        sequences: in a pass.
        guess_s: seconds of one more guess for all sequences.
        cost: of a pass with so many rows.
    """
    options = []
    tokens, share = 1.0, 1.0
    for guesses in range(most_guesses + 1):
        options.append(
            Expectation(
                guesses=guesses,
                tokens_per_pass=sequences * tokens,
                cost=cost(sequences * (1 + guesses)),
                guess_s=guess_s,
            )
        )
        share *= chance
        tokens += share
    return min(options, key=lambda option: option.s_per_token)
