"""Gain of drafting: tokens per pass from the acceptance rate, and the best number of draft tokens.

Each draft token is accepted with probability `a`, given that all before it were. A pass with `k` draft tokens yields

    E(k) = 1 + a + a^2 + ... + a^k                        (Leviathan, Kalman, Matias 2023, equation 1)

tokens and takes `k * draft_token_s + cost(1 + k rows)`. The rates below are fits of E to published tokens per pass at 4, 8 and
16 draft tokens (chat prompts of code and prose). At run time the engine replaces them by its own counts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from headrace.checkpoint import Checkpoint, open_checkpoint
from headrace.checkpoint.low_bit import COPY_TYPES, low_bit_copy
from headrace.errors import UsageError
from headrace.forecast.predict import SMALLER_MODEL_ACCEPTANCE_RATE
from headrace.paths import exists
from headrace.plan.cost import PassCost
from headrace.plan.profile import Profile

# Max draft tokens of one sequence in a pass: beyond it even a perfect draft gains little, and rows cost memory.
MAX_DRAFT_TOKENS = 24
# (max bits per weight, acceptance rate) of a low-bit copy: Q2_K, Q3_K_M, Q4_0.
# Published tokens per pass of Q4_0 at 4 / 8 / 16 draft tokens: 4.4 / 6.8 / 10.8.
COPY_ACCEPTANCE_RATES = ((3.6, 0.80), (4.4, 0.92), (32.0, 0.94))
# Min bits per weight of a model whose low-bit copy saves enough.
LEAST_BITS = 8.0
COPIED_WEIGHTS_PER_S = {"Q4_K": 150e6, "Q4_0": 350e6}  # quantising on load, measured with two readers
# Acceptance rate of prompt lookup in free text; far higher where text is edited.
LOOKUP_ACCEPTANCE_RATE = 0.1


@dataclass(frozen=True, kw_only=True)
class Drafting:
    """A drafting method. `checkpoint` is the draft model's, if any; it stays in memory."""

    name: str  # none, prompt, self or a file name
    acceptance_rate: float  # acceptance probability of a draft token, given that all before it were accepted
    max_draft_tokens: int
    lookup: bool = False
    prepare_s: float = 0.0  # one-time seconds to make the draft model
    checkpoint: Checkpoint | None = None


NO_DRAFT = Drafting(name="none", acceptance_rate=0.0, max_draft_tokens=0)
LOOKUP = Drafting(name="prompt", acceptance_rate=LOOKUP_ACCEPTANCE_RATE, max_draft_tokens=MAX_DRAFT_TOKENS, lookup=True)


def drafting_options(checkpoint: Checkpoint, name: str, profile: Profile | None = None) -> list[Drafting]:
    """Drafting methods that `--draft NAME` allows, plain decoding first if allowed.

    Args:
        checkpoint: the model that verifies.
        name: none, prompt, self, auto, or the path of a draft model.
        profile: rates that decide the format of a low-bit copy.

    Raises:
        UsageError: missing file, other vocabulary, or a model with too few bits for a low-bit copy.
        CheckpointError: the draft model's file is damaged.
    """
    if checkpoint.has_encoder:
        if name not in ("none", "auto"):
            raise UsageError(
                f"{checkpoint.name} has an encoder: its native cache cannot be rolled back after a rejected draft token",
                hint="use --draft none",
            )
        return [NO_DRAFT]
    fixed = {"none": NO_DRAFT, "prompt": LOOKUP}
    if name in fixed:
        return [fixed[name]]
    if name not in ("auto", "self"):
        return [_model(checkpoint, name)]
    copies = [_copy(checkpoint, profile)] if _average_bits(checkpoint) >= LEAST_BITS else []
    if name == "auto":
        return [NO_DRAFT, LOOKUP, *copies]
    if not copies:
        raise UsageError(
            f"{checkpoint.name} has {_average_bits(checkpoint):.1f} bits per weight: a copy in fewer saves little",
            hint="use --draft prompt, or a smaller model of the same family",
        )
    return copies


def _copy(checkpoint: Checkpoint, profile: Profile | None) -> Drafting:
    """A low-bit copy: in Q4_0, which is made in less than half the time, where it is multiplied as fast as Q4_K."""
    types: Sequence[str] = COPY_TYPES
    if profile is not None and "Q4_0" in profile.repacked_weights_per_s:
        q4_0, q4_k = (profile.kernel(kind, 1, repacked=True) for kind in ("Q4_0", "Q4_K"))
        types = ("Q4_0",) if q4_0 > 0.9 * q4_k else COPY_TYPES
    copy = low_bit_copy(checkpoint, types)
    changed = [t for t in copy.tensors.values() if t != checkpoint.tensors[t.name]]
    prepare_s = sum(t.rows * t.columns / COPIED_WEIGHTS_PER_S[t.type] for t in changed)
    return replace(_with_model(copy, "self", _copy_acceptance_rate(copy)), prepare_s=prepare_s)


