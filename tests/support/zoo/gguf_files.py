"""Tiny random models of every architecture, as transformers models and as GGUF files of the same weights.

The writer does the same as llama.cpp's converter. Names come from the `gguf` package's tensor map. It permutes q and k of
llama, adds one to norms of gemma and nemotron, and transposes gpt2's matrices. A reader that forgets to undo one of these
therefore differs from the transformers model.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 320
COMMON = {"vocab_size": VOCAB, "num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 96}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
OF_EIGHT = {"num_experts_per_tok": 2, "num_local_experts": 8}
CHOOSING = {"expert_count": 8, "expert_used_count": 2}
GEMMA4_ROPE = {
    "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
}
GEMMA4 = {
    "attention.key_length": 64, "attention.value_length": 64, "attention.key_length_swa": 32,
    "attention.value_length_swa": 32, "attention.sliding_window": 8, "rope.dimension_count": 64,
    "rope.dimension_count_swa": 32, "rope.freq_base": 5e5, "rope.freq_base_swa": 2e4,
}  # fmt: skip


# Layers of linear attention, with more value heads than key heads, beside one of full attention.
DELTA = {
    **HEADS, "num_hidden_layers": 4, "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 6,
    "linear_key_head_dim": 16, "linear_value_head_dim": 32,
    "rope_parameters": {
        "rope_theta": 1e6, "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1], "mrope_interleaved": True,
        "rope_type": "default",
    },
}  # fmt: skip
STATES = {
    "attention.key_length": 32, "ssm.conv_kernel": 4, "ssm.state_size": 16, "ssm.group_count": 2,
    "ssm.time_step_rank": 6, "ssm.inner_size": 192, "full_attention_interval": 4, "rope.freq_base": 1e6,
    "rope.dimension_count": 8, "rope.dimension_sections": [2, 1, 1, 0],
}  # fmt: skip


# MLA, as config and as GGUF metadata.
LATENT = {
    **COMMON, "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 64, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32, "v_head_dim": 24, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 32, "first_k_dense_replace": 1,
}  # fmt: skip
LATENT_IN_FILES = {
    **CHOOSING, "attention.kv_lora_rank": 64, "rope.dimension_count": 16, "leading_dense_block_count": 1,
    "expert_feed_forward_length": 32, "expert_shared_count": 1, "rope.freq_base": 1e4,
}  # fmt: skip


# Mamba-2 layers, as config and as GGUF metadata.
NEMOTRON_H = {
    "head_dim": 32, "ssm_state_size": 16, "mamba_num_heads": 4, "mamba_head_dim": 32, "n_groups": 2, "chunk_size": 16,
    "conv_kernel": 4, "use_mamba_kernels": False,
}  # fmt: skip
SPACE = {
    "ssm.conv_kernel": 4, "ssm.state_size": 16, "ssm.group_count": 2, "ssm.inner_size": 128, "ssm.time_step_rank": 4,
}  # fmt: skip
GRANITE = {
    "attention_multiplier": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0,
    "rope_theta": 1e6,
}  # fmt: skip
GRANITE_IN_FILES = {
    "attention.scale": 0.3, "embedding_scale": 3.0, "residual_scale": 0.5, "logit_scale": 2.0, "rope.freq_base": 1e6,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    model_type: str
    config: dict[str, Any]
    metadata: dict[str, Any]
    norm_plus_one: bool = False
    permute: bool = False
    written_as: str | None = None  # `general.architecture`, where it differs from the family's name


FAMILIES = {
    "llama": Family("llama", {**COMMON, **HEADS, "rope_theta": 5e5}, {"rope.freq_base": 5e5}, permute=True),
    "mistral": Family(
        "mistral", {**COMMON, **HEADS, "sliding_window": None, "head_dim": 32}, {"attention.key_length": 32},
        permute=True, written_as="llama",
    ),
    "qwen2": Family("qwen2", {**COMMON, **HEADS, "rope_theta": 1e6}, {"rope.freq_base": 1e6}),
    "qwen3": Family("qwen3", {**COMMON, **HEADS, "head_dim": 32}, {"attention.key_length": 32}),
    "gemma2": Family(
        "gemma2",
        {**COMMON, **HEADS, "head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 32},
        {
            "attention.key_length": 32, "attention.sliding_window": 8,
            "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        },
        norm_plus_one=True,
    ),
    "gemma3": Family(
        "gemma3_text",
        {
            **COMMON, **HEADS, "num_hidden_layers": 7, "head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 32,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        {
            "attention.key_length": 32, "attention.sliding_window": 8, "rope.freq_base": 1e6,
            "rope.scaling.type": "linear", "rope.scaling.factor": 8.0,
        },
        norm_plus_one=True,
    ),
    "gemma4": Family(
        "gemma4_text",
        {
            **COMMON, **HEADS, **GEMMA4_ROPE, "num_hidden_layers": 6, "head_dim": 32, "global_head_dim": 64,
            "sliding_window": 8, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 3,
            "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 32, "use_double_wide_mlp": True,
            "final_logit_softcapping": 30.0,
        },
        {
            **GEMMA4, "attention.sliding_window_pattern": [True, False] * 3, "attention.shared_kv_layers": 2,
            "embedding_length_per_layer_input": 32, "feed_forward_length": [96] * 4 + [192] * 2,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma4-31b": Family(
        "gemma4_text",
        {
            **COMMON, **HEADS, **GEMMA4_ROPE, "num_hidden_layers": 4, "head_dim": 32, "global_head_dim": 64,
            "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2,
            "attention_k_eq_v": True, "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 0,
        },
        {
            **GEMMA4, "attention.sliding_window_pattern": [True, False] * 2, "attention.shared_kv_layers": 0,
            "attention.head_count_kv": [2, 1] * 2, "embedding_length_per_layer_input": 0,
        },
        written_as="gemma4",
    ),
    "gemma4-unified": Family(
        "gemma4_unified_text",
        {
            **COMMON, **HEADS, **GEMMA4_ROPE, "num_hidden_layers": 4, "head_dim": 32, "global_head_dim": 64,
            "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2,
            "attention_k_eq_v": True, "num_global_key_value_heads": 1, "use_bidirectional_attention": None,
        },
        {
            **GEMMA4, "attention.sliding_window_pattern": [True, False] * 2, "attention.shared_kv_layers": 0,
            "attention.head_count_kv": [2, 1] * 2, "embedding_length_per_layer_input": 0,
        },
        written_as="gemma4",
    ),
    "gemma4-26b": Family(
        "gemma4_text",
        {
            **COMMON, **HEADS, **GEMMA4_ROPE, "num_hidden_layers": 4, "head_dim": 32, "global_head_dim": 64,
            "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2, "enable_moe_block": True,
            "hidden_size_per_layer_input": 0, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32,
            "attention_k_eq_v": True, "num_global_key_value_heads": 1, "final_logit_softcapping": 30.0,
        },
        {
            **GEMMA4, **CHOOSING, "attention.sliding_window_pattern": [True, False] * 2,
            "attention.shared_kv_layers": 0, "attention.head_count_kv": [2, 1] * 2,
            "embedding_length_per_layer_input": 0, "expert_feed_forward_length": 32, "final_logit_softcapping": 30.0,
        },
        written_as="gemma4",
    ),
    "phi3": Family(
        "phi3", {**COMMON, **HEADS, "pad_token_id": 0, "sliding_window": 12}, {"attention.sliding_window": 12}
    ),
    "starcoder2": Family(
        "starcoder2",
        {**COMMON, **HEADS, "rope_theta": 1e5, "sliding_window": None, "tie_word_embeddings": True},
        {"rope.freq_base": 1e5},
    ),
    "gpt2": Family("gpt2", {"vocab_size": VOCAB, "n_layer": 3, "n_embd": 64, "n_head": 4, "n_positions": 512}, {}),
    "falcon": Family(
        "falcon",
        {"vocab_size": VOCAB, "num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "multi_query": True},
        {"attention.head_count_kv": 1},
    ),
    "bloom": Family("bloom", {"vocab_size": VOCAB, "n_layer": 3, "hidden_size": 64, "n_head": 4}, {}),
    "mamba": Family(
        "mamba",
        {"vocab_size": VOCAB, "num_hidden_layers": 3, "hidden_size": 64, "state_size": 8, "time_step_rank": 4},
        {
            "feed_forward_length": 0, "attention.head_count": 0, "ssm.conv_kernel": 4, "ssm.state_size": 8,
            "ssm.time_step_rank": 4, "ssm.inner_size": 128, "attention.layer_norm_rms_epsilon": 1e-5,
        },
    ),
    "lfm2": Family(
        "lfm2",
        {
            **COMMON, **HEADS, "layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False,
            "tie_word_embeddings": True, "conv_L_cache": 3,
        },
        {
            "attention.head_count_kv": [0, 2, 0], "shortconv.l_cache": 3, "rope.freq_base": 1e6,
            "attention.layer_norm_rms_epsilon": 1e-5,
        },
    ),
    "qwen35": Family("qwen3_5_text", {**COMMON, **DELTA}, {**STATES}, norm_plus_one=True),
    "qwen35moe": Family(
        "qwen3_5_moe_text",
        {
            **COMMON, **DELTA, **OF_EIGHT, "num_experts": 8, "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
        },
        {**STATES, **CHOOSING, "expert_feed_forward_length": 32, "expert_shared_feed_forward_length": 64},
        norm_plus_one=True,
    ),
    "stablelm": Family(
        "stablelm",
        {**COMMON, **HEADS, "partial_rotary_factor": 0.25, "use_qkv_bias": True},
        {"rope.dimension_count": 4},
    ),
    "nemotron": Family(
        "nemotron",
        {**COMMON, **HEADS, "head_dim": 16, "partial_rotary_factor": 0.5},
        {"rope.dimension_count": 8},
        norm_plus_one=True,
    ),
    "mixtral": Family(
        "mixtral", {**COMMON, **HEADS, **OF_EIGHT, "sliding_window": None}, {**CHOOSING, "rope.freq_base": 1e6},
        permute=True, written_as="llama",
    ),
    "qwen2moe": Family(
        "qwen2_moe",
        {
            **COMMON, **HEADS, "num_experts_per_tok": 2, "num_experts": 8, "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
        },
        {**CHOOSING, "expert_feed_forward_length": 32, "expert_shared_feed_forward_length": 64},
    ),
    "qwen3moe": Family(
        "qwen3_moe",
        {**COMMON, **HEADS, **OF_EIGHT, "head_dim": 32, "moe_intermediate_size": 32, "norm_topk_prob": True},
        {**CHOOSING, "attention.key_length": 32, "expert_feed_forward_length": 32},
    ),
    "gpt-oss": Family(
        "gpt_oss",
        {**COMMON, **HEADS, **OF_EIGHT, "head_dim": 32, "sliding_window": 8},
        {
            **CHOOSING, "attention.key_length": 32, "attention.sliding_window": 8, "expert_feed_forward_length": 96,
            "rope.freq_base": 150000.0, "rope.scaling.type": "yarn", "rope.scaling.factor": 32.0,
            "rope.scaling.original_context_length": 4096,
        },
    ),
    "glm4moe": Family(
        "glm4_moe",
        {
            **COMMON, **HEADS, "head_dim": 32, "num_experts_per_tok": 2, "n_routed_experts": 8, "n_shared_experts": 1,
            "moe_intermediate_size": 32, "first_k_dense_replace": 1, "use_qk_norm": True, "attention_bias": True,
            "routed_scaling_factor": 2.5, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
        },
        {
            **CHOOSING, "block_count": 4, "nextn_predict_layers": 1, "attention.key_length": 32,
            "attention.value_length": 32, "rope.dimension_count": 16, "rope.freq_base": 1e6,
            "expert_feed_forward_length": 32, "expert_shared_count": 1, "leading_dense_block_count": 1,
            "expert_gating_func": 2, "expert_weights_scale": 2.5, "expert_weights_norm": True,
            "expert_group_count": 1, "expert_group_used_count": 1,
        },
    ),
    "deepseek2": Family(  # V3 as it is converted now
        "deepseek_v3",
        {**LATENT, "q_lora_rank": 32, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
         "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
            "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0,
         }},
        {
            **LATENT_IN_FILES, "attention.head_count_kv": 1, "attention.q_lora_rank": 32, "attention.key_length": 80,
            "attention.value_length": 64, "attention.key_length_mla": 48, "attention.value_length_mla": 24,
            "expert_gating_func": 2, "expert_group_count": 4, "expert_group_used_count": 2, "expert_weights_scale": 2.5,
            "expert_weights_norm": True, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 16, "rope.scaling.yarn_log_multiplier": 0.1,
        },
    ),
    "deepseek2-lite": Family(  # V2 Lite as it was converted at first
        "deepseek_v2",
        {**LATENT, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "topk_method": "greedy", "rope_theta": 1e4},
        {**LATENT_IN_FILES, "attention.head_count_kv": 4, "attention.key_length": 48, "attention.value_length": 24},
        written_as="deepseek2",
    ),
    "llama4": Family(
        "llama4_text",
        {
            **COMMON, **HEADS, **OF_EIGHT, "num_experts_per_tok": 1, "head_dim": 32, "intermediate_size": 48,
            "intermediate_size_mlp": 96, "interleave_moe_layer_step": 2, "rope_theta": 5e5, "num_hidden_layers": 4,
        },
        {
            **CHOOSING, "expert_used_count": 1, "attention.key_length": 32, "rope.dimension_count": 32,
            "feed_forward_length": 96, "expert_feed_forward_length": 48, "interleave_moe_layer_step": 2,
            "rope.freq_base": 5e5,
        },
    ),
    "glm4moe-air": Family(
        "glm4_moe",
        {
            **COMMON, **HEADS, "head_dim": 16, "num_experts_per_tok": 2, "n_routed_experts": 8, "n_shared_experts": 2,
            "moe_intermediate_size": 32, "first_k_dense_replace": 0, "n_group": 4, "topk_group": 2,
            "norm_topk_prob": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
        },
        {
            **CHOOSING, "attention.key_length": 16, "rope.dimension_count": 16, "rope.freq_base": 1e4,
            "expert_feed_forward_length": 32, "expert_shared_count": 2, "leading_dense_block_count": 0,
            "expert_gating_func": 2, "expert_weights_scale": 1.0, "expert_weights_norm": False,
            "expert_group_count": 4, "expert_group_used_count": 2,
        },
        written_as="glm4moe",
    ),
    "seed_oss": Family(
        "seed_oss", {**COMMON, **HEADS, "head_dim": 32, "rope_theta": 1e7},
        {"attention.key_length": 32, "rope.freq_base": 1e7},
    ),
    "smollm3": Family(
        "smollm3", {**COMMON, **HEADS, "num_hidden_layers": 5, "rope_theta": 5e6, "pad_token_id": 0},
        {"rope.freq_base": 5e6, "rope.dimension_count": 16}, permute=True,
    ),
    "olmo2": Family("olmo2", {**COMMON, **HEADS, "rope_theta": 5e5}, {"rope.freq_base": 5e5}),
    "olmo3": Family(
        "olmo3",
        {
            **COMMON, **HEADS, "num_hidden_layers": 4, "sliding_window": 8, "max_position_embeddings": 512,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 5e5,
                    "attention_factor": 1.3, "beta_fast": 30.0, "beta_slow": 1.5,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
            },
        },
        {
            "rope.freq_base": 5e5, "attention.sliding_window": 8, "rope.scaling.type": "yarn",
            "attention.sliding_window_pattern": [True] * 3 + [False], "rope.scaling.factor": 8.0,
            "rope.scaling.original_context_length": 64, "rope.scaling.yarn_attn_factor": 1.3,
            "rope.scaling.yarn_beta_fast": 30.0, "rope.scaling.yarn_beta_slow": 1.5,
        },
        written_as="olmo2",
    ),
    "granite": Family(
        "granite",
        {
            **COMMON, **HEADS, "attention_multiplier": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
            "logits_scaling": 2.0, "rope_theta": 1e6,
        },
        {
            "attention.scale": 0.3, "embedding_scale": 3.0, "residual_scale": 0.5, "logit_scale": 2.0,
            "rope.freq_base": 1e6, "rope.dimension_count": 16,
        },
        permute=True,
    ),
    "command-r": Family(
        "cohere", {**COMMON, **HEADS, "logit_scale": 0.25, "use_qk_norm": True, "rope_theta": 8e6},
        {"logit_scale": 0.25, "rope.freq_base": 8e6, "rope.scaling.type": "none"},
    ),
    "cohere2": Family(
        "cohere2", {**COMMON, **HEADS, "num_hidden_layers": 5, "logit_scale": 0.25, "sliding_window": 8, "rope_theta": 5e4},
        {
            "logit_scale": 0.25, "attention.sliding_window": 8, "rope.freq_base": 5e4, "rope.dimension_count": 16,
            "rope.scaling.type": "none",
        },
    ),
    "exaone4": Family(
        "exaone4",
        {
            **COMMON, **HEADS, "num_hidden_layers": 4, "head_dim": 32, "sliding_window": 8, "rope_theta": 1e6,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        },
        {
            "attention.key_length": 32, "attention.sliding_window": 8, "rope.freq_base": 1e6,
            "attention.sliding_window_pattern": [True] * 3 + [False],
        },
    ),
    "exaone4-full": Family(
        "exaone4",
        {
            **COMMON, **HEADS, "sliding_window": None, "layer_types": ["full_attention"] * 3, "rope_theta": 1e6,
            "tie_word_embeddings": True,
        },
        {"rope.freq_base": 1e6},
        written_as="exaone4",
    ),
    "qwen3next": Family(
        "qwen3_next",
        {
            **COMMON, **{key: value for key, value in DELTA.items() if key != "rope_parameters"}, "num_experts": 8,
            "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
        },
        {
            **{key: value for key, value in STATES.items() if key != "rope.dimension_sections"}, **CHOOSING,
            "expert_feed_forward_length": 32, "expert_shared_feed_forward_length": 64,
        },
        norm_plus_one=True,
    ),
    "lfm2moe": Family(
        "lfm2_moe",
        {
            **COMMON, **HEADS, "layer_types": ["conv", "full_attention", "conv"], "tie_word_embeddings": True,
            "conv_L_cache": 3, "num_dense_layers": 1, "num_experts": 8, "num_experts_per_tok": 2,
            "moe_intermediate_size": 32, "rope_theta": 1e6,
        },
        {
            **CHOOSING, "attention.head_count_kv": [0, 2, 0], "shortconv.l_cache": 3, "rope.freq_base": 1e6,
            "attention.layer_norm_rms_epsilon": 1e-5, "leading_dense_block_count": 1, "expert_gating_func": 2,
            "expert_feed_forward_length": 32,
        },
    ),
    "nemotron_h": Family(
        "nemotron_h",
        {
            "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, **HEADS, **NEMOTRON_H,
            "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"],
        },
        {
            **SPACE, "attention.key_length": 32, "attention.head_count_kv": [0, 0, 2, 0],
            "feed_forward_length": [0, 96, 0, 96], "attention.layer_norm_rms_epsilon": 1e-5,
        },
    ),
    "nemotron_h_moe": Family(
        "nemotron_h",
        {
            "vocab_size": VOCAB, "hidden_size": 64, **HEADS, **NEMOTRON_H, "n_routed_experts": 8,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"], "num_experts_per_tok": 2,
            "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 48, "routed_scaling_factor": 2.5,
            "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
        },
        {
            **SPACE, **CHOOSING, "attention.key_length": 32, "attention.head_count_kv": [0, 0, 2, 0],
            "feed_forward_length": [0, 32, 0, 32], "attention.layer_norm_rms_epsilon": 1e-5,
            "expert_feed_forward_length": 32, "expert_shared_feed_forward_length": 48, "expert_shared_count": 1,
            "expert_weights_norm": True, "expert_weights_scale": 2.5, "expert_group_count": 1,
        },
    ),
    "granitehybrid": Family(
        "granitemoehybrid",
        {
            **COMMON, **HEADS, **GRANITE, **OF_EIGHT, "shared_intermediate_size": 48, "mamba_n_heads": 4,
            "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 2, "mamba_d_conv": 4, "mamba_chunk_size": 16,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
        {
            **SPACE, **CHOOSING, **GRANITE_IN_FILES, "attention.head_count_kv": [0, 2, 0],
            "expert_shared_feed_forward_length": 48, "rope.scaling.finetuned": False,
        },
        permute=True,
    ),
    "granitehybrid-dense": Family(
        "granitemoehybrid",
        {
            **COMMON, **HEADS, **GRANITE, "num_local_experts": 0, "shared_intermediate_size": 96, "mamba_n_heads": 4,
            "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_d_conv": 4, "mamba_chunk_size": 16,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
        {
            **SPACE, **GRANITE_IN_FILES, "ssm.group_count": 1, "attention.head_count_kv": [0, 2, 0],
            "expert_shared_feed_forward_length": 96, "rope.scaling.finetuned": False,
        },
        permute=True, written_as="granitehybrid",
    ),
    "granitemoe": Family(
        "granitemoeshared", {**COMMON, **HEADS, **GRANITE, **OF_EIGHT, "shared_intermediate_size": 48},
        {**CHOOSING, **GRANITE_IN_FILES, "expert_shared_feed_forward_length": 48, "rope.dimension_count": 16},
        permute=True,
    ),
    "glm-dsa": Family(  # its sparse attention drops keys only beyond the positions of a test
        "glm_moe_dsa",
        {
            **LATENT, "q_lora_rank": 32, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5, "head_dim": 16,
            "norm_topk_prob": True, "index_n_heads": 2, "index_head_dim": 64, "index_topk": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        {
            **LATENT_IN_FILES, "attention.head_count_kv": 1, "attention.q_lora_rank": 32, "attention.key_length": 80,
            "attention.value_length": 64, "attention.key_length_mla": 48, "attention.value_length_mla": 24,
            "expert_gating_func": 2, "expert_group_count": 1, "expert_group_used_count": 1, "expert_weights_scale": 2.5,
            "expert_weights_norm": True, "attention.indexer.head_count": 2, "attention.indexer.key_length": 64,
            "attention.indexer.top_k": 512,
        },
    ),
    "mistral3": Family(
        "ministral3",
        {
            **COMMON, **HEADS, "head_dim": 32, "max_position_embeddings": 1024,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 64,
                "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
            },
        },
        {
            "attention.key_length": 32, "rope.dimension_count": 32, "rope.freq_base": 1e6, "rope.scaling.type": "yarn",
            "rope.scaling.factor": 16.0, "rope.scaling.original_context_length": 64, "rope.scaling.yarn_beta_fast": 32.0,
            "rope.scaling.yarn_beta_slow": 1.0, "rope.scaling.yarn_log_multiplier": 1.0,
            "attention.temperature_scale": 0.1,
        },
        permute=True,
    ),
    "exaone-moe": Family(
        "exaone_moe",
        {
            **COMMON, **HEADS, "num_hidden_layers": 4, "head_dim": 32, "sliding_window": 8, "num_experts": 8,
            "num_experts_per_tok": 2, "num_shared_experts": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
            "mlp_layer_types": ["dense"] + ["sparse"] * 3, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        {
            **CHOOSING, "attention.key_length": 32, "attention.sliding_window": 8, "rope.freq_base": 1e6,
            "attention.sliding_window_pattern": [True] * 3 + [False], "expert_feed_forward_length": 32,
            "expert_shared_feed_forward_length": 32, "expert_shared_count": 1, "leading_dense_block_count": 1,
            "expert_weights_scale": 2.5, "expert_weights_norm": True, "expert_gating_func": 2,
            "rope.scaling.type": "none",
        },
    ),
    "afmoe": Family(
        "afmoe",
        {
            **COMMON, **HEADS, "num_hidden_layers": 5, "head_dim": 32, "sliding_window": 8, "num_dense_layers": 1,
            "num_experts": 8, "num_experts_per_tok": 2, "num_shared_experts": 1, "moe_intermediate_size": 32,
            "route_scale": 1.5, "mup_enabled": True, "rope_theta": 1e4,
        },
        {
            **CHOOSING, "attention.key_length": 32, "attention.sliding_window": 8, "rope.freq_base": 1e4,
            "rope.dimension_count": 32, "expert_feed_forward_length": 32, "expert_shared_count": 1,
            "leading_dense_block_count": 1, "expert_weights_scale": 1.5, "expert_weights_norm": True,
            "expert_gating_func": 2,
        },
    ),
    "phimoe": Family(
        "phimoe",
        {
            **COMMON, **HEADS, **OF_EIGHT, "attention_bias": True, "lm_head_bias": True, "pad_token_id": 0,
            "sliding_window": None, "rope_theta": 1e4,
        },
        {**CHOOSING, "rope.freq_base": 1e4, "rope.dimension_count": 16, "attention.layer_norm_rms_epsilon": 1e-5},
    ),
    "olmoe": Family(
        "olmoe", {**COMMON, **HEADS, "num_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1e4, "pad_token_id": 0},
        {**CHOOSING, "rope.freq_base": 1e4},
    ),
    "dots1": Family(
        "dots1",
        {
            **COMMON, **HEADS, "head_dim": 32, "num_experts_per_tok": 2, "n_routed_experts": 8, "n_shared_experts": 2,
            "moe_intermediate_size": 32, "first_k_dense_replace": 1, "norm_topk_prob": True,
            "routed_scaling_factor": 2.5, "sliding_window": None, "layer_types": ["full_attention"] * 3,
            "rope_theta": 1e6,
        },
        {
            **CHOOSING, "attention.key_length": 32, "rope.freq_base": 1e6, "expert_feed_forward_length": 32,
            "expert_shared_count": 2, "leading_dense_block_count": 1, "expert_weights_scale": 2.5,
            "expert_weights_norm": True, "expert_gating_func": 2,
        },
    ),
    "ernie4_5": Family(
        "ernie4_5", {**COMMON, **HEADS, "head_dim": 32, "rope_theta": 5e5},
        {"attention.key_length": 32, "rope.freq_base": 5e5},
    ),
    "ernie4_5-moe": Family(
        "ernie4_5_moe",
        {
            **COMMON, **HEADS, "moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 32,
            "moe_num_shared_experts": 2, "moe_layer_start_index": 1, "rope_theta": 5e5,
        },
        {
            **CHOOSING, "rope.freq_base": 5e5, "expert_feed_forward_length": 32, "expert_shared_count": 2,
            "expert_shared_feed_forward_length": 64, "leading_dense_block_count": 1, "interleave_moe_layer_step": 1,
        },
    ),
    "hunyuan-moe": Family(
        "hunyuan_v1_moe",
        {
            **COMMON, **HEADS, "head_dim": 32, "num_experts": 8, "moe_topk": 2,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1000.0, "factor": 1.0},
        },
        {
            **CHOOSING, "attention.key_length": 32, "rope.freq_base": 1e4 * 1000 ** (32 / 30),
            "rope.scaling.type": "none", "rope.scaling.factor": 1.0, "expert_feed_forward_length": 96,
            "expert_shared_feed_forward_length": 96, "expert_shared_count": 1,
        },
    ),
    "hunyuan-dense": Family(
        "hunyuan_v1_dense", {**COMMON, **HEADS, "head_dim": 32, "rope_theta": 1e5},
        {"attention.key_length": 32, "rope.freq_base": 1e5, "rope.scaling.type": "none", "rope.scaling.factor": 1.0},
    ),
    "glm4": Family(
        "glm4",
        {
            **COMMON, **HEADS, "head_dim": 32, "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
        {"attention.key_length": 32, "rope.dimension_count": 16, "rope.freq_base": 1e4},
    ),
    "gemma": Family(
        "gemma", {**COMMON, **HEADS, "head_dim": 32}, {"attention.key_length": 32}, norm_plus_one=True,
    ),
    "arcee": Family("arcee", {**COMMON, **HEADS, "rope_theta": 1e4}, {"rope.dimension_count": 16}, permute=True),
    "qwen2vl": Family(
        "qwen2", {**COMMON, **HEADS, "rope_theta": 1e6},
        {"rope.freq_base": 1e6, "rope.dimension_sections": [4, 2, 2, 0]},
    ),
    "qwen3vl": Family(
        "qwen3", {**COMMON, **HEADS, "head_dim": 32, "rope_theta": 5e6},
        {"attention.key_length": 32, "rope.freq_base": 5e6, "rope.dimension_sections": [6, 5, 5, 0]},
    ),
    "qwen3vlmoe": Family(
        "qwen3_moe",
        {
            **COMMON, **HEADS, **OF_EIGHT, "head_dim": 32, "moe_intermediate_size": 32, "norm_topk_prob": True,
            "rope_theta": 5e6,
        },
        {
            **CHOOSING, "attention.key_length": 32, "expert_feed_forward_length": 32, "rope.freq_base": 5e6,
            "rope.dimension_sections": [6, 5, 5, 0],
        },
    ),
    "minimax-m2": Family(
        "minimax_m2",
        {**COMMON, **HEADS, **OF_EIGHT, "head_dim": 32, "rotary_dim": 16},
        {
            **CHOOSING, "attention.key_length": 32, "expert_feed_forward_length": 96, "rope.dimension_count": 16,
            "expert_gating_func": 2, "rope.freq_base": 5e6,
        },
    ),
}  # fmt: skip


def random_model(architecture: str, seed: int = 0) -> PreTrainedModel:
    """A transformers model with random weights, large enough that every part matters to the logits."""
    family = FAMILIES[architecture]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family.model_type, **family.config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("A_log", "mixer.D", "dt_proj.bias")):
            continue  # logarithms and steps keep the model's initial values
        scale = 0.5 if parameter.dim() == 1 else 0.15
        parameter.data = torch.randn_like(parameter) * scale
        if parameter.dim() == 1 and name.endswith("weight") and not family.norm_plus_one:
            parameter.data += 1
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn_like(buffer) * 0.2)
        if name.endswith("layer_scalar"):
            buffer.copy_(1 + torch.randn_like(buffer) * 0.2)
    model.tie_weights()
    return model


def write_gguf(
    model: PreTrainedModel,
    architecture: str,
    path: Path,
    kind: str = "F32",
    extra: dict[str, Any] | None = None,
    more: dict[str, np.ndarray] | None = None,
    without: tuple[str, ...] = (),
) -> Path:
    """Write a transformers model as GGUF. `kind` is the format of the matrices: F32, F16, BF16, Q8_0, Q4_0 ...

    `extra` is further metadata, `more` further tensors. Tensors in `without`, by their name in a layer, are left out.
    """
    family, config = FAMILIES[architecture], model.config
    architecture = family.written_as or architecture
    writer = _Writer(path, architecture)
    writer.without = without
    heads = getattr(config, "num_attention_heads", 0)
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": getattr(config, "max_position_embeddings", 512),
        "embedding_length": config.hidden_size,
        "feed_forward_length": getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        "attention.head_count": heads,
        **({"attention.head_count_kv": config.to_dict().get("num_key_value_heads", heads)} if heads else {}),
        **family.metadata,
        **(extra or {}),
    }
    if "attention.key_length" in values:
        values.setdefault("attention.value_length", values["attention.key_length"])
    for key, value in values.items():
        if isinstance(value, list):
            writer.add_array(f"{architecture}.{key}", value)
            continue
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add = writer.add_bool if isinstance(value, bool) else add
        (writer.add_string if isinstance(value, str) else add)(f"{architecture}.{key}", value)
    for eps in ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps"):
        if getattr(config, eps, None) is not None:
            key = "layer_norm_rms_epsilon" if eps == "rms_norm_eps" else "layer_norm_epsilon"
            writer.add_float32(f"{architecture}.attention.{key}", getattr(config, eps))
            if architecture == "nemotron":  # transformers' mapping reads this name
                writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", getattr(config, eps))
    _add_vocabulary(writer)
    _add_tensors(writer, model, architecture, family, kind)
    for name, value in (more or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class _Writer(gguf.GGUFWriter):
    without: tuple[str, ...] = ()

    def add_tensor(self, name: str, *given: Any, **named: Any) -> None:
        if not any(f".{one}." in name for one in self.without):
            super().add_tensor(name, *given, **named)


def rounded_to(value: np.ndarray, kind: str) -> np.ndarray:
    """A matrix quantised to a format and dequantised."""
    number = gguf.GGMLQuantizationType[kind]
    return np.array(gguf.dequantize(gguf.quantize(np.ascontiguousarray(value), number), number), np.float32)


def _add_vocabulary(writer: gguf.GGUFWriter) -> None:
    """Add all 256 bytes in GPT-2's spelling, some control tokens, and fillers."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = [*bytes_to_unicode().values()]
    kinds = [1] * len(tokens)
    tokens += ["<|im_start|>", "<|im_end|>"]
    kinds += [3, 3]
    tokens += ["he", "hel", "Ġw"]
    kinds += [1, 1, 1]
    while len(tokens) < VOCAB:
        tokens.append(f"filler{len(tokens)}")
        kinds.append(5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["h e", "he l", "Ġ w"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_add_bos_token(False)
    writer.add_chat_template(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def _add_tensors(writer: gguf.GGUFWriter, model: PreTrainedModel, architecture: str, family: Family, kind: str) -> None:
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, model.config.num_hidden_layers)
    tied = model.config.tie_word_embeddings or architecture == "falcon"
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        if ".experts." in name:
            for expert_name, value in _experts(name, parameter.numpy(), architecture):
                stored = "F32" if expert_name.endswith("bias") else kind
                data = gguf.quantize(np.ascontiguousarray(value), gguf.GGMLQuantizationType[stored])
                writer.add_tensor(expert_name, data, raw_dtype=gguf.GGMLQuantizationType[stored])
            continue
        name = name.replace("e_score_correction_bias", "e_score_correction.bias")
        name = name.replace("mlp.gate.moe_statics", "mlp.moe_statics") + ".bias" * name.endswith("expert_bias")
        name += ".weight" if name.endswith(("sinks", "layer_scalar")) else ""
        name = name.replace("router.scale", "router.proj.scale")
        name = name.replace("router.per_expert_scale", "experts.down_proj.scale")
        name = name.replace("dt_bias", "dt_proj.bias") if ".linear_attn." in name else name
        name = _converter_name(name)
        if "shared_mlp.input_linear" in name:
            ends = "" if not family.metadata.get("expert_count") else "_shexp"
            for half, part in zip(("gate", "up"), np.split(parameter.numpy(), 2), strict=True):
                data = gguf.quantize(np.ascontiguousarray(part), gguf.GGMLQuantizationType[kind])
                stored_name = f"blk.{name.split('.')[2]}.ffn_{half}{ends}.weight"
                writer.add_tensor(stored_name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
            continue
        base, suffix = name.rsplit(".", 1) if not name.endswith(("A_log", ".D")) else (name, name[-5:])
        gguf_name = names.get_name(base) or names.get_name(base.removeprefix("model.").removeprefix("transformer."))
        assert gguf_name, name
        if "shared_mlp.output_linear" in name and not family.metadata.get("expert_count"):
            gguf_name = gguf_name.replace("_shexp", "")
        value = parameter.numpy().astype(np.float32)
        if ".kv_b_proj." in name and "attention.key_length_mla" in family.metadata:
            for half, part in _split_kv_b(value, model.config):
                data = gguf.quantize(np.ascontiguousarray(part), gguf.GGMLQuantizationType[kind])
                stored_name = gguf_name.replace("kv_b", half) + ".weight"
                writer.add_tensor(stored_name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
            continue
        if architecture == "gpt2" and value.ndim == 2 and (".h." in name):
            value = value.T
        if architecture == "bloom" and "query_key_value" in name:
            value = _by_thirds(value, model.config.n_head)
        if suffix == "A_log":
            value = -np.exp(value)
        if ".linear_attn." in name and architecture != "qwen3next":
            value = _tiled(name, value, model.config)
        if "in_proj_qkvz" in name:
            for part_name, part in _ungrouped(value, model.config):
                data = gguf.quantize(np.ascontiguousarray(part), gguf.GGMLQuantizationType[kind])
                stored_name = f"blk.{name.split('.')[2]}.{part_name}.weight"
                writer.add_tensor(stored_name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
            continue
        if "ssm.group_count" in family.metadata and (".mixer." in name or ".mamba." in name):  # columns, and groups
            groups = family.metadata["ssm.group_count"]
            value = value.reshape(-1, 1) if name.endswith(("A_log", ".D")) else value
            value = value.reshape(groups, -1) if name.endswith((".mixer.norm.weight", ".mamba.norm.weight")) else value
        value = value.squeeze(1) if "conv" in name and value.ndim == 3 else value
        if family.permute and (".q_proj." in name or ".k_proj." in name):
            value = _permuted(value, model.config, ".q_proj." in name)
        if family.norm_plus_one and "norm" in name and suffix == "weight" and ".linear_attn." not in name:
            value = value + 1
        plain = value.ndim == 1 or any(
            word in gguf_name for word in ("position", "gate_inp", "ssm_a", "ssm_d", "ssm_norm", "conv1d", "conv.conv")
        )
        stored = "F32" if plain else kind
        data = gguf.quantize(np.ascontiguousarray(value), gguf.GGMLQuantizationType[stored])
        stored_name = gguf_name if base == name else f"{gguf_name}.{suffix}"
        writer.add_tensor(stored_name, data, raw_dtype=gguf.GGMLQuantizationType[stored])
    if family.metadata.get("nextn_predict_layers"):
        for name, shape in (("attn_q", (128, 64)), ("nextn.eh_proj", (64, 128)), ("ffn_gate_exps", (8, 32, 64))):
            writer.add_tensor(f"blk.{model.config.num_hidden_layers}.{name}.weight", np.zeros(shape, np.float32))
    if architecture == "gemma4":
        _add_unused_tensors_of_gemma4(writer, model.config, kind)


def _converter_name(name: str) -> str:
    """The name that the converter expects for a parameter of Nemotron-H and Granite."""
    if ".mixer." in name or ".mamba." in name:
        name = name.replace("dt_bias", "dt_proj.bias")
    if name.startswith("model.") and (".mixer." in name or name.startswith(("model.embeddings", "model.norm_f"))):
        name = "backbone" + name.removeprefix("model")
    return name.replace("block_sparse_moe.router.weight", "block_sparse_moe.router.layer.weight")


def _add_unused_tensors_of_gemma4(writer: gguf.GGUFWriter, config: Any, kind: str) -> None:
    """Add RoPE factors of full attention, which the config implies as well, and unused K and V weights."""
    rope = config.rope_parameters["full_attention"]
    half = config.per_layer_config["full_attention"].head_dim // 2
    rotated = int(half * rope["partial_rotary_factor"])
    writer.add_tensor("rope_freqs.weight", np.array([1.0] * rotated + [1e30] * (half - rotated), np.float32))
    for layer in range(
        config.num_hidden_layers - (getattr(config, "num_kv_shared_layers", 0) or 0), config.num_hidden_layers
    ):
        one = config.per_layer_config[layer]
        matrix = np.full((one.num_key_value_heads * one.head_dim, config.hidden_size), 1e4, np.float32)
        for name in ("attn_k", "attn_v"):
            data = gguf.quantize(matrix, gguf.GGMLQuantizationType[kind])
            writer.add_tensor(f"blk.{layer}.{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind])
        writer.add_tensor(f"blk.{layer}.attn_k_norm.weight", np.full(one.head_dim, 1e4, np.float32))


def _experts(name: str, value: np.ndarray, architecture: str) -> list[tuple[str, np.ndarray]]:
    """Stacked expert weights (experts, outputs, inputs) under llama.cpp's names; gate_proj and up_proj in separate tensors."""
    bias = name.endswith("_bias")
    if architecture in ("gpt-oss", "llama4") and not bias:
        value = value.swapaxes(1, 2)
    base, suffix = f"blk.{name.split('.')[2]}.ffn_", "_exps.bias" if bias else "_exps.weight"
    if architecture == "gemma4":  # gate_up_proj in one tensor
        return [(f"{base}{'gate_up' if 'gate_up' in name else 'down'}{suffix}", value)]
    if "gate_up" not in name:
        return [(f"{base}{'up' if 'up_proj' in name else 'down'}{suffix}", value)]
    half = value.shape[1] // 2
    gate, up = (value[:, ::2], value[:, 1::2]) if architecture == "gpt-oss" else (value[:, :half], value[:, half:])
    return [(f"{base}gate{suffix}", gate), (f"{base}up{suffix}", up)]


def _split_kv_b(value: np.ndarray, config: Any) -> list[tuple[str, np.ndarray]]:
    """Split `kv_b_proj` into its key half, transposed per head, and its value half."""
    heads = value.reshape(config.num_attention_heads, -1, value.shape[1])
    keys, values = np.split(heads, [config.qk_nope_head_dim], 1)
    return [("k_b", keys.swapaxes(1, 2)), ("v_b", values)]


def _tiled(name: str, value: np.ndarray, config: Any) -> np.ndarray:
    """Interleave value heads of linear attention over the key heads; the model groups them by key head."""
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads

    def tiled(part: np.ndarray) -> np.ndarray:
        return part.reshape(keys, values // keys, len(part) // values, -1).swapaxes(0, 1).reshape(part.shape)

    if ".norm." in name:
        return value  # one norm for all heads
    if ".out_proj." in name:
        return tiled(value.T).T
    first = 2 * config.linear_key_head_dim * keys if ".in_proj_qkv." in name or ".conv1d." in name else 0
    return np.concatenate([value[:first], tiled(value[first:])])


def _ungrouped(value: np.ndarray, config: Any) -> list[tuple[str, np.ndarray]]:
    """Split a projection grouped by key head into Q, K and V of all heads, and the gates."""
    widths = np.array([config.linear_key_head_dim] * 2 + [config.linear_value_head_dim * 3] * 2)
    heads = value.reshape(config.linear_num_key_heads, widths.sum(), -1)
    parts = [one.reshape(-1, value.shape[1]) for one in np.split(heads, widths.cumsum()[:-1], 1)]
    return [("attn_qkv", np.concatenate(parts[:3])), ("attn_gate", parts[3])]


def _by_thirds(value: np.ndarray, heads: int) -> np.ndarray:
    """Reorder a projection from (Q, K, V) per head to all Q, all K, all V."""
    return value.reshape(heads, 3, value.shape[0] // heads // 3, -1).swapaxes(0, 1).reshape(value.shape)


def _permuted(value: np.ndarray, config: Any, query: bool) -> np.ndarray:
    heads = config.num_attention_heads if query else config.num_key_value_heads
    width = value.shape[0] // heads // 2
    return value.reshape(heads, 2, width, -1).swapaxes(1, 2).reshape(value.shape)
