"""Which experts stay in memory: the one that goes is the one least likely to be asked for at its layer's next visit.

All layers share the slots. The chance that an expert is asked for is a mixture of two predictions,

    p = a * last + (1 - a) * usual

`last` is the share of the layer's last rows that chose it, `usual` the same share averaged over earlier passes, where one counts
half as much after each `HALF_LIFE`. A pass of n rows counts as sqrt(n) tokens: as n, a prompt would wipe out what earlier
answers said of the next one; as 1, it would hardly be heard. `a`, how much neighbouring tokens agree, differs between models and
texts and is measured, not set: the least-squares slope of what was asked, less `usual`, against `last`, less `usual`. With
a = 0 this is LFU that forgets.
`docs/expert-cache.md` has the alternatives with their numbers.

Ages are counted in visits of the expert's own layer: counted in time, every layer just computed would look fresher than those
that come next, and LRU throws out precisely what is needed soonest.

Reads nothing, imports no torch, is not thread-safe (the owner locks), and never gives away a slot that is held.
"""

import numpy as np
import numpy.typing as npt

from headrace.errors import BudgetError, UsageError

HALF_LIFE = 24  # tokens
REMEMBERED_VISITS = 2000  # of all layers, over which the agreement of neighbouring tokens is averaged: some 40 tokens
DOUBT = 16.0  # squared deviations counted before the first: until the data outweighs it, the slope is near zero
HIGHEST_LOCALITY = 0.9
NOTHING = -1


class ExpertCache:
    """The experts in memory, and which one goes when another comes.

    Per layer and pass: `note` what the router asks for; `find` and `hold` what is there; `place` what is missing, which comes
    held, and read it, or `forget` it; `release` each slot after its use.

    Args:
        layers: layers with experts, visited in order.
        experts: routed experts in each.
        slots: experts that fit into memory.
        scores: (layers, experts), `scores` of an earlier run of the same model.
    """

    def __init__(self, *, layers: int, experts: int, slots: int, scores: npt.NDArray[np.float32] | None = None):
        if slots < 1:
            raise BudgetError(f"{slots} experts fit into memory, at least 1 must", hint="give more --memory")
        self.experts = experts
        self._usual = np.zeros((layers, experts), np.float32) if scores is None else _checked(scores, layers, experts)
        self._last = np.zeros_like(self._usual)
        self._chance = self._usual.copy()
        self._agreement, self._deviation = 0.0, DOUBT
        self._slot_of = [NOTHING] * (layers * experts)
        self._expert_in = [NOTHING] * slots
        self._holds = [0] * slots
        self._free = list(range(slots - 1, -1, -1))
        self._leaving = np.full_like(self._usual, np.inf)  # the chance, where an expert is in memory and not held
        self._leaving_by_number, self._chance_by_number = self._leaving.reshape(-1), self._chance.reshape(-1)

    @property
    def scores(self) -> npt.NDArray[np.float32]:
        """How often each expert is usually chosen, per row: (layers, experts), for the next run of this model."""
        return self._usual.copy()

    @property
    def locality(self) -> float:
        """Weight of the last rows' choice in the prediction of the next, as measured so far."""
        return min(max(self._agreement / self._deviation, 0.0), HIGHEST_LOCALITY)

    def note(self, layer: int, counts: npt.NDArray[np.integer], rows: int) -> None:
        """The router of `layer` has chosen: `counts[e]` of this pass's `rows` rows go to expert e."""
        asked = counts.astype(np.float32)  # (experts,)
        asked /= rows
        usual, last, chance, leaving = self._usual[layer], self._last[layer], self._chance[layer], self._leaving[layer]
        news = asked - usual
        self._measure(last - usual, news)
        share = 1 - 0.5 ** (rows**0.5 / HALF_LIFE)
        usual += share * news
        last[:] = asked
        # asked - usual, now that the news are in `usual`, is what is left of them
        np.add(usual, self.locality * (1 - share) * news, out=chance)
        np.copyto(leaving, chance, where=leaving < np.inf)

    def find(self, layer: int, expert: int) -> int | None:
        """The slot of an expert, or None if it is not in memory."""
        slot = self._slot_of[layer * self.experts + expert]
        return None if slot == NOTHING else slot

    def worthy(self, layer: int, expert: int) -> bool:
        """Whether an expert is likelier to be asked for again than the one that `place` would turn out for it.

        If not, and there is a buffer outside the slots, it is better read there and dropped after its use.
        """
        if self._free:
            return True
        return bool(self._chance[layer, expert] > self._leaving.min())

    def place(self, layer: int, expert: int) -> int | None:
        """A slot for a missing expert, held: a free one or that of the least likely one not held; None if all are held."""
        assert self.find(layer, expert) is None
        slot = self._free.pop() if self._free else self._evict()
        if slot is not None:
            number = layer * self.experts + expert
            self._slot_of[number], self._expert_in[slot], self._holds[slot] = slot, number, 1
        return slot

    def hold(self, slot: int) -> None:
        """A slot with an expert in it is in use, once more, and must not be given away."""
        assert self._expert_in[slot] != NOTHING
        self._holds[slot] += 1
        self._leaving_by_number[self._expert_in[slot]] = np.inf

    def release(self, slot: int) -> None:
        """One use of a slot has ended."""
        assert self._holds[slot] > 0
        self._holds[slot] -= 1
        if self._holds[slot] > 0:
            return
        if self._expert_in[slot] == NOTHING:
            self._free.append(slot)
            return
        number = self._expert_in[slot]
        self._leaving_by_number[number] = self._chance_by_number[number]

    def forget(self, slot: int) -> None:
        """A held slot holds nothing, its read has failed: nobody finds it, and it is free after its last `release`."""
        assert self._holds[slot] > 0
        self._slot_of[self._expert_in[slot]] = NOTHING
        self._expert_in[slot] = NOTHING

    def _measure(self, last: npt.NDArray[np.float32], asked: npt.NDArray[np.float32]) -> None:
        """Let one visit into the slope of `asked` against `last`, both less what is usual."""
        kept = 1 - 1 / REMEMBERED_VISITS
        self._agreement = kept * self._agreement + float(last @ asked)
        self._deviation = kept * self._deviation + float(last @ last)

    def _evict(self) -> int | None:
        number = int(self._leaving_by_number.argmin())
        if self._leaving_by_number[number] == np.inf:
            return None
        self._leaving_by_number[number] = np.inf
        slot, self._slot_of[number] = self._slot_of[number], NOTHING
        return slot


def _checked(scores: npt.NDArray[np.float32], layers: int, experts: int) -> npt.NDArray[np.float32]:
    """A copy of remembered scores, if they can be those of this model."""
    if scores.shape != (layers, experts) or not ((scores >= 0) & (scores <= 1)).all():
        raise UsageError(
            f"the remembered scores are not shares of {layers} layers x {experts} experts",
            hint="delete them: the next run starts without",
        )
    return scores.astype(np.float32)
