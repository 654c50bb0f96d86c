"""What tensors of GGUF files become in the model, for architectures that transformers has no mapping of.

Written as transformers writes its own (`integrations.gguf.gguf_conversion_mapping`), with its operations: names first, then what
llama.cpp's converter has done to the values, undone.
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
    SubtractOne,
    Unsqueeze,
)

Mapping = list[WeightConverter | WeightRenaming]


def mapping_of(architecture: str, config: PreTrainedConfig) -> Mapping | None:
    """The mapping of a file's tensors; None: names alone are enough."""
    if architecture in GGUF_ARCHS:
        return [*GGUF_ARCHS[architecture](config), *_ALSO_IN_FILES]
    return _MAPPINGS[architecture](config) if architecture in _MAPPINGS else None


# What llama.cpp's converter may write, and transformers' mappings of its files do not know.
_ALSO_IN_FILES = (WeightRenaming(r"\.ffn_gate_up_exps\.weight", ".mlp.experts.gate_up_proj"),)


class GroupedByKeyHead(ConversionOps):  # type: ignore[misc]  # transformers tells no types
    """Queries, keys, values and gates of all heads one after another become those of each key head together.

    Rows of two tensors, (heads x (2 key width + value width), ...) and (heads x value width, ...).
    """

    supports_packed = True

    def __init__(self, heads: int, key_width: int):
        self._heads, self._keys = heads, heads * key_width

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **_: Any
    ) -> dict[str, torch.Tensor]:
        """The rows of both, head after head."""
        tensors = (input_dict[pattern] for pattern in source_patterns)
        joined, gates = (found[0] if isinstance(found, list) else found for found in tensors)
        queries, keys, values = joined.split([self._keys, self._keys, len(joined) - 2 * self._keys])
        parts = [part.reshape(self._heads, -1, *part.shape[1:]) for part in (queries, keys, values, gates)]
        return {target_patterns[0]: torch.cat(parts, 1).flatten(0, 1)}


def _norms_less_one(**names: str) -> Mapping:
    """Norms around one, which files hold whole."""
    return [
        WeightConverter(rf"\.{stored}\.weight", f".{target}.weight", operations=[SubtractOne()])
        for stored, target in names.items()
    ]


def _of_experts(block: str) -> Mapping:
    """Stacks of routed experts, gates and ups apart or in one."""
    return [
        WeightRenaming(r"\.ffn_gate_inp\.", f".{block}.gate."),
        WeightRenaming(r"\.ffn_down_exps\.weight", f".{block}.experts.down_proj"),
        WeightRenaming(r"\.ffn_gate_up_exps\.weight", f".{block}.experts.gate_up_proj"),
        WeightConverter(
            [r"\.ffn_gate_exps\.weight", r"\.ffn_up_exps\.weight"],
            f".{block}.experts.gate_up_proj",
            operations=[ConcatenateRows(dim=1)],
        ),
    ]


def _qwen3next(config: Any) -> Mapping:
    """Qwen3-Next: as Qwen 3.5, but value heads lie as in the model, and its two products make four and two things each."""
    renamed = {
        r"\.ssm_ba\.": ".linear_attn.in_proj_ba.",
        r"\.ssm_in\.": ".linear_attn.in_proj_qkvz.",  # older files hold it as the model does
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
        *(WeightRenaming(stored, target) for stored, target in renamed.items()),
        *_of_experts("mlp"),
        WeightConverter(r"^output_norm\.weight", "model.norm.weight", operations=[SubtractOne()]),
        *_norms_less_one(
            attn_norm="input_layernorm",
            post_attention_norm="post_attention_layernorm",
            attn_q_norm="self_attn.q_norm",
            attn_k_norm="self_attn.k_norm",
        ),
        WeightConverter("linear_attn.A_log", "linear_attn.A_log", operations=[LogNegate()]),
        WeightConverter("linear_attn.conv1d.weight", "linear_attn.conv1d.weight", operations=[Unsqueeze(1)]),
        WeightConverter(
            "mlp.shared_expert_gate.weight",
            "mlp.shared_expert_gate.weight",
            operations=[Unsqueeze(0, expected_ndim=2)],
        ),
        WeightConverter(
            [r"\.attn_qkv\.weight", r"\.attn_gate\.weight"],
            ".linear_attn.in_proj_qkvz.weight",
            operations=[GroupedByKeyHead(config.linear_num_key_heads, config.linear_key_head_dim)],
        ),
    ]


def _lfm2moe(config: Any) -> Mapping:
    """LFM2 with experts, whose router has a bias that only chooses."""
    return [
        *GGUF_ARCHS["lfm2"](config),
        WeightRenaming(r"\.exp_probs_b\.bias", ".feed_forward.expert_bias"),
        *_of_experts("feed_forward"),
    ]


_MAPPINGS: dict[str, Callable[[Any], Mapping]] = {"lfm2moe": _lfm2moe, "qwen3next": _qwen3next}
