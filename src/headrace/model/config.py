"""A transformers config: a folder's own, or one made from GGUF metadata.

transformers maps most GGUF keys (`GGUF_CONFIG_MAPPING`), but leaves out those that its test models did not need: RoPE
widths and scalings, logit soft-capping, biases, Falcon's and GPT-2's own names. `_corrections` adds them, with one
function per family where values must be derived. Each value comes from the file itself.
"""

from collections.abc import Callable, Mapping
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.integrations.ggml import GGUF_CONFIG_DEFAULTS_MAPPING, GGUF_CONFIG_MAPPING
from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from headrace.checkpoint import Checkpoint
from headrace.checkpoint.gguf import ArrayRef
from headrace.errors import CheckpointError, HeadraceError, UnsupportedError, did_you_mean

MODEL_TYPES = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "command-r": "cohere",
    "ernie4_5-moe": "ernie4_5_moe",
    "exaone-moe": "exaone_moe",
    "glm-dsa": "deepseek_v3",  # its sparse attention indexer is left out: here attention covers all positions
    "glm4moe": "glm4_moe",
    "gpt-oss": "gpt_oss",
    "granitehybrid": "granitemoehybrid",
    "granitemoe": "granitemoeshared",
    "hunyuan-dense": "hunyuan_v1_dense",
    "hunyuan-moe": "hunyuan_v1_moe",
    "lfm2moe": "lfm2_moe",
    "llama4": "llama4_text",
    "minimax-m2": "minimax_m2",
    "mistral3": "ministral3",
    "nemotron_h_moe": "nemotron_h",
    "qwen2moe": "qwen2_moe",
    "qwen2vl": "qwen2",
    "qwen3moe": "qwen3_moe",
    "qwen3next": "qwen3_next",
    "qwen3vl": "qwen3",
    "qwen3vlmoe": "qwen3_moe",
}
# Refused types and why: they have a language head in transformers, but do not generate text from left to right.
_ENCODER = "an encoder, which sees what follows a token"
_DECODER_HALF = "the decoder of a model with an encoder"
_OTHERS = {
    "blt": "a model over bytes, with separate models for patches of them",
    "cpmant": "a model that lets a token see what follows it",
    "reformer": "a model with hashed attention, drawn anew each time",
    "xlm": _ENCODER,
    "xlnet": "a model with permuted attention",
    "gemma4_assistant": "a drafter that reads another model's hidden states",
    "gemma4_unified_assistant": "a drafter that reads another model's hidden states",
    **dict.fromkeys(
        (
            "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
            "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl",
            "xmod",
        ),
        _ENCODER,
    ),
    **dict.fromkeys(
        (
            "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart",
            "prophetnet", "trocr", "whisper",
        ),
        _DECODER_HALF,
    ),
}  # fmt: skip
_OTHERS_WITH_ENCODER = {
    "fsmt": "a model with a vocabulary for each of two languages",
    "nllb-moe": "a MoE that transformers computes with the first two experts of each layer, whatever its router says",
    "prophetnet": "a model whose tokens transformers computes differently when more tokens follow",
    "seamless_m4t": "a model of speech",
    "seamless_m4t_v2": "a model of speech",
}
# The 27B sizes scale queries by hidden_size / heads, the others by head_dim. No metadata says so; llama.cpp also goes by
# the number of layers.
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
_SOFTMAX, _SIGMOID = 1, 2  # values of `expert_gating_func`, the function of a router's scores


def make_config(checkpoint: Checkpoint, read_floats: Callable[[str], list[float]]) -> PreTrainedConfig:
    """The config of the model in a checkpoint.

    Args:
        checkpoint: an open header of a supported architecture.
        read_floats: reader of a small tensor by name, for scalings that are stored as tensors.

    Raises:
        CheckpointError: metadata that the architecture needs is missing or impossible.
    """
    if checkpoint.config is not None:
        return _of_folder(checkpoint, checkpoint.config)
    if not 0 < checkpoint.layers <= len(checkpoint.tensors):
        raise CheckpointError(
            f"{checkpoint.path}: the metadata says {checkpoint.layers} layers, of {len(checkpoint.tensors)} tensors",
            hint=_BROKEN,
        )
    return _checked_config(checkpoint, lambda: _of_gguf(checkpoint, read_floats))


_FOLDER = "use the model's folder, or llama.cpp"
_BROKEN = "the file was written by a broken converter; get it from another source"


def _of_gguf(checkpoint: Checkpoint, read_floats: Callable[[str], list[float]]) -> PreTrainedConfig:
    if checkpoint.architecture in GGUF_CONFIG_ARCHS:
        return _by_transformers(checkpoint)
    architecture = checkpoint.architecture
    mapped = architecture if architecture in GGUF_CONFIG_MAPPING else MODEL_TYPES.get(architecture, architecture)
    values: dict[str, Any] = dict(GGUF_CONFIG_DEFAULTS_MAPPING.get(mapped, {}))
    for key, renamed in GGUF_CONFIG_MAPPING.get(mapped, GGUF_CONFIG_MAPPING["qwen3"]).items():  # keys for any decoder
        value = checkpoint.get(key)
        if renamed is not None and value is not None:
            values[renamed] = value
    values |= {
        "vocab_size": checkpoint.vocab_size,
        "tie_word_embeddings": "output.weight" not in checkpoint.tensors,
        "bos_token_id": checkpoint.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": checkpoint.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": checkpoint.get("tokenizer.ggml.padding_token_id"),
    }
    values |= _corrections(checkpoint, read_floats)
    values.pop("model_type", None)
    return AutoConfig.for_model(_model_type(checkpoint), **values)


