"""The list of architectures matches transformers' own."""

import pytest
from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from headrace.checkpoint.architectures import NOT_YET, SUPPORTED, check_architecture
from headrace.errors import UnsupportedError

# Keys of transformers' mapping that are rules for all architectures.
NOT_ARCHITECTURES = {"general", "tokenizer"}
# Known to transformers only as a case in its code, loaded by the mapping of t5.
UNLISTED = {"t5encoder"}
# Known to transformers as models only: their files need no more than names and a config.
OURS = {
    "afmoe", "arcee", "cohere2", "command-r", "deepseek2", "dots1", "ernie4_5", "ernie4_5-moe", "exaone-moe",
    "exaone4", "gemma", "glm-dsa", "glm4", "glm4moe", "granite", "granitehybrid", "granitemoe", "hunyuan-dense",
    "hunyuan-moe", "lfm2moe", "llama4", "mistral3", "nemotron_h", "nemotron_h_moe", "olmo2", "olmoe", "phimoe",
    "qwen2vl", "qwen3next", "qwen3vl", "qwen3vlmoe", "seed_oss", "smollm3",
}  # fmt: skip


def plain(name: str) -> str:
    """A name without - and _: files say gpt-oss and qwen2moe where transformers says gpt_oss and qwen2_moe."""
    return name.replace("-", "").replace("_", "")


def test_the_list_is_that_of_transformers() -> None:
    theirs = {plain(name) for name in (*GGUF_SUPPORTED_ARCHITECTURES, *GGUF_CONFIG_ARCHS)} - NOT_ARCHITECTURES
    assert {plain(name) for name in (*SUPPORTED, *NOT_YET)} == theirs | UNLISTED | {plain(name) for name in OURS}
    assert not theirs & {plain(name) for name in OURS}


def test_no_architecture_is_both_supported_and_not() -> None:
    names = [plain(name) for name in (*SUPPORTED, *NOT_YET)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_supported_model_passes(name: str) -> None:
    check_architecture(name, "model.gguf")


@pytest.mark.parametrize("name", sorted(NOT_YET))
def test_an_unsupported_model_is_refused_with_its_reason_and_what_is_supported(name: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        check_architecture(name, "model.gguf")
    assert str(caught.value) == f"model.gguf is a {name} model: {NOT_YET[name]}"
    assert all(known in str(caught.value.hint) for known in SUPPORTED)


@pytest.mark.parametrize(
    ("name", "meant"), [("lama", "llama"), ("qwen4", "qwen3"), ("gemma-3", "gemma3"), ("Falcon", "falcon")]
)
def test_an_unknown_name_is_refused_with_the_nearest_known_one(name: str, meant: str) -> None:
    with pytest.raises(UnsupportedError, match=f"unknown architecture `{name}`") as caught:
        check_architecture(name, "model.gguf")
    assert str(caught.value.hint).startswith("did you mean ")
    assert meant in str(caught.value.hint)


def test_a_name_like_no_other_is_refused_with_all_known_ones() -> None:
    with pytest.raises(UnsupportedError) as caught:
        check_architecture("zzzzzzzz", "model.gguf")
    assert str(caught.value.hint) == f"known: {', '.join(sorted(SUPPORTED))}"
