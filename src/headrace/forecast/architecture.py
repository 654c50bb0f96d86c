"""The sizes of a model for a forecast: from a table, a file, a config.json, or a parameter count alone."""

import json
import os
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from math import inf, sqrt
from pathlib import Path
from typing import Any

from headrace.checkpoint.foreign import check_names
from headrace.errors import CheckpointError, UsageError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The sizes of a published model. `experts` counts routed ones; `source` is the origin of the numbers."""

    name: str
    params: float
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    source: str
    active_params: float | None = None  # parameters that a token uses, for MoE
    feed_forward: int | None = None
    gated: bool = True
    vocab: int = 0
    tied: bool = False
    context: int | None = None
    experts: int = 0
    experts_per_token: int = 0
    shared_experts: int = 0
    expert_feed_forward: int | None = None
    dense_layers: int = 0  # layers without experts, for MoE
    kv_dim_per_layer: float | None = None  # KV elements per token and layer, where not 2 * kv_heads * head_dim
    kv_layers: int | None = None  # layers with a KV cache, for a hybrid model
    window: int | None = None
    window_layers: int = 0
    native_bits: float = 16.0
    training_tokens: float | None = None
    weights_bytes: float | None = None  # exact bytes that every pass reads, for a file
    bits: float | None = None  # bits per weight of a file
    note: str = ""

    def __post_init__(self) -> None:
        if min(self.params, self.layers, self.hidden, self.heads, self.kv_heads, self.head_dim) <= 0:
            raise UsageError(f"the architecture {self.name} has a size that is not positive")
        if bool(self.experts) != bool(self.experts_per_token) or self.experts_per_token > self.experts:
            raise UsageError(f"{self.name} chooses {self.experts_per_token} of {self.experts} experts")

    @property
    def is_moe(self) -> bool:
        """True for MoE: a token uses only some of the weights."""
        return self.experts > 0

    @property
    def computed_params(self) -> float:
        """Parameters that a token multiplies, without the embedding table, which is only looked up."""
        table = 0 if self.tied else self.vocab * self.hidden
        return (self.active_params or self.params) - table

    @property
    def expert_params(self) -> float:
        """Parameters of all routed experts: from total minus active parameters, or from the widths."""
        if not self.is_moe:
            return 0.0
        if self.active_params is not None:
            return (self.params - self.active_params) / (1 - self.experts_per_token / self.experts)
        assert self.expert_feed_forward is not None
        one = (3 if self.gated else 2) * self.hidden * self.expert_feed_forward
        return float(one * self.experts * (self.layers - self.dense_layers))

    @property
    def dense_params(self) -> float:
        """Dense parameters, which every token uses."""
        return self.params - self.expert_params

    @property
    def expert_layers(self) -> int:
        """Layers with routed experts."""
        return self.layers - self.dense_layers if self.is_moe else 0

    def read_bytes(self, bits: float, distinct_experts: float | None = None) -> float:
        """Bytes of weights that a pass reads; an MoE pass uses `distinct_experts` experts per layer."""
        table = 0.0 if self.tied else float(self.vocab * self.hidden)
        if not self.is_moe:
            exact = self.weights_bytes if self.bits == bits else None
            return exact if exact is not None else (self.params - table) * bits / 8
        touched = self.experts_per_token if distinct_experts is None else distinct_experts
        return (self.dense_params - table + self.expert_params * touched / self.experts) * bits / 8

    def all_bytes(self, bits: float) -> float:
        """Bytes of all weights."""
        return self.params * bits / 8

    def kv_bytes(self, tokens: float, bits: float = 16) -> float:
        """Bytes of KV cache of one sequence of `tokens` tokens."""
        elements = self.kv_dim_per_layer or 2.0 * self.kv_heads * self.head_dim
        layers = self.kv_layers if self.kv_layers is not None else self.layers
        short = min(self.window_layers, layers)
        kept = (layers - short) * tokens + short * min(tokens, self.window or tokens)
        return kept * elements * bits / 8

    def flop(self, context: float = 0) -> float:
        """FLOP of one token after `context` tokens: 2 N, plus attention to the context."""
        layers = self.kv_layers if self.kv_layers is not None else self.layers
        return 2 * self.computed_params + 4 * layers * self.heads * self.head_dim * context


@cache
def table(name: str) -> Mapping[str, Any]:
    """One of the tables of facts in `data/`, unchanged."""
    return tomllib.loads((files("headrace.forecast") / "data" / f"{name}.toml").read_text())


def published(name: str) -> Architecture:
    """A model from the table, by name.

    Raises:
        UsageError: no such model.
    """
    known = table("models")
    key = name.lower().replace("_", "-").replace(" ", "-")
    if key not in known:
        raise UsageError(f"no published model is called {name}", hint=did_you_mean(key, known))
    fields = {k: v for k, v in known[key].items() if k in Architecture.__dataclass_fields__}
    return Architecture(**{"kv_heads": fields["heads"]} | fields)


def of_params(params: float) -> Architecture:
    """A dense model with a given number of parameters and an estimated shape.

    Raises:
        UsageError: fewer than a million parameters, so a unit is probably missing.
    """
    if not 1e6 <= params < inf:
        raise UsageError(f"{params:g} parameters is no language model", hint="write it like --params 175e9")
    # P = 12 L d^2 with d = 128 L, as at 1.75e11 (96 layers of width 12288). At 1e8, 12 of width 768 are usual.
    layers = max(1, round((params / (12 * 128**2)) ** (1 / 3)))
    hidden = max(128, round(sqrt(params / 12 / layers) / 128) * 128)
    return Architecture(
        name=f"{params / 1e9:g}B parameters",
        params=params,
        layers=layers,
        hidden=hidden,
        heads=hidden // 128,
        kv_heads=hidden // 128,
        head_dim=128,
        gated=False,
        source="estimated from the number of parameters: P = 12 L d^2 with d = 128 L",
    )


def of_config(path: Path) -> Architecture:
    """The sizes of a Hugging Face folder, from its config.json.

    Raises:
        UsageError: the file is missing or incomplete.
    """
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        config = config.get("text_config", config)
        layers, hidden, heads, vocab = (int(config[key]) for key in _CONFIG)
        experts = int(
            config.get("num_local_experts") or config.get("num_experts") or config.get("n_routed_experts") or 0
        )
        chosen = int(config.get("num_experts_per_tok") or 0)
        kv_heads = int(config.get("num_key_value_heads") or heads)
        head_dim = int(config.get("head_dim") or hidden // heads)
        dense_ff = int(config.get("intermediate_size") or 4 * hidden)
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        with suppress(FileNotFoundError, NotADirectoryError):
            check_names(str(path.parent), os.listdir(path.parent))
        if isinstance(error, FileNotFoundError):
            raise CheckpointError(
                f"{path.parent} holds no weights", hint="name a folder with a model.safetensors, or a .gguf file"
            ) from error
        raise UsageError(
            f"{path} does not give the sizes of a model ({error})", hint=f"it needs {', '.join(_CONFIG)}"
        ) from error
    expert_ff = int(config.get("moe_intermediate_size") or dense_ff) if experts else None
    gated = "gelu_new" not in str(config.get("hidden_act", config.get("activation_function", "silu")))
    matrices = 3 if gated else 2
    attention = hidden * head_dim * 2 * (heads + kv_heads)
    tied = bool(config.get("tie_word_embeddings", False))
    tables = vocab * hidden * (1 if tied else 2)
    mlp = matrices * hidden * (expert_ff or dense_ff)
    params = layers * (attention + mlp * max(1, experts)) + tables
    return Architecture(
        name=str(config.get("_name_or_path") or path.parent.name),
        params=float(params),
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        source="config.json; parameters counted from its widths",
        active_params=float(params - layers * mlp * (experts - chosen)) if experts else None,
        feed_forward=dense_ff,
        gated=gated,
        vocab=vocab,
        tied=tied,
        context=int(config.get("max_position_embeddings") or 0) or None,
        experts=experts,
        experts_per_token=chosen,
        expert_feed_forward=expert_ff,
    )


_CONFIG = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
