"""From logits to the next token: temperature, top-k, top-p, min-p."""

from dataclasses import dataclass

import torch

from headrace.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn. Temperature 0 takes the likeliest; `seed=None` draws differently every time."""

    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = {
            "temperature": 0 <= self.temperature <= 100,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1,
        }
        wrong = [name for name, fine in checks.items() if not fine]
        if wrong:
            name = wrong[0]
            raise UsageError(
                f"{name} {getattr(self, name)} is out of range", hint="temperature 0 to 100, top-p and min-p 0 to 1"
            )


class Sampler:
    """Draws tokens for one sequence, with a generator of its own."""

    def __init__(self, sampling: Sampling):
        self._sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def draw(self, logits: torch.Tensor) -> int:
        """One token from logits of shape (vocab,)."""
        if self._sampling.temperature == 0:
            return int(logits.argmax())
        probabilities, tokens = distribution(logits, self._sampling)
        return int(tokens[torch.multinomial(probabilities, 1, generator=self._generator)])


def distribution(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """(probabilities, tokens), likeliest first, after all filters in llama.cpp's order: top-k, top-p, min-p, temperature.

    The filters look at the distribution before temperature, so they keep the same tokens at every temperature.
    """
    count = min(sampling.top_k or logits.shape[0], logits.shape[0])
    values, tokens = torch.topk(logits.float(), count)
    probabilities = values.softmax(0)
    keep = probabilities >= sampling.min_p * probabilities[0]
    # The tokens before the one that reaches top_p, and that one.
    keep &= probabilities.cumsum(0) - probabilities < sampling.top_p
    keep[0] = True
    values, tokens = values[keep], tokens[keep]
    return (values / sampling.temperature).softmax(0), tokens
