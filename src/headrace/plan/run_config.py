"""The run that a plan is made for."""

from dataclasses import dataclass

from headrace.kernels import DECODE_MAX_ROWS
from headrace.plan.draft import NO_DRAFT, Drafting

MOST_VERIFY_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Sizes of a run: prompt tokens, context length, concurrent sequences, KV cache bits and drafting method."""

    prompt_tokens: int = 512
    context_tokens: int = 1024
    sequences: int = 1  # sequences batched in every pass
    kv_tokens: int | None = None  # tokens that all KV caches hold together; None: every cache may be full
    kv_bits: int = 16
    drafting: Drafting = NO_DRAFT

    @property
    def kv_pool_tokens(self) -> int:
        """Tokens that all KV caches hold together: at least one whole context."""
        full = self.sequences * self.context_tokens
        return full if self.kv_tokens is None else min(full, max(self.kv_tokens, self.context_tokens))

    @property
    def prompt_rows(self) -> int:
        """Prompt rows of all sequences, which may share a pass."""
        return self.prompt_tokens * self.sequences

    @property
    def max_draft_tokens(self) -> int:
        """Max draft tokens per sequence in a pass; a larger batch gets fewer, because every row's logits take memory."""
        return min(self.drafting.max_draft_tokens, max(0, MOST_VERIFY_ROWS // self.sequences - 1))

    @property
    def row_invariant(self) -> bool:
        """True if decode rows must be independent of batch size: with draft tokens, or with several sequences."""
        return self.sequences > 1 or self.max_draft_tokens > 0

    @property
    def verify_rows(self) -> int:
        """Max row-invariant rows of a pass: one token and all draft tokens of every sequence."""
        return max(DECODE_MAX_ROWS, self.sequences * (1 + self.max_draft_tokens))
