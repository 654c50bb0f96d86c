"""Streams that are closed, full or of another encoding, and odd terminals: the answer or a message, no traceback."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, TypeAlias

import pytest
from click.testing import CliRunner
from transformers.convert_slow_tokenizer import bytes_to_unicode

from headrace.cli import main
from support.command import COMMAND
from support.zoo.scripted import NORMAL, byte_level, in_turn, write_scripted

pytestmark = [pytest.mark.zoo, pytest.mark.usefixtures("probed")]

Broken: TypeAlias = Callable[[], AbstractContextManager[IO[str]]]

ANSWER = "caf\u00e9 \u20ac\u2192\U0001f600"  # only the first word is in Latin-1
REQUEST = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "h", "max_tokens": 4}}
# Commands that run no model.
QUICK = (
    "plan {model}",
    "plan {model} --json",
    "show {model}",
    "list",
    "tables devices",
    "claims",
    "claims 1",
    "--help",
)


def spelled(text: str) -> str:
    """A text as a token of a byte-level vocabulary."""
    return "".join(bytes_to_unicode()[byte] for byte in text.encode())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers "h" with `ANSWER`."""
    vocabulary = byte_level(more=[(spelled(ANSWER), NORMAL)])
    asked, answer, end = (vocabulary["tokens"].index(t) for t in ("h", spelled(ANSWER), "<|im_end|>"))
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    return write_scripted(path, **vocabulary, eos=end, follows=in_turn(asked, answer, end))


def invoke(*arguments: str | Path) -> int:
    """The exit code of a command with the streams that `sys` holds now."""
    try:
        main.main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def words(command: str, model: Path) -> list[str]:
    return [word.format(model=model) for word in command.split()]