def _by_transformers(checkpoint: Checkpoint) -> PreTrainedConfig:
    """The config of an architecture whose whole config transformers derives."""
    metadata: dict[str, Any] = {
        key: checkpoint.array(key) if isinstance(value, ArrayRef) and not key.startswith("tokenizer.") else value
        for key, value in checkpoint.metadata.items()
    }
    metadata["tokenizer.ggml.tokens"] = checkpoint.vocab_size
    values = GGUF_CONFIG_ARCHS[checkpoint.architecture](metadata, tuple(checkpoint.tensors))
    return AutoConfig.for_model(values.pop("model_type"), **values)


def _checked_config(checkpoint: Checkpoint, make: Callable[[], PreTrainedConfig]) -> PreTrainedConfig:
    try:
        return make()
    except (HeadraceError, ImportError, OSError):
        raise
    except Exception as error:  # whatever untrusted metadata provokes, here and in transformers' checks
        missing = f"`{error.args[0]}` is missing" if isinstance(error, KeyError) and error.args else error
        raise CheckpointError(
            f"{checkpoint.path}: the metadata makes no {checkpoint.architecture} model: {missing}", hint=_BROKEN
        ) from error


def _model_type(checkpoint: Checkpoint) -> str:
    """transformers' name for a GGUF architecture.

    Mixtral's files call themselves llama and have experts; OLMo 3's call themselves olmo2 and have a window.
    """
    if checkpoint.architecture == "llama" and checkpoint.number("expert_count", 0):
        return "mixtral"
    if checkpoint.architecture == "deepseek2":
        gating = checkpoint.number("expert_gating_func", 0)  # missing in GLM 4.7 Flash's files
        corrected = not gating and any(".exp_probs_b." in name for name in checkpoint.tensors)
        return "deepseek_v3" if gating == _SIGMOID or corrected else "deepseek_v2"
    if checkpoint.architecture == "mistral3" and checkpoint.get("rope.scaling.type") != "yarn":
        return "mistral"  # Mistral Small 3.1 and similar models
    if checkpoint.architecture == "olmo2" and checkpoint.number("attention.sliding_window", 0):
        return "olmo3"
    if checkpoint.architecture == "t5" and "enc.blk.1.attn_rel_b.weight" in checkpoint.tensors:
        return "umt5"  # relative position biases in every layer
    return MODEL_TYPES.get(checkpoint.architecture, checkpoint.architecture)


def decoder_start_ids(checkpoint: Checkpoint) -> tuple[int, ...]:
    """The decoder's first tokens when an encoder reads the prompt; none for decoder-only models.

    Raises:
        CheckpointError: no config or metadata gives them.
    """
    if not checkpoint.has_encoder:
        return ()
    values = checkpoint.config
    if values is None:
        found: list[Any] = [checkpoint.get("decoder_start_token_id")]
    else:
        config = _of_folder(checkpoint, values)

        def told(name: str) -> Any:
            return checkpoint.generation.get(name, values.get(name, getattr(config, name, None)))

        start, forced = told("decoder_start_token_id"), told("forced_bos_token_id")
        found = [told("bos_token_id") if start is None else start, *([] if forced is None else [forced])]
    tokens = tuple(token for token in found if isinstance(token, int) and 0 <= token < checkpoint.vocab_size)
    if len(tokens) != len(found):
        raise CheckpointError(
            f"{checkpoint.path}: the decoder start tokens are {found}, the vocabulary has {checkpoint.vocab_size}",
            hint="`decoder_start_token_id` in config.json or generation_config.json says which token it is",
        )
    return tokens


def check_model_type(checkpoint: Checkpoint) -> None:
    """Raise `UnsupportedError` for a folder whose model has no language model in transformers, or is refused."""
    values = checkpoint.config
    if values is None:
        return
    kind = values["model_type"]
    writers = (
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES if checkpoint.has_encoder else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    )
    if kind not in CONFIG_MAPPING_NAMES or kind not in writers:
        own_code = " needs its own code, which headrace does not run" if values.get("auto_map") else ""
        reason = own_code or f" is a {kind} model, of which transformers has no language model that generates text"
        known = did_you_mean(kind, writers)
        raise UnsupportedError(
            f"{checkpoint.path}{reason}",
            hint=known if known and known.startswith("did") else "use a GGUF file of the model",
        )
    others = _OTHERS_WITH_ENCODER if checkpoint.has_encoder else _OTHERS
    if kind in others:
        raise UnsupportedError(
            f"{checkpoint.path} is a {kind} model: {others[kind]}, which is not supported",
            hint="docs/architectures.md lists what runs",
        )


def _of_folder(checkpoint: Checkpoint, values: Mapping[str, Any]) -> PreTrainedConfig:
    """The folder's config as it is, if transformers has a language model for it."""
    check_model_type(checkpoint)
    kind = values["model_type"]
    given = {key: value for key, value in values.items() if key not in ("quantization_config", "compression_config")}
    try:
        config = CONFIG_MAPPING[kind].from_dict(PreTrainedConfig._decode_special_floats(given))
    except Exception as error:  # whatever an untrusted config provokes in transformers' checks of it
        raise CheckpointError(
            f"{checkpoint.path}: config.json makes no {kind} model: {error}",
            hint="the config is damaged, or of another version of transformers",
        ) from error
    if hasattr(config, "rescale_every"):
        # It keeps RWKV's values within half precision by changing its weights; here they are fp32.
        config.rescale_every = 0
    if kind == "bigbird_pegasus":
        config.attention_type = "original_full"  # the model switches to it for a short text, and never back
    return config


