"""Paths that the operating system refuses, in every command and option that takes one: an error that names the path."""

import importlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from click.testing import CliRunner, Result

import headrace
from headrace.cli import main
from headrace.errors import HeadraceError
from headrace.plan import Profile
from headrace.plan.profile import save_profile
from support.zoo.scripted import byte_level, write_scripted

pytestmark = pytest.mark.zoo

NOBODY = 65534
REQUEST = '{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": []}}\n'

# Every place where a command takes a path. {model}, {requests} and {out} are sound.
PLACES = {
    "the model of run": "run {path} hi",
    "the draft model of run": "run {model} hi -n 1 --draft {path}",
    "the prompt file of run": "run {model} -f {path}",
    "the trace of run": "run {model} hi -n 1 --trace {path}",
    "the model of plan": "plan {path}",
    "the model of a forecast": "plan {path} --machine rtx-4090",
    "the page of plan": "plan {model} --html {path}",
    "the draft model of plan": "plan {model} --draft {path}",
    "the draft model of a forecast": "plan llama-3-8b --draft {path}",
    "the machine of plan": "plan llama-3-8b --machine {path}.toml",
    "the records of a fit": "plan --fit {path}",
    "the page of claims": "claims --html {path}",
    "the model of bench": "bench {path}",
    "the requests of a batch": "batch {path} {out} -m {model}",
    "the results of a batch": "batch {requests} {path} -m {model}",
    "the model of a batch": "batch {requests} {out} -m {path}",
    "the target of probe": "probe {path}",
    "the name to pull": "pull {path}",
    "the folder to pack": "pack {path} {out}",
    "the model to show": "show {path}",
    "the name to remove": "rm {path}",
}
# Paths that no file can have. {model} is a file.
IMPOSSIBLE = {
    "a name of 300 characters with a suffix": "x" * 300 + ".gguf",
    "a name of 100 characters of three bytes": "名" * 100,
    "a path of 6000 characters": "/".join(["y" * 200] * 30),
    "a file taken for a folder": "{model}/below/it",
}


@pytest.fixture(scope="module")
def open_folder() -> Iterator[Path]:
    """A folder that every user of this machine may enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


@pytest.fixture(scope="module")
def model(open_folder: Path) -> Path:
    return write_scripted(open_folder / "model.gguf", **byte_level(), eos=5)


@pytest.fixture(scope="module")
def requests(open_folder: Path) -> Path:
    path = open_folder / "requests.jsonl"
    path.write_text(REQUEST)
    return path


@pytest.fixture(scope="module")
def forbidden(open_folder: Path) -> Iterator[Path]:
    """A model file in a folder that may not be entered."""
    folder = open_folder / "forbidden"
    folder.mkdir()
    write_scripted(folder / "model.gguf", **byte_level(), eos=5)
    folder.chmod(0)
    yield folder / "model.gguf"
    folder.chmod(0o755)


@pytest.fixture(scope="module", autouse=True)
def imported(model: Path, open_folder: Path) -> None:
    """Import the commands' lazy modules: another user may not be allowed to read them."""
    for module in ("bench", "batch", "demo", "hub", "pack", "page", "run"):
        importlib.import_module(f"headrace.cli.{module}")
    for arguments in (["plan", str(model), "--html", str(open_folder / "page.html")], ["list"], ["show", "org/x"]):
        invoke(arguments)


@pytest.fixture(autouse=True)
def kept_profile(profile: Profile, open_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A profile that another user can read, no network, and no cache of this machine's."""
    monkeypatch.setenv("HEADRACE_HOME", str(open_folder / "home"))
    save_profile(profile)
    use_cache(tmp_path / "hub", monkeypatch)


def use_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(folder / "no-token"))


def invoke(arguments: list[str]) -> Result:
    return CliRunner().invoke(main, arguments)


def invoke_as_nobody(arguments: list[str]) -> Result:
    """Invoke as a user who is not root, because root may read everything."""
    if os.geteuid() != 0:
        return invoke(arguments)
    os.seteuid(NOBODY)
    try:
        return invoke(arguments)
    finally:
        os.seteuid(0)


def check_refused(result: Result, *words: str) -> None:
    """Check for an error without a traceback, with one of these words if any are given."""
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code in (1, 2), result.output
    assert "Error: " in result.output
    assert not words or any(word in result.output for word in words), result.output


@pytest.mark.parametrize("place", PLACES)
def test_a_path_in_a_forbidden_folder_is_refused(
    place: str, forbidden: Path, model: Path, requests: Path, open_folder: Path
) -> None:
    paths = {"path": forbidden, "model": model, "requests": requests, "out": open_folder / "out"}
    check_refused(invoke_as_nobody([word.format(**paths) for word in PLACES[place].split()]))


