"""MoE routing: distinct experts that a pass uses, and the hit rate of an expert cache.

Each row is routed to `k` of `n` experts, independently of other rows. The expected share of experts that `rows` rows use is

    1 - (1 - k / n) ** rows                              (Erdil 2025, "Inference economics of language models", equation 32)

Real routing is skewed and neighbouring tokens agree, so fewer experts are used. `skew` is the exponent of a Zipf law over
experts (0: uniform). Consecutive tokens of one text also repeat experts (temporal locality): `locality` is the share of
choices that repeat the previous row's.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import exp


@lru_cache(maxsize=256)
def popularity(experts: int, skew: float) -> tuple[float, ...]:
    """Share of the routed choices of each expert under a Zipf law, most popular first."""
    weights = [(rank + 1) ** -skew for rank in range(experts)]
    total = sum(weights)
    return tuple(weight / total for weight in weights)


@lru_cache(maxsize=4096)
def chosen(experts: int, per_row: int, skew: float) -> tuple[float, ...]:
    """Probability that a row chooses each expert, most popular first; the sum is `per_row`.

    A row draws `per_row` distinct experts in proportion to their popularity p. The probability is 1 - exp(-c p), with c solved
    for the sum (the limit of sampling without replacement; Rosen 1972).
    """
    if per_row >= experts:
        return (1.0,) * experts
    shares = popularity(experts, skew)
    low, high = 0.0, 1e3 * per_row * experts
    for _ in range(80):
        middle = (low + high) / 2
        if sum(1 - exp(-middle * share) for share in shares) < per_row:
            low = middle
        else:
            high = middle
    return tuple(1 - exp(-high * share) for share in shares)


def distinct(experts: int, per_row: int, rows: int, *, skew: float = 0.0, locality: float = 0.0) -> float:
    """Expected number of distinct experts that one layer uses for `rows` rows.

    Args:
        experts: routed experts in the layer.
        per_row: experts per row.
        rows: rows of the pass.
        skew: exponent of the Zipf law.
        locality: share of a row's choices that repeat the previous row's; only the others are new.
    """
    effective = 1 + (rows - 1) * (1 - locality)
    return sum(1 - float((1 - chance) ** effective) for chance in chosen(experts, per_row, skew))


def hit_rate(experts: int, per_row: int, cached: float, *, skew: float = 0.0, locality: float = 0.0) -> float:
    """Hit rate of a row in a cache of `cached` experts per layer.

    The cache holds the last row's experts and the most popular ones: the best fixed set for independent choices
    (Aho, Denning, Ullman 1971), plus the experts shared by neighbouring rows.
    """
    if cached >= experts:
        return 1.0
    chances = chosen(experts, per_row, skew)
    whole = int(cached)
    held = sum(chances[:whole]) + (cached - whole) * chances[whole]
    fixed = held / per_row
    recent = locality if cached >= per_row else locality * cached / per_row
    return recent + (1 - recent) * fixed


def skew_of(hits: Sequence[tuple[float, float]], experts: int, per_row: int, locality: float = 0.0) -> float:
    """The skew with which `hit_rate` comes nearest to measured (cached experts per layer, hit rate) pairs."""

    def error(skew: float) -> float:
        return sum((hit_rate(experts, per_row, c, skew=skew, locality=locality) - h) ** 2 for c, h in hits)

    return min((step / 50 for step in range(101)), key=error)
