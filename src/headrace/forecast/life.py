"""Lifetime FLOP of a model: training, distillation, serving, and the break-even of serving a smaller model.

training  = 6 * N * D FLOP        N multiplied parameters, D tokens (Kaplan et al. 2020, section 2.1)
inference = 2 * N FLOP per token
"""

from dataclasses import dataclass


def training_flop(params: float, tokens: float) -> float:
    """Training FLOP: 6 N D."""
    return 6 * params * tokens


def inference_flop(params: float, tokens: float) -> float:
    """Inference FLOP: 2 N per token, without attention to a long context (`Architecture.flop`)."""
    return 2 * params * tokens


@dataclass(frozen=True, kw_only=True)
class Life:
    """FLOP of a model from its first training step to its last token."""

    making_flop: float
    flop_per_token: float
    tokens: float

    @property
    def total_flop(self) -> float:
        """Training and inference FLOP."""
        return self.making_flop + self.flop_per_token * self.tokens

    @property
    def serving_share(self) -> float:
        """Share of the total that is inference."""
        return self.flop_per_token * self.tokens / self.total_flop


def break_even_tokens(extra_making_flop: float, flop_per_token: float, smaller_flop_per_token: float) -> float:
    """Served tokens after which a smaller model has paid for its training; infinite if it never does."""
    saved = flop_per_token - smaller_flop_per_token
    return extra_making_flop / saved if saved > 0 else float("inf")
