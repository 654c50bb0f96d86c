"""Folders that cannot run: each is refused with a hint, before anything large is read, and nothing hangs."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from headrace.errors import HeadraceError, UnsupportedError
from headrace.kernels import Kernels
from support.command import headrace
from support.engines import build_engine, streamed
from support.zoo.folders import REFUSED, tiny_model, write_folder

pytestmark = [pytest.mark.zoo, pytest.mark.usefixtures("probed")]


@dataclass(frozen=True)
class Fault:
    """A change that breaks a valid folder, and words of the refusal."""

    words: str
    damage: Callable[[Path], None]
    model: str = "llama"
    shards: int = 1


def config(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def absent_in_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = sorted(folder.glob("*.safetensors"))[0].name
    path.write_text(json.dumps(index))


def lose_a_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def cut_a_shard(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-100])


def without(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        del tensors[name]
        save_file(tensors, path, {"format": "pt"})

    return damage


def with_one_more(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.gate.weight"] = tensors["model.norm.weight"].clone()
    save_file(tensors, path, {"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"
FAULTS = {
    "a missing shard": Fault("model-00002-of", lose_a_shard, shards=3),
    "an index that names absent tensors": Fault("are not in the files", absent_in_index, shards=3),
    "a truncated shard": Fault("lies from", cut_a_shard, shards=3),
    "a missing linear": Fault(UP, without(UP)),
    "a missing norm": Fault("model.norm.weight", without("model.norm.weight")),
    "a tensor without a place": Fault("no place", with_one_more),
    "another hidden size": Fault("shape", config(hidden_size=128)),
    "another vocabulary": Fault("shape", config(vocab_size=640)),
    "more layers than stored": Fault("model.layers.3", config(num_hidden_layers=4)),
    "fewer experts than stored": Fault("experts", config(num_local_experts=4), model="mixtral"),
    "more experts than stored": Fault("experts", config(num_local_experts=16), model="mixtral"),
    "an expert that is missing": Fault(
        "experts", without("model.layers.1.block_sparse_moe.experts.5.w2.weight"), model="mixtral"
    ),
    "a misspelt model type": Fault("llamma", config(model_type="llamma")),
    "its own code": Fault(
        "its own code", config(model_type="mymodel", auto_map={"AutoModelForCausalLM": "modeling_mine.MyModel"})
    ),
    "no model type": Fault("names no model_type", config(model_type=None)),
    "an encoder of speech": Fault("whisper", config(model_type="whisper", is_encoder_decoder=True)),
    "an encoder alone": Fault("bert", config(model_type="bert")),
    "a model of pictures": Fault("vit", config(model_type="vit")),
    "an unknown quantisation": Fault("frobnicate", config(quantization_config={"quant_method": "frobnicate"})),
    "a quantisation that nothing was stored with": Fault(
        "bitsandbytes", config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    ),
    "a config that makes no model": Fault("config.json makes no llama model", config(num_attention_heads="four")),
}


def damaged(fault: Fault, folder: Path) -> Path:
    write_folder(tiny_model(fault.model), folder, shards=fault.shards)
    fault.damage(folder)
    return folder


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_folder_is_refused_with_a_hint(name: str, tmp_path: Path) -> None:
    folder = damaged(FAULTS[name], tmp_path / "model")
    with pytest.raises(HeadraceError) as refusal:
        streamed(folder, Kernels(1))
    assert FAULTS[name].words in str(refusal.value)
    assert refusal.value.hint
    assert refusal.value.exit_code == 1


def test_a_misspelt_model_type_gets_a_suggestion(tmp_path: Path) -> None:
    folder = damaged(FAULTS["a misspelt model type"], tmp_path / "model")
    with pytest.raises(HeadraceError) as refusal:
        streamed(folder, Kernels(1))
    assert "did you mean llama" in str(refusal.value.hint)


@pytest.mark.parametrize("model_type", REFUSED)
def test_models_that_do_not_generate_left_to_right_are_refused_by_name(model_type: str, tmp_path: Path) -> None:
    folder = write_folder(tiny_model("llama"), tmp_path / "model")
    config(model_type=model_type)(folder)
    with pytest.raises(HeadraceError, match=model_type) as refusal:
        streamed(folder, Kernels(1))
    assert refusal.value.hint


@pytest.mark.parametrize("name", ["a missing shard", "an encoder of speech", "an unknown quantisation"])
def test_the_command_ends_with_a_message_and_code_1(name: str, tmp_path: Path) -> None:
    folder = damaged(FAULTS[name], tmp_path / "model")
    result = headrace("run", folder, "hello", "--memory", "2GiB")
    assert result.exit_code == 1, result.stderr
    assert FAULTS[name].words in result.stderr
    assert "hint:" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_model_with_parts_for_images_is_refused(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    text = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
    }
    config = AutoConfig.for_model("gemma3", text_config=text | heads, vision_config=vision | {"patch_size": 14})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)

    with pytest.raises(UnsupportedError, match="images or sound") as caught:
        build_engine(tmp_path)
    assert caught.value.hint
