"""Parity of every corpus case, as a streamed folder, with transformers' own forward; and the cases that are refused."""

from dataclasses import dataclass
from pathlib import Path

import torch
from corpus import CASES, VOCAB, tiny_model, write_folder

from headrace.checkpoint import open_checkpoint
from headrace.engine import Engine, Rows
from headrace.engine.attention import KVCache
from headrace.engine.model_weights import StreamOptions
from headrace.kernels import Kernels, ReferenceKernels
from headrace.model import ModelSkeleton
from headrace.model.trace import LinearStep

TOKENS = torch.randint(0, VOCAB, (1, 40), generator=torch.Generator().manual_seed(1))
# Rows of the passes: a prefill, single rows, several behind a cached prefix, single rows again.
PARTS = (30, 1, 1, 5, 1, 1, 1)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a case: attention mode, equality of each row's likeliest token, largest KL divergence."""

    way: str
    same: bool
    divergence: float
    multiplied: frozenset[str]  # names of tensors that linear layers use
    kept: int | None  # KV elements per token, where the engine keeps the cache


def outcome_of(name: str, folder: Path) -> Outcome:
    """Write the case's model into a folder; compare all rows of TOKENS between transformers and the engine."""
    model = tiny_model(name)
    write_folder(model, folder)
    with torch.inference_mode():
        expected = model(TOKENS).logits[0]
    with opened(folder, Kernels(1)) as engine:
        ours, cache = logits_of(engine, PARTS)
        steps = [step for step in engine.weights.steps if isinstance(step, LinearStep)]
        multiplied = frozenset(tensor.name for step in steps for tensor in step.tensors)
        kept = None
        if isinstance(cache, KVCache):
            kept = sum(
                one.shape[0] * one.shape[2]
                for layer in range(engine.model.config.get_text_config().num_hidden_layers)
                for one in cache.get(layer, 1)
            )
        return Outcome(engine.attention_mode, same_choice(ours, expected), divergence(ours, expected), multiplied, kept)


def opened(path: Path, kernels: Kernels | ReferenceKernels, share: float = 0.5) -> Engine:
    """An engine with `share` of every linear pinned, a ring of three units of 16 KiB, and four expert slots."""

    def options(skeleton: ModelSkeleton) -> StreamOptions:
        pinned = {t.name: int(share * t.rows) // t.row_multiple * t.row_multiple for t in skeleton.linears}
        return StreamOptions(
            pinned_rows=pinned, unit_bytes=16 << 10, slots=3, readers=2, expert_slots=4, expert_readers=2
        )

    return Engine(open_checkpoint(path), options, kernels)


def streamed(
    path: Path, kernels: Kernels | ReferenceKernels, *, share: float = 0.5, parts: tuple[int, ...] = PARTS
) -> tuple[torch.Tensor, str]:
    """Logits of every row of TOKENS, with `parts` as rows of the steps, and the attention mode."""
    with opened(path, kernels, share) as engine:
        return logits_of(engine, parts)[0], engine.attention_mode


def logits_of(engine: Engine, parts: tuple[int, ...]) -> tuple[torch.Tensor, object]:
    """Logits of every row of TOKENS, with `parts` as rows of the steps, and the cache."""
    cache, tokens, rows = engine.new_cache(64, 32), TOKENS[0].tolist(), []
    for count in parts:
        rows.append(engine.step([Rows(cache=cache, tokens=tokens[:count], logits=count)]))
        tokens = tokens[count:]
    return torch.cat(rows), cache


def divergence(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest KL divergence of a row, from theirs to ours."""
    return float(
        torch.nn.functional.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="none")
        .sum(-1)
        .max()
    )


def same_choice(ours: torch.Tensor, theirs: torch.Tensor, tie: float = 1e-3) -> bool:
    """True if our likeliest token is theirs in every row, but for ties within `tie` of a logit."""
    chosen = theirs.gather(-1, ours.argmax(-1, keepdim=True))[:, 0]
    return bool((theirs.max(-1).values - chosen < tie).all())


def kind_of(name: str) -> str:
    """The kind of a case: dense, experts or hybrid."""
    return CASES[name].kind
