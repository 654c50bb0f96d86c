"""The memory of all KV caches, counted in tokens: slots, what they hold, and what may be dropped for a new sequence."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from headrace.kernels.thresholds import KV_BLOCK_TOKENS


@dataclass(eq=False)
class Slot:
    """The tokens in one KV cache. Kept after its sequence ends, for prefix caching."""

    number: int
    tokens: list[int] = field(default_factory=list)
    prompt_tokens: int = 0  # number of tokens computed as a prompt
    is_wide: bool = False  # keys and values are stored in the wide type
    last_used: int = 0  # number of the step

    def truncate(self, count: int) -> None:
        """Forget all but the first `count` tokens."""
        del self.tokens[count:]
        self.prompt_tokens = min(self.prompt_tokens, count)


class KvPool:
    """Slots, and the tokens that they may hold together."""

    def __init__(self, num_slots: int, capacity: int, kv_tokens: int | None):
        """`capacity`: max tokens of a slot; `kv_tokens`: of all slots together, None: all may be full."""
        self.slots = [Slot(number) for number in range(num_slots)]
        self.free = list(self.slots)
        self._capacity = capacity
        self._limit_blocks = None if kv_tokens is None else max(_blocks(kv_tokens), _blocks(capacity))
        self._truncated: dict[int, int] = {}  # length by slot

    def best_free(self, cached_prefix: Callable[[Slot], int]) -> Slot:
        """The free slot with the longest reusable prefix; among equals an empty one, then the least recently used."""
        return max(self.free, key=lambda slot: (cached_prefix(slot), not slot.tokens, -slot.last_used))

    def reserve(self, slot: Slot, tokens: int, ends: Mapping[Slot, int]) -> bool:
        """Drop idle caches until a slot may hold `tokens` tokens; False if that is not enough.

        `ends`: tokens that other slots will hold.
        """
        if self._limit_blocks is None:
            return True
        needed = {**ends, slot: tokens}
        idle = sorted((one for one in self.free if one.tokens and one is not slot), key=lambda one: one.last_used)
        excess = self._held_blocks(needed, without=slot) - self._limit_blocks
        if excess > sum(_blocks(len(one.tokens)) for one in idle):
            return False  # and the idle caches stay
        while excess > 0:
            excess -= _blocks(len(idle[0].tokens))
            self.release(idle.pop(0))
        return True

    def release(self, slot: Slot) -> None:
        """Drop the tokens of a slot."""
        self.truncate(slot, 0)

    def truncate(self, slot: Slot, length: int) -> None:
        """Keep the first tokens of a slot; the next step returns the memory of the others."""
        if length < len(slot.tokens) or not length:
            slot.truncate(length)
            self._truncated[slot.number] = min(length, self._truncated.get(slot.number, length))

    def take_truncated(self) -> tuple[tuple[int, int], ...]:
        """(slot, length) of the slots truncated since the last call."""
        truncated = tuple(sorted(self._truncated.items()))
        self._truncated.clear()
        return truncated

    def free_tokens(self, ends: Mapping[Slot, int]) -> int:
        """Tokens that slots could hold beyond `ends`. Without a limit: the capacity of all slots."""
        if self._limit_blocks is None:
            return self._capacity * len(self.slots)
        return max(0, self._limit_blocks - self._held_blocks(ends)) * KV_BLOCK_TOKENS

    def _held_blocks(self, ends: Mapping[Slot, int], without: Slot | None = None) -> int:
        """Blocks of all slots, at least those of `ends`; the tokens that `without` holds now do not count."""
        return sum(_blocks(max(0 if slot is without else len(slot.tokens), ends.get(slot, 0))) for slot in self.slots)


def _blocks(tokens: int) -> int:
    return -(-tokens // KV_BLOCK_TOKENS)
