"""Tiny random models of the causal-LM architectures that transformers has, as oracles for a streaming engine.

Each case is a config small enough for a test and odd enough that a wrong implementation shows. Every layer type of the
architecture occurs. Windows are shorter than the prompts, and KV heads fewer than query heads where allowed. There are
more experts than are used. Nothing here reads the network or a checkpoint.
"""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 320
MATRIX_SCALE, EMBEDDING_SCALE, VECTOR_SPREAD, BUFFER_SPREAD = 0.15, 0.5, 0.5, 0.2
# Parameters whose values are logarithms, decays and steps: drawn around the model's initial values.
KEPT_ABOUT_THEIR_START = ("A_log", "dt_bias", "time_decay", "time_first", "lambda_q1", "lambda_k1", "recurrent_param")

LEARNT_BUFFERS = ("bias", "biases", "layer_scalar")


@dataclass(frozen=True)
class Case:
    """One tiny config. `kind` is "dense", "experts" (MoE) or "hybrid" (layers with a recurrent state).

    `cache_differs`: in transformers, prefill and decode through the native cache differ from a full forward. Only the
    full forward is then an oracle.
    """

    model_type: str
    config: dict[str, Any]
    kind: str
    cache_differs: str = ""


NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SIZES = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 3, "max_position_embeddings": 128, **NO_TOKENS}
COMMON = {**SIZES, "intermediate_size": 96, "num_attention_heads": 4}
GROUPED = {**COMMON, "num_key_value_heads": 2}
HEADED = {**GROUPED, "head_dim": 32}
WINDOWED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
GPT = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128, **NO_TOKENS}
OF_EIGHT = {"num_experts_per_tok": 2, "num_experts": 8}
OF_EIGHT_LOCAL = {"num_experts_per_tok": 2, "num_local_experts": 8}
SMALL_EXPERTS = {"moe_intermediate_size": 32}
SHARED_EXPERT = {"shared_expert_intermediate_size": 48}
ROUTED = {**SMALL_EXPERTS, "num_experts_per_tok": 2, "n_routed_experts": 8, "n_shared_experts": 1}
IN_GROUPS = {"n_group": 4, "topk_group": 2}
FIRST_DENSE = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 24}
LATENT_Q = {**LATENT, "q_lora_rank": 24}
# With few index heads most scores are exactly zero, and the choice among equals depends on the cache.
INDEXED = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 16}
LINEAR_FIRST = {"layer_types": ["linear_attention", "linear_attention", "full_attention"]}
DELTA = {
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 2, "mamba_chunk_size": 16}
GRANITE = {
    "embedding_multiplier": 6.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2,
}  # fmt: skip

