"""From logits to the next token: logits processors, top-k, top-p, min-p, temperature, and log-probabilities."""

import secrets
from collections.abc import Sequence
from typing import NamedTuple

import torch

from headrace.engine.logits_processors import make_processors
from headrace.sampling_params import SamplingParams


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one position, from the model's logits before any processor and at temperature 1, as in vLLM."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the likeliest tokens, best first


class Sampler:
    """Draws the tokens of one sequence. A draw depends on the logits, the token ids before it and the seed alone.

    Each position has its own random numbers, one per token of the vocabulary. It takes the token with the largest
    p / -log(u). This is an exact draw from p (the exponential race, or Gumbel-max). So a draft token drawn with the same
    numbers is mostly the same token. Verified tokens are exactly those of plain decoding
    (Daliri, Musco, Suresh: Coupling without Communication and Drafter-Invariant Speculative Decoding, 2024).
    """

    def __init__(self, params: SamplingParams, prompt_tokens: int = 0):
        """`prompt_tokens` is the length of the prompt, which some penalties leave out."""
        self.params = params
        self._seed = secrets.randbits(63) if params.seed is None else params.seed
        self._processors = make_processors(params, prompt_tokens)

    def draw(self, logits: torch.Tensor, token_ids: Sequence[int]) -> int:
        """The token that follows `token_ids`, from logits of shape (vocab,)."""
        return self.draw_with_confidence(logits, token_ids)[0]

    def draw_with_confidence(self, logits: torch.Tensor, token_ids: Sequence[int]) -> tuple[int, float]:
        """The token, and its probability."""
        for process in self._processors:
            logits = process(token_ids, logits)
        if self.params.temperature == 0:
            token = int(logits.argmax())
            return token, float((logits[token] - logits.logsumexp(0)).exp())
        probabilities, tokens = distribution(logits, self.params)
        chosen = int((probabilities.double() / -uniform(self._seed, len(token_ids), tokens).log()).argmax())
        return int(tokens[chosen]), float(probabilities[chosen])

    def logprobs(self, logits: torch.Tensor, token: int) -> TokenLogprobs | None:
        """Log-probabilities of a drawn token and of the likeliest ones, from logits of shape (vocab,); None: not asked for."""
        if self.params.logprobs is None:
            return None
        values = logits.float().log_softmax(0)
        best = torch.topk(values, min(self.params.logprobs, len(values)))
        top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return TokenLogprobs(token, float(values[token]), top)


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


def distribution(logits: torch.Tensor, sampling: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
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


def _tempered(logits: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """Softmax at a temperature, shifted by the max logit so that tiny temperatures do not overflow."""
    return ((logits - logits.max()) / max(sampling.temperature, _MIN_TEMPERATURE)).softmax(0)


_MIN_TEMPERATURE = 1e-30  # in fp32 a quotient by less is infinite


def _likeliest(logits: torch.Tensor, sampling: SamplingParams) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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
