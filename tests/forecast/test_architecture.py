"""The sizes of models: from the table, a file, a folder, a number of parameters."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from headrace.checkpoint import open_checkpoint
from headrace.errors import CheckpointError, UsageError
from headrace.forecast.architecture import (
    Architecture,
    of_config,
    of_params,
    published,
    table,
)
from headrace.plan.checkpoint_architecture import architecture_of

MODELS = sorted(table("models"))
CONFIG = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "intermediate_size": 14336,
}


def config(folder: Path, **other: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(CONFIG | other))
    return path


# The table


@pytest.mark.parametrize("name", MODELS)
def test_a_published_model_makes_sense(name: str) -> None:
    model = published(name)

    assert model.source
    assert 0 < model.computed_params <= model.params
    assert 0 < model.dense_params <= model.params
    assert model.read_bytes(16) <= model.all_bytes(16) * (1 + 1e-9)
    assert model.kv_bytes(1000) > 0
    assert model.heads % model.kv_heads == 0
    if model.is_moe:
        assert model.active_params is None or model.active_params < model.params
        assert 0 <= model.dense_layers < model.layers
        assert model.read_bytes(16, model.experts) == pytest.approx(
            model.all_bytes(16) - (0 if model.tied else 2 * model.vocab * model.hidden)
        )


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("gpt-2", 124_439_808),
        ("gpt-3", 174.6e9),
        ("llama-3-8b", 8.03e9),
        ("mixtral-8x7b", 46.7e9),
        ("deepseek-v3", 671e9),
    ],
)
def test_a_known_model_has_its_known_number_of_parameters(name: str, params: float) -> None:
    assert published(name).params == pytest.approx(params, rel=0.001)


def test_a_token_of_gpt_3_takes_4_72_megabytes_of_kv_cache() -> None:
    gpt3 = published("gpt-3")
    assert gpt3.kv_bytes(1) == 4_718_592
    assert gpt3.kv_bytes(2048) == 2048 * 4_718_592
    assert gpt3.kv_bytes(1, bits=8) == 4_718_592 / 2


def test_a_row_of_an_moe_reads_the_active_parameters() -> None:
    model = published("mixtral-8x7b")
    assert model.active_params is not None
    active = 2 * (model.active_params - model.vocab * model.hidden)  # the table is looked up

    assert model.read_bytes(16) == pytest.approx(active)
    assert model.read_bytes(16, 2) == pytest.approx(active)
    assert model.read_bytes(16, 8) == pytest.approx(2 * (model.params - model.vocab * model.hidden))
    assert model.read_bytes(4) == pytest.approx(active / 4)


def test_expert_params_from_active_params_equal_those_from_the_widths() -> None:
    model = published("mixtral-8x7b")
    assert replace(model, active_params=None).expert_params == pytest.approx(model.expert_params, rel=0.005)


def test_a_sliding_window_cache_holds_no_more_than_its_tokens() -> None:
    model = published("gemma-3-27b")
    assert (model.window, model.window_layers) == (1024, 52)
    each = 2 * 2 * model.kv_heads * model.head_dim

    assert model.kv_bytes(1000) == model.layers * each * 1000
    assert model.kv_bytes(10_000) == each * (52 * 1024 + 10 * 10_000)
    assert replace(model, window_layers=0).kv_bytes(10_000) > 4 * model.kv_bytes(10_000)


def test_the_kv_cache_of_a_hybrid_counts_only_its_attention_layers() -> None:
    model = published("qwen3-next-80b-a3b")
    assert model.kv_layers is not None
    assert model.kv_bytes(100) == replace(model, kv_layers=None).kv_bytes(100) * model.kv_layers / model.layers


def test_the_mla_cache_holds_latents_instead_of_k_and_v() -> None:
    model = published("deepseek-v3")
    assert model.kv_dim_per_layer is not None
    assert model.kv_bytes(1) == 2 * model.layers * model.kv_dim_per_layer


def test_flop_is_two_per_parameter_and_grows_with_the_context() -> None:
    gpt3 = published("gpt-3")
    assert gpt3.flop() == 2 * gpt3.params  # its head is tied to its table, and is multiplied
    assert gpt3.flop(2048) - gpt3.flop() == 4 * 96 * 12288 * 2048


@pytest.mark.parametrize("spelling", ["llama-3-8b", "Llama 3 8B", "LLAMA_3_8b"])
def test_a_name_may_be_spelled_with_blanks_and_capitals(spelling: str) -> None:
    assert published(spelling) == published("llama-3-8b")


def test_an_unknown_name_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="lama-3-8b") as caught:
        published("lama-3-8b")
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("did you mean")
    assert "llama-3-8b" in caught.value.hint


@pytest.mark.parametrize(
    "wrong",
    [{"layers": 0}, {"params": -1.0}, {"experts": 8}, {"experts_per_token": 2}, {"experts": 8, "experts_per_token": 9}],
)
def test_sizes_that_make_no_sense_are_an_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        replace(published("llama-3-8b"), **wrong)


# A number of parameters


@pytest.mark.parametrize("params", [1e6, 1e8, 7e9, 175e9, 1e13])
def test_an_estimated_shape_has_about_as_many_parameters(params: float) -> None:
    model = of_params(params)

    assert model.params == params
    assert 12 * model.layers * model.hidden**2 == pytest.approx(params, rel=0.6 if params < 1e8 else 0.15)
    assert model.heads * model.head_dim == model.hidden
    assert "estimated" in model.source


def test_the_estimate_for_175_billion_is_about_the_shape_of_gpt_3() -> None:
    estimate, real = of_params(175e9), published("gpt-3")
    assert estimate.layers == pytest.approx(real.layers, rel=0.05)
    assert estimate.hidden == pytest.approx(real.hidden, rel=0.05)


@pytest.mark.parametrize("params", [175.0, 0.0, -1e9, -math.inf])
def test_a_number_of_parameters_without_its_unit_is_an_error(params: float) -> None:
    with pytest.raises(UsageError, match="no language model") as caught:
        of_params(params)
    assert "175e9" in str(caught.value.hint)


@pytest.mark.parametrize("params", [math.nan, math.inf])
def test_parameters_that_are_no_number_are_an_error(params: float) -> None:
    with pytest.raises(UsageError):
        of_params(params)


# A file


def test_the_header_of_a_file_gives_its_sizes(tiny_llama: Path) -> None:
    checkpoint = open_checkpoint(tiny_llama)
    model = architecture_of(checkpoint)
    read = [t for name, t in checkpoint.tensors.items() if len(t.shape) == 2 and name != "token_embd.weight"]

    assert (model.layers, model.hidden, model.heads, model.kv_heads, model.head_dim) == (3, 64, 4, 2, 16)
    assert (model.vocab, model.feed_forward, model.tied) == (320, 96, False)
    per_layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96
    assert model.params == 3 * per_layer + 2 * 320 * 64
    assert model.weights_bytes == sum(t.nbytes for t in read)
    assert model.bits == 8.5  # 32 bytes and a scale of 2 for 32 weights
    assert model.source == "the file's header"


def test_a_file_is_read_in_its_own_bytes_and_other_bits_are_computed(tiny_llama: Path) -> None:
    model = architecture_of(open_checkpoint(tiny_llama))
    assert model.bits is not None

    assert model.read_bytes(model.bits) == model.weights_bytes
    assert model.read_bytes(4) == pytest.approx((model.params - 320 * 64) / 2)


# A folder


def test_a_config_gives_the_parameters_of_its_widths(tmp_path: Path) -> None:
    model = of_config(config(tmp_path, max_position_embeddings=8192))
    real = published("llama-3-8b")

    assert model.params == pytest.approx(real.params, rel=0.001)
    assert (model.layers, model.kv_heads, model.head_dim, model.context) == (32, 8, 128, 8192)
    assert model.kv_bytes(100) == real.kv_bytes(100)


def test_a_config_of_an_moe_gives_its_active_parameters(tmp_path: Path) -> None:
    model = of_config(config(tmp_path, vocab_size=32000, num_local_experts=8, num_experts_per_tok=2))
    real = published("mixtral-8x7b")
    assert (model.experts, model.experts_per_token) == (8, 2)
    assert model.params == pytest.approx(real.params, rel=0.001)
    assert model.active_params == pytest.approx(real.active_params, rel=0.001)


def test_the_text_part_of_a_config_counts(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"vision_config": {}, "text_config": CONFIG}))
    assert of_config(path).layers == 32


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "7",
        "{}",
        json.dumps(CONFIG | {"num_attention_heads": 0}),
        json.dumps(CONFIG | {"vocab_size": None}),
    ],
)
def test_an_incomplete_config_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        of_config(path)
    assert "num_hidden_layers" in str(caught.value.hint) or "experts" in str(caught.value)


def test_a_missing_config_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no weights"):
        of_config(tmp_path / "config.json")


def test_an_architecture_is_frozen() -> None:
    model: Architecture = published("gpt-2")
    with pytest.raises(AttributeError):
        model.layers = 3  # type: ignore[misc]
