"""A Hugging Face folder as a checkpoint: its tensors, and its config under the planner's keys.

The planner's keys are GGUF's metadata keys: `block_count`, `embedding_length`, `expert_count`. Configs of transformers have
several names for each, listed here. Models are built from the config itself (`model.config`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headrace.checkpoint.encodings import Encoding, decoded
from headrace.checkpoint.gguf import Checkpoint, Scalar
from headrace.checkpoint.safetensors import read_folder
from headrace.checkpoint.source import LocalSource, OpenSource
from headrace.checkpoint.tensor import Tensor
from headrace.errors import CheckpointError, UnsupportedError
from headrace.sampling_params import FIELDS

# GGUF's key, and its names in configs.
_NAMES = {
    "block_count": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "num_encoder_layers"),
    "embedding_length": ("hidden_size", "n_embd", "d_model"),
    "decoder_block_count": ("num_decoder_layers", "decoder_layers"),
    "attention.head_count": ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"),
    "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads"),
    "attention.key_length": ("head_dim", "d_kv"),
    "attention.value_length": ("v_head_dim",),
    "feed_forward_length": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "expansion_ratio"),
    "context_length": ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"),
    "vocab_size": ("vocab_size",),
    "expert_count": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "expert_used_count": (
        "num_experts_per_tok",
        "num_experts_per_token",
        "moe_topk",
        "moe_top_k",
        "top_k_experts",
        "moe_k",
        "top_k",
    ),
    "expert_feed_forward_length": ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size"),
}


_LAYERS = ("layers_block_type", "layer_types")  # keys of lists with an entry per layer


def _state_of(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """(channels, values per channel) of a layer's recurrent state in pure state-space models; None for others."""

    def number(name: str, default: int) -> int:
        found = config.get(name)
        return found if isinstance(found, int) and found > 0 else default

    hidden, kind = number("hidden_size", 0), config.get("model_type")
    if kind in ("mamba", "falcon_mamba"):
        return number("intermediate_size", number("expand", 2) * hidden), number("state_size", 16)
    if kind == "mamba2":
        return number("num_heads", 128) * number("head_dim", 64), number("state_size", 128)
    if kind == "rwkv":
        return hidden, 5
    return (hidden, hidden // number("num_heads", 8)) if kind == "xlstm" else None


def open_folder(path: str, open_source: OpenSource = LocalSource) -> Checkpoint:
    """Read the headers of a Hugging Face folder, or of one .safetensors file in it.

    Raises:
        CheckpointError: a file is missing, damaged, or contradicts the others.
        UnsupportedError: a layout, or a model with parts beside the language model, that cannot run.
    """
    folder = read_folder(path, open_source)
    config = dict(folder.config)
    _check_config(path, config)
    tensors, encodings = decoded(folder.tensors, config, folder.path)
    return Checkpoint(
        path=path,
        paths=folder.paths,
        metadata=_metadata(path, config, folder.generation),
        tensors=tensors,
        config=config,
        generation=folder.generation,
        virtual=_by_path(tensors, encodings),
    )


def _by_path(
    tensors: Mapping[str, Tensor], encodings: Mapping[str, Encoding]
) -> dict[str, list[tuple[Tensor, Encoding]]]:
    virtual: dict[str, list[tuple[Tensor, Encoding]]] = {}
    for name, encoding in encodings.items():
        virtual.setdefault(tensors[name].path, []).append((tensors[name], encoding))
    return virtual


def _check_config(path: str, config: Mapping[str, Any]) -> None:
    if not isinstance(config.get("model_type"), str):
        remote = " (it has its own code, which headrace does not run)" if config.get("auto_map") else ""
        raise UnsupportedError(
            f"{path}: config.json names no model_type{remote}",
            hint="use a version of the model that transformers supports, or a GGUF file",
        )


def _name(path: str) -> str:
    """Name of the folder; in the hub's cache, where folders are commits, of the model."""
    if not Path(path).exists():
        return path.rstrip("/").split("/")[-1]
    folder = Path(path).resolve()
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.split("--")[-1]
    return folder.name


_LARGEST = 1 << 48


def _metadata(path: str, config: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    text = config.get("text_config", config.get("decoder"))
    inner: Mapping[str, Any] = text if isinstance(text, Mapping) else config
    for part in ("attn_config", "ffn_config"):  # DBRX's
        if isinstance(inner.get(part), Mapping):
            inner = {**inner[part], **inner}
    found: dict[str, Scalar] = {
        "general.architecture": str(inner.get("model_type") or config["model_type"]),
        "general.name": _name(path),
    }
    for key, names in _NAMES.items():
        value = next((inner[name] for name in names if isinstance(inner.get(name), int)), None)
        if value is not None and not isinstance(value, bool):
            if abs(value) > _LARGEST:
                raise CheckpointError(
                    f"{path}: `{key}` in config.json is beyond {_LARGEST}",
                    hint="the file is damaged; get it from another source",
                )
            found[key] = value
    kinds: list[Any] = next((inner[key] for key in _LAYERS if isinstance(inner.get(key), list)), [])
    if "block_count" not in found and kinds:
        found["block_count"] = len(kinds)
    if inner.get("multi_query") is True and not inner.get("new_decoder_architecture"):  # Falcon
        found["attention.head_count_kv"] = 1
    rope_dim, nope_dim = inner.get("qk_rope_head_dim"), inner.get("qk_nope_head_dim")
    if isinstance(rope_dim, int) and isinstance(nope_dim, int):  # MLA: keys are wider than values
        found["attention.key_length"] = rope_dim + nope_dim
        rank = inner.get("kv_lora_rank")
        if isinstance(rank, int):
            found |= {"attention.kv_lora_rank": rank, "rope.dimension_count": rope_dim}
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if isinstance(inner.get(key), int | float):
            found[key] = inner[key]
    heads, width, keys = (inner.get(f"linear_{name}") for name in ("num_value_heads", "value_head_dim", "key_head_dim"))
    # Recurrent state of linear attention.
    if isinstance(heads, int) and isinstance(width, int) and isinstance(keys, int):
        found["ssm.inner_size"], found["ssm.state_size"] = heads * width, keys
    state = _state_of(inner)
    if state is not None:  # no layer has a KV cache
        found["attention.head_count"] = 0
        found["ssm.inner_size"], found["ssm.state_size"] = state
    if "expert_count" not in found:
        found["expert_count"] = 0
    if inner.get("model_type") == "switch_transformers":
        found["expert_used_count"] = 1
    for one in FIELDS:
        value = generation.get(one.name)
        if one.gguf_key and isinstance(value, int | float) and not isinstance(value, bool):
            found[f"general.sampling.{one.gguf_key}"] = value
    if generation and generation.get("do_sample") is not True:
        found["general.sampling.temp"] = 0.0
    return found
