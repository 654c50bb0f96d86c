"""What a model's routed experts cost: how many of them a pass touches, and how many of those memory holds.

With the chance `p_e` that a row chooses expert e, and rows that choose independently, `n` rows touch

    sum over e of 1 - (1 - p_e)^n            different experts of a layer,

and miss those of them that are not in memory. The chances are those that earlier runs of the same model have counted
(`routing`), else a Zipf law (`forecast.experts`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from headrace.forecast.experts import chosen

# Exponent of the Zipf law where nothing has been counted: 0.5 to 0.8 were fitted to published models (docs/expert-cache.md).
SKEW = 0.6
# Of the interpreter and small operations in one layer with experts: sorting rows by expert, gates, sums.
LAYER_S = 250e-6


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
        return f"guessed: Zipf with exponent {SKEW}" if self.chances is None else "counted in earlier runs"

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
        return self.layers * self.missed(rows) * self.bytes_each

    def with_cached(self, cached: int) -> "Experts":
        """The same with so many in memory."""
        return replace(self, cached=min(cached, self.total))

    def with_routing(self, scores: npt.NDArray[np.float32] | None) -> "Experts":
        """The same with the shares that were counted: (layers, experts)."""
        if scores is None or scores.shape != (self.layers, self.count) or not scores.any():
            return self
        # Each layer has favourites of its own: ranks are averaged, not experts.
        ranked = np.sort(scores, 1)[:, ::-1].mean(0)
        chances = np.minimum(1.0, ranked * (self.per_token / max(float(ranked.sum()), 1e-9)))
        return replace(self, chances=tuple(float(chance) for chance in chances))


def average_weights(experts: Experts) -> dict[str, float]:
    """Weights of one expert by type."""
    return {kind: count / experts.total for kind, count in experts.weights.items()}


def most_slots(experts: Experts, room: int) -> int:
    """How many experts fit into so many bytes."""
    return max(0, min(experts.total, room // experts.slot_bytes))