@contextmanager
def full_disk() -> Iterator[IO[str]]:
    """A stream whose writes fail: No space left on device."""
    descriptor = os.open("/dev/full", os.O_WRONLY)
    yield open(descriptor, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 (what it holds cannot be flushed)
    os.close(descriptor)


@contextmanager
def closed_pipe() -> Iterator[IO[str]]:
    """A pipe whose reader has gone."""
    ours, theirs = os.pipe()
    os.close(ours)
    yield open(theirs, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    os.close(theirs)


@pytest.mark.parametrize("command", [*QUICK, "run {model} h --raw -q", "run {model} h --raw -q --json"])
def test_a_closed_stdout_is_no_error(command: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", None)  # as Python sets it
    assert invoke(*words(command, model)) == 0


@pytest.mark.parametrize("command", ["plan {model}", "run {model} h --raw", "show nowhere.gguf", "run nowhere.gguf h"])
def test_a_closed_stderr_is_no_error(
    command: str, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr", None)
    assert invoke(*words(command, model)) == int("nowhere" in command)
    assert (ANSWER in capsys.readouterr().out) == ("run {model}" in command)


@pytest.mark.parametrize("command", ["run {model}", "run {model} -", "run {model} -f -"])
def test_a_prompt_from_a_closed_stdin_is_refused(
    command: str, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert invoke(*words(command, model)) == 2
    assert "Error: " in capsys.readouterr().err


def test_a_removal_is_not_asked_for_at_a_closed_stdin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    snapshot = tmp_path / "hub" / "models--org--x" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("sys.stdin", None)
    assert invoke("rm", "org/x") == 2
    assert "nobody to ask" in capsys.readouterr().err
    assert (snapshot / "model.gguf").exists()


@pytest.mark.parametrize("command", [*QUICK, "run {model} h --raw -q", "run {model} h --raw -q --json", "--version"])
def test_a_full_disk_under_stdout_is_an_error_that_says_so(
    command: str, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with full_disk() as stream:
        monkeypatch.setattr("sys.stdout", stream)
        assert invoke(*words(command, model)) == 1
        monkeypatch.undo()
    errors = capsys.readouterr().err
    assert "No space left on device" in errors
    assert errors.startswith("Error: ")


@pytest.mark.parametrize("command", ["plan {model}", "claims", "run {model} h --raw -q", "tables devices --json"])
def test_a_closed_pipe_under_stdout_ends_in_silence(
    command: str, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with closed_pipe() as stream:
        monkeypatch.setattr("sys.stdout", stream)
        invoke(*words(command, model))
        monkeypatch.undo()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("broken", [full_disk, closed_pipe])
def test_the_answer_comes_where_stderr_cannot_be_written(
    broken: Broken,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with broken() as stream:
        monkeypatch.setattr("sys.stderr", stream)
        assert invoke("run", model, "h", "--raw") == 0
        monkeypatch.undo()
    assert capsys.readouterr().out == f"{ANSWER}\n"


@pytest.mark.parametrize("broken", [full_disk, closed_pipe])
def test_a_batch_is_answered_where_stderr_cannot_be_written(
    broken: Broken, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(REQUEST) + "\n")
    with broken() as stream:
        monkeypatch.setattr("sys.stderr", stream)
        assert invoke("batch", source, target, "-m", model) == 0
        monkeypatch.undo()
    assert len(target.read_text().splitlines()) == 1


def test_a_batch_with_all_streams_closed_writes_results_alone(model: Path, tmp_path: Path) -> None:
    """The first opened files would otherwise become stdin, stdout and stderr, and get their text."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(REQUEST) + "\n")
    skeleton = 'exec "$@" <&- >&- 2>&-'
    command = ["sh", "-c", skeleton, "sh", *COMMAND, "batch", str(source), str(target), "-m", str(model)]
    assert subprocess.run(command, timeout=120).returncode == 0
    (line,) = target.read_text().splitlines()
    assert json.loads(line)["custom_id"] == "a"


@pytest.mark.parametrize("charset", ["latin-1", "ascii", "cp1252"])
@pytest.mark.parametrize(
    "command", ["tables devices", "tables models", "claims", "claims 1", "plan {model}", "show {model}"]
)
def test_characters_that_the_terminal_lacks_are_replaced(command: str, charset: str, model: Path) -> None:
    result = CliRunner(charset=charset).invoke(main, words(command, model))
    assert result.exit_code == 0, repr(result.exception)


@pytest.mark.parametrize(("charset", "first"), [("latin-1", "caf\u00e9"), ("cp437", "caf\u00e9"), ("iso8859-5", "caf")])
def test_an_answer_is_shown_as_far_as_the_terminal_has_its_characters(charset: str, first: str, model: Path) -> None:
    result = CliRunner(charset=charset).invoke(main, ["run", str(model), "h", "--raw", "-q"])
    assert result.exit_code == 0, repr(result.exception)
    assert result.stdout_bytes.decode(charset).startswith(first)


@pytest.mark.parametrize("charset", ["latin-1", "iso8859-5"])
def test_json_loses_no_character_on_any_terminal(charset: str, model: Path) -> None:
    result = CliRunner(charset=charset).invoke(main, ["run", str(model), "h", "--raw", "-q", "--json"])
    assert result.exit_code == 0, repr(result.exception)
    assert json.loads(result.stdout_bytes.decode(charset))["text"] == ANSWER


@pytest.mark.parametrize("command", ["show {path}", "plan {path}", "plan {path} --json", "run {path} h --raw -q"])
def test_a_file_name_that_is_no_text_can_be_printed(command: str, model: Path, tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/m\xff.gguf")
    vocabulary = byte_level()
    write_scripted(Path(path), **vocabulary, eos=vocabulary["tokens"].index("<|im_end|>"), name="")
    result = CliRunner().invoke(main, [word.format(path=path) for word in command.split()])
    assert result.exit_code == 0, repr(result.exception)


def test_a_page_of_a_file_name_that_is_no_text_can_be_written(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/m\xff.gguf")
    write_scripted(Path(path), **byte_level(), eos=5, name="")
    result = CliRunner().invoke(main, ["plan", path, "--html", str(tmp_path / "page.html")])
    assert result.exit_code == 0, repr(result.exception)
    assert (tmp_path / "page.html").exists()


@pytest.mark.parametrize("value", ["x", "", " ", "-5", "0", "1", "\u00b2", "1e3", "9" * 25, "9" * 5000])
@pytest.mark.parametrize("name", ["COLUMNS", "LINES"])
def test_a_size_of_the_terminal_that_is_no_number_is_passed_over(
    name: str, value: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    for command in ("tables prices", "claims 1", "plan {model}", "--help"):
        result = CliRunner().invoke(main, words(command, model))
        assert result.exit_code == 0, (command, repr(result.exception))
        assert len(result.output) < 1_000_000


@pytest.mark.parametrize("terminal", ["dumb", "", "unknown", "nonsense\x1b[2J"])
def test_any_kind_of_terminal_gets_the_plan(terminal: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", terminal)
    for command in ("plan {model}", "claims 1", "tables prices"):
        result = CliRunner().invoke(main, words(command, model))
        assert result.exit_code == 0, repr(result.exception)
        assert "\x1b" not in result.output


def optimised(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [COMMAND[0], "-OO", *COMMAND[1:], *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_python_without_docstrings_answers_or_says_what_is_wrong(model: Path) -> None:
    """transformers builds models from docstrings, which -OO leaves out."""
    result = optimised("run", model, "h", "--raw", "-q")
    assert "Traceback" not in result.stderr
    if result.returncode == 0:
        assert result.stdout == f"{ANSWER}\n"
    else:
        assert "-OO" in result.stderr


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    skeleton = '"$@" | head -c 1 >/dev/null'
    command = ["sh", "-c", skeleton, "sh", *COMMAND, "tables", "devices", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.stderr == ""
