"""What a model's routed experts cost: how many of them a pass touches, and how many of those memory holds.

With the chance `p_e` that a row chooses expert e, and rows that choose independently, `n` rows touch

    sum over e of 1 - (1 - p_e)^n            different experts of a layer,

and miss those of them that are not in memory. The chances are a Zipf law's (`forecast.experts`), as skewed as the hits of an
earlier run of the same model say (`routing`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from headrace.forecast.expert_hits import chosen, skew_of
from headrace.plan.routing import Routing

# Exponent of the Zipf law where nothing has been counted: a guess, until a run of the model has left its hit rate.
SKEW = 0.6
# Of one layer with experts, beside its weights at the kernels' rate: the router, the interpreter, products that are small.
LAYER_S = 0.2e-3
FOUND_LATE = 0.2  # of the bytes missed: nobody foresaw them, so the layer waits for them
WASTED = 0.07  # bytes read ahead in vain, for each byte that was needed


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The routed experts of a model, averaged over layers, and how many of them are in memory."""

    layers: int
    count: int  # in each layer
    per_token: int
    nbytes: int  # of all
    slot_bytes: int  # of the largest, as it lies in memory
    hidden: int
    width: int  # between up and down
    weights: Mapping[str, int]  # of all, by type
    read_share: float = 1.0  # bytes read from the disk for each byte in memory
    cached: int = 0  # in memory, of all layers together
    chances: tuple[float, ...] | None = (
        None  # that a row chooses an expert, most popular first; they add up to `per_token`
    )

    @property
    def total(self) -> int:
        """Experts of all layers."""
        return self.layers * self.count

    @property
    def bytes_each(self) -> float:
        """Bytes of an average one."""
        return self.nbytes / self.total

    @property
    def source(self) -> str:
        """Where the chances are from, in words."""
        return f"guessed: Zipf with exponent {SKEW}" if self.chances is None else "from an earlier run"

    @cached_property
    def _chances(self) -> npt.NDArray[np.float64]:
        return np.asarray(self.chances or chosen(self.count, self.per_token, SKEW))

    def touched(self, rows: int) -> float:
        """Different experts of one layer that so many rows choose."""
        return float((1 - (1 - self._chances) ** rows).sum())

    def missed(self, rows: int) -> float:
        """Of those, how many are not in memory, which holds the most popular ones."""
        touched = 1 - (1 - self._chances) ** rows
        held = self.cached / self.layers
        whole = min(int(held), self.count)
        rest = float(touched[whole:].sum())
        return rest if whole >= self.count else rest - (held - whole) * float(touched[whole])

    @property
    def hit_rate(self) -> float:
        """Share of one row's choices that memory holds."""
        return 1 - self.missed(1) / self.per_token

    def missed_bytes(self, rows: int) -> float:
        """Bytes that a pass of so many rows reads."""
        return self.layers * self.missed(rows) * self.bytes_each * self.read_share * (1 + WASTED)

    def with_cached(self, cached: int) -> "Experts":
        """The same with so many in memory."""
        return replace(self, cached=min(cached, self.total))

    def with_routing(self, routing: Routing | None) -> "Experts":
        """The same, as popular as the hits of an earlier run say."""
        if routing is None or routing.scores.shape != (self.layers, self.count) or routing.cached >= self.total:
            return self
        skew = skew_of([(routing.cached / self.layers, routing.hit_rate)], self.count, self.per_token)
        return replace(self, chances=chosen(self.count, self.per_token, skew))


def average_weights(experts: Experts) -> dict[str, float]:
    """Weights of one expert by type."""
    return {kind: count / experts.total for kind, count in experts.weights.items()}


def most_slots(experts: Experts, room: int) -> int:
    """How many experts fit into so many bytes."""
    return max(0, min(experts.total, room // experts.slot_bytes))
