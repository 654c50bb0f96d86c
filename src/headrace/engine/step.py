"""A step as plain data: what the scheduler tells the runner to compute in one pass, and what comes back.

It holds numbers only, so that it can be sent to another process or another machine.
"""

from dataclasses import dataclass

import torch

from headrace.engine.timeline import PassStats


@dataclass(frozen=True, kw_only=True, slots=True)
class RowsInput:
    """New tokens of one sequence. Before the first rows of a slot, its KV cache forgets every position from `start` on.

    The results of row-invariant rows do not depend on the rows beside them. Other rows are one prompt chunk, for the
    faster prefill kernels. Their results depend on that chunk alone.
    A sequence may have several chunks in a step, in their order.
    """

    slot: int
    start: int
    token_ids: tuple[int, ...]
    num_logits: int = 1  # number of last tokens that need logits
    row_invariant: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixCopy:
    """The first `length` positions of a KV cache, copied to another one before its new rows."""

    source: int  # slot; it may compute them in the same step
    target: int
    length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StepInput:
    """One pass: the rows of all sequences, and changes of KV caches before it."""

    rows: tuple[RowsInput, ...]
    copies: tuple[PrefixCopy, ...] = ()
    truncated: tuple[tuple[int, int], ...] = ()  # (slot, length): what a cache holds beyond is dropped first
    wide: frozenset[int] = frozenset()  # slots that hold keys and values in BF16, or in 8 bits with scales in fp32


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutput:
    """Logits of a step in the order of its rows: fp32, (sum of `num_logits`, vocab). Or the slots that have none.

    After an overflow no cache has grown. The sequence starts again in the wide type.
    """

    logits: torch.Tensor | None
    stats: PassStats | None
    overflowed: int | None = None
    failed: frozenset[int] = frozenset()  # slots of sequences whose results are not finite; no cache has grown
    error: Exception | None = None  # why they failed


@dataclass(frozen=True, kw_only=True, slots=True)
class RunnerInfo:
    """Facts about a runner that the scheduler needs."""

    num_slots: int
    capacity: int  # max tokens of a sequence
    one_chunk: bool  # a pass takes one chunk of a sequence
    prefill_is_row_invariant: bool
    accepts_multiple_rows: bool  # any number of rows may follow cached ones
    can_truncate: bool  # a KV cache can forget its last positions; else it is computed again from the start
