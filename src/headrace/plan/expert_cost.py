"""Cost of routed experts: distinct experts that a pass uses, and how many of them are in memory.

With probability `p_e` that a row chooses expert e, and independent rows, `n` rows use

    sum over e of 1 - (1 - p_e)^n            distinct experts of a layer,

and miss those not in memory. The probabilities follow a Zipf law (`forecast.expert_hits`). Its skew is fitted to the hit
rate of an earlier run of the same model (`routing`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from headrace.forecast.expert_hits import chosen, skew_of
from headrace.plan.routing import Routing

# Assumed exponent of the Zipf law, until a run of the model has recorded its hit rate.
SKEW = 0.6
# Seconds per MoE layer besides its weights at the kernels' rate: router, interpreter, small matmuls.
LAYER_S = 0.2e-3
FOUND_LATE = 0.2  # share of the missed bytes that were not prefetched, so the layer waits for them
WASTED = 0.07  # bytes prefetched but not used, per byte needed


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The routed experts of a model, averaged over layers, and how many of them are in memory."""

    layers: int
    count: int  # experts per layer
    per_token: int
    nbytes: int  # bytes of all experts
    slot_bytes: int  # bytes of the largest expert in memory
    hidden: int
    width: int  # intermediate size
    weights: Mapping[str, int]  # elements of all experts by type
    read_share: float = 1.0  # bytes read from disk per byte in memory
    cached: int = 0  # experts in memory, over all layers
    # Probability that a row chooses each expert, most popular first; the sum is `per_token`.
    chances: tuple[float, ...] | None = None

    @property
    def total(self) -> int:
        """Number of experts over all layers."""
        return self.layers * self.count

    @property
    def bytes_each(self) -> float:
        """Bytes of an average expert."""
        return self.nbytes / self.total

    @property
    def source(self) -> str:
        """Origin of the probabilities, in words."""
        return f"assumed: Zipf with exponent {SKEW}" if self.chances is None else "from an earlier run"

    @cached_property
    def _chances(self) -> npt.NDArray[np.float64]:
        return np.asarray(self.chances or chosen(self.count, self.per_token, SKEW))

    def touched(self, rows: int) -> float:
        """Distinct experts of one layer that `rows` rows choose."""
        return float((1 - (1 - self._chances) ** rows).sum())

    def missed(self, rows: int) -> float:
        """Distinct chosen experts that are not in memory, which holds the most popular ones."""
        touched = 1 - (1 - self._chances) ** rows
        held = self.cached / self.layers
        whole = min(int(held), self.count)
        rest = float(touched[whole:].sum())
        return rest if whole >= self.count else rest - (held - whole) * float(touched[whole])

    @property
    def hit_rate(self) -> float:
        """Share of one row's routed experts that are in memory."""
        return 1 - self.missed(1) / self.per_token

    def missed_bytes(self, rows: int) -> float:
        """Bytes of experts that a pass of `rows` rows reads."""
        return self.layers * self.missed(rows) * self.bytes_each * self.read_share * (1 + WASTED)

    def with_cached(self, cached: int) -> "Experts":
        """The same experts with `cached` of them in memory."""
        return replace(self, cached=min(cached, self.total))

    def with_routing(self, routing: Routing | None) -> "Experts":
        """The same experts with popularities fitted to the hit rate of an earlier run."""
        if routing is None or routing.scores.shape != (self.layers, self.count) or routing.cached >= self.total:
            return self
        skew = skew_of([(routing.cached / self.layers, routing.hit_rate)], self.count, self.per_token)
        return replace(self, chances=chosen(self.count, self.per_token, skew))


def average_weights(experts: Experts) -> dict[str, float]:
    """Weights of one expert by type."""
    return {kind: count / experts.total for kind, count in experts.weights.items()}


def most_slots(experts: Experts, free_bytes: int) -> int:
    """Number of experts that fit into `free_bytes`."""
    return max(0, min(experts.total, free_bytes // experts.slot_bytes))
