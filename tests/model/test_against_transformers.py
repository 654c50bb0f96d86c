"""Every architecture against two oracles: the transformers model that the file was written from, and transformers' loader."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from headrace.checkpoint import open_checkpoint
from headrace.errors import UnsupportedError
from headrace.kernels import Kernels
from headrace.plan.shape import shape_of
from support import engines
from support.comparison import divergence, same_argmax
from support.engines import TOKENS, build_engine
from support.zoo.gguf_files import FAMILIES, random_model, rounded_to, write_gguf

pytestmark = pytest.mark.zoo

TIE = 0.02  # of logits, within the rounding of fp16 keys


def logits_of(path: Path, parts: tuple[int, ...], share: float = 0.5) -> torch.Tensor:
    """Logits of every row of TOKENS.

    Prefill runs in fp32: in bf16, errors do not average out over rows of 64 random values (tests/test_real.py has both).
    """
    with build_engine(path, Kernels(2, bf16_prefill=False), share=share) as engine:
        # With experts, keys and values stay in fp32: a row routed to another expert is far off.
        return engines.logits_of(engine, parts, kv_bits=32 if engine.experts is not None else 16)[0]


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_logits_equal_those_of_the_model_the_file_was_written_from(architecture: str, tmp_path: Path) -> None:
    model = random_model(architecture)
    path = write_gguf(model, architecture, tmp_path / "tiny.gguf")
    with torch.inference_mode():
        expected = model(TOKENS).logits[0]
    # Prefill, then decoding row by row: both paths of attention and kernels. Both pass the sliding window.
    ours = logits_of(path, (30, 1, 1, 5, 1, 1, 1))

    # fp16 keys and values are the only rounding: about 1e-3 of a logit.
    assert divergence(ours, expected) < 1e-3
    assert same_argmax(ours, expected, TIE)


def test_phi_moe_with_longrope_factors_equals_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short, long = [1.0 + i / 8 for i in range(8)], [4.0] * 8
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": short, "long_factor": long, "short_mscale": 1.2,
        "long_mscale": 1.2, "original_max_position_embeddings": 64,
    }  # fmt: skip
    family = FAMILIES["phimoe"]
    config = {**family.config, "rope_parameters": rope, "max_position_embeddings": 256}
    monkeypatch.setitem(FAMILIES, "phimoe", replace(family, config=config))
    model = random_model("phimoe")
    factors = {
        f"rope_factors_{name}.weight": np.array(of, np.float32) for name, of in (("short", short), ("long", long))
    }
    extra = {"rope.scaling.attn_factor": 1.2, "rope.scaling.original_context_length": 64}
    path = write_gguf(model, "phimoe", tmp_path / "tiny.gguf", extra=extra, more=factors)
    with torch.inference_mode():
        expected = model(TOKENS).logits[0]
    assert divergence(logits_of(path, (30, 10)), expected) < 1e-3


def test_mistral3_without_yarn_is_mistral(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistral Small 3.1 has the same architecture name as Ministral, without YaRN."""
    plain = replace(FAMILIES["mistral"], written_as="mistral3")
    monkeypatch.setitem(FAMILIES, "mistral", plain)
    model = random_model("mistral")
    path = write_gguf(model, "mistral", tmp_path / "tiny.gguf")
    with torch.inference_mode():
        expected = model(TOKENS).logits[0]
    assert divergence(logits_of(path, (30, 10)), expected) < 1e-3


@pytest.mark.parametrize(
    ("architecture", "extra", "words"),
    [
        ("glm4", {"rope.dimension_sections": [8, 4, 4, 0]}, "several axes"),
        ("granitehybrid", {"rope.scaling.finetuned": True}, "with RoPE"),
        ("dots1", {"expert_gating_func": 1}, "another gating function"),
        ("afmoe", {"expert_weights_norm": False}, "add up to one"),
    ],
)
def test_files_with_unsupported_metadata_are_refused(
    architecture: str, extra: dict[str, object], words: str, tmp_path: Path
) -> None:
    path = write_gguf(random_model(architecture), architecture, tmp_path / "tiny.gguf", extra=extra)
    with pytest.raises(UnsupportedError, match=words) as refusal:
        logits_of(path, (30, 10))
    assert refusal.value.hint


