"""Eviction policy of experts in memory: the one least likely to be routed at its layer's next step is evicted.

All layers share the slots. The probability that an expert is routed combines two predictions,

    p = a * last + (1 - a) * frequency

`last` is the share of the layer's last rows that chose it. `frequency` is an EWMA of that share over earlier passes, where one
counts half as much after each `HALF_LIFE`. A pass of n rows counts as sqrt(n) tokens. Counted as n, a prompt would erase the
history of earlier sequences; counted as 1, it would hardly matter. `a`, the temporal locality of neighbouring tokens, differs
between models and texts and is measured, not set. It is the least-squares slope of (routed share - frequency) against
(last - frequency). With a = 0 this is LFU that forgets.
`docs/expert-cache.md` has the alternatives with their numbers.

Ages are counted in steps of the expert's own layer. Counted in time, a layer just computed would look fresher than the next
ones. LRU would then evict precisely what is needed soonest.

The cache reads nothing and imports no torch. It is not thread-safe (the owner locks), and never evicts a slot that is held.
"""

import numpy as np
import numpy.typing as npt

from headrace.errors import BudgetError, UsageError

HALF_LIFE = 24  # tokens
LOCALITY_WINDOW = 2000  # steps of all layers over which temporal locality is averaged: some 40 tokens
DOUBT = 16.0  # initial denominator of the slope, which stays near zero until the data outweighs it
HIGHEST_LOCALITY = 0.9
NOTHING = -1


class ExpertCache:
    """The experts in memory, and the choice of the one to evict.

    Per layer and pass: `note` the routed experts; `find` and `hold` the cached ones; `place` the missing ones, which are then
    held, and read them, or `forget` them; `release` each slot after its use.

    Args:
        layers: layers with experts, in order.
        experts: routed experts in each.
        slots: experts that fit into memory.
        scores: (layers, experts), `scores` of an earlier run of the same model.
    """

    def __init__(self, *, layers: int, experts: int, slots: int, scores: npt.NDArray[np.float32] | None = None):
        if slots < 1:
            raise BudgetError(f"{slots} experts fit into memory, at least 1 must", hint="give more --memory")
        self.experts = experts
        self._frequency = (
            np.zeros((layers, experts), np.float32) if scores is None else _checked(scores, layers, experts)
        )
        self._last = np.zeros_like(self._frequency)
        self._probability = self._frequency.copy()
        self._covariance, self._variance = 0.0, DOUBT
        self._slot_of = [NOTHING] * (layers * experts)
        self._expert_in = [NOTHING] * slots
        self._uses = [0] * slots
        self._free = list(range(slots - 1, -1, -1))
        self._evictable = np.full_like(self._frequency, np.inf)  # probability, if in memory and not held
        self._evictable_by_number = self._evictable.reshape(-1)
        self._probability_by_number = self._probability.reshape(-1)

    @property
    def scores(self) -> npt.NDArray[np.float32]:
        """Frequency of each expert, per row: (layers, experts), for the next run of this model."""
        return self._frequency.copy()

    @property
    def locality(self) -> float:
        """Temporal locality: weight of the last rows' experts in the prediction of the next, as measured so far."""
        return min(max(self._covariance / self._variance, 0.0), HIGHEST_LOCALITY)

    def note(self, layer: int, counts: npt.NDArray[np.integer], rows: int) -> None:
        """Record the router's choice in `layer`: `counts[e]` of this pass's `rows` rows go to expert e."""
        routed = counts.astype(np.float32)  # (experts,)
        routed /= rows
        frequency, last = self._frequency[layer], self._last[layer]
        probability, evictable = self._probability[layer], self._evictable[layer]
        change = routed - frequency
        self._measure(last - frequency, change)
        share = 1 - 0.5 ** (rows**0.5 / HALF_LIFE)
        frequency += share * change
        last[:] = routed
        # routed - frequency is (1 - share) * change, now that `frequency` contains its share
        np.add(frequency, self.locality * (1 - share) * change, out=probability)
        np.copyto(evictable, probability, where=evictable < np.inf)

    def find(self, layer: int, expert: int) -> int | None:
        """The slot of an expert, or None if it is not in memory."""
        slot = self._slot_of[layer * self.experts + expert]
        return None if slot == NOTHING else slot

    def worthy(self, layer: int, expert: int) -> bool:
        """True if an expert is likelier to be routed again than the one that `place` would evict for it.

        If not, and there is a buffer outside the slots, it is better read there and dropped after its use.
        """
        if self._free:
            return True
        return bool(self._probability[layer, expert] > self._evictable.min())

    def place(self, layer: int, expert: int) -> int | None:
        """A slot for a missing expert, held: a free one or the least likely expert's that is not held; None if all are held."""
        assert self.find(layer, expert) is None
        slot = self._free.pop() if self._free else self._evict()
        if slot is not None:
            number = layer * self.experts + expert
            self._slot_of[number], self._expert_in[slot], self._uses[slot] = slot, number, 1
        return slot

    def hold(self, slot: int) -> None:
        """Count one more use of a slot with an expert in it; a slot in use is not evicted."""
        assert self._expert_in[slot] != NOTHING
        self._uses[slot] += 1
        self._evictable_by_number[self._expert_in[slot]] = np.inf

    def release(self, slot: int) -> None:
        """End one use of a slot."""
        assert self._uses[slot] > 0
        self._uses[slot] -= 1
        if self._uses[slot] > 0:
            return
        if self._expert_in[slot] == NOTHING:
            self._free.append(slot)
            return
        number = self._expert_in[slot]
        self._evictable_by_number[number] = self._probability_by_number[number]

    def forget(self, slot: int) -> None:
        """Empty a held slot whose read has failed. `find` returns it no more; it is free after its last `release`."""
        assert self._uses[slot] > 0
        self._slot_of[self._expert_in[slot]] = NOTHING
        self._expert_in[slot] = NOTHING

    def _measure(self, last: npt.NDArray[np.float32], routed: npt.NDArray[np.float32]) -> None:
        """Add one step of a layer to the slope of `routed` against `last`, both less the frequency."""
        kept = 1 - 1 / LOCALITY_WINDOW
        self._covariance = kept * self._covariance + float(last @ routed)
        self._variance = kept * self._variance + float(last @ last)

    def _evict(self) -> int | None:
        number = int(self._evictable_by_number.argmin())
        if self._evictable_by_number[number] == np.inf:
            return None
        self._evictable_by_number[number] = np.inf
        slot, self._slot_of[number] = self._slot_of[number], NOTHING
        return slot


def _checked(scores: npt.NDArray[np.float32], layers: int, experts: int) -> npt.NDArray[np.float32]:
    """A copy of remembered scores, checked against this model's shape."""
    if scores.shape != (layers, experts) or not ((scores >= 0) & (scores <= 1)).all():
        raise UsageError(
            f"the remembered scores are not shares of {layers} layers x {experts} experts",
            hint="delete them: the next run starts without",
        )
    return scores.astype(np.float32)
