"""Impossible metadata in GGUF files yields a model or an error with a hint; never a traceback, a flood of memory or a hang."""

from pathlib import Path
from typing import Any

import pytest

from headrace.errors import CheckpointError, HeadraceError
from headrace.kernels import Kernels
from support.engines import build_engine
from support.zoo.gguf_files import FAMILIES, random_model, write_gguf

pytestmark = pytest.mark.zoo

ARCHITECTURES = ("afmoe", "ernie4_5-moe", "glm-dsa", "granitehybrid", "lfm2moe", "nemotron_h_moe", "qwen3next")
GENERAL = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count", "context_length")


def wrong(value: Any) -> list[Any]:
    """Wrong values for a key: zero, far too large, another type; lists too short or of wrong values."""
    if isinstance(value, list):
        return [value[:-1], [0] * len(value), [1 << 30] * len(value)]
    return [0, 1 << 31, "word"]


def is_refused(path: Path, what: str) -> bool:
    """True if the model is refused with a hint, False if it loads; any other outcome is a failure."""
    try:
        with build_engine(path, Kernels(1), share=0.0):
            return False
    except HeadraceError as error:
        if error.hint:
            return True
        raise AssertionError(f"{what}: no hint beside {error}") from error
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_any_value_of_a_key_yields_a_model_or_an_error_with_a_hint(architecture: str, tmp_path: Path) -> None:
    family = FAMILIES[architecture]
    model = random_model(architecture)
    refused = 0
    for key in sorted({*family.metadata, *GENERAL}):
        for value in wrong(family.metadata.get(key, 0)):
            path = write_gguf(model, architecture, tmp_path / "tiny.gguf", extra={key: value})
            refused += is_refused(path, f"{key} = {value}")
    assert refused > len(family.metadata)


def test_a_model_far_larger_than_its_file_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    path = write_gguf(random_model("lfm2moe"), "lfm2moe", tmp_path / "tiny.gguf", extra={"shortconv.l_cache": 1 << 26})
    with pytest.raises(CheckpointError, match="billion parameters") as refusal:
        build_engine(path)
    assert refusal.value.hint