@pytest.mark.parametrize("place", ["the model of run", "the model of plan", "the model to show", "the folder to pack"])
def test_the_reason_of_a_refused_model_is_the_permission(place: str, forbidden: Path, open_folder: Path) -> None:
    paths = {"path": forbidden, "out": open_folder / "out"}
    result = invoke_as_nobody([word.format(**paths) for word in PLACES[place].split()])
    check_refused(result, "Permission denied")
    assert str(forbidden) in result.output


@pytest.mark.parametrize("kind", IMPOSSIBLE)
@pytest.mark.parametrize("place", PLACES)
def test_a_path_that_no_file_can_have_is_refused(
    place: str, kind: str, model: Path, requests: Path, tmp_path: Path
) -> None:
    path = IMPOSSIBLE[kind].format(model=model)
    paths = {"path": path, "model": model, "requests": requests, "out": tmp_path / "out"}
    check_refused(invoke([word.format(**paths) for word in PLACES[place].split()]))


@pytest.mark.parametrize("place", PLACES)
def test_a_path_with_a_null_character_is_refused(place: str, model: Path, requests: Path, tmp_path: Path) -> None:
    paths = {"path": "a\0b", "model": model, "requests": requests, "out": tmp_path / "out"}
    check_refused(invoke([word.format(**paths) for word in PLACES[place].split()]))


@pytest.mark.parametrize("place", [place for place in PLACES if not place.startswith("the page")])
def test_a_link_to_itself_is_refused(place: str, model: Path, requests: Path, tmp_path: Path) -> None:
    link = tmp_path / "loop"
    link.symlink_to(link)
    paths = {"path": link, "model": model, "requests": requests, "out": tmp_path / "out"}
    check_refused(invoke([word.format(**paths) for word in PLACES[place].split()]))


@pytest.mark.parametrize("place", PLACES)
def test_an_empty_path_is_refused(place: str, model: Path, requests: Path, tmp_path: Path) -> None:
    if "machine" in place:
        pytest.skip("an empty path with a suffix is a file")
    paths = {"path": "", "model": model, "requests": requests, "out": tmp_path / "out"}
    check_refused(invoke([word.format(**paths) for word in PLACES[place].split()]))


def test_a_folder_whose_files_may_not_be_listed_is_refused(open_folder: Path) -> None:
    folder = open_folder / "not-listed"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    folder.chmod(0o311)
    for arguments in (["show", str(folder)], ["plan", str(folder)], ["run", str(folder), "hi"]):
        check_refused(invoke_as_nobody(arguments))


def test_a_page_in_a_folder_that_may_not_be_written_is_refused(open_folder: Path, model: Path) -> None:
    folder = open_folder / "read-only"
    folder.mkdir()
    folder.chmod(0o555)
    check_refused(invoke_as_nobody(["claims", "--html", str(folder / "page.html")]), "Permission denied")
    check_refused(invoke_as_nobody(["run", str(model), "hi", "--trace", str(folder / "trace.json")]), "cannot write")


@pytest.mark.parametrize("cache", ["forbidden", "long"])
@pytest.mark.parametrize(
    "command", ["list", "show org/x", "pull org/x", "rm org/x --yes", "run org/x hi", "plan org/x"]
)
def test_a_hub_cache_that_cannot_be_read_is_an_error(
    command: str, cache: str, forbidden: Path, open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_cache(forbidden.parent / "hub" if cache == "forbidden" else open_folder / ("x" * 300), monkeypatch)
    check_refused(invoke_as_nobody(command.split()))


@pytest.mark.parametrize("home", ["forbidden", "long", "file"])
def test_a_home_that_cannot_be_used_is_no_traceback(
    home: str, forbidden: Path, open_folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {"forbidden": forbidden.parent / "home", "long": open_folder / ("x" * 300), "file": model}
    for variable in ("HOME", "HEADRACE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, str(folders[home]))
    assert invoke_as_nobody(["plan", str(model)]).exit_code == 0
    check_refused(invoke_as_nobody(["demo"]))


def test_a_user_without_a_home_can_plan(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: int) -> None:
        raise KeyError("no such user")

    for variable in ("HOME", "HEADRACE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    result = invoke(["plan", str(model)])
    assert result.exit_code == 0, result.exception


def test_a_working_folder_that_is_gone_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    check_refused(invoke(["probe"]))
    check_refused(invoke(["plan", "model.gguf"]))


@pytest.mark.parametrize("path", ["x" * 300, "x" * 300 + ".gguf", "a\0b.gguf", ""])
def test_load_refuses_a_path_that_no_file_can_have(path: str, model: Path) -> None:
    with pytest.raises(HeadraceError):
        headrace.load(path)
    with pytest.raises(HeadraceError):
        headrace.load(model, draft=path)
