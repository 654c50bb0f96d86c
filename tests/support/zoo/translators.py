"""Tiny random encoder-decoder models, with a unigram vocabulary: as transformers models, as folders and as GGUF files.

The GGUF writer does the same as llama.cpp's converter. Names come from the `gguf` package's tensor map, and there is one
table of embeddings. Blanks of the vocabulary are `[PADn]`. It writes the unused bias of cross attention in the first T5s.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel, T5Tokenizer

from support.zoo.folders import drawn, write_folder
from support.zoo.gguf_files import VOCAB

WORDS = ("▁translate", "▁English", "▁to", "▁German", "▁the", "▁house", "ing", "er", "▁is")
BLANKS = 100
# Odd on purpose: encoder and decoder differ in depth, heads sum to more than the width, prompts exceed the buckets.
T5 = {
    "vocab_size": VOCAB, "d_model": 64, "d_kv": 24, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "decoder_start_token_id": 0,
}  # fmt: skip
BART = {
    "vocab_size": VOCAB, "d_model": 64, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 80, "max_position_embeddings": 64,
    "decoder_start_token_id": 2, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
SMALL = {key: value for key, value in BART.items() if key != "vocab_size"}
SWITCH = {
    **T5, "num_experts": 8, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_layers": 4,
    "num_decoder_layers": 4,
}  # fmt: skip
SPECIAL = {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
GEMMA = {
    **SPECIAL, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "sliding_window": 8,
    "query_pre_attn_scalar": 16,
}  # fmt: skip
BERT = {
    "model_type": "bert", "vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 96, "max_position_embeddings": 64,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "t5": T5,
    "t5:gated": {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "umt5": T5,
    "mt5": {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "longt5": {**T5, "local_radius": 7},
    "bart": BART,
    "bart:forced": {**BART, "forced_bos_token_id": 5},
    "mbart": BART,
    "pegasus": BART,
    "pegasus_x": BART,
    "marian": BART,
    "m2m_100": BART,
    "blenderbot": BART,
    "blenderbot-small": BART,
    "mvp": BART,
    "bigbird_pegasus": {**BART, "attention_type": "original_full"},
    "bigbird_pegasus:blocks": BART,  # block-sparse attention, which is for longer texts
    "led": {**BART, "attention_window": 8, "max_encoder_position_embeddings": 64},
    "switch_transformers": SWITCH,
    "switch_transformers:full": {**SWITCH, "num_experts": 2, "expert_capacity": 15},  # enough for most of the text
    "t5gemma": {"encoder": GEMMA, "decoder": {**GEMMA, "num_hidden_layers": 3}, **SPECIAL},
    "plbart": BART,
    "encoder-decoder": {
        "encoder": BERT,
        "decoder": {**BERT, "is_decoder": True, "add_cross_attention": True},
        "decoder_start_token_id": 2,
        "pad_token_id": 0,
        "eos_token_id": 1,
    },
}
# Other encoder-decoder models of transformers, and the reasons why they do not run.
REFUSED = {
    "fsmt": ({**SMALL, "langs": ["en", "de"], "src_vocab_size": VOCAB, "tgt_vocab_size": VOCAB}, "two languages"),
    "nllb-moe": ({**BART, "num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2}, "first two experts"),
    "prophetnet": (
        {
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "num_encoder_layers": 2,
            "num_decoder_layers": 3,
            "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 80,
            "max_position_embeddings": 64,
            "decoder_start_token_id": 2,
            "pad_token_id": 0,
            "eos_token_id": 1,
        },
        "more tokens follow",
    ),
    "seamless_m4t": ({**SMALL, "vocab_size": VOCAB, "hidden_size": 64}, "speech"),
}
UNTIED = ("t5:gated", "mt5")
# GGUF files: t5 with the bucket distance that no metadata carries.
FILES = {
    "t5": {**T5, "relative_attention_max_distance": 128},
    "t5:gated": {**CASES["t5:gated"], "relative_attention_max_distance": 128},
    "umt5": {**T5, "relative_attention_max_distance": 128, "feed_forward_proj": "gated-gelu"},
}


def translator(name: str, values: dict[str, Any]) -> PreTrainedModel:
    """The model in float32 with eager attention, its weights large enough that every part matters."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.partition(":")[0], **values)
    model = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.requires_grad:  # sinusoidal position embeddings are not learnt
                parameter.copy_(drawn(parameter_name, parameter))
    model.tie_weights()
    if name in UNTIED:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.15)
    return model


def vocabulary() -> list[tuple[str, float]]:
    """Tokens with their scores: controls, letters, words, fillers, and blanks, in T5's order."""
    tokens = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    tokens += [(chr(letter), -6.0) for letter in range(33, 127)] + [(word, -3.0) for word in WORDS]
    tokens += [(f"▁filler{number}", -9.0) for number in range(VOCAB - BLANKS - len(tokens))]
    return tokens + [(f"<extra_id_{number}>", -20.0) for number in reversed(range(BLANKS))]


def write_translator(model: PreTrainedModel, folder: Path) -> Path:
    """Write a folder with weights and a tokenizer."""
    write_folder(model, folder)
    T5Tokenizer(vocab=vocabulary()).save_pretrained(folder)
    return folder


def write_gguf(
    model: PreTrainedModel, path: Path, kind: str = "F32", unknown: int = 2, charsmap: bytes | None = None
) -> Path:
    """Write a T5 or UMT5 model as GGUF. `kind` is the format of the matrices, `charsmap` SentencePiece's normalisation."""
    config = model.config
    writer = gguf.GGUFWriter(path, "t5")
    writer.add_context_length(512)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_block_count(config.num_layers)
    writer.add_decoder_block_count(config.num_decoder_layers)
    writer.add_head_count(config.num_heads)
    writer.add_key_length(config.d_kv)
    writer.add_value_length(config.d_kv)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_relative_attn_buckets_count(config.relative_attention_num_buckets)
    writer.add_decoder_start_token_id(config.decoder_start_token_id)
    _add_vocabulary(writer, unknown, charsmap)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5, max(config.num_layers, config.num_decoder_layers))
    held = {key: value for key, value in model.state_dict().items() if "embed_tokens" not in key}
    if not torch.equal(held["lm_head.weight"], held["shared.weight"]):
        held["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.randn(
            8, config.num_heads
        )
    else:
        del held["lm_head.weight"]
    for key, value in held.items():
        stored = "F32" if value.dim() < 2 or value.shape[1] % 32 else kind
        number = gguf.GGMLQuantizationType[stored]
        data = gguf.quantize(np.ascontiguousarray(value.numpy()), number)
        writer.add_tensor(f"{names.get_name(key.removesuffix('.weight'))}.weight", data, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_vocabulary(writer: gguf.GGUFWriter, unknown: int, charsmap: bytes | None) -> None:
    tokens = vocabulary()
    first = len(tokens) - BLANKS
    writer.add_tokenizer_model("t5")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([token if i < first else f"[PAD{i}]" for i, (token, _) in enumerate(tokens)])
    writer.add_token_scores([score if i < first else -10000.0 for i, (_, score) in enumerate(tokens)])
    writer.add_token_types([3, 3, 2] + [1] * (first - 3) + [5] * BLANKS)
    writer.add_add_space_prefix(True)
    writer.add_remove_extra_whitespaces(True)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(unknown)
    if charsmap is not None:
        writer.add_precompiled_charsmap(charsmap)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(True)
