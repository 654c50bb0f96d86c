"""Where prompts are cut into chunks, which kernels compute a chunk, and how much of a prefix may be reused."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from headrace.engine.drafters import common_length
from headrace.engine.kv_pool import Slot
from headrace.engine.step import RunnerInfo
from headrace.kernels.thresholds import CHUNK_ROWS, DECODE_MAX_ROWS, GEMM_CHUNK_ROWS, SMALL_CHUNK_ROWS


@dataclass(frozen=True)
class Chunks:
    """Prompts are cut into chunks at multiples of `first` up to position `tokens`, then at multiples of `tokens`.

    `first` divides `tokens`, so that `whole` is always the end of a chunk.
    """

    first: int
    tokens: int

    def end(self, start: int) -> int:
        """End of the chunk that holds position `start`."""
        step = self.first if start < self.tokens else self.tokens
        return (start // step + 1) * step

    def whole(self, count: int) -> int:
        """Number of the first `count` tokens that lie in whole chunks."""
        step = self.first if count < self.tokens else self.tokens
        return count // step * step


class ChunkRules:
    """The chunks of a model's prompts. They depend on the sequence alone, so its results do too."""

    def __init__(self, info: RunnerInfo, prefill_rows: int, deterministic: bool):
        """`deterministic`: reuse nothing whose reuse could change the last bits of a result."""
        self.info = info
        # In other attention modes than packed, a pass takes one chunk of a sequence.
        rows = CHUNK_ROWS if info.prefill_is_row_invariant else GEMM_CHUNK_ROWS
        tokens = prefill_rows if info.one_chunk else min(rows, prefill_rows)
        # Small chunks let more of a prefix be reused; they cost nothing if prefill is row-invariant.
        self._small = not info.one_chunk and info.prefill_is_row_invariant
        if self._small:
            self._chunks = Chunks(SMALL_CHUNK_ROWS, tokens // SMALL_CHUNK_ROWS * SMALL_CHUNK_ROWS)
        else:
            self._chunks = Chunks(tokens, tokens)
        self._reused = self._chunks if deterministic else None

    def of(self, tokens: Sequence[int], prompt_tokens: int, start: int) -> Iterator[Sequence[int]]:
        """Chunks of a sequence from `start` on. They end at multiples of their size and at the end of the prompt.

        Generated tokens that are computed again come in chunks of row-invariant rows.
        """
        if not self.info.accepts_multiple_rows:
            yield tokens[start:]
            return
        while start < len(tokens):
            if start < prompt_tokens:
                end = min(self._chunks.end(start), prompt_tokens)
            else:
                end = min(start + DECODE_MAX_ROWS, len(tokens))
            yield tokens[start:end]
            start = end

    def is_row_invariant(self, prompt_tokens: int, start: int, rows: int) -> bool:
        """True if a chunk of `rows` rows is computed by the decode kernels.

        With small chunks the prompt's length, not the chunk's, decides. So all reusable rows come from the prefill kernels.
        """
        if self._small and start < prompt_tokens:
            return prompt_tokens < self._chunks.first  # a prompt shorter than a chunk
        return rows <= DECODE_MAX_ROWS

    def cached_prefix(self, slot: Slot, prompt: Sequence[int]) -> int:
        """Number of a prompt's tokens in a slot that need not be computed again, never its last."""
        if slot.is_wide:
            return 0  # a wide cache is not reused by other prompts
        common = common_length(slot.tokens, prompt[:-1])
        if not self.info.accepts_multiple_rows and (self._reused is not None or common < len(prompt) - 1):
            return 0  # this cache cannot resume in the middle of a prompt
        found = common if self._reused is None else self._reused.whole(min(common, slot.prompt_tokens))
        return found if self.info.can_truncate or found == len(slot.tokens) else 0

    def shareable_prefix(self, tokens: Sequence[int], prompt_tokens: int, prompt: Sequence[int]) -> int:
        """Number of a prompt's reusable tokens that another sequence has computed or will compute."""
        common = common_length(tokens, prompt[:-1])
        return common if self._reused is None else self._chunks.whole(min(common, prompt_tokens))
