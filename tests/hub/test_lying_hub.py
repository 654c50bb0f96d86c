"""A hub or a mirror that lies: nothing is written outside the cache, nothing wrong stays in it, names are escaped."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import huggingface_hub.constants
import pytest
from click.testing import CliRunner

from headrace.cli import main
from headrace.errors import HeadraceError
from headrace.hub import Reference, cached_models, local_path, pull
from support.hub import StandIn, commit_of

pytestmark = pytest.mark.zoo

REPO = Reference(repo="org/model")
LARGE = os.urandom(5000)
CONFIG = b'{"model_type": "llama"}'
FOLDER = {"config.json": CONFIG, "tokenizer.json": b'{"a": 1}', "model.safetensors": LARGE}
# Names that lead out of a folder, or that no file may have.
OUT = [
    "../../../escaped",
    "..",
    ".",
    "a/../../../../escaped",
    "{cache}/../escaped",
    "..\\..\\escaped",
    "\0",
    "x" * 300,
    "",
]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)


@pytest.fixture
def lying(hub: StandIn) -> StandIn:
    hub.add("org/model", dict(FOLDER))
    return hub


def everything(folder: Path, cache: Path) -> set[Path]:
    """All files of the folder around the cache, without the cache."""
    return {path for path in folder.rglob("*") if cache not in (path, *path.parents)}


def check_nothing_outside(cache: Path, before: set[Path]) -> None:
    assert everything(cache.parent, cache) == before
    root = cache / "models--org--model"
    inside = [cache / ".locks", root, *(root / name for name in ("blobs", "refs", "snapshots", "trees", ".no_exist"))]
    for path in cache.rglob("*"):
        if path.name == "CACHEDIR.TAG":
            continue
        assert any(part in inside for part in (path, *path.parents)), path
        if path.is_symlink():
            assert (root / "blobs").resolve() in path.resolve().parents, path


def pull_whatever_comes(cache: Path) -> None:
    """A pull that may fail with a `HubError`, but writes nothing outside the repository's own folder."""
    before = everything(cache.parent, cache)
    path = None
    with suppress(HeadraceError):
        path = pull(REPO, say=None)
    if path is not None:
        assert path == str(cache / "models--org--model" / "snapshots" / commit_of(FOLDER))
        assert {file.name: file.read_bytes() for file in Path(path).iterdir()} == FOLDER
    check_nothing_outside(cache, before)


@pytest.mark.parametrize("value", OUT)
@pytest.mark.parametrize("name", ["ETag", "X-Linked-ETag", "X-Repo-Commit"])
def test_a_header_that_leads_out_of_the_cache_writes_nothing_there(
    name: str, value: str, lying: StandIn, cache: Path
) -> None:
    if not value.isprintable():
        pytest.skip("no header can hold it")
    value = value.format(cache=cache)
    lying.lies[name] = f'"{value}"' if "ETag" in name else value
    pull_whatever_comes(cache)


def test_a_missing_file_of_a_commit_that_leads_out_writes_nothing_there(lying: StandIn, cache: Path) -> None:
    """The library records the absent file in a folder of that name."""
    lying.lies["X-Repo-Commit"] = "../../../escaped"
    lying.absent.append("tokenizer.json")
    pull_whatever_comes(cache)


@pytest.mark.parametrize(
    "commit",
    [
        "../../../" + "e" * 31,
        "e/../../../../" + "e" * 26,
        "." * 40,
        "Z" * 40,
        "a" * 39 + "/",
        "a" * 39 + "\n",
        "a" * 39 + "\0",
        "\u0661" * 40,
        "A" * 40,
    ],
)
def test_a_commit_that_is_no_hash_is_refused(commit: str, lying: StandIn, cache: Path) -> None:
    assert len(commit) == 40
    lying.commits[:] = [commit]
    before = everything(cache.parent, cache)
    with pytest.raises(HeadraceError):
        pull(REPO, say=None)
    check_nothing_outside(cache, before)
    assert not list(cache.rglob("*.json"))


def test_a_branch_at_two_commits_does_not_lead_out_of_the_cache(lying: StandIn, cache: Path) -> None:
    """The library later uses the branch's file in the cache as the name of a folder."""
    outside = cache.parent / "outside"
    outside.mkdir()
    (outside / "model.gguf").write_bytes(b"GGUF")
    lying.commits[:] = [commit_of(FOLDER), "../../../outside"]
    before = everything(cache.parent, cache)
    with suppress(HeadraceError):
        pull(REPO, say=None)
    check_nothing_outside(cache, before)
    for reference in (cache / "models--org--model" / "refs").glob("*"):
        assert reference.read_text() == commit_of(FOLDER)
    found = local_path(REPO)
    assert found is None or Path(found).resolve().is_relative_to(cache)


@pytest.mark.parametrize("name", [name for name in OUT if name])
def test_a_file_in_the_tree_that_leads_out_of_the_cache_is_not_written(name: str, lying: StandIn, cache: Path) -> None:
    lying.extra.append(name.format(cache=cache))
    pull_whatever_comes(cache)


