"""The one builder of engines, and the passes that most tests make with one.

By default half of every matrix is pinned and the rest streams through a ring of three units of 16 KiB.
"""

from collections.abc import Mapping, Sequence
from math import lcm
from pathlib import Path
from typing import Any

import torch

from headrace.checkpoint import open_checkpoint
from headrace.engine import Engine, Rows
from headrace.engine.model_weights import StreamOptions
from headrace.kernels import Backend, Kernels
from headrace.model import ModelSkeleton
from support.zoo.folders import VOCAB

TOKENS = torch.randint(0, VOCAB, (1, 40), generator=torch.Generator().manual_seed(1))
# Rows of the passes over TOKENS: a prefill, single rows, several behind a cached prefix, single rows again.
PARTS = (30, 1, 1, 5, 1, 1, 1)
PROMPT = [5, 17, 99, 3, 250, 41, 7, 7, 12, 130, 64, 2, 9]
SMALL_RING: Mapping[str, Any] = {
    "unit_bytes": 16 << 10, "slots": 3, "readers": 2, "expert_slots": 4, "expert_readers": 2,
}  # fmt: skip


def build_engine(
    path: Path,
    backend: Backend | None = None,
    *,
    share: float = 0.5,
    decode_share: float = 0.0,
    row_multiple: int = 1,
    options: Mapping[str, Any] | None = None,
    **given: Any,
) -> Engine:
    """An engine of a model file or folder that streams part of its weights.

    Args:
        path: the file or folder.
        backend: None for ggml on one thread.
        share: share of the rows of every matrix that is pinned.
        decode_share: share that is pinned beside it while decode reuses prefill memory.
        row_multiple: pinned rows of a matrix are a multiple of this, and of what its layout needs.
        options: more fields of `StreamOptions`, over those of `SMALL_RING`.
        given: more arguments of `Engine`.
    """

    def decide(skeleton: ModelSkeleton) -> StreamOptions:
        linears = (*skeleton.linears, *skeleton.prefill_only_linears)
        multiple = {tensor.name: lcm(tensor.row_multiple, row_multiple) for tensor in linears}

        def rows(part: float) -> dict[str, int]:
            return {one.name: int(part * one.rows) // multiple[one.name] * multiple[one.name] for one in linears}

        chosen: dict[str, Any] = {**SMALL_RING, **(options or {})}
        if decode_share:
            chosen["decode_pinned_rows"] = rows(decode_share)
        return StreamOptions(pinned_rows=rows(share), **chosen)

    return Engine(open_checkpoint(path), decide, backend or Kernels(1), **given)


def logits_of(engine: Engine, parts: Sequence[int] = PARTS, *, kv_bits: int = 32) -> tuple[torch.Tensor, object]:
    """Logits of every row of TOKENS, with `parts` as rows of the passes, and the cache."""
    cache, tokens, rows = engine.new_cache(64, kv_bits), TOKENS[0].tolist(), []
    for count in parts:
        rows.append(engine.step([Rows(cache=cache, tokens=tokens[:count], logits=count)]))
        tokens = tokens[count:]
    return torch.cat(rows), cache


def streamed(
    path: Path, backend: Backend, *, share: float = 0.5, parts: Sequence[int] = PARTS
) -> tuple[torch.Tensor, str]:
    """Logits of every row of TOKENS, with `parts` as rows of the passes, and the attention mode."""
    with build_engine(path, backend, share=share) as engine:
        return logits_of(engine, parts)[0], engine.attention_mode


def greedy_logits(engine: Engine, steps: int = 6) -> torch.Tensor:
    """Logits of PROMPT's last token and of some greedy tokens after it: (1 + steps, vocabulary)."""
    cache = engine.new_cache(64)
    logits = [engine.step([Rows(cache=cache, tokens=PROMPT)])]
    for _ in range(steps):
        logits.append(engine.step([Rows(cache=cache, tokens=[int(logits[-1][-1].argmax())])]))
    return torch.cat(logits)
