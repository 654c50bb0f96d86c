"""Conversion mappings from GGUF tensors to the model, for architectures for which transformers has none.

They have the form of transformers' own (`integrations.gguf.gguf_conversion_mapping`) and use its operations. Each maps names
first, then undoes the changes that llama.cpp's converter made to the values.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.integrations.gguf.gguf_conversion_mapping import (
    DENSE_DECODER_RENAMINGS,
    GGUF_ARCHS,
    ConcatenateRows,
    LogNegate,
    PermuteRows,
    SubtractOne,
    Unsqueeze,
)

Mapping = list[WeightConverter | WeightRenaming]


def mapping_of(architecture: str, config: PreTrainedConfig) -> Mapping | None:
    """The mapping of a file's tensors; None: the weight map uses transformers' name table."""
    if architecture in GGUF_ARCHS:
        return [*GGUF_ARCHS[architecture](config), *_ALSO_IN_FILES]
    return _MAPPINGS[architecture](config) if architecture in _MAPPINGS else None


# Tensors that llama.cpp's converter may write and transformers' mappings lack.
_ALSO_IN_FILES = (WeightRenaming(r"\.ffn_gate_up_exps\.weight", ".mlp.experts.gate_up_proj"),)


class GroupedByKeyHead(ConversionOps):  # type: ignore[misc]  # transformers tells no types
    """Group the rows of queries, keys, values and gates by key head; files store them one after another for all heads.

    The inputs are two tensors, (heads x (2 key width + value width), ...) and (heads x value width, ...).
    """

    supports_packed = True

    def __init__(self, heads: int, key_width: int):
        self._heads, self._keys = heads, heads * key_width

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **_: Any
    ) -> dict[str, torch.Tensor]:
        """The rows of both tensors, head after head."""
        tensors = (input_dict[pattern] for pattern in source_patterns)
        joined, gates = (found[0] if isinstance(found, list) else found for found in tensors)
        queries, keys, values = joined.split([self._keys, self._keys, len(joined) - 2 * self._keys])
        parts = [part.reshape(self._heads, -1, *part.shape[1:]) for part in (queries, keys, values, gates)]
        return {target_patterns[0]: torch.cat(parts, 1).flatten(0, 1)}


class Flat(ConversionOps):  # type: ignore[misc]  # transformers tells no types
    """Flattens a vector that files store as a column, or in groups."""

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **_: Any
    ) -> dict[str, torch.Tensor]:
        """The same values in one dimension."""
        (found,) = input_dict.values()
        return {target_patterns[0]: (found[0] if isinstance(found, list) else found).flatten()}


def _converted(target: str, *operations: ConversionOps) -> WeightConverter:
    """These operations on a tensor that already has its new name."""
    return WeightConverter(target, target, operations=list(operations))


def _renamed(names: dict[str, str]) -> Mapping:
    return [WeightRenaming(stored, target) for stored, target in names.items()]


def _norms_less_one(**names: str) -> Mapping:
    """Norm weights minus one: the model adds one, files store the sum."""
    return [
        WeightConverter(rf"\.{stored}\.weight", f".{target}.weight", operations=[SubtractOne()])
        for stored, target in names.items()
    ]


def _of_experts(block: str, router: str = "gate") -> Mapping:
    """Stacked routed experts, with gate and up in two tensors or one."""
    return [
        WeightRenaming(r"\.ffn_gate_inp\.", f".{block}.{router}."),
        WeightRenaming(r"\.ffn_down_exps\.weight", f".{block}.experts.down_proj"),
        WeightRenaming(r"\.ffn_gate_up_exps\.weight", f".{block}.experts.gate_up_proj"),
        WeightConverter(
            [r"\.ffn_gate_exps\.weight", r"\.ffn_up_exps\.weight"],
            f".{block}.experts.gate_up_proj",
            operations=[ConcatenateRows(dim=1)],
        ),
    ]


def _of_mamba2(block: str) -> Mapping:
    """A Mamba-2 layer."""
    names = {r"\.ssm_(in|out)\.": rf".{block}.\1_proj.", r"\.ssm_(conv1d|norm)\.": rf".{block}.\1."}
    vectors = {r"\.ssm_dt\.bias": f".{block}.dt_bias", r"\.ssm_a$": f".{block}.A_log", r"\.ssm_d$": f".{block}.D"}
    return [
        *_renamed(names | vectors),
        _converted(f"{block}.A_log", LogNegate(), Flat()),
        _converted(f"{block}.D", Flat()),
        _converted(f"{block}.norm.weight", Flat()),
        _converted(f"{block}.conv1d.weight", Unsqueeze(1)),
    ]


def _qwen3next(config: Any) -> Mapping:
    """Qwen3-Next: like Qwen 3.5, but value heads are in the model's order, and its two matmuls yield four and two outputs."""
    renamed = {
        r"\.ssm_ba\.": ".linear_attn.in_proj_ba.",
        r"\.ssm_in\.": ".linear_attn.in_proj_qkvz.",  # older files store it as in the model
        r"\.ssm_conv1d\.": ".linear_attn.conv1d.",
        r"\.ssm_norm\.": ".linear_attn.norm.",
        r"\.ssm_out\.": ".linear_attn.out_proj.",
        r"\.ssm_a$": ".linear_attn.A_log",
        r"\.ssm_dt\.bias": ".linear_attn.dt_bias",
        r"\.ffn_gate_inp_shexp\.": ".mlp.shared_expert_gate.",
        r"\.ffn_gate_shexp\.": ".mlp.shared_expert.gate_proj.",
        r"\.ffn_up_shexp\.": ".mlp.shared_expert.up_proj.",
        r"\.ffn_down_shexp\.": ".mlp.shared_expert.down_proj.",
    }
    return [
        *DENSE_DECODER_RENAMINGS,
        *_renamed(renamed),
        *_of_experts("mlp"),
        WeightConverter(r"^output_norm\.weight", "model.norm.weight", operations=[SubtractOne()]),
        *_norms_less_one(
            attn_norm="input_layernorm",
            post_attention_norm="post_attention_layernorm",
            attn_q_norm="self_attn.q_norm",
            attn_k_norm="self_attn.k_norm",
        ),
        _converted("linear_attn.A_log", LogNegate()),
        _converted("linear_attn.conv1d.weight", Unsqueeze(1)),
        _converted("mlp.shared_expert_gate.weight", Unsqueeze(0, expected_ndim=2)),
        WeightConverter(
            [r"\.attn_qkv\.weight", r"\.attn_gate\.weight"],
            ".linear_attn.in_proj_qkvz.weight",
            operations=[GroupedByKeyHead(config.linear_num_key_heads, config.linear_key_head_dim)],
        ),
    ]