@pytest.mark.parametrize("suffix", ["", ".gguf"])
@pytest.mark.parametrize("name", OUT)
def test_a_listed_file_that_leads_out_of_the_cache_is_refused(
    name: str, suffix: str, hub: StandIn, cache: Path
) -> None:
    hub.add("org/model", {name.format(cache=cache) + suffix: LARGE, **({} if suffix else FOLDER)})
    before = everything(cache.parent, cache)
    with suppress(HeadraceError):
        pull(REPO, say=None)
    check_nothing_outside(cache, before)


@pytest.mark.parametrize(
    "files",
    [
        {"a.gguf": LARGE, "a.gguf/b.gguf": LARGE},
        {"m-00001-of-00002.gguf": LARGE, "m-00001-of-00002.gguf/m-00002-of-00002.gguf": LARGE},
        {"config.json": CONFIG, "model.safetensors": LARGE, "config.json/x": CONFIG},
        {"a//b.gguf": LARGE},
        {"a/./b.gguf": LARGE},
        {"~/b.gguf": LARGE},
        {"-rf.gguf": LARGE},
        {"a\nb.gguf": LARGE},
    ],
)
def test_odd_names_are_fetched_or_refused(files: Mapping[str, bytes], hub: StandIn, cache: Path) -> None:
    hub.add("org/model", dict(files))
    before = everything(cache.parent, cache)
    for name in files:
        try:
            path = pull(Reference(repo="org/model", file=name if name.endswith(".gguf") else None), say=None)
        except HeadraceError:
            continue
        if name.endswith(".gguf"):
            assert Path(path).read_bytes() == LARGE
    check_nothing_outside(cache, before)


SHORT, LONG = CONFIG[:-1], CONFIG + b" "


@pytest.mark.parametrize("sent", [SHORT, LONG, b"", CONFIG.replace(b"llama", b"other")])
def test_a_small_file_of_another_content_is_an_error_and_is_not_kept(sent: bytes, lying: StandIn, cache: Path) -> None:
    lying.altered["config.json"] = sent
    with pytest.raises(HeadraceError, match=r"config\.json"):
        pull(REPO, say=None)
    assert not [path for path in cache.rglob("*") if path.is_file() and path.read_bytes() == sent and sent]
    assert local_path(REPO) is None
    assert cached_models() == []

    lying.altered.clear()
    path = pull(REPO, say=None)
    assert (Path(path) / "config.json").read_bytes() == CONFIG


@pytest.mark.parametrize("sent", [LARGE[:-1], LARGE + b"x", b"", LARGE[::-1]])
def test_a_large_file_of_another_content_is_an_error_and_is_not_kept(sent: bytes, lying: StandIn, cache: Path) -> None:
    lying.altered["model.safetensors"] = sent
    with pytest.raises(HeadraceError, match=r"model\.safetensors"):
        pull(REPO, say=None)
    assert not [path for path in cache.rglob("*") if path.is_file() and path.read_bytes() == sent and sent]
    assert local_path(REPO) is None

    lying.altered.clear()
    assert (Path(pull(REPO, say=None)) / "model.safetensors").read_bytes() == LARGE


def test_a_cached_file_of_another_length_than_listed_is_fetched_again(lying: StandIn) -> None:
    path = Path(pull(REPO, say=None))
    blob = (path / "config.json").resolve()
    blob.write_bytes(SHORT)
    again = pull(REPO, say=None)
    assert (Path(again) / "config.json").read_bytes() == CONFIG


def test_run_does_not_open_a_model_that_pull_refused(lying: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    lying.altered["config.json"] = LONG
    for _ in range(2):
        result = CliRunner().invoke(main, ["run", "org/model", "hi", "-q"])
        assert isinstance(result.exception, SystemExit), repr(result.exception)
        assert "config.json" in result.stderr
        assert "is not what the hub lists" in result.stderr or "the hub lists" in result.stderr
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert local_path(REPO) is None


EVIL = "m\x1b[31m\x1b]0;t\x07\x9b2J\u202e"


@pytest.mark.parametrize("command", ["pull", "show", "plan", "run"])
@pytest.mark.parametrize(
    "files", [("{}.gguf",), ("{}-Q4_0.gguf", "{}-Q8_0.gguf"), ("{}-00001-of-00002.gguf",), ("x.{}",)]
)
def test_names_of_a_hub_are_shown_escaped(files: tuple[str, ...], command: str, hub: StandIn) -> None:
    hub.add("org/model", {name.format(EVIL): LARGE for name in files})
    arguments = [command, "org/model", *(["h"] if command == "run" else [])]
    result = CliRunner().invoke(main, arguments, color=True)
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert not any(character in result.output for character in "\x1b\x07\x9b\u202e"), result.output


@pytest.mark.parametrize("refuse", [None, (503, "\x1b[31m"), (429, "\x9b31m")])
def test_messages_of_a_hub_are_shown_escaped(refuse: tuple[int, str] | None, hub: StandIn) -> None:
    hub.add("org/model", {"model.gguf": LARGE})
    hub.license = EVIL
    hub.refuse = None if refuse is None else (refuse[0], {"Retry-After": refuse[1]})
    result = CliRunner().invoke(main, ["show", "org/model"], color=True)
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert not any(character in result.output for character in "\x1b\x07\x9b\u202e"), result.output