def _model(checkpoint: Checkpoint, path: str) -> Drafting:
    """A draft model in a file: a low-bit copy of the same model, or a smaller one with the same vocabulary."""
    if not exists(path):
        raise UsageError(
            f"there is no draft model {path}", hint="use none, prompt, self, auto, a .gguf file or a folder"
        )
    draft = open_checkpoint(path)
    if draft.has_encoder:
        raise UsageError(
            f"{path} has an encoder: it cannot continue another model's text",
            hint="use a model that only decodes",
        )
    ours, theirs = checkpoint.tokens(), draft.tokens()
    common = min(len(ours), len(theirs))
    if not common or ours[:common] != theirs[:common]:
        raise UsageError(
            f"{path} has another vocabulary than {checkpoint.path}: its token ids mean other tokens",
            hint="use a draft model of the same family, or --draft prompt",
        )
    rate = _copy_acceptance_rate(draft) if _same_shape(checkpoint, draft) else SMALLER_MODEL_ACCEPTANCE_RATE
    return _with_model(draft, Path(path).name, rate)


def _same_shape(one: Checkpoint, other: Checkpoint) -> bool:
    """True if both have the same matrices: probably the same model in different formats."""
    shapes, others = (
        {name: tensor.shape for name, tensor in checkpoint.tensors.items() if len(tensor.shape) >= 2}
        for checkpoint in (one, other)
    )
    return shapes == others


def _with_model(checkpoint: Checkpoint, name: str, acceptance_rate: float) -> Drafting:
    """A draft model combined with prompt lookup, which is free."""
    return Drafting(
        name=name,
        acceptance_rate=acceptance_rate,
        max_draft_tokens=MAX_DRAFT_TOKENS,
        lookup=True,
        checkpoint=checkpoint,
    )


def _copy_acceptance_rate(copy: Checkpoint) -> float:
    bits = _average_bits(copy)
    best = COPY_ACCEPTANCE_RATES[-1][1]
    return next((acceptance_rate for limit, acceptance_rate in COPY_ACCEPTANCE_RATES if bits <= limit), best)


def _average_bits(checkpoint: Checkpoint) -> float:
    matrices = [tensor for tensor in checkpoint.tensors.values() if len(tensor.shape) >= 2]  # experts have 3 dimensions
    return 8 * sum(t.nbytes for t in matrices) / max(1, sum(t.rows * t.columns for t in matrices))


@dataclass(frozen=True, kw_only=True)
class DecodePrediction:
    """Predicted decode pass with the best number of draft tokens."""

    draft_tokens: int
    tokens_per_pass: float  # sum over all sequences
    cost: PassCost
    draft_token_s: float  # seconds of one draft token for every sequence

    @property
    def draft_s(self) -> float:
        """Seconds of drafting before a pass."""
        return self.draft_tokens * self.draft_token_s

    @property
    def seconds(self) -> float:
        """Seconds of drafting and the pass."""
        return self.cost.seconds + self.draft_s

    @property
    def s_per_token(self) -> float:
        """Seconds per token of the pass."""
        return self.seconds / self.tokens_per_pass

    @property
    def binding(self) -> str:
        """The largest share of the time: drafting, disk or compute."""
        return "drafting" if self.draft_s > self.cost.seconds else self.cost.binding


def predict_decode(
    acceptance_rate: float, max_draft_tokens: int, sequences: int, draft_token_s: float, cost: Callable[[int], PassCost]
) -> DecodePrediction:
    """The decode pass with the number of draft tokens that minimises seconds per token.

    Args:
        acceptance_rate: probability that a draft token is accepted, given that all before it were.
        max_draft_tokens: max per sequence in a pass.
        sequences: sequences in a pass.
        draft_token_s: seconds of one more draft token for all sequences.
        cost: cost of a pass by its rows.
    """
    options = []
    tokens, share = 1.0, 1.0
    for draft_tokens in range(max_draft_tokens + 1):
        options.append(
            DecodePrediction(
                draft_tokens=draft_tokens,
                tokens_per_pass=sequences * tokens,
                cost=cost(sequences * (1 + draft_tokens)),
                draft_token_s=draft_token_s,
            )
        )
        share *= acceptance_rate
        tokens += share
    return min(options, key=lambda option: option.s_per_token)