def _lfm2moe(config: Any) -> Mapping:
    """LFM2 with experts. Its router's bias affects only the choice of experts, not their weights."""
    return [
        *GGUF_ARCHS["lfm2"](config),
        WeightRenaming(r"\.exp_probs_b\.bias", ".feed_forward.expert_bias"),
        *_of_experts("feed_forward"),
    ]


def _nemotron_h(config: Any) -> Mapping:
    """Nemotron-H and Nemotron 3: every layer is one of Mamba-2, attention, an MLP or experts without gates."""
    names = {
        r"^token_embd\.": "model.embeddings.",
        r"^output_norm\.": "model.norm_f.",
        r"^output\.": "lm_head.",
        r"^blk\.": "model.layers.",
        r"\.attn_norm\.": ".norm.",
        r"\.attn_([qkv])\.": r".mixer.\1_proj.",
        r"\.attn_output\.": ".mixer.o_proj.",
        r"\.ffn_(up|down)\.": r".mixer.\1_proj.",
        r"\.ffn_(up|down)_exps\.weight": r".mixer.experts.\1_proj",
        r"\.ffn_(up|down)_shexp\.": r".mixer.shared_experts.\1_proj.",
        r"\.ffn_gate_inp\.": ".mixer.gate.",
        r"\.exp_probs_b\.bias": ".mixer.gate.e_score_correction_bias",
        r"\.ffn_latent_down\.": ".mixer.fc1_latent_proj.",
        r"\.ffn_latent_up\.": ".mixer.fc2_latent_proj.",
    }
    return [*_renamed(names), *_of_mamba2("mixer")]


def _granite(config: Any) -> Mapping:
    """Granite with experts and a shared MLP; hybrids have Mamba-2 layers. Queries and keys are permuted as llama's."""
    names = {
        r"^output_norm\.": "model.norm.",
        r"\.attn_norm\.": ".input_layernorm.",
        r"\.ffn_norm\.": ".post_attention_layernorm.",
        r"\.ffn_down_shexp\.": ".shared_mlp.output_linear.",
        r"\.ffn_down\.": ".shared_mlp.output_linear.",
    }
    shared = [
        WeightConverter(
            [rf"\.ffn_gate{kind}\.weight", rf"\.ffn_up{kind}\.weight"],
            ".shared_mlp.input_linear.weight",
            operations=[ConcatenateRows(dim=0)],
        )
        for kind in ("_shexp", "")
    ]
    mlp = (".mlp.gate_proj.", ".mlp.up_proj.", ".mlp.down_proj.")
    return [
        *(one for one in DENSE_DECODER_RENAMINGS if one.target_patterns[0] not in mlp),
        *_renamed(names),
        *_of_mamba2("mamba"),
        *_of_experts("block_sparse_moe", "router"),
        *shared,
        _converted("self_attn.q_proj.weight", PermuteRows(_by_halves(config, config.num_attention_heads))),
        _converted("self_attn.k_proj.weight", PermuteRows(_by_halves(config, config.num_key_value_heads))),
    ]


def _by_halves(config: Any, heads: int) -> torch.Tensor:
    """The row order that puts each head's halves one after another; in files their rows alternate."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return torch.arange(heads * width, device="cpu").view(heads, -1, 2).swapaxes(1, 2).flatten()


_MAPPINGS: dict[str, Callable[[Any], Mapping]] = {
    "granitehybrid": _granite,
    "granitemoe": _granite,
    "lfm2moe": _lfm2moe,
    "nemotron_h": _nemotron_h,
    "nemotron_h_moe": _nemotron_h,
    "qwen3next": _qwen3next,
}
