"""Every architecture of the corpus, streamed, against transformers; docs/architectures.md lists the results."""

import re
from pathlib import Path

import pytest
import torch
from make_architectures import TARGET, refusals, row

from headrace.checkpoint import open_checkpoint
from headrace.engine import Rows
from headrace.errors import HeadraceError
from headrace.kernels import Kernels
from headrace.model import moe
from headrace.plan.shape import shape_of
from support.comparison import divergence
from support.engines import TOKENS, build_engine, streamed
from support.parity import outcome_of
from support.zoo.folders import CASES, tiny_model, write_folder

pytestmark = pytest.mark.zoo

PAGE = TARGET.read_text()
# Types whose KV elements per token the header alone does not give; the built model does.
UNKNOWN_KV_ELEMENTS = {"gemma4_text:experts", "gemma4_unified_text", "jetmoe", "longcat_flash", "mimo_v2_flash"}


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    outcome = outcome_of(name, tmp_path / "model")
    # fp32 throughout; only the order of sums differs, which experts and norms amplify to about 1e-5.
    assert outcome.divergence < 1e-3
    assert outcome.same
    assert row(name, outcome) in PAGE, "run `python docs/make_architectures.py`"
    # From the header alone, the plan must contain every multiplied weight and all KV elements per token.
    shape = shape_of(open_checkpoint(tmp_path / "model"))
    weights = {tensor.name: tensor.rows * tensor.columns for tensor in shape.linears}
    assert outcome.linear_tensors <= weights.keys()
    # Nearly all weights must stream: an unrecognised linear would stay in memory in fp32.
    streamed = sum(weights[tensor] for tensor in outcome.linear_tensors)
    assert streamed > 0.7 * sum(weights.values())
    if outcome.kv_elements_per_token is not None and name not in UNKNOWN_KV_ELEMENTS:
        assert outcome.kv_elements_per_token == shape.cached_elements


@pytest.mark.parametrize(
    "name",
    [
        "qwen3",
        "mixtral",
        "gpt_oss",
        "gemma3_text",
        "codegen",
        "falcon",
        "gpt_neo",
        "bloom",
        "jamba",
        "qwen3_next",
        "mamba",
        "jetmoe",
        "openai-gpt",
        "rwkv",
        "recurrent_gemma",
        "qwen4_exp_text",
    ],
)
def test_sequences_are_independent_and_the_cache_rolls_back(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    write_folder(model, tmp_path / "model")
    other = TOKENS.flip(1)
    with torch.inference_mode():
        expected = [model(tokens).logits[0] for tokens in (TOKENS, other)]
    with build_engine(tmp_path / "model", Kernels(1)) as engine:
        caches = [engine.new_cache(64, 32) for _ in expected]
        for counts in ((17, 1), (1, 9), (1, 1), (3, 2), (1, 1)):
            firsts = [cache.length for cache in caches]
            batch = [
                Rows(cache=cache, tokens=tokens[0, first : first + count].tolist(), logits=count)
                for cache, tokens, first, count in zip(caches, (TOKENS, other), firsts, counts, strict=True)
            ]
            for rows, first, theirs in zip(engine.step(batch).split(counts), firsts, expected, strict=True):
                assert divergence(rows, theirs[first : first + len(rows)]) < 1e-3
        caches[0].truncate(10)
        first = caches[0].length  # 10, or 0 where recurrent state cannot be rolled back
        again = engine.step([Rows(cache=caches[0], tokens=TOKENS[0, first:15].tolist(), logits=15 - first)])
        assert divergence(again, expected[0][first:15]) < 1e-3


def test_a_moe_layer_without_a_known_layout_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(moe._OWN, "JetMoeMoE")
    write_folder(tiny_model("jetmoe"), tmp_path / "model")
    with pytest.raises(HeadraceError, match="jetmoe model computes its experts in its own code") as refusal:
        streamed(tmp_path / "model", Kernels(1))
    assert refusal.value.hint


def test_the_page_lists_what_is_tested_and_nothing_else() -> None:
    tables = PAGE.split("## Refused")
    listed = [set(re.findall(r"^\| ([a-z0-9_:-]+) \|", table, re.MULTILINE)) for table in tables]
    assert listed[0] == set(CASES)
    assert PAGE.endswith("".join(refusals()))
