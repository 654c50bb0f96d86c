"""From logits to the next token: temperature, top-k, top-p, min-p."""

import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from headrace.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling options. Temperature 0 takes the likeliest token; `seed=None` draws differently every time."""

    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    seed: int | None = None

    def __post_init__(self) -> None:
        numbers = {"temperature": float, "top_p": float, "min_p": float, "top_k": int, "seed": int}
        for name, kind in numbers.items():
            value = getattr(self, name)
            allowed = (int, float) if kind is float else (int,)
            if not (value is None and name == "seed") and (isinstance(value, bool) or not isinstance(value, allowed)):
                raise UsageError(f"{name} is {value!r}", hint="a number" if kind is float else "a whole number")
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


def recommended(found: Mapping[str, object]) -> Sampling:
    """Sampling options that a file recommends, by the names of `Sampling`; invalid values are ignored."""
    kept: dict[str, Any] = {}
    for name, value in found.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            with suppress(UsageError):
                one: dict[str, Any] = {name: value}
                kept |= {name: getattr(Sampling(**one), name)}
    return Sampling(**kept)


class Sampler:
    """Draws the tokens of one sequence. A draw depends on the logits, the seed and the position alone.

    Each position has its own random numbers, one per token of the vocabulary. It takes the token with the largest
    p / -log(u). This is an exact draw from p (the exponential race, or Gumbel-max). So a draft token drawn with the same
    numbers is mostly the same token. Verified tokens are exactly those of plain decoding
    (Daliri, Musco, Suresh: Coupling without Communication and Drafter-Invariant Speculative Decoding, 2024).
    """

    def __init__(self, sampling: Sampling):
        self._sampling = sampling
        self._seed = secrets.randbits(63) if sampling.seed is None else sampling.seed

    def draw(self, logits: torch.Tensor, position: int) -> int:
        """The token at `position` of the sequence, from logits of shape (vocab,)."""
        return self.draw_with_confidence(logits, position)[0]

    def draw_with_confidence(self, logits: torch.Tensor, position: int) -> tuple[int, float]:
        """The token, and its probability."""
        if self._sampling.temperature == 0:
            token = int(logits.argmax())
            return token, float((logits[token] - logits.logsumexp(0)).exp())
        probabilities, tokens = distribution(logits, self._sampling)
        chosen = int((probabilities.double() / -uniform(self._seed, position, tokens).log()).argmax())
        return int(tokens[chosen]), float(probabilities[chosen])


def uniform(seed: int, position: int, tokens: torch.Tensor) -> torch.Tensor:
    """Independent numbers in (0, 1), one per token id: a hash of (seed, position, token), so order does not matter.

    The mixing steps are those of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
    """
    x = tokens.long() * _signed(0x9E3779B97F4A7C15) + _signed(_mixed(_mixed(seed) + position))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = (x ^ (x >> shift) & ((1 << 64 - shift) - 1)) * _signed(factor)
    return ((x >> 11 & (1 << 53) - 1).double() + 0.5) * 2.0**-53


def _mixed(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _WORD
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _WORD
    return x ^ x >> 31


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


_WORD = (1 << 64) - 1


def distribution(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """(probabilities, tokens) after all filters in llama.cpp's order: top-k, top-p, min-p, temperature.

    The filters look at the distribution before temperature, so they keep the same tokens at every temperature. With any
    filter the likeliest token comes first.
    """
    logits = logits.float()
    if not sampling.top_k and sampling.top_p == 1 and not sampling.min_p:
        return _tempered(logits, sampling), torch.arange(logits.shape[0])
    values, tokens, probabilities = _likeliest(logits, sampling)
    keep = probabilities >= sampling.min_p * probabilities[0]
    # The tokens before the one that reaches top_p, and that one.
    keep &= probabilities.cumsum(0) - probabilities < sampling.top_p
    keep[0] = True
    values, tokens = values[keep], tokens[keep]
    return _tempered(values, sampling), tokens


def _tempered(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Softmax at a temperature, shifted by the max logit so that tiny temperatures do not overflow."""
    return ((logits - logits.max()) / max(sampling.temperature, _MIN_TEMPERATURE)).softmax(0)


_MIN_TEMPERATURE = 1e-30  # in fp32 a quotient by less is infinite


def _likeliest(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits, tokens, probabilities) of the top k, or of enough tokens for the filters: sorting them all takes 10 ms."""
    if sampling.top_k:
        values, tokens = torch.topk(logits, min(sampling.top_k, logits.shape[0]))
        return values, tokens, values.softmax(0)
    for count in (min(_USUALLY_ENOUGH, logits.shape[0]), logits.shape[0]):
        values, tokens = torch.topk(logits, count)
        probabilities = (values - logits.logsumexp(0)).exp()
        if probabilities.sum() > sampling.top_p or probabilities[-1] < sampling.min_p * probabilities[0]:
            break
    return values, tokens, probabilities


_USUALLY_ENOUGH = 1024
