"""What a model costs over its life: training, shrinking and serving, and when serving a smaller one pays.

training  = 6 * N * D FLOP        N parameters that compute, D tokens (Kaplan et al. 2020, section 2.1)
inference = 2 * N FLOP per token
"""

from dataclasses import dataclass


def training_flop(params: float, tokens: float) -> float:
    """6 N D."""
    return 6 * params * tokens


def inference_flop(params: float, tokens: float) -> float:
    """2 N per token; attention to a long context comes on top (`Architecture.flop`)."""
    return 2 * params * tokens


@dataclass(frozen=True, kw_only=True)
class Life:
    """FLOP of a model from its first step to its last token."""

    making_flop: float
    flop_per_token: float
    tokens: float

    @property
    def total_flop(self) -> float:
        """All of it."""
        return self.making_flop + self.flop_per_token * self.tokens

    @property
    def serving_share(self) -> float:
        """Share of the total that is inference."""
        return self.flop_per_token * self.tokens / self.total_flop


def break_even_tokens(extra_making_flop: float, flop_per_token: float, smaller_flop_per_token: float) -> float:
    """Tokens served after which a smaller model has paid for its making; infinite if it never does."""
    saved = flop_per_token - smaller_flop_per_token
    return extra_making_flop / saved if saved > 0 else float("inf")