def test_qwen3_next_from_an_older_converter_equals_transformers(tmp_path: Path) -> None:
    """These files store the joint q, k, v and gate projection as in the model, and the experts' gate and up in one tensor."""
    model = random_model("qwen3next")
    names = ("attn_qkv", "attn_gate", "ffn_gate_exps", "ffn_up_exps")
    older: dict[str, np.ndarray] = {}
    for layer in range(4):
        state = model.model.layers[layer].state_dict()
        if "linear_attn.in_proj_qkvz.weight" in state:
            older[f"blk.{layer}.ssm_in.weight"] = state["linear_attn.in_proj_qkvz.weight"].numpy()
        older[f"blk.{layer}.ffn_gate_up_exps.weight"] = state["mlp.experts.gate_up_proj"].numpy()
    path = write_gguf(model, "qwen3next", tmp_path / "tiny.gguf", more=older, without=names)
    with torch.inference_mode():
        expected = model(TOKENS).logits[0]
    assert divergence(logits_of(path, (30, 10)), expected) < 1e-3


def test_a_multi_token_prediction_block_is_neither_planned_nor_read(tmp_path: Path) -> None:
    """Files store it as one more layer, which `block_count` includes."""
    model = random_model("qwen35")
    block = {
        "blk.4.nextn.eh_proj.weight": np.ones((64, 128), np.float32),
        "blk.4.attn_q.weight": np.ones((256, 64), np.float32),
    }
    plain = write_gguf(model, "qwen35", tmp_path / "plain.gguf")
    path = write_gguf(
        model, "qwen35", tmp_path / "mtp.gguf", extra={"block_count": 5, "nextn_predict_layers": 1}, more=block
    )
    with torch.inference_mode():
        expected = model(TOKENS).logits[0]

    assert divergence(logits_of(path, (30, 10)), expected) < 1e-3
    assert shape_of(open_checkpoint(path)).weights_bytes == shape_of(open_checkpoint(plain)).weights_bytes


def test_only_attention_layers_are_planned_with_a_kv_cache(tmp_path: Path) -> None:
    shape = shape_of(open_checkpoint(write_gguf(random_model("qwen35"), "qwen35", tmp_path / "tiny.gguf")))
    states = 3 * 192 * 16 * 2 * 4  # three layers, values x keys, fp32, and a copy
    assert shape.kv_bytes(100, 16) == 100 * 2 * (32 + 32) * 2 * 4 + states
    lfm2 = shape_of(open_checkpoint(write_gguf(random_model("lfm2"), "lfm2", tmp_path / "conv.gguf")))
    assert lfm2.kv_bytes(100, 16) == 100 * 2 * (16 + 16) * 2 * 4


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1", "MXFP4"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_quantised_logits_equal_transformers_own_loader(architecture: str, kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = write_gguf(random_model(architecture), architecture, tmp_path / "tiny.gguf", kind)
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = oracle(TOKENS).logits[0]
    ours = logits_of(path, (30, 10))

    # Beside quantised weights, activations are quantised to 8 bits per block, as in ggml. These random logits have a
    # standard deviation of several units; trained ones stay within 1e-3 (tests/test_real.py).
    assert divergence(ours, expected) < 2e-2
    assert (ours.argmax(-1) == expected.argmax(-1)).float().mean() > 0.9


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("mixtral", "Q8_0"),
        ("qwen2moe", "Q8_0"),
        ("qwen3moe", "Q8_0"),
        ("minimax-m2", "Q8_0"),
        ("qwen35moe", "Q8_0"),
        ("gpt-oss", "MXFP4"),
        ("gemma4-26b", "Q8_0"),
        ("glm4moe", "Q8_0"),
    ],
)
def test_quantised_experts_equal_the_model_with_dequantised_weights(
    architecture: str, kind: str, tmp_path: Path
) -> None:
    model = random_model(architecture)
    path = write_gguf(model, architecture, tmp_path / "tiny.gguf", kind)
    _round_matrices(model, architecture, kind)
    with torch.inference_mode():
        expected = model(TOKENS).logits[0]
    ours = logits_of(path, (30, 1, 1, 5, 1, 1, 1))

    # Activations are rounded to 8 bits per block, as in ggml. With random experts a row may then be routed to another one,
    # which no tolerance covers; so only most rows must agree.
    rows = torch.nn.functional.kl_div(ours.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="none")
    assert float(rows.sum(-1).median()) < 1e-2
    assert (ours.argmax(-1) == expected.argmax(-1)).float().mean() > 0.8


@torch.no_grad()
def _round_matrices(model: torch.nn.Module, architecture: str, kind: str) -> None:
    """Round weights as in the file, along the reduction dimension, which in gpt-oss's experts is the other one."""
    for name, parameter in model.named_parameters():
        kept = ("gate.weight", "router.weight", "router.proj.weight", "_bias", "conv1d.weight")
        if parameter.dim() < 2 or name.endswith(kept):
            continue
        is_transposed = architecture == "gpt-oss" and ".experts." in name
        value = parameter.transpose(1, 2) if is_transposed else parameter
        rounded = torch.from_numpy(rounded_to(value.numpy(), kind)).view(value.shape)
        parameter.copy_(rounded.transpose(1, 2) if is_transposed else rounded)
