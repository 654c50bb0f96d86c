"""Names of models at the hub: which texts are one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.hub import Reference, parse_reference


@pytest.mark.parametrize(
    ("text", "repo", "revision", "file"),
    [
        ("org/repo", "org/repo", None, None),
        ("hf://org/repo", "org/repo", None, None),
        ("Qwen/Qwen2.5-0.5B-Instruct-GGUF", "Qwen/Qwen2.5-0.5B-Instruct-GGUF", None, None),
        ("org/repo:Q4_K_M", "org/repo", None, "Q4_K_M"),
        ("org/repo:model-Q8_0.gguf", "org/repo", None, "model-Q8_0.gguf"),
        ("org/repo:Q8_0/model-00001-of-00002.gguf", "org/repo", None, "Q8_0/model-00001-of-00002.gguf"),
        ("org/repo@v1.0", "org/repo", "v1.0", None),
        ("org/repo@refs/pr/1:Q4_0", "org/repo", "refs/pr/1", "Q4_0"),
    ],
)
def test_a_name_is_taken_apart_and_put_together(text: str, repo: str, revision: str | None, file: str | None) -> None:
    reference = parse_reference(text)

    assert reference == Reference(repo=repo, revision=revision, file=file)
    assert str(reference) == text.removeprefix("hf://")


@pytest.mark.parametrize(
    "text",
    [
        "", "repo", "model.gguf", "./x", "/x", "~/x", "../x/y", "a/b/c", "/a/b", "a\\b", "org/re\\po", "models/model.gguf",
        "models/Model.GGUF", "folder/config.json", "org/repo:", "org/repo@", "org/repo:/etc/passwd", "org/repo:../x",
        "org/repo@../../x", "org/re--po", "org/re..po", "org/repo.git", "-org/repo", "org/.repo", "org/repo ", "org/re po",
        "org/" + "x" * 97, "org//repo", "C:/x", "https://host/org/repo",
    ],
)  # fmt: skip
def test_a_text_like_a_path_is_no_name(text: str) -> None:
    assert parse_reference(text) is None


@given(st.text(max_size=40))
def test_any_text_is_a_name_or_none(text: str) -> None:
    reference = parse_reference(text)

    assert reference is None or parse_reference(str(reference)) == reference
