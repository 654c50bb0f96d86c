"""Mixtures of experts: how many experts a pass touches, and how many of those a cache holds.

With `k` of `n` experts chosen per row, and rows that choose independently, the expected share of experts that `rows`
rows touch is

    1 - (1 - k / n) ** rows                              (Erdil 2025, "Inference economics of language models", equation 32)

Real routing is skewed and neighbouring tokens agree, so fewer are touched; `skew` is the exponent of a Zipf law over
experts (0: uniform). Consecutive tokens of one text also repeat experts: `locality` is the share of choices that repeat
the previous row's.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import exp


@lru_cache(maxsize=256)
def popularity(experts: int, skew: float) -> tuple[float, ...]:
    """Share of the choices that each expert gets, most popular first, under a Zipf law."""
    weights = [(rank + 1) ** -skew for rank in range(experts)]
    total = sum(weights)
    return tuple(weight / total for weight in weights)


@lru_cache(maxsize=4096)
def chosen(experts: int, per_row: int, skew: float) -> tuple[float, ...]:
    """Chance that a row chooses each expert, most popular first; they add up to `per_row`.

    Drawing `per_row` different experts in proportion to their popularity p: the chance is 1 - exp(-c p), with c such that the
    sum is right (the limit of sampling without replacement; Rosen 1972).
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
    """Expected number of different experts that one layer reads for `rows` rows together.

    Args:
        experts: routed experts in the layer.
        per_row: chosen for each row.
        rows: rows of the pass.
        skew: exponent of the Zipf law.
        locality: share of a row's choices that repeat those of the row before; only the others bring something new.
    """
    effective = 1 + (rows - 1) * (1 - locality)
    return sum(1 - float((1 - chance) ** effective) for chance in chosen(experts, per_row, skew))


def hit_rate(experts: int, per_row: int, cached: float, *, skew: float = 0.0, locality: float = 0.0) -> float:
    """Share of the choices of a row that a cache of `cached` experts per layer holds.

    The cache keeps the last row's experts and otherwise the most popular ones: the best fixed set for independent choices
    (Aho, Denning, Ullman 1971), plus what neighbouring rows share.
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
