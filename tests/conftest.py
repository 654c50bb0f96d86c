# ruff: noqa: E402
import gc
import os
from pathlib import Path

import pytest
from hypothesis import settings

from headrace import slim_import

if os.environ.get("HEADRACE_TEST_SLIM"):  # as the command imports the library
    slim_import.library()

# The same examples in every run; HEADRACE_FUZZ=1 draws others.
settings.register_profile("reproducible", derandomize=True)
if not os.environ.get("HEADRACE_FUZZ"):
    settings.load_profile("reproducible")

from headrace.plan import Profile, guessed_profile
from support.zoo.gguf_files import random_model, write_gguf

gc.freeze()  # each load collects garbage, and scanning the modules' objects took 0.3 s each time


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="session")
def profile() -> Profile:
    return guessed_profile()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(random_model("llama"), "llama", tmp_path_factory.mktemp("llama") / "tiny.gguf", "Q8_0")
