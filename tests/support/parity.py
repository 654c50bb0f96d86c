"""Parity of a streamed folder with transformers' own forward: for the tests, and for docs/architectures.md."""

from dataclasses import dataclass
from pathlib import Path

import torch

from headrace.engine.attention import KVCache
from headrace.kernels import Kernels
from headrace.model.trace import LinearStep
from support.comparison import divergence, same_argmax
from support.engines import TOKENS, build_engine, logits_of
from support.zoo.folders import tiny_model, write_folder


@dataclass(frozen=True)
class Outcome:
    """The outcome of a case: attention mode, equality of each row's likeliest token, largest KL divergence."""

    attention_mode: str
    same: bool
    divergence: float
    linear_tensors: frozenset[str]  # names of tensors that linear layers use
    kv_elements_per_token: int | None  # KV elements per token, where the engine keeps the cache


def outcome_of(name: str, folder: Path) -> Outcome:
    """Write the case's model into a folder; compare all rows of TOKENS between transformers and the engine."""
    model = tiny_model(name)
    write_folder(model, folder)
    with torch.inference_mode():
        expected = model(TOKENS).logits[0]
    with build_engine(folder, Kernels(1)) as engine:
        ours, cache = logits_of(engine)
        steps = [step for step in engine.weights.steps if isinstance(step, LinearStep)]
        multiplied = frozenset(tensor.name for step in steps for tensor in step.tensors)
        kept = None
        if isinstance(cache, KVCache):
            kept = sum(
                one.shape[0] * one.shape[2]
                for layer in range(engine.model.config.get_text_config().num_hidden_layers)
                for one in cache.get(layer, 1)
            )
        return Outcome(engine.attention_mode, same_argmax(ours, expected), divergence(ours, expected), multiplied, kept)
