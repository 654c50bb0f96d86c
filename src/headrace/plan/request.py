"""What is asked of a model."""

from dataclasses import dataclass

from headrace.kernels import DECODE_MAX_ROWS
from headrace.plan.draft import NO_DRAFT, Drafting

MOST_VERIFY_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of the model: how many tokens go in, how many the context must hold in all, and how to go about it."""

    prompt_tokens: int = 512
    context_tokens: int = 1024
    sequences: int = 1  # computed together in every pass
    kv_bits: int = 16
    drafting: Drafting = NO_DRAFT

    @property
    def prompt_rows(self) -> int:
        """Rows of the prompts of all sequences, which may share a pass."""
        return self.prompt_tokens * self.sequences

    @property
    def max_draft_tokens(self) -> int:
        """For each sequence in a pass: fewer where many share it, since the logits of every row take memory."""
        return min(self.drafting.max_draft_tokens, max(0, MOST_VERIFY_ROWS // self.sequences - 1))

    @property
    def row_invariant(self) -> bool:
        """Whether what one row computes must not depend on the number of rows: with draft tokens, or with other sequences."""
        return self.sequences > 1 or self.max_draft_tokens > 0

    @property
    def verify_rows(self) -> int:
        """The most exact rows of a pass: of every sequence its token and all draft tokens."""
        return max(DECODE_MAX_ROWS, self.sequences * (1 + self.max_draft_tokens))
