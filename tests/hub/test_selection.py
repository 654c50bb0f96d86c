"""Selection of a repository's needed files."""

import pytest

from headrace.errors import CheckpointError, UnsupportedError, UsageError
from headrace.hub import RemoteFile, files_needed


def listed(*names: str) -> list[RemoteFile]:
    return [RemoteFile(name=name, size=100 + i) for i, name in enumerate(names)]


def chosen(names: list[str], wanted: str | None = None) -> list[str]:
    return [file.name for file in files_needed(listed(*names), wanted).files]


GGUF = [
    "README.md",
    "m-Q4_K_M.gguf",
    "m-Q4_K_S.gguf",
    "m-Q4_0.gguf",
    "m-IQ4_XS.gguf",
    "m-Q8_0.gguf",
    "mmproj-m-F16.gguf",
]
SPLIT = [f"Q8_0/big-Q8_0-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
SAFE = ["config.json", "tokenizer.json", "model.safetensors.index.json"]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_the_only_gguf_model_is_chosen() -> None:
    selection = files_needed(listed("README.md", "a.gguf", "mmproj-a.gguf", "imatrix.gguf"), None)

    assert (selection.format, selection.opened, selection.nbytes) == ("gguf", "a.gguf", 101)
    assert "only" in selection.reason


def test_q4_k_m_is_chosen_among_several() -> None:
    assert chosen(GGUF) == ["m-Q4_K_M.gguf"]


@pytest.mark.parametrize(
    ("wanted", "name"),
    [
        ("Q8_0", "m-Q8_0.gguf"),
        ("q8_0", "m-Q8_0.gguf"),
        ("Q4_0", "m-Q4_0.gguf"),
        ("m-Q4_K_S.gguf", "m-Q4_K_S.gguf"),
        ("m-q4_k_s", "m-Q4_K_S.gguf"),
        ("IQ4_XS", "m-IQ4_XS.gguf"),
    ],
)
def test_a_file_or_a_quantisation_is_found_in_any_case(wanted: str, name: str) -> None:
    assert chosen(GGUF, wanted) == [name]


@pytest.mark.parametrize("wanted", ["Q4_XS", "Q4_K", "Q3_K_M", "mmproj-m-F16.gguf", "F16"])
def test_an_absent_file_is_an_error_with_the_choices(wanted: str) -> None:
    with pytest.raises(UsageError, match="no GGUF model is called") as caught:
        chosen(GGUF, wanted)
    assert "m-Q8_0.gguf" in str(caught.value.hint)
    assert "mmproj" not in str(caught.value.hint)


def test_several_without_q4_k_m_are_an_error_with_the_choices_and_their_sizes() -> None:
    big = [RemoteFile(name="a-Q8_0.gguf", size=8_000_000_000), RemoteFile(name="a-Q2_K.gguf", size=3_100_000_000)]

    with pytest.raises(UsageError, match="2 GGUF models") as caught:
        files_needed(big, None)
    lines = str(caught.value.hint).splitlines()
    assert lines[1:] == ["  :a-Q2_K.gguf  3.10 GB", "  :a-Q8_0.gguf  8.00 GB"]


def test_a_quantisation_that_two_files_have_is_an_error_that_names_both() -> None:
    with pytest.raises(UsageError, match="2 GGUF models are called") as caught:
        chosen(["a-Q4_0.gguf", "b-Q4_0.gguf", "a-Q8_0.gguf"], "Q4_0")
    assert "a-Q8_0" not in str(caught.value.hint)


@pytest.mark.parametrize("wanted", ["Q8_0", SPLIT[0], SPLIT[2], "big-Q8_0-00002-of-00003.gguf", "big-Q8_0"])
def test_all_parts_of_a_split_are_needed_and_the_first_is_opened(wanted: str) -> None:
    selection = files_needed(listed(*GGUF[:2], *reversed(SPLIT)), wanted)

    assert [file.name for file in selection.files] == SPLIT
    assert selection.opened == SPLIT[0]


def test_a_split_that_lacks_a_part_is_an_error_before_anything_is_fetched() -> None:
    with pytest.raises(CheckpointError, match="2 of 3 parts"):
        chosen(SPLIT[:2], None)


def test_shards_config_and_tokenizer_are_needed_and_nothing_else() -> None:
    beside = [*SAFE, "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
              "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "qwen.tiktoken"]  # fmt: skip
    other = ["README.md", "consolidated.safetensors", "consolidated-00001-of-00001.safetensors", "pytorch_model.bin", "x.pt",
             "model.onnx", "flax_model.msgpack", "tf_model.h5", "original/model.safetensors", "fp32/model.safetensors",
             "model.fp32.safetensors", "original/tokenizer.model", "training_args.bin"]  # fmt: skip
    selection = files_needed(listed(*other, *beside, *SHARDS), None)

    assert sorted(file.name for file in selection.files) == sorted([*beside, *SHARDS])
    assert (selection.format, selection.opened) == ("safetensors", None)


def test_a_single_file_model_is_preferred_to_other_copies() -> None:
    names = ["config.json", "model.safetensors", "model.fp16.safetensors", "adapter_model.safetensors"]

    assert chosen(names) == ["config.json", "model.safetensors"]


def test_safetensors_are_preferred_to_gguf_unless_a_file_is_named() -> None:
    assert sorted(chosen([*SAFE, *SHARDS, *GGUF])) == sorted([*SAFE, *SHARDS])
    assert chosen([*SAFE, *SHARDS, *GGUF], "Q8_0") == ["m-Q8_0.gguf"]


def test_a_missing_shard_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="1 of 2 parts"):
        chosen([*SAFE, SHARDS[0]])


@pytest.mark.parametrize(
    "names",
    [[], ["README.md"], ["config.json", "pytorch_model.bin"], ["adapter_config.json", "adapter_model.safetensors"]],
)
def test_without_weights_the_error_names_the_files_and_has_a_hint(names: list[str]) -> None:
    with pytest.raises(UnsupportedError, match="no GGUF file") as caught:
        chosen(names)
    assert all(f"*.{name.rsplit('.', 1)[1]}" in str(caught.value) for name in names)
    assert caught.value.hint


def test_a_file_of_a_safetensors_model_cannot_be_had_alone() -> None:
    with pytest.raises(UnsupportedError, match="all files") as caught:
        chosen([*SAFE, *SHARDS], SHARDS[0])
    assert "colon" in str(caught.value.hint)
