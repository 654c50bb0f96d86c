"""The runner executes steps: it owns the KV caches and the engine that computes passes."""

from headrace.engine.attention import CacheOverflow, KVCache, NotFinite
from headrace.engine.engine import Engine, Rows
from headrace.engine.native_cache import NativeCache
from headrace.engine.step import RunnerInfo, StepInput, StepOutput


class ModelRunner:
    """KV caches in numbered slots, and passes over them. Not thread-safe."""

    def __init__(self, engine: Engine, num_slots: int, capacity: int, kv_bits: int = 16, returns_memory: bool = False):
        """Make empty caches.

        Args:
            engine: computes the passes.
            num_slots: number of KV caches.
            capacity: tokens of each. Their memory is taken from the system as it is written.
            kv_bits: 16 or 8.
            returns_memory: return the memory of positions that a cache forgets; else it stays for the next sequence.
        """
        self.engine = engine
        self._caches = [engine.new_cache(capacity, kv_bits) for _ in range(num_slots)]
        self._returns_memory = returns_memory
        first = self._caches[0]
        self.info = RunnerInfo(
            num_slots=num_slots,
            capacity=capacity,
            one_chunk=engine.attention_mode != "packed",
            prefill_is_row_invariant=engine.weights.prefill_is_row_invariant,
            accepts_multiple_rows=first.accepts_multiple_rows,
            can_truncate=not isinstance(first, NativeCache) or first.can_truncate,
        )

    def cache_type(self, slot: int) -> str:
        """Type of a slot's keys and values, by ggml's names."""
        return self._caches[slot].type

    def execute(self, step: StepInput) -> StepOutput:
        """Run one pass.

        Raises:
            HeadraceError: the pass failed. No cache has grown; the slots of the step have to start again.
        """
        try:
            self._prepare(step)
            batch = [
                Rows(
                    cache=self._caches[rows.slot],
                    tokens=rows.token_ids,
                    logits=rows.num_logits,
                    row_invariant=rows.row_invariant,
                )
                for rows in step.rows
            ]
            logits = self.engine.step(batch)
        except CacheOverflow as overflow:
            self._roll_back(step)
            return StepOutput(logits=None, stats=None, overflowed=self._slot_of(overflow.cache))
        except NotFinite as found:
            self._roll_back(step)
            failed = frozenset(map(self._slot_of, found.caches))
            return StepOutput(logits=None, stats=None, failed=failed, error=found.error)
        except BaseException:
            self._roll_back(step)
            raise
        return StepOutput(logits=logits, stats=self.engine.passes[-1])

    def _prepare(self, step: StepInput) -> None:
        """Change the caches as the step says, before its rows."""
        for slot, length in step.truncated:
            self._truncate(slot, min(length, self._caches[slot].length))
        copied = {copy.target for copy in step.copies}
        seen = set()
        for rows in step.rows:
            if rows.slot in seen:
                continue
            seen.add(rows.slot)
            cache = self._caches[rows.slot]
            if isinstance(cache, KVCache) and cache.is_wide != (rows.slot in step.wide):
                cache.widen() if rows.slot in step.wide else cache.restore()
            if rows.slot not in copied:
                self._truncate(rows.slot, rows.start)
        for copy in step.copies:
            source, target = self._caches[copy.source], self._caches[copy.target]
            assert isinstance(source, KVCache)
            assert isinstance(target, KVCache)
            self._truncate(copy.target, min(copy.length, target.length))
            target.copy_prefix(source, copy.length)

    def _truncate(self, slot: int, length: int) -> None:
        cache = self._caches[slot]
        if length == cache.length:
            return
        cache.truncate(length)
        assert cache.length == length, "the scheduler knows which caches can be truncated"
        if self._returns_memory and isinstance(cache, KVCache):
            cache.return_memory()

    def _roll_back(self, step: StepInput) -> None:
        for slot in {rows.slot for rows in step.rows}:
            self._caches[slot].rollback()

    def _slot_of(self, cache: KVCache | NativeCache) -> int:
        return next(slot for slot, one in enumerate(self._caches) if one is cache)
