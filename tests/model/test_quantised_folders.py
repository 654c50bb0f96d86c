"""Quantised folders end to end, against the transformers model filled with a plain dequantisation of the same weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from headrace.kernels import Kernels, ReferenceKernels
from support.comparison import divergence, same_argmax
from support.engines import TOKENS, streamed
from support.zoo.folders import GROUPED, SMALL_EXPERTS, tiny_model, write_folder
from support.zoo.packers import LAYOUTS, Layout, mxfp4

pytestmark = pytest.mark.zoo

# Groups of 128 divide all widths; blocks of 128 x 128 do not, since keys and values have 64 outputs.
WIDE = {**GROUPED, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2, "head_dim": 32}
CONFIGS = {
    "llama": WIDE,
    "qwen3_moe": {
        **WIDE, **SMALL_EXPERTS, "moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2,
    },
}  # fmt: skip


def random_model(model_type: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **CONFIGS[model_type])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.3 * noise if parameter.dim() == 1 else 0.1 * noise)
    return model


def write_quantised(model: PreTrainedModel, folder: Path, layout: Layout) -> torch.Tensor:
    """Write the folder with every projection quantised. Returns transformers' logits with the dequantised weights."""
    folder = write_folder(model, folder)
    stored, plain = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            parts, plain[name] = layout.pack(tensor)
            stored |= {name.removesuffix("weight") + part: value.contiguous() for part, value in parts.items()}
        else:
            stored[name] = plain[name] = tensor
    expected = _logits_with(folder, plain)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    _configure(folder, layout.config)
    return expected


def _logits_with(folder: Path, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        return oracle(TOKENS).logits[0]


def _configure(folder: Path, quantisation: dict[str, object]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantisation}))


def rows_of(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    parts = torch.nn.functional.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="none")
    return parts.sum(-1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model_type", CONFIGS)
def test_quantised_folders_equal_their_plain_dequantisation(model_type: str, layout: str, tmp_path: Path) -> None:
    expected = write_quantised(random_model(model_type), tmp_path / "model", LAYOUTS[layout])

    # fp32 on the decoded blocks. Only FP8 and act-order weights and minima are rounded, once, to fp16.
    reference, _ = streamed(tmp_path / "model", ReferenceKernels(1), parts=(38, 1, 1))
    assert divergence(reference, expected) < 1e-4
    assert same_argmax(reference, expected, 0.01)

    # The fast kernels round activations before each matmul to 8 bits per block of 32, 2^-8 of the largest. In a MoE, a row
    # near a routing tie may then use another expert, so there only most rows must agree.
    fast, _ = streamed(tmp_path / "model", Kernels(1))
    rows = rows_of(fast, expected)
    assert float(rows.max() if model_type == "llama" else rows.median()) < 1e-2
    assert (fast.argmax(-1) == expected.argmax(-1)).float().mean() > 0.9


def test_gpt_oss_with_mxfp4_experts_equals_transformers(tmp_path: Path) -> None:
    model = tiny_model("gpt_oss")
    with torch.no_grad():
        quantised = {}
        for name, parameter in model.named_parameters():
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):  # (experts, inputs, outputs)
                blocks, scales, values = mxfp4(parameter.transpose(1, 2))
                parameter.copy_(values.transpose(1, 2))
                quantised |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        expected = model(TOKENS).logits[0]
    folder = write_folder(model, tmp_path / "model")
    kept = load_file(folder / "model.safetensors")
    kept = {n: t for n, t in kept.items() if not n.endswith(("experts.gate_up_proj", "experts.down_proj"))}
    save_file(kept | quantised, folder / "model.safetensors", {"format": "pt"})
    _configure(folder, {"quant_method": "mxfp4", "modules_to_not_convert": []})

    reference, _ = streamed(folder, ReferenceKernels(1), parts=(38, 1, 1))
    assert divergence(reference, expected) < 1e-4  # nothing is rounded
    fast, _ = streamed(folder, Kernels(1))
    assert float(rows_of(fast, expected).median()) < 1e-2  # activations are, to 8 bits


@pytest.mark.parametrize("layout", ["gptq", "transposed"])
def test_streamed_equals_resident_bit_for_bit(layout: str, tmp_path: Path) -> None:
    if layout == "gptq":
        write_quantised(random_model("llama"), tmp_path / "model", LAYOUTS["gptq"])
    else:
        write_folder(tiny_model("gpt2"), tmp_path / "model")
    # Decode and draft rows: up to 16 at a time. In prefill, torch's order of sums depends on where weights are split.
    parts = (8, 1, 1, 5, 16, 1, 8)
    resident, _ = streamed(tmp_path / "model", Kernels(1), share=1.0, parts=parts)
    mixed, _ = streamed(tmp_path / "model", Kernels(1), share=0.3, parts=parts)
    assert torch.equal(mixed, resident)
