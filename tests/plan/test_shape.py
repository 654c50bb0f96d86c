"""The sizes for a plan, from the header alone, compared with the built model."""

from pathlib import Path

import pytest

from headrace.checkpoint import open_checkpoint
from headrace.model.trace import LinearStep
from headrace.plan import (
    Budget,
    RunConfig,
    choose_drafting,
    choose_sequences,
    drafting_options,
    guessed_profile,
    make_plan,
)
from headrace.plan.cost import layer_seconds, layers_of
from headrace.plan.draft import NO_DRAFT
from headrace.plan.shape import Built, shape_of
from headrace.probe import small_model
from support.engines import build_engine
from support.zoo.gguf_files import random_model, write_gguf


@pytest.mark.parametrize(
    ("architecture", "numbers", "heads"),
    [
        # (heads, width of a head): sliding-window and full layers alternate; four of six layers have their own cache.
        ("gemma4", 2 * (2 * (2 * 32) + 2 * (2 * 64)), 8),
        ("gemma4-31b", 2 * (2 * (2 * 32) + 2 * (1 * 64)), 6),
        ("gemma4-26b", 2 * (2 * (2 * 32) + 2 * (1 * 64)), 6),
        ("deepseek2", 3 * (64 + 16), 3),  # MLA: one latent and one RoPE key for all heads
        ("deepseek2-lite", 3 * (64 + 16), 3),
        ("glm-dsa", 3 * (64 + 16), 3),
        ("glm4moe", 2 * 3 * (2 * 32), 6),  # the fourth layer is for multi-token prediction
        ("lfm2", 2 * (2 * 16), 2),
        ("nemotron_h_moe", 2 * (2 * 32), 2),
        ("granitehybrid", 2 * (2 * 16), 2),
        ("qwen3next", 2 * (2 * 32), 2),
        ("llama", 2 * 3 * (2 * 16), 6),
    ],
)
def test_the_kv_cache_counts_only_layers_that_have_one(
    architecture: str, numbers: int, heads: int, tmp_path: Path
) -> None:
    shape = shape_of(open_checkpoint(write_gguf(random_model(architecture), architecture, tmp_path / "tiny.gguf")))
    assert shape.kv_bytes(1, 16) - shape.state_bytes == (8 if shape.single_sequence else 2) * numbers
    assert shape.single_sequence or shape.kv_bytes(1, 8) == numbers + 4 * heads


@pytest.mark.parametrize(
    "architecture",
    [
        "deepseek2",
        "deepseek2-lite",
        "falcon",
        "gemma4",
        "gemma4-31b",
        "gemma4-26b",
        "glm4moe",
        "llama",
        "llama4",
        "qwen3moe",
        "glm-dsa",
        "granitehybrid",
        "granitehybrid-dense",
        "lfm2moe",
        "nemotron_h_moe",
        "qwen3next",
    ],
)
def test_the_headers_matrices_are_those_that_the_model_multiplies(architecture: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_gguf(random_model(architecture), architecture, tmp_path / "tiny.gguf"))
    with build_engine(Path(checkpoint.path), share=0.0) as engine:
        multiplied = {
            tensor.name for step in engine.weights.steps if isinstance(step, LinearStep) for tensor in step.tensors
        }
    by_header = {tensor.name for tensor in shape_of(checkpoint).linears}
    assert {name for name in by_header - multiplied if "ffn_gate_inp" not in name} == set()  # routers stay in memory
    assert multiplied <= by_header


def test_a_built_model_supplies_the_kv_elements_of_its_layers(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_gguf(random_model("llama"), "llama", tmp_path / "tiny.gguf"))
    built = Built(linears=shape_of(checkpoint).linears, experts=(), single_sequence=False, cached=((2, 40), (1, 30)))
    shape = shape_of(checkpoint, built)
    assert (shape.cached_heads, shape.cached_elements) == (3, 70)


@pytest.mark.parametrize("architecture", ["granitehybrid", "lfm2", "mamba", "qwen3next"])
def test_recurrent_models_are_planned_without_drafts_and_with_single_sequences(
    architecture: str, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(write_gguf(random_model(architecture), architecture, tmp_path / "tiny.gguf"))
    budget, profile = Budget(nbytes=8 << 30, reason="test"), guessed_profile()
    options = drafting_options(checkpoint, "auto")
    assert len(options) > 1
    run_config = RunConfig(context_tokens=256, prompt_tokens=64)
    assert choose_drafting(checkpoint, profile, budget, run_config, options)[0] is NO_DRAFT
    assert choose_sequences(checkpoint, profile, budget, run_config, options, 16).sequences == 1


def test_a_plan_names_sparse_attention_that_is_computed_densely(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_gguf(random_model("glm-dsa"), "glm-dsa", tmp_path / "tiny.gguf"))
    budget = Budget(nbytes=8 << 30, reason="test")
    said = {
        tokens: any("512 positions" in reason for reason in plan.reasons)
        for tokens in (512, 2048)
        for plan in [
            make_plan(checkpoint, guessed_profile(), budget, RunConfig(context_tokens=tokens, prompt_tokens=64))
        ]
    }
    assert said == {512: False, 2048: True}


def test_further_rows_of_a_wider_model_take_longer_outside_the_matmuls(tmp_path: Path) -> None:
    """In proportion to the results of its matmuls; the first row does not."""
    layers = []
    for hidden in (256, 512):
        checkpoint = small_model(tmp_path / f"{hidden}.gguf", layers=2, hidden=hidden, feed_forward=4 * hidden)
        layers.append(layers_of(shape_of(checkpoint)))
    one, further = ([layer_seconds(guessed_profile(), each, rows) for each in layers] for rows in (1, 17))
    assert one[1] == one[0]
    assert further[1] - one[1] == pytest.approx(2 * (further[0] - one[0]))
    probed = small_model(tmp_path / "probed.gguf", layers=2)
    assert layers_of(shape_of(probed)) == (2, 1)
