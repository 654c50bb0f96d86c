# ruff: noqa: E402
import gc
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings

from headrace import slim_import

if os.environ.get("HEADRACE_TEST_SLIM"):  # as the command imports the library
    slim_import.import_api()

# The same examples in every run; HEADRACE_FUZZ=1 draws others.
settings.register_profile("reproducible", derandomize=True)
if not os.environ.get("HEADRACE_FUZZ"):
    settings.load_profile("reproducible")

import headrace.api  # noqa: F401  (with torch and transformers, so that they are frozen)
from headrace.plan import Profile, guessed_profile
from headrace.plan.profile import save_profile
from headrace.units import MIB
from support.zoo.gguf_files import random_model, write_gguf


@pytest.fixture(autouse=True, scope="module")
def frozen() -> None:
    """Freeze what exists, for the rest of the run: each load collects garbage, and would look at all of it for 0.15 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="session")
def profile() -> Profile:
    """A profile for one thread: pytest-xdist has a worker on every core. Commands read that of `probed`, with all cores."""
    return replace(guessed_profile(), threads=1)


@pytest.fixture
def probed(own_home: None) -> None:
    """Keep a profile with the memory of a fresh process, so that no command measures the machine."""
    save_profile(replace(guessed_profile(), runtime_bytes=440 * MIB, disk_bytes_per_s={"0": 2e9}))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(random_model("llama"), "llama", tmp_path_factory.mktemp("llama") / "tiny.gguf", "Q8_0")