def _corrections(checkpoint: Checkpoint, read_floats: Callable[[str], list[float]]) -> dict[str, Any]:
    architecture = checkpoint.architecture
    _check_router(checkpoint)
    values = dict(_FAMILIES.get(architecture, _plain)(checkpoint))
    if architecture in _WITHOUT_ROTATION:
        return values
    if architecture == "gemma4":
        return values | {"rope_parameters": _gemma4_rope(checkpoint, read_floats)}
    rope = _rope(checkpoint, read_floats)
    if architecture in ("deepseek2", "glm-dsa"):  # the RoPE part of a head has its own width
        rope.pop("partial_rotary_factor", None)
        logarithm = checkpoint.get("rope.scaling.yarn_log_multiplier")
        if rope["rope_type"] == "yarn" and isinstance(logarithm, float):
            rope |= dict.fromkeys(("mscale", "mscale_all_dim"), 10 * logarithm)
    if architecture == "mistral3" and rope["rope_type"] == "yarn":
        beta = checkpoint.get("attention.temperature_scale") or 0.0
        rope |= {"mscale": 1.0, "mscale_all_dim": checkpoint.get("rope.scaling.yarn_log_multiplier") or 0.0}
        values["rope_parameters"] = rope | {"llama_4_scaling_beta": beta}
    elif architecture == "gemma3":
        local = {"rope_type": "default", "rope_theta": checkpoint.get("rope.freq_base_swa") or 10000.0}
        values["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
    elif _model_type(checkpoint) == "olmo3":
        local = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
        values["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
    else:
        values["rope_parameters"] = rope
    return values


_WITHOUT_ROTATION = ("bloom", "granitehybrid", "mamba", "nemotron_h", "nemotron_h_moe", "t5")


# Function from scores to weights in these families' routers; files may give it.
_GATED = {
    **dict.fromkeys(
        ("afmoe", "dots1", "exaone-moe", "glm-dsa", "glm4moe", "lfm2moe", "minimax-m2", "nemotron_h_moe"), _SIGMOID
    ),
    **dict.fromkeys(
        ("ernie4_5-moe", "hunyuan-moe", "olmoe", "qwen2moe", "qwen3moe", "qwen3next", "qwen3vlmoe"), _SOFTMAX
    ),
}


def _check_router(checkpoint: Checkpoint) -> None:
    """Refuse a file whose router uses another gating function than the model's."""
    usual = _GATED.get(checkpoint.architecture)
    if usual is not None and checkpoint.number("expert_gating_func", usual) not in (0, usual):
        raise UnsupportedError(
            f"{checkpoint.path}: the routers of this {checkpoint.architecture} model use another gating function",
            hint="use the model's folder",
        )


def _head_dim(checkpoint: Checkpoint) -> int:
    heads = checkpoint.number("attention.head_count")
    if heads < 1:
        raise CheckpointError(f"{checkpoint.path}: the model has {heads} attention heads", hint=_BROKEN)
    width = checkpoint.number("attention.key_length", checkpoint.number("embedding_length") // heads)
    if width < 1:
        raise CheckpointError(f"{checkpoint.path}: attention heads are {width} wide", hint=_BROKEN)
    return width


# mscale in Phi-3.5-MoE's config for a context 32 times as long; files store a formula's value instead, 1.19.
_PHI_MOE_FACTOR, _PHI_MOE_SCALE = 32, 1.243163121016122


def _rope(checkpoint: Checkpoint, read_floats: Callable[[str], list[float]]) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": checkpoint.get("rope.freq_base") or 10000.0}
    width = checkpoint.number("rope.dimension_count", _head_dim(checkpoint))
    if width != _head_dim(checkpoint):
        rope["partial_rotary_factor"] = width / _head_dim(checkpoint)
    original = checkpoint.get("rope.scaling.original_context_length")
    if "rope_factors_long.weight" in checkpoint.tensors:
        context = checkpoint.number("context_length")
        rope |= {
            "rope_type": "longrope",
            "long_factor": read_floats("rope_factors_long.weight"),
            "short_factor": read_floats("rope_factors_short.weight"),
            "original_max_position_embeddings": original or context,
            "attention_factor": checkpoint.get("rope.scaling.attn_factor"),
            "factor": context / int(original or context),
        }
        if checkpoint.architecture == "phimoe":
            scale = checkpoint.get("rope.scaling.attn_factor") or 1.0
            scale = _PHI_MOE_SCALE if rope["factor"] == _PHI_MOE_FACTOR else scale
            rope |= dict.fromkeys(("short_mscale", "long_mscale"), scale)
        return rope
    kind = checkpoint.get("rope.scaling.type")
    if kind in (None, "none", "default") or not checkpoint.get("rope.scaling.factor"):
        return rope
    if kind not in ("linear", "yarn"):
        raise UnsupportedError(
            f"{checkpoint.path}: positions are scaled by `{kind}`, which is not supported", hint=_FOLDER
        )
    rope |= {"rope_type": kind, "factor": checkpoint.get("rope.scaling.factor")}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = original or checkpoint.number("context_length")
        given = {"attention_factor": "attn_factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow"}
        found = {name: checkpoint.get(f"rope.scaling.yarn_{key}") for name, key in given.items()}
        rope |= {name: value for name, value in found.items() if value is not None}
        if checkpoint.architecture == "gpt-oss":
            rope["truncate"] = False
    return rope


def _gemma4_rope(checkpoint: Checkpoint, read_floats: Callable[[str], list[float]]) -> dict[str, Any]:
    """RoPE of Gemma 4. Frequencies that full attention does not rotate have an infinite factor in `rope_freqs.weight`."""
    factors = read_floats("rope_freqs.weight")
    rotated = [factor for factor in factors if factor == 1.0]
    if factors[: len(rotated)] != rotated or any(factor < 1e20 for factor in factors[len(rotated) :]):
        raise UnsupportedError(
            f"{checkpoint.path}: `rope_freqs.weight` scales frequencies, which is not supported", hint=_FOLDER
        )
    return {
        "full_attention": {
            "rope_type": "proportional",
            "partial_rotary_factor": len(rotated) / max(1, len(factors)),
            "rope_theta": checkpoint.get("rope.freq_base") or 1e6,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": checkpoint.get("rope.freq_base_swa") or 1e4},
    }


def _plain(checkpoint: Checkpoint) -> dict[str, Any]:
    return {}


def _llama(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "head_dim": _head_dim(checkpoint),
        "attention_bias": "blk.0.attn_q.bias" in checkpoint.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in checkpoint.tensors,
        "num_local_experts": checkpoint.number("expert_count", 0),
        "num_experts_per_tok": checkpoint.number("expert_used_count", 0),
    }


def _moe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Expert widths from `expert_feed_forward_length`; in older files from the tensors."""
    down = checkpoint.tensors.get("blk.0.ffn_down_exps.weight")
    width = checkpoint.number("expert_feed_forward_length", down.columns if down is not None else 0)
    values = {"head_dim": _head_dim(checkpoint), "moe_intermediate_size": width}
    if checkpoint.architecture in ("gpt-oss", "minimax-m2"):
        values["intermediate_size"] = width
    shared = checkpoint.tensors.get("blk.0.ffn_down_shexp.weight")
    if shared is not None:
        values["shared_expert_intermediate_size"] = shared.columns
    window = checkpoint.number("attention.sliding_window", 0)
    return values | ({"sliding_window": window} if window else {})


def _gemma(checkpoint: Checkpoint) -> dict[str, Any]:
    head_dim, layers = _head_dim(checkpoint), checkpoint.number("block_count")
    scalar = head_dim
    if _GEMMA_27B_LAYERS[checkpoint.architecture] == layers:
        scalar = checkpoint.number("embedding_length") // checkpoint.number("attention.head_count")
    values = {"query_pre_attn_scalar": scalar, "head_dim": head_dim}
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if checkpoint.get(key) is not None:
            values[key] = checkpoint.get(key)  # type: ignore[assignment]
    return values


def _of_layers(checkpoint: Checkpoint, key: str) -> list[Any]:
    """A value for every layer; the file may have one for all layers."""
    layers, values = checkpoint.number("block_count"), checkpoint.array(key)
    if not values and layers <= len(checkpoint.tensors):
        return [checkpoint.number(key)] * layers
    if len(values) != layers or not all(isinstance(value, int) for value in values):
        raise CheckpointError(
            f"{checkpoint.path}: metadata `{key}` has {len(values)} values for {layers} layers, or none that are numbers",
            hint="the file was written by a broken converter; get it from another source",
        )
    return values


def _gemma4(checkpoint: Checkpoint) -> dict[str, Any]:
    """Gemma 4: sliding and full layers have different heads; the last layers may share the K/V of earlier ones."""
    sliding = _of_layers(checkpoint, "attention.sliding_window_pattern")
    if not any(sliding) or all(sliding):
        raise UnsupportedError(
            f"{checkpoint.path}: all layers are of one kind of attention, which is not supported", hint=_FOLDER
        )
    full, local = sliding.index(False), sliding.index(True)
    kv_heads, widths = (_of_layers(checkpoint, key) for key in ("attention.head_count_kv", "feed_forward_length"))
    table, experts = checkpoint.tensors.get("per_layer_token_embd.weight"), checkpoint.number("expert_count", 0)
    values = {
        "layer_types": ["sliding_attention" if windowed else "full_attention" for windowed in sliding],
        "head_dim": checkpoint.number("attention.key_length_swa", _head_dim(checkpoint)),
        "num_key_value_heads": kv_heads[local],
        "num_global_key_value_heads": kv_heads[full],
        "attention_k_eq_v": f"blk.{full}.attn_v.weight" not in checkpoint.tensors,
        "num_kv_shared_layers": checkpoint.number("attention.shared_kv_layers", 0),
        "intermediate_size": widths[0],
        "use_double_wide_mlp": widths[-1] != widths[0],
        "hidden_size_per_layer_input": checkpoint.number("embedding_length_per_layer_input", 0),
        "final_logit_softcapping": checkpoint.get("final_logit_softcapping"),
        "enable_moe_block": experts > 0,
    }
    if table is not None:
        values["vocab_size_per_layer_input"] = table.rows
    if experts:
        values |= {
            "num_experts": experts,
            "top_k_experts": checkpoint.number("expert_used_count"),
            "moe_intermediate_size": checkpoint.number("expert_feed_forward_length"),
        }
    return values


def _gpt2(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "n_positions": checkpoint.number("context_length"),
        "n_inner": checkpoint.number("feed_forward_length", 0) or None,
    }


def _falcon(checkpoint: Checkpoint) -> dict[str, Any]:
    kv_heads = checkpoint.number("attention.head_count_kv", 1)
    return {
        "num_kv_heads": kv_heads,
        "multi_query": kv_heads == 1,
        "new_decoder_architecture": "blk.0.attn_norm_2.weight" in checkpoint.tensors,
        "layer_norm_epsilon": checkpoint.get("attention.layer_norm_epsilon") or 1e-5,
        "ffn_hidden_size": checkpoint.number("feed_forward_length", 4 * checkpoint.number("embedding_length")),
        "bias": "blk.0.attn_qkv.bias" in checkpoint.tensors,
    }


def _stablelm(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "use_qkv_bias": "blk.0.attn_q.bias" in checkpoint.tensors,
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in checkpoint.tensors,
        "qk_layernorm": "blk.0.attn_q_norm.weight" in checkpoint.tensors,
    }


def _starcoder2(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"use_bias": "blk.0.attn_q.bias" in checkpoint.tensors, "sliding_window": None}


def _glm4moe(checkpoint: Checkpoint) -> dict[str, Any]:
    """GLM 4.5. Multi-token prediction heads are stored as further layers."""
    head_dim, experts = _head_dim(checkpoint), checkpoint.number("expert_count")
    return {
        "num_hidden_layers": checkpoint.layers,
        "num_mtp_layers": 0,
        "head_dim": head_dim,
        "partial_rotary_factor": checkpoint.number("rope.dimension_count", head_dim) / head_dim,
        "attention_bias": "blk.0.attn_q.bias" in checkpoint.tensors,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in checkpoint.tensors,
        "first_k_dense_replace": checkpoint.number("leading_dense_block_count", 0),
        "n_routed_experts": experts,
        "num_experts_per_tok": checkpoint.number("expert_used_count"),
        "moe_intermediate_size": checkpoint.number("expert_feed_forward_length"),
        "n_shared_experts": checkpoint.number("expert_shared_count", 0),
        "n_group": checkpoint.number("expert_group_count", 1),
        "topk_group": checkpoint.number("expert_group_used_count", 1),
        "routed_scaling_factor": checkpoint.get("expert_weights_scale") or 1.0,
        "norm_topk_prob": checkpoint.get("expert_weights_norm") is True,
    }


def _deepseek2(checkpoint: Checkpoint) -> dict[str, Any]:
    """DeepSeek V2, V3 and similar models. Newer files give the head widths in keys of their own, beside the cached widths."""
    rotated = checkpoint.number("rope.dimension_count")
    keys = checkpoint.number("attention.key_length_mla", _head_dim(checkpoint))
    groups = checkpoint.number("expert_group_count", 1)
    values = {
        "num_hidden_layers": checkpoint.layers,
        "num_key_value_heads": checkpoint.number("attention.head_count"),
        "num_mtp_layers": 0,
        "q_lora_rank": checkpoint.get("attention.q_lora_rank"),
        "kv_lora_rank": checkpoint.number("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": keys - rotated,
        "v_head_dim": checkpoint.number("attention.value_length_mla", checkpoint.number("attention.value_length")),
        "first_k_dense_replace": checkpoint.number("leading_dense_block_count", 0),
        "n_routed_experts": checkpoint.number("expert_count", 0),
        "num_experts_per_tok": checkpoint.number("expert_used_count", 0),
        "moe_intermediate_size": checkpoint.number("expert_feed_forward_length", 0),
        "n_shared_experts": checkpoint.number("expert_shared_count", 0),
        "n_group": groups,
        "topk_group": checkpoint.number("expert_group_used_count", 1),
        "routed_scaling_factor": checkpoint.get("expert_weights_scale") or 1.0,
        "norm_topk_prob": checkpoint.get("expert_weights_norm") is True,
    }
    if _model_type(checkpoint) == "deepseek_v2":
        values["topk_method"] = "group_limited_greedy" if groups > 1 else "greedy"
    return values


def _llama4(checkpoint: Checkpoint) -> dict[str, Any]:
    """Llama 4 Scout and Maverick. Scout normalises queries and keys, which no metadata says."""
    experts = checkpoint.number("expert_count", 0)
    if not experts or checkpoint.get("attention.sliding_window") == 0:
        raise UnsupportedError(
            f"{checkpoint.path}: a llama4 model without experts or chunks is not supported", hint=_FOLDER
        )
    return {
        "head_dim": _head_dim(checkpoint),
        "attention_bias": "blk.0.attn_q.bias" in checkpoint.tensors,
        "use_qk_norm": experts != _LLAMA4_WITHOUT_NORMS,
        "intermediate_size": checkpoint.number("expert_feed_forward_length"),
        "intermediate_size_mlp": checkpoint.number("feed_forward_length"),
        "interleave_moe_layer_step": checkpoint.number("interleave_moe_layer_step", 1),
        "num_local_experts": experts,
        "num_experts_per_tok": checkpoint.number("expert_used_count"),
    }


_LLAMA4_WITHOUT_NORMS = 128  # number of experts in Maverick


def _granite(checkpoint: Checkpoint) -> dict[str, Any]:
    if checkpoint.get("rope.scaling.finetuned") is False:
        raise UnsupportedError(f"{checkpoint.path}: a granite model without RoPE is not supported", hint=_FOLDER)
    return _llama(checkpoint) | {name: checkpoint.get(key) or 1.0 for name, key in _GRANITE_SCALES.items()}


_GRANITE_SCALES = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}


def _granitemoe(checkpoint: Checkpoint) -> dict[str, Any]:
    shared = checkpoint.number("expert_shared_feed_forward_length", 0)
    return _granite(checkpoint) | {"shared_intermediate_size": shared}


def _granitehybrid(checkpoint: Checkpoint) -> dict[str, Any]:
    """Granite 4 hybrid. Layers with KV heads are attention, without RoPE."""
    if checkpoint.get("rope.scaling.finetuned") is not False:
        raise UnsupportedError(
            f"{checkpoint.path}: a hybrid granite model with RoPE is not supported", hint="use its folder"
        )
    kv_heads, heads = _of_layers(checkpoint, "attention.head_count_kv"), checkpoint.number("ssm.time_step_rank")
    width = checkpoint.number("expert_shared_feed_forward_length", 0)
    scales = {name: checkpoint.get(key) or 1.0 for name, key in _GRANITE_SCALES.items()}
    return scales | {
        "num_key_value_heads": max(kv_heads),
        "layer_types": ["full_attention" if count else "linear_attention" for count in kv_heads],
        "num_local_experts": checkpoint.number("expert_count", 0),
        "num_experts_per_tok": checkpoint.number("expert_used_count", 0),
        "shared_intermediate_size": width or checkpoint.number("feed_forward_length"),
        "mamba_n_heads": heads,
        "mamba_d_head": checkpoint.number("ssm.inner_size") // max(1, heads),
        "mamba_n_groups": checkpoint.number("ssm.group_count", 1),
        "mamba_d_state": checkpoint.number("ssm.state_size"),
        "mamba_d_conv": checkpoint.number("ssm.conv_kernel"),
        "mamba_expand": checkpoint.number("ssm.inner_size") // checkpoint.number("embedding_length"),
        "mamba_conv_bias": any(name.endswith("ssm_conv1d.bias") for name in checkpoint.tensors),
    }


def _nemotron_h(checkpoint: Checkpoint) -> dict[str, Any]:
    """Nemotron-H. Widths give each layer's type: KV heads, an MLP or experts, or neither (Mamba)."""
    layers = checkpoint.layers
    kv_heads, widths = (
        _of_layers(checkpoint, key)[:layers] for key in ("attention.head_count_kv", "feed_forward_length")
    )
    wide, heads = "mlp" if checkpoint.architecture == "nemotron_h" else "moe", checkpoint.number("ssm.time_step_rank")
    values = {
        "layers_block_type": [
            "full_attention" if count else wide if width else "linear_attention"
            for count, width in zip(kv_heads, widths, strict=True)
        ],
        "num_key_value_heads": max(kv_heads),
        "head_dim": _head_dim(checkpoint),
        "intermediate_size": max(widths),
        "layer_norm_epsilon": checkpoint.get("attention.layer_norm_rms_epsilon") or 1e-5,
        "mamba_num_heads": heads,
        "mamba_head_dim": checkpoint.number("ssm.inner_size") // max(1, heads),
        "n_groups": checkpoint.number("ssm.group_count"),
        "ssm_state_size": checkpoint.number("ssm.state_size"),
        "conv_kernel": checkpoint.number("ssm.conv_kernel"),
        "use_conv_bias": any(name.endswith("ssm_conv1d.bias") for name in checkpoint.tensors),
    }
    if wide == "mlp":
        return values
    return values | {
        "n_routed_experts": checkpoint.number("expert_count"),
        "num_experts_per_tok": checkpoint.number("expert_used_count"),
        "n_shared_experts": checkpoint.number("expert_shared_count", 1),
        "moe_intermediate_size": checkpoint.number("expert_feed_forward_length"),
        "moe_shared_expert_intermediate_size": checkpoint.number("expert_shared_feed_forward_length"),
        "moe_latent_size": checkpoint.get("moe_latent_size"),
        "n_group": checkpoint.number("expert_group_count", 1),
        "topk_group": checkpoint.number("expert_group_used_count", 1),
        "routed_scaling_factor": checkpoint.get("expert_weights_scale") or 1.0,
        "norm_topk_prob": checkpoint.get("expert_weights_norm") is True,
    }


def _mistral3(checkpoint: Checkpoint) -> dict[str, Any]:
    return _llama(checkpoint) | {"sliding_window": checkpoint.number("attention.sliding_window", 0) or None}


def _cohere(checkpoint: Checkpoint) -> dict[str, Any]:
    """Command R. Command R7B and A have a window in three of four layers, which no metadata says."""
    window = checkpoint.number("attention.sliding_window", 0)
    return {
        "logit_scale": checkpoint.get("logit_scale") or 1.0,
        "layer_norm_eps": checkpoint.get("attention.layer_norm_epsilon") or 1e-5,
        "attention_bias": "blk.0.attn_q.bias" in checkpoint.tensors,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in checkpoint.tensors,
    } | ({"sliding_window": window} if window else {})


def _windowed(checkpoint: Checkpoint) -> dict[str, Any]:
    """Models whose metadata lists the layers with a sliding window."""
    window = checkpoint.number("attention.sliding_window", 0)
    layers = checkpoint.layers
    values = {"head_dim": _head_dim(checkpoint), "num_hidden_layers": layers, "sliding_window": window or None}
    if layers > len(checkpoint.tensors):
        raise CheckpointError(
            f"{checkpoint.path}: {len(checkpoint.tensors)} tensors are too few for {layers} layers", hint=_BROKEN
        )
    sliding = checkpoint.array("attention.sliding_window_pattern")[:layers] if window else [False] * layers
    if len(sliding) != layers:
        raise CheckpointError(
            f"{checkpoint.path}: `attention.sliding_window_pattern` does not say which of {layers} layers have the window",
            hint="the file was written by a broken converter; get it from another source",
        )
    return values | {"layer_types": ["sliding_attention" if one else "full_attention" for one in sliding]}


def _seed_oss(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "head_dim": _head_dim(checkpoint),
        "attention_bias": "blk.0.attn_q.bias" in checkpoint.tensors,
        "attention_out_bias": "blk.0.attn_output.bias" in checkpoint.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in checkpoint.tensors,
    }


def _nemotron(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "head_dim": _head_dim(checkpoint),
        "norm_eps": checkpoint.get("attention.layer_norm_epsilon") or 1e-5,
        "attention_bias": "blk.0.attn_q.bias" in checkpoint.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in checkpoint.tensors,
    }


def _phi3(checkpoint: Checkpoint) -> dict[str, Any]:
    window = checkpoint.number("attention.sliding_window", 0)
    return {
        "sliding_window": window or None,
        "original_max_position_embeddings": checkpoint.get("rope.scaling.original_context_length")
        or checkpoint.number("context_length"),
    }


def _t5(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "num_decoder_layers": checkpoint.number("decoder_block_count", checkpoint.number("block_count")),
        "feed_forward_proj": "gated-gelu" if "enc.blk.0.ffn_gate.weight" in checkpoint.tensors else "relu",
    }


def _qwen3(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"head_dim": _head_dim(checkpoint), "attention_bias": "blk.0.attn_q.bias" in checkpoint.tensors}


def _qwen3next(checkpoint: Checkpoint) -> dict[str, Any]:
    """Qwen3-Next: linear attention, with full attention in every `full_attention_interval`-th layer."""
    layers, interval = checkpoint.layers, checkpoint.number("full_attention_interval", 4)
    value_heads = checkpoint.number("ssm.time_step_rank")
    return _moe(checkpoint) | {
        "num_hidden_layers": layers,
        "layer_types": ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(layers)],
        "linear_conv_kernel_dim": checkpoint.number("ssm.conv_kernel"),
        "linear_key_head_dim": checkpoint.number("ssm.state_size"),
        "linear_num_key_heads": checkpoint.number("ssm.group_count"),
        "linear_num_value_heads": value_heads,
        "linear_value_head_dim": checkpoint.number("ssm.inner_size") // max(1, value_heads),
        "num_experts": checkpoint.number("expert_count"),
        "num_experts_per_tok": checkpoint.number("expert_used_count"),
        "norm_topk_prob": True,
    }


def _lfm2moe(checkpoint: Checkpoint) -> dict[str, Any]:
    """LFM2 with experts. Layers without KV heads are convolutions."""
    kv_heads = _of_layers(checkpoint, "attention.head_count_kv")
    return {
        "num_key_value_heads": max(kv_heads),
        "layer_types": ["full_attention" if heads else "conv" for heads in kv_heads],
        "norm_eps": checkpoint.get("attention.layer_norm_rms_epsilon") or 1e-5,
        "conv_L_cache": checkpoint.number("shortconv.l_cache"),
        "conv_bias": any(name.endswith("shortconv.in_proj.bias") for name in checkpoint.tensors),
        "num_dense_layers": checkpoint.number("leading_dense_block_count", 0),
        "moe_intermediate_size": checkpoint.number("expert_feed_forward_length"),
        "num_experts": checkpoint.number("expert_count"),
        "num_experts_per_tok": checkpoint.number("expert_used_count"),
        "use_expert_bias": any(name.endswith("exp_probs_b.bias") for name in checkpoint.tensors),
        "norm_topk_prob": True,
    }


def _olmoe(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "num_experts": checkpoint.number("expert_count"),
        "num_experts_per_tok": checkpoint.number("expert_used_count"),
        "norm_topk_prob": False,
    }


def _dots1(checkpoint: Checkpoint) -> dict[str, Any]:
    values = _glm4moe(checkpoint)
    return values | {"layer_types": ["full_attention"] * values["num_hidden_layers"], "sliding_window": None}


def _exaone_moe(checkpoint: Checkpoint) -> dict[str, Any]:
    values = _windowed(checkpoint)
    dense = checkpoint.number("leading_dense_block_count", 0)
    return values | {
        "mlp_layer_types": ["dense" if i < dense else "sparse" for i in range(values["num_hidden_layers"])],
        "first_k_dense_replace": dense,
        "num_experts": checkpoint.number("expert_count"),
        "num_experts_per_tok": checkpoint.number("expert_used_count"),
        "num_shared_experts": checkpoint.number("expert_shared_count", 1),
        "moe_intermediate_size": checkpoint.number("expert_feed_forward_length"),
        "routed_scaling_factor": checkpoint.get("expert_weights_scale") or 1.0,
        "norm_topk_prob": checkpoint.get("expert_weights_norm") is True,
    }


def _afmoe(checkpoint: Checkpoint) -> dict[str, Any]:
    """AFMoE. No metadata says that every fourth layer has full attention, embeddings are scaled and expert weights sum to 1."""
    if checkpoint.get("expert_weights_norm") is False:
        raise UnsupportedError(
            f"{checkpoint.path}: weights of experts that do not add up to one are not supported", hint="use its folder"
        )
    return {
        "head_dim": _head_dim(checkpoint),
        "sliding_window": checkpoint.number("attention.sliding_window"),
        "num_dense_layers": checkpoint.number("leading_dense_block_count", 0),
        "num_experts": checkpoint.number("expert_count"),
        "num_experts_per_tok": checkpoint.number("expert_used_count"),
        "num_shared_experts": checkpoint.number("expert_shared_count", 0),
        "moe_intermediate_size": checkpoint.number("expert_feed_forward_length"),
        "route_scale": checkpoint.get("expert_weights_scale") or 1.0,
        "mup_enabled": True,
    }


def _phimoe(checkpoint: Checkpoint) -> dict[str, Any]:
    return _phi3(checkpoint) | {
        "rms_norm_eps": checkpoint.get("attention.layer_norm_epsilon")
        or checkpoint.get("attention.layer_norm_rms_epsilon")
        or 1e-5,
        "num_local_experts": checkpoint.number("expert_count"),
        "num_experts_per_tok": checkpoint.number("expert_used_count"),
        "attention_bias": "blk.0.attn_q.bias" in checkpoint.tensors,
        "lm_head_bias": "output.bias" in checkpoint.tensors,
    }


def _ernie4_5(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"head_dim": _head_dim(checkpoint), "use_bias": "blk.0.attn_q.bias" in checkpoint.tensors}


def _ernie4_5_moe(checkpoint: Checkpoint) -> dict[str, Any]:
    return _ernie4_5(checkpoint) | {
        "moe_num_experts": checkpoint.number("expert_count"),
        "moe_k": checkpoint.number("expert_used_count"),
        "moe_intermediate_size": checkpoint.number("expert_feed_forward_length"),
        "moe_num_shared_experts": checkpoint.number("expert_shared_count", 0),
        "moe_layer_start_index": checkpoint.number("leading_dense_block_count", 0),
        "moe_layer_interval": checkpoint.number("interleave_moe_layer_step", 1),
    }


def _glm4(checkpoint: Checkpoint) -> dict[str, Any]:
    """GLM 4. Multimodal models (GLM 4V, GLM-OCR) have the same name, but another RoPE."""
    if checkpoint.array("rope.dimension_sections") or checkpoint.get("rope.dimension_sections") is not None:
        raise UnsupportedError(
            f"{checkpoint.path}: positions of a glm4 model with several axes are not supported",
            hint="use a text-only model of the family",
        )
    return _qwen3(checkpoint) | {"num_hidden_layers": checkpoint.layers}


def _hunyuan(checkpoint: Checkpoint) -> dict[str, Any]:
    """Hunyuan. Files store the RoPE base already scaled."""
    values = {"head_dim": _head_dim(checkpoint), "attention_bias": "blk.0.attn_q.bias" in checkpoint.tensors}
    experts = checkpoint.number("expert_count", 0)
    if not experts:
        return values
    width, shared = checkpoint.number("expert_feed_forward_length"), "expert_shared_feed_forward_length"
    if width != checkpoint.number(shared, width):
        raise UnsupportedError(
            f"{checkpoint.path}: experts of different widths in a hunyuan model are not supported",
            hint="use a file of another model of the family",
        )
    return values | {
        "num_experts": experts,
        "moe_topk": checkpoint.number("expert_used_count"),
        "intermediate_size": width,
    }


_FAMILIES: dict[str, Callable[[Checkpoint], dict[str, Any]]] = {
    "afmoe": _afmoe,
    "arcee": _llama,
    "cohere2": _cohere,
    "command-r": _cohere,
    "deepseek2": _deepseek2,
    "dots1": _dots1,
    "ernie4_5": _ernie4_5,
    "ernie4_5-moe": _ernie4_5_moe,
    "exaone-moe": _exaone_moe,
    "exaone4": _windowed,
    "falcon": _falcon,
    "gemma": _qwen3,
    "gemma2": _gemma,
    "gemma3": _gemma,
    "gemma4": _gemma4,
    "glm-dsa": _deepseek2,
    "glm4": _glm4,
    "glm4moe": _glm4moe,
    "gpt-oss": _moe,
    "gpt2": _gpt2,
    "granite": _granite,
    "granitehybrid": _granitehybrid,
    "granitemoe": _granitemoe,
    "hunyuan-dense": _hunyuan,
    "hunyuan-moe": _hunyuan,
    "lfm2moe": _lfm2moe,
    "llama": _llama,
    "llama4": _llama4,
    "minimax-m2": _moe,
    "mistral3": _mistral3,
    "nemotron": _nemotron,
    "nemotron_h": _nemotron_h,
    "nemotron_h_moe": _nemotron_h,
    "olmo2": _windowed,
    "olmoe": _olmoe,
    "phi3": _phi3,
    "phimoe": _phimoe,
    "qwen2moe": _moe,
    "qwen3": _qwen3,
    "qwen3moe": _moe,
    "qwen3next": _qwen3next,
    "qwen3vl": _qwen3,
    "qwen3vlmoe": _moe,
    "seed_oss": _seed_oss,
    "smollm3": _llama,
    "stablelm": _stablelm,
    "starcoder2": _starcoder2,
    "t5": _t5,
}