DENSE: dict[str, dict[str, Any]] = {
    "apertus": GROUPED,
    "arcee": GROUPED,
    "biogpt": COMMON,
    "bitnet": GROUPED,
    "bloom": {"vocab_size": VOCAB, "hidden_size": 64, "n_layer": 3, "n_head": 4, **NO_TOKENS},
    "codegen": {**GPT, "rotary_dim": 8},
    "cohere": {**GROUPED, "use_qk_norm": True, "logit_scale": 0.5},
    "cohere2": {**GROUPED, **WINDOWED, "logit_scale": 0.5},
    "cohere_compass_text": {
        **GROUPED, **WINDOWED, "logit_scale": 0.5, "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "default", "rope_theta": 1e5},
        },
    },
    "ctrl": {**GPT, "dff": 96},
    "cwm": {**HEADED, **WINDOWED, "bos_token_id": 0, "eos_token_id": 1},
    "diffllama": GROUPED,
    # Above keep_window_size its choice of keys depends on the number of later ones, so the window stays above the prompts.
    "doge": GROUPED,
    "ernie4_5": HEADED,
    "exaone4": {**GROUPED, **WINDOWED},
    "falcon": {
        "vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "bias": True,
    },
    "falcon:new": {
        "vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_kv_heads": 2,
        "new_decoder_architecture": True,
    },
    "falcon:alibi": {
        "vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "alibi": True,
        "multi_query": False, "parallel_attn": False,
    },
    "gemma": HEADED,
    "gemma2": {**HEADED, **WINDOWED, "query_pre_attn_scalar": 32},
    "gemma3_text": {**HEADED, **WINDOWED, "query_pre_attn_scalar": 32},
    "gemma3n_text": {
        **HEADED, "num_hidden_layers": 6, "sliding_window": 8, "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 3, "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 16, "laurel_rank": 8, "activation_sparsity_pattern": [0.95] * 2 + [0.0] * 4,
    },
    "gemma4_text": {
        **HEADED, "num_hidden_layers": 6, "sliding_window": 8, "num_kv_shared_layers": 2, "global_head_dim": 48,
        "layer_types": ["sliding_attention", "full_attention"] * 3, "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 16, "use_double_wide_mlp": True, "final_logit_softcapping": 30.0,
    },
    "gemma4_unified_text": {
        **HEADED, "num_hidden_layers": 4, "sliding_window": 8, "global_head_dim": 48, "attention_k_eq_v": True,
        "num_global_key_value_heads": 1, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "use_bidirectional_attention": None,
    },
    "glm": HEADED,
    "glm4": HEADED,
    "gpt2": GPT,
    "gpt2:scaled": {**GPT, "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "gpt_bigcode": GPT,
    "gpt_bigcode:heads": {**GPT, "multi_query": False},
    "gpt_neo": {
        "vocab_size": VOCAB, "hidden_size": 64, "num_layers": 3, "num_heads": 4, "window_size": 8,
        "attention_types": [[["global", "local", "global"], 1]], "max_position_embeddings": 128, **NO_TOKENS,
    },
    "gpt_neox": {**COMMON, "rotary_pct": 0.5},
    "gpt_neox:serial": {**COMMON, "use_parallel_residual": False},
    "gpt_neox_japanese": {**SIZES, "num_attention_heads": 4, "intermediate_multiple_size": 2},
    "gptj": {**GPT, "rotary_dim": 8},
    "granite": {**GROUPED, **GRANITE},
    "granite_swa": {**GROUPED, **WINDOWED, **GRANITE},
    "helium": {**GROUPED, "head_dim": 16},
    "hrm_text": {
        **COMMON, "num_hidden_layers": 12, "num_layers_per_stack": 2, "H_cycles": 2, "L_cycles": 2, "head_dim": 16,
        "prefix_lm": False,
    },
    "hunyuan_v1_dense": HEADED,
    "hyperclovax": {**HEADED, **GRANITE},
    "internlm3": HEADED,
    "iquestcoder": HEADED,
    "jais2": GROUPED,
    "llama": {**GROUPED, "rope_theta": 5e5},
    "llama:biased": {
        **HEADED, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "minicpm3": {"dim_model_base": 16, **COMMON, **LATENT_Q, "num_key_value_heads": 4},
    "ministral": {**HEADED, **WINDOWED},
    "ministral3": HEADED,
    "mistral": {**HEADED, "sliding_window": 8},
    "modernbert-decoder": {
        **COMMON, "local_attention": 16, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
        "cls_token_id": 0, "sep_token_id": 1, "layer_types": WINDOWED["layer_types"],
    },
    "mpt": {"vocab_size": VOCAB, "d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 128},
    "nanochat": GROUPED,
    "nemotron": {**GROUPED, "head_dim": 16, "partial_rotary_factor": 0.5},
    "olmo": {**GROUPED, "clip_qkv": 1.0},
    "olmo2": GROUPED,
    "olmo3": {**GROUPED, **WINDOWED},
    "openai-gpt": GPT,
    "opt": {**SIZES, "ffn_dim": 96, "num_attention_heads": 4, "word_embed_proj_dim": 64},
    "opt:projected": {
        **SIZES, "ffn_dim": 96, "num_attention_heads": 4, "word_embed_proj_dim": 32, "do_layer_norm_before": False,
    },
    "persimmon": COMMON,
    "phi": {**GROUPED, "partial_rotary_factor": 0.5},
    "phi:normed": {**COMMON, "qk_layernorm": True},
    "phi3": {**GROUPED, "sliding_window": 12},
    "phi3:longrope": {
        **GROUPED, "original_max_position_embeddings": 64,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [4.0] * 8},
    },
    "qwen2": {**GROUPED, "rope_theta": 1e6},
    "qwen2:windowed": {**GROUPED, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": HEADED,
    "seed_oss": HEADED,
    "smollm3": {**GROUPED, "no_rope_layers": [1, 0, 1]},
    "stablelm": {**GROUPED, "partial_rotary_factor": 0.25, "use_qkv_bias": True},
    "stablelm:parallel": {**GROUPED, "qk_layernorm": True, "use_parallel_residual": True},
    "starcoder2": {**GROUPED, "sliding_window": 8},
    "vaultgemma": {**HEADED, **WINDOWED, "query_pre_attn_scalar": 32},
    "xglm": {
        "vocab_size": VOCAB, "d_model": 64, "ffn_dim": 96, "num_layers": 3, "attention_heads": 4,
        "max_position_embeddings": 128, **NO_TOKENS, "pad_token_id": 1,
    },
    "youtu": {**COMMON, **LATENT_Q, "num_key_value_heads": 4},
}  # fmt: skip

EXPERTS: dict[str, dict[str, Any]] = {
    "afmoe": {
        **HEADED, **WINDOWED, **OF_EIGHT, **SMALL_EXPERTS, "num_shared_experts": 1, "mup_enabled": True,
        "route_scale": 1.5,
    },
    "aria_text": {**GROUPED, "moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 1},
    "axk1": {**COMMON, **LATENT_Q, **ROUTED, **IN_GROUPS, **FIRST_DENSE, "num_key_value_heads": 4},
    "axk2": {
        **COMMON, **LATENT_Q, **ROUTED, **IN_GROUPS, **FIRST_DENSE, **INDEXED, "num_key_value_heads": 4,
        "gated_norm_rank": 8,
    },
    "beam": {**HEADED, **WINDOWED, **OF_EIGHT, **SMALL_EXPERTS, **IN_GROUPS, **FIRST_DENSE},
    "cohere2_moe": {
        **HEADED, **WINDOWED, **OF_EIGHT, **FIRST_DENSE, "num_shared_experts": 1, "prefix_dense_intermediate_size": 80,
        "logit_scale": 0.5,
    },
    "dbrx": {
        "vocab_size": VOCAB, "d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "deepseek_v2": {
        **COMMON, **LATENT_Q, **ROUTED, **IN_GROUPS, "num_key_value_heads": 4, "first_k_dense_replace": 1,
        "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5,
    },
    "deepseek_v2:lite": {
        **COMMON, **LATENT, **ROUTED, "num_key_value_heads": 4, "q_lora_rank": None, "first_k_dense_replace": 1,
    },
    "deepseek_v3": {
        **COMMON, **LATENT_Q, **ROUTED, **IN_GROUPS, "num_key_value_heads": 4, "first_k_dense_replace": 1,
    },
    "deepseek_v32": {
        **COMMON, **LATENT_Q, **ROUTED, **IN_GROUPS, **INDEXED, "num_key_value_heads": 4, "first_k_dense_replace": 1,
    },
    "deepseek_v4": {
        **SIZES, **ROUTED, **INDEXED, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32,
        "q_lora_rank": 24, "o_groups": 2, "o_lora_rank": 16, "hc_mult": 2, "hc_sinkhorn_iters": 4, "sliding_window": 8,
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 8}, "index_topk": 4,
        "mlp_layer_types": ["hash_moe", "moe", "moe"], "partial_rotary_factor": 0.5,
    },
    "dots1": {**HEADED, **WINDOWED, **ROUTED, **IN_GROUPS, "first_k_dense_replace": 1, "norm_topk_prob": True},
    "dots3_note_text": {
        **COMMON, **LATENT_Q, **ROUTED, **INDEXED, "num_key_value_heads": 4, "sliding_window": 8,
        "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
        "shared_experts_intermediate_size": 48, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 24, "swa_kv_lora_rank": 16, "swa_head_dim": 24, "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 24,
    },
    "ernie4_5_moe": {
        **GROUPED, **SMALL_EXPERTS, "moe_num_experts": 8, "moe_k": 2, "moe_layer_start_index": 1,
        "moe_num_shared_experts": 1,
    },
    "exaone_moe": {**HEADED, **WINDOWED, **OF_EIGHT, **SMALL_EXPERTS, **IN_GROUPS, "num_shared_experts": 1},
    "flex_olmo": {**GROUPED, **OF_EIGHT},
    "flint": {
        **HEADED, **WINDOWED, **OF_EIGHT, **SMALL_EXPERTS, **SHARED_EXPERT, "mlp_only_layers": [0],
    },
    "gemma4_text:experts": {
        **HEADED, "num_hidden_layers": 4, "sliding_window": 8, "global_head_dim": 48, "enable_moe_block": True,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 0,
        "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32, "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
    },
    "glm4_moe": {**HEADED, **ROUTED, **IN_GROUPS, "first_k_dense_replace": 1, "use_qk_norm": True},
    "glm4_moe_lite": {**COMMON, **LATENT_Q, **ROUTED, **IN_GROUPS, **FIRST_DENSE, "num_key_value_heads": 4},
    "glm_moe_dsa": {
        **COMMON, **LATENT_Q, **ROUTED, **IN_GROUPS, **FIRST_DENSE, **INDEXED, "num_key_value_heads": 4,
        "indexer_types": ["full", "full", "shared"],
    },
    "gpt_oss": {**HEADED, **WINDOWED, **OF_EIGHT_LOCAL},
    "granitemoe": {**GROUPED, **OF_EIGHT_LOCAL, **GRANITE},
    "granitemoe_swa": {**GROUPED, **WINDOWED, **OF_EIGHT_LOCAL, **GRANITE, "shared_intermediate_size": 48},
    "granitemoeshared": {**GROUPED, **OF_EIGHT_LOCAL, **GRANITE, "shared_intermediate_size": 48},
    "hunyuan_v1_moe": {**HEADED, "num_experts": 8, "moe_topk": 2},
    "hy_v3": {**HEADED, **OF_EIGHT, **SMALL_EXPERTS, **FIRST_DENSE, "num_shared_experts": 1},
    "hy_v4": {
        **COMMON, **LATENT_Q, **ROUTED, **IN_GROUPS, **FIRST_DENSE, **INDEXED, "hc_mult": 2,
        "indexer_types": ["full", "full", "shared"],
    },
    "jetmoe": {
        **SIZES, "intermediate_size": 96, "num_key_value_heads": 2, "kv_channels": 16, **OF_EIGHT_LOCAL,
    },
    "kolibri1": {**HEADED, **WINDOWED, **OF_EIGHT, **SMALL_EXPERTS, **SHARED_EXPERT},
    "laguna": {
        **HEADED, **WINDOWED, **OF_EIGHT, **SMALL_EXPERTS, **SHARED_EXPERT, **FIRST_DENSE,
        "num_attention_heads_per_layer": [4, 2, 4], "moe_routed_scaling_factor": 1.5,
    },
    "llama4_text": {
        **HEADED, **OF_EIGHT_LOCAL, "intermediate_size_mlp": 96, "intermediate_size": 48, "moe_layers": [1, 2],
        "attention_chunk_size": 16, "no_rope_layers": [1, 0, 1], "floor_scale": 16,
    },
    "longcat_flash": {
        "vocab_size": VOCAB, "hidden_size": 64, "num_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 32, "n_routed_experts": 8, "zero_expert_num": 4, "moe_topk": 3,
        "routed_scaling_factor": 1.5, "head_dim": 8, "max_position_embeddings": 128, **LATENT_Q, **NO_TOKENS,
    },
    "mellum": {**HEADED, **WINDOWED, "num_experts_per_tok": 2, "num_local_experts": 8, **SMALL_EXPERTS, **FIRST_DENSE},
    "mimo_v2_flash": {
        **GROUPED, **WINDOWED, **ROUTED, **IN_GROUPS, **FIRST_DENSE, "head_dim": 24, "v_head_dim": 16,
        "swa_num_key_value_heads": 4,
    },
    "minimax_m2": {**HEADED, **OF_EIGHT_LOCAL, "rotary_dim": 16},
    "minimax_m3_vl_text": {
        **HEADED, **OF_EIGHT_LOCAL, **FIRST_DENSE, "intermediate_size": 32, "dense_intermediate_size": 96,
        "shared_intermediate_size": 48, "rotary_dim": 16, "index_n_heads": 2, "index_head_dim": 16,
        "index_block_size": 4, "index_topk_blocks": 2,
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
    },
    "mixtral": {**GROUPED, **OF_EIGHT_LOCAL},
    "olmoe": {**GROUPED, **OF_EIGHT, "intermediate_size": 48},
    "phimoe": {**GROUPED, **OF_EIGHT_LOCAL, "lm_head_bias": True, "attention_bias": True},
    "qwen2_moe": {**GROUPED, **OF_EIGHT, **SMALL_EXPERTS, **SHARED_EXPERT, "mlp_only_layers": [0]},
    "qwen3_moe": {
        **HEADED, "num_experts_per_tok": 2, "num_local_experts": 8, **SMALL_EXPERTS, "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
    "solar_open": {**HEADED, **ROUTED, **IN_GROUPS},
}  # fmt: skip

HYBRIDS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {
        **COMMON, **LATENT, "num_key_value_heads": 4, **SMALL_EXPERTS, "num_local_experts": 8,
        "num_experts_per_tok": 2, "n_shared_experts": 1, **IN_GROUPS, "head_dim": 16, **LINEAR_FIRST,
        "first_k_dense_replace": 1, "num_mtp_layers": 0,
    },
    # It counts positions from 0 in each call: a decode step has to pass position_ids.
    "bamba": {**GROUPED, **MAMBA2, "attn_layer_indices": [1]},
    "falcon_h1": {**HEADED, **MAMBA2, "mamba_d_ssm": 128, "key_multiplier": 0.5, "ssm_in_multiplier": 1.5},
    "falcon_mamba": {**SIZES, "state_size": 8, "time_step_rank": 4},
    "granitemoehybrid": {
        **GROUPED, **OF_EIGHT_LOCAL, **GRANITE, **MAMBA2, **LINEAR_FIRST, "shared_intermediate_size": 48,
    },
    "inkling2_text": {
        **SIZES, **SMALL_EXPERTS, "num_experts_per_tok": 2, "n_routed_experts": 8, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
        "swa_head_dim": 16, "sliding_window_size": 8, "d_rel": 8, "rel_extent": 16,
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"], "unpadded_vocab_size": VOCAB,
        "n_layers_per_attn_res_block": 2,
    },
    "inkling_text": {
        "logits_mup_width_multiplier": 2.0,
        **COMMON, **ROUTED, **FIRST_DENSE, "num_key_value_heads": 2, "head_dim": 16, "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4, "swa_head_dim": 16, "sliding_window_size": 8, "d_rel": 8, "rel_extent": 16,
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
    },
    "jamba": {
        **GROUPED, **OF_EIGHT, "attn_layer_period": 3, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "kimi_linear": {
        **COMMON, **LATENT, "num_key_value_heads": 4, **SMALL_EXPERTS, "num_local_experts": 8,
        "num_experts_per_tok": 2, "n_shared_experts": 1, "linear_head_dim": 16, "linear_num_heads": 4,
        **LINEAR_FIRST, **FIRST_DENSE,
    },
    "lfm2": {**GROUPED, "layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 16},
    "lfm2_moe": {
        **GROUPED, **OF_EIGHT, **SMALL_EXPERTS, "layer_types": ["conv", "full_attention", "conv"],
        "num_dense_layers": 1,
    },
    "lfm3": {
        **HEADED, "num_hidden_layers": 4, "sliding_window": 8, "conv_L_cache": 4,
        "layer_types": ["conv", "sliding_attention", "conv", "full_attention"],
    },
    "mamba": {**SIZES, "state_size": 8, "time_step_rank": 4},
    "mamba2": {**SIZES, "state_size": 16, "num_heads": 4, "head_dim": 32, "n_groups": 2, "chunk_size": 16},
    "minimax": {
        **HEADED, **OF_EIGHT_LOCAL, "block_size": 16, "full_attn_alpha_factor": 1.5, "mlp_beta_factor": 0.5,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "nemotron_h": {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, **NO_TOKENS, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "ssm_state_size": 16, "mamba_num_heads": 4, "mamba_head_dim": 32,
        "n_groups": 2, "chunk_size": 16, **ROUTED, **IN_GROUPS, "moe_shared_expert_intermediate_size": 48,
        "max_position_embeddings": 128, "use_mamba_kernels": False,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
    },
    "olmo_hybrid": {**GROUPED, **DELTA, **LINEAR_FIRST, "linear_num_key_heads": 4},
    "qwen3_5_moe_text": {**HEADED, **OF_EIGHT, **SMALL_EXPERTS, **SHARED_EXPERT, **DELTA, **LINEAR_FIRST},
    "qwen3_5_text": {**HEADED, **DELTA, **LINEAR_FIRST},
    "qwen3_next": {
        **HEADED, **OF_EIGHT, **SMALL_EXPERTS, **SHARED_EXPERT, **DELTA, **LINEAR_FIRST, "mlp_only_layers": [0],
    },
    "qwen4_exp_text": {
        **HEADED, **OF_EIGHT, **SMALL_EXPERTS, **SHARED_EXPERT, **DELTA, "hc_count": 2, "hc_lowrank": 16,
        "layer_types": ["linear_attention", "indexed_attention", "linear_attention"], "indexer_n_heads": 2,
        "indexer_kv_heads": 1, "indexer_head_dim": 32, "indexer_budget": 8, "indexer_compress_ratio": 2,
        "ple_layer_ids": [1], "ngram_vocab_size_base": 100, "heads_per_ngram": 2, "split_ngram_parts": 1,
        "make_ngram_vocab_size_divisible_by": 8, "eos_token_id": 1,
    },
    # Its recurrent state lives in its modules, and its output has no cache: the caller has to pass one.
    "recurrent_gemma": {
        **GROUPED, "attention_window_size": 8, "block_types": ["recurrent", "recurrent", "attention"],
        "lru_width": 64,
    },
    "rwkv": {
        "vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 3, "context_length": 128, "rescale_every": 2,
        **NO_TOKENS,
    },
    "xlstm": {**SIZES, "hidden_size": 128, "num_heads": 4, "chunk_size": 16},
    "zamba": {
        **COMMON, "num_hidden_layers": 6, "num_key_value_heads": 4, "n_mamba_heads": 2, "mamba_d_state": 8,
        "mamba_dt_rank": 4, "use_mamba_kernels": False,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"] + ["linear_attention"] * 2,
    },
    # Its prefill clamps steps from below by time_step_min and its decode does not: with the default they differ by 1e-2.
    "zamba2": {
        **COMMON, "num_hidden_layers": 6, "num_key_value_heads": 4, "n_mamba_heads": 4, "mamba_d_state": 16,
        "mamba_ngroups": 2, "chunk_size": 16,
        "time_step_min": 1e-6, "num_mem_blocks": 2, "adapter_rank": 8, "use_mamba_kernels": False,
        "use_shared_attention_adapter": True, "use_mem_rope": True,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "zaya": {
        **SIZES, **SMALL_EXPERTS, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "num_experts": 8, "num_experts_per_tok": 1, "router_hidden_size": 16, "sliding_window": 8,
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
    },
}  # fmt: skip

CACHE_DIFFERS = {"openai-gpt": "it has no cache"}

_ENCODER = "an encoder, causal only where its config says is_decoder"
_ENCODER_DECODER = "the decoder half of an encoder-decoder"
_ASSISTANT = "a drafter that reads another model's hidden states"
REFUSED = {
    "blt": "over bytes, with a patcher and two local models",
    "cpmant": "its mask lets a token see what follows, and each step wants the whole text",
    "reformer": "hashed attention over chunks, drawn anew each forward",
    "xlm": "an encoder, causal only where its config says causal",
    "xlnet": "permuted attention, not causal",
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
        _ENCODER_DECODER,
    ),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), _ASSISTANT),
}  # fmt: skip

# Causal-LM types without a separate architecture: another type's config, or a text model within a multimodal one.
ALIASES = ("gpt-sw3",)
WRAPPERS = (
    "dots3_note", "emu3", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "git", "got_ocr2", "llama4",
    "mllama", "moshi", "moss_transcribe_diarize", "musicgen", "musicgen_melody", "phi4_multimodal", "qwen3_5",
    "qwen3_5_moe", "qwen4_exp",
)  # fmt: skip

CASES = {
    name: Case(name.split(":")[0], config, kind, CACHE_DIFFERS.get(name, ""))
    for kind, cases in (("dense", DENSE), ("experts", EXPERTS), ("hybrid", HYBRIDS))
    for name, config in cases.items()
}


def tiny_model(name: str, seed: int = 0) -> PreTrainedModel:
    """The case's model in float32 with eager attention, its weights large enough that every part matters."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(CASES[name].model_type, **CASES[name].config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.copy_(drawn(parameter_name, parameter))
        embeddings = model.get_input_embeddings().weight
        embeddings.mul_(EMBEDDING_SCALE / MATRIX_SCALE)
        _draw_buffers(model)
    model.tie_weights()
    return model


def drawn(name: str, start: torch.Tensor) -> torch.Tensor:
    """Draw vectors (norms, biases, decays) around their initial values, and matrices afresh."""
    noise = torch.randn_like(start)
    if start.dim() < 2 or name.endswith(KEPT_ABOUT_THEIR_START):
        return start + VECTOR_SPREAD * noise
    return MATRIX_SCALE * noise


def _draw_buffers(model: PreTrainedModel) -> None:
    """Draw learnt buffers, like a router's correction bias, and tables of experts by token; others are derived."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in model.state_dict().items():
        if name in parameters:
            continue
        if name.endswith(LEARNT_BUFFERS):
            tensor.add_(BUFFER_SPREAD * torch.randn_like(tensor))
        if name.endswith("tid2eid"):  # (vocabulary, experts of a token), distinct in a row
            experts = model.config.n_routed_experts
            tensor.copy_(torch.rand(len(tensor), experts).argsort(dim=1)[:, : tensor.shape[1]])


def write_folder(model: PreTrainedModel, path: Path, dtype: torch.dtype = torch.float32, shards: int = 1) -> Path:
    """Write the model as a checkpoint folder of at least `shards` weight files, under the published names.

    transformers reverts its loader's renaming and fusing, so experts are stored one by one where the hub's files do so.
    """
    stored = deepcopy(model).to(dtype)
    size_bytes = sum(tensor.nbytes for tensor in stored.state_dict().values())
    stored.save_pretrained(path, max_shard_size=size_bytes // shards if shards > 1 else 2 * size_bytes)
    return path
