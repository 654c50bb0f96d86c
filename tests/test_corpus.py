"""The corpus covers what transformers has, and its models are tiny, reproducible and written whole."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from support.zoo.folders import ALIASES, CASES, REFUSED, WRAPPERS, tiny_model, write_folder

pytestmark = pytest.mark.zoo

TYPES = {case.model_type for case in CASES.values()}


@pytest.mark.parametrize(("kind", "at_least"), [("dense", 60), ("experts", 40), ("hybrid", 25)])
def test_every_kind_is_well_covered(kind: str, at_least: int) -> None:
    types = {case.model_type: case.kind for case in CASES.values() if case.kind == kind}
    assert Counter(types.values())[kind] >= at_least


def test_every_causal_model_of_transformers_is_a_case_or_has_a_reason() -> None:
    named = [TYPES, set(REFUSED), set(ALIASES), set(WRAPPERS)]
    assert set().union(*named) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert sum(map(len, named)) == len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert all(REFUSED.values())


@pytest.mark.parametrize("name", CASES)
def test_a_model_is_tiny_and_finite(name: str) -> None:
    model = tiny_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) < 2_000_000
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values() if tensor.is_floating_point())


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "qwen3_next"])
def test_a_seed_is_one_model(name: str) -> None:
    first, again, other = tiny_model(name).state_dict(), tiny_model(name).state_dict(), tiny_model(name, 1).state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in first.items())
    assert any(not torch.equal(tensor, other[key]) for key, tensor in first.items())


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss", "jamba"])
def test_a_folder_in_shards_loads_as_the_same_model(name: str, tmp_path: Path) -> None:
    model, tokens = tiny_model(name), torch.arange(3, 23)[None]
    folder = write_folder(model, tmp_path, shards=3)
    assert len(list(folder.glob("model-*.safetensors"))) >= 3
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_a_folder_in_bfloat16_leaves_the_model_in_float32(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    folder = write_folder(model, tmp_path, dtype=torch.bfloat16)
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    assert model.dtype == torch.float32
