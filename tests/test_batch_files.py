"""`headrace batch` and its files: failures of single lines, owners of results, the summary, odd paths."""

import errno
import fcntl
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from headrace.cli import main
from headrace.plan import Profile
from headrace.plan.profile import save_profile
from headrace.units import GIB, MIB
from support.command import COMMAND
from support.zoo.scripted import CHATML, byte_level, in_turn, write_scripted

pytestmark = pytest.mark.usefixtures("probed")

VOCABULARY = byte_level()
LETTERS = [VOCABULARY["tokens"].index(chr(ord("a") + i)) for i in range(26)]
END, NEWLINE = VOCABULARY["tokens"].index("<|im_end|>"), VOCABULARY["tokens"].index("Ċ")
FOLLOWS = {**in_turn(*LETTERS, LETTERS[0]), NEWLINE: LETTERS[0]}

# A template that fails in the way named by the user message.
BROKEN = (
    "{% set c = messages[0].content %}"
    "{% if c == 'zero' %}{{ 1 // 0 }}"
    "{% elif c == 'deep' %}{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}"
    "{% elif c == 'undefined' %}{{ nothing.at.all }}"
    "{% elif c == 'type' %}{{ 'a' + 1 }}"
    "{% elif c == 'overflow' %}{{ range(1000000000) }}"
    "{% elif c == 'large' %}{{ 'x' * 10 ** 30 }}"
    "{% elif c == 'half' %}{{ '\\ud83d' }}"
    "{% elif c == 'forbidden' %}{{ ''.__class__.mro() }}"
    "{% elif c == 'index' %}{{ 'abc'.index('x') }}"
    "{% elif c == 'key' %}{{ '{x}'.format(y=1) }}"
    "{% elif c == 'none' %}"
    "{% else %}{{ c }}{% endif %}"
)
FAILURES = ["zero", "deep", "undefined", "type", "overflow", "large", "half", "forbidden", "index", "key", "none"]


def line(custom_id: str, prompt: str = "a", **body: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": 3, "temperature": 0, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def chat(custom_id: str, content: str) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 3, "temperature": 0}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def write(path: Path, lines: Sequence[Mapping[str, Any] | str]) -> Path:
    path.write_text("".join((text if isinstance(text, str) else json.dumps(text)) + "\n" for text in lines))
    return path


def records(path: Path) -> dict[str | None, dict[str, Any]]:
    return {record["custom_id"]: record for record in map(json.loads, path.read_text().splitlines())}


def text_of(record: Mapping[str, Any]) -> str:
    assert record["error"] is None, record["error"]
    choice = record["response"]["body"]["choices"][0]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


@pytest.fixture(scope="module")
def alphabet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that continues the alphabet after the last letter of its prompt."""
    path = tmp_path_factory.mktemp("alphabet") / "model.gguf"
    return write_scripted(path, **VOCABULARY, eos=END, follows=FOLLOWS)


def arguments(source: Path, target: Path, model: Path, *options: str) -> list[str]:
    return ["batch", str(source), str(target), "-m", str(model), "--memory", "2GiB", "--draft", "none", *options]


def batch(source: Path, target: Path, model: Path, *options: str) -> Result:
    """Run the command; anything but its own exit codes is a traceback."""
    result = CliRunner().invoke(main, arguments(source, target, model, *options))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result


# One line that cannot be answered


def test_a_token_without_a_row_in_the_embedding_fails_its_line_alone(tmp_path: Path) -> None:
    more = byte_level(control=("<|im_start|>", "<|im_end|>", "<|added|>", "<|added2|>"))
    rows = len(VOCABULARY["tokens"])
    model = write_scripted(tmp_path / "model.gguf", **more, rows=rows, eos=END, follows=FOLLOWS)
    lines = [
        *(chat("first", "a"), chat("beyond", "x<|added|>y"), line("raw", "x<|added2|>"), chat("last", "b")),
        line("only", "<|added|>"),
    ]
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    result = batch(source, target, model)
    assert result.exit_code == 1, result.output
    found = records(target)
    assert text_of(found["first"]) == text_of(found["last"]) == "abc"
    for name, token in (("beyond", rows), ("raw", rows + 1), ("only", rows)):
        assert found[name]["error"]["code"] == "invalid_request"
        assert str(token) in found[name]["error"]["message"]
    size = target.stat().st_size
    assert batch(source, target, model).exit_code == 1
    assert target.stat().st_size == size  # done, so a resumed run does not fail at it again


def test_a_template_that_fails_at_one_conversation_fails_its_line_alone(tmp_path: Path) -> None:
    model = write_scripted(tmp_path / "model.gguf", **VOCABULARY, template=BROKEN, eos=END, follows=FOLLOWS)
    lines = [chat("first", "a"), *(chat(name, name) for name in FAILURES), chat("last", "b")]
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    assert batch(source, target, model).exit_code == 1
    found = records(target)
    assert (text_of(found["first"]), text_of(found["last"])) == ("bcd", "cde")
    assert {name: (found[name]["error"] or {}).get("code") for name in FAILURES} == dict.fromkeys(
        FAILURES, "invalid_request"
    )
    assert all(found[name]["error"]["message"] for name in FAILURES)
    size = target.stat().st_size
    assert batch(source, target, model).exit_code == 1
    assert target.stat().st_size == size


# Owners of the results in an output file

LINES: list[Mapping[str, Any] | str] = [line("r0", "a"), chat("r1", "hi"), line("bad", n=2), "no json", line("r2", "d")]


@pytest.fixture(scope="module")
def done(alphabet: Path, tmp_path_factory: pytest.TempPathFactory, profile: Profile) -> Path:
    """The results of `LINES` by the model of the alphabet."""
    folder = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADRACE_HOME", str(folder / "home"))
        save_profile(replace(profile, runtime_bytes=400 * MIB, disk_bytes_per_s={"0": 2e9}))
        batch(write(folder / "in.jsonl", LINES), folder / "out.jsonl", alphabet)
    assert len((folder / "out.jsonl").read_text().splitlines()) == len(LINES)
    return folder / "out.jsonl"


def _changed(number: int, change: Callable[[dict[str, Any]], None]) -> list[Mapping[str, Any] | str]:
    lines = [text if isinstance(text, str) else json.loads(json.dumps(text)) for text in LINES]
    change(lines[number])  # type: ignore[arg-type]
    return lines


OTHER_REQUESTS: dict[str, list[Mapping[str, Any] | str]] = {
    "another prompt": _changed(0, lambda one: one["body"].update(prompt="b")),
    "another last prompt": _changed(4, lambda one: one["body"].update(prompt="e")),
    "another conversation": _changed(1, lambda one: one["body"]["messages"].insert(0, {"role": "system", "content": "x"})),
    "another length": _changed(0, lambda one: one["body"].update(max_tokens=4)),
    "another temperature": _changed(0, lambda one: one["body"].update(temperature=0.5)),
    "a seed": _changed(0, lambda one: one["body"].update(seed=1)),
    "a stop string": _changed(0, lambda one: one["body"].update(stop="c")),
    "a line that was refused and can be answered now": _changed(2, lambda one: one["body"].update(n=1)),
    "a line that was answered and is bad now": _changed(0, lambda one: one["body"].update(n=2)),
    "another line without a name": [*LINES[:3], "no json either", *LINES[4:]],
    "other names": [line("s0", "a"), line("s1", "b")],
    "names of two requests exchanged": _changed(0, lambda one: one["body"].update(prompt="d"))[:1]
    + list(LINES[1:4])
    + _changed(4, lambda one: one["body"].update(prompt="a"))[4:],
}  # fmt: skip


@pytest.mark.parametrize("lines", OTHER_REQUESTS.values(), ids=OTHER_REQUESTS)
def test_results_of_other_requests_are_refused(
    done: Path, alphabet: Path, tmp_path: Path, lines: list[Mapping[str, Any] | str]
) -> None:
    target = Path(shutil.copy(done, tmp_path / "out.jsonl"))
    result = batch(write(tmp_path / "in.jsonl", lines), target, alphabet)
    assert result.exit_code == 1, result.output
    assert "other requests" in result.stderr
    assert "hint:" in result.stderr
    assert target.read_bytes() == done.read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"follows": {**FOLLOWS, LETTERS[5]: LETTERS[0]}},  # one weight, in a file of the same name and size
        {"template": CHATML.replace("user", "human").replace("assistant\n", "helper\n")},
        {"name": "renamed", "context": 256},
    ],
    ids=["weights", "template", "metadata"],
)
def test_results_of_another_model_are_refused(done: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    target = Path(shutil.copy(done, tmp_path / "out.jsonl"))
    other = write_scripted(tmp_path / "model.gguf", **VOCABULARY, **{"eos": END, "follows": FOLLOWS, **change})
    result = batch(write(tmp_path / "in.jsonl", LINES), target, other)
    assert result.exit_code == 1, result.output
    assert "another model" in result.stderr
    assert "hint:" in result.stderr
    assert target.read_bytes() == done.read_bytes()


def test_a_copy_of_the_model_at_another_place_goes_on(done: Path, alphabet: Path, tmp_path: Path) -> None:
    target = Path(shutil.copy(done, tmp_path / "out.jsonl"))
    copy = Path(shutil.copyfile(alphabet, tmp_path / "copy.gguf"))
    os.utime(copy, (0, 0))
    result = batch(write(tmp_path / "in.jsonl", [*LINES, line("new", "x")]), target, copy)
    assert "4 answered, 2 failed" in result.stderr
    assert target.read_bytes().startswith(done.read_bytes())
    assert text_of(records(target)["new"]) == "yza"


def test_the_same_requests_written_and_ordered_otherwise_go_on(done: Path, alphabet: Path, tmp_path: Path) -> None:
    target = Path(shutil.copy(done, tmp_path / "out.jsonl"))
    lines = [text if isinstance(text, str) else json.dumps(text, sort_keys=True, indent=None) for text in LINES]
    spaced = [text.replace('"a"', '"\\u0061"').replace(": ", " :  ") for text in lines]
    last, *others = [spaced[4], spaced[0], spaced[1], spaced[3], spaced[2]]
    source = write(tmp_path / "in.jsonl", ["", last, *others])
    batch(source, target, alphabet)
    assert target.read_bytes() == done.read_bytes()


def test_results_that_do_not_say_whose_they_are_are_refused(done: Path, alphabet: Path, tmp_path: Path) -> None:
    """Files of other programs and of earlier versions lack the hashes."""
    target = tmp_path / "out.jsonl"
    old = [
        {"id": f"batch_req_{i + 1}", "custom_id": one["custom_id"], "response": one["response"], "error": one["error"]}
        for i, one in enumerate(map(json.loads, done.read_text().splitlines()))
    ]
    for one in old:
        body = (one["response"] or {}).get("body", {})
        one["response"] = one["response"] and {
            "status_code": 200,
            "request_id": "r",
            "body": {"choices": body["choices"]},
        }
    write(target, old)
    before = target.read_bytes()
    result = batch(write(tmp_path / "in.jsonl", LINES), target, alphabet)
    assert result.exit_code == 1, result.output
    assert "hint:" in result.stderr
    assert target.read_bytes() == before


@pytest.mark.parametrize("key", ["id", "custom_id", "response", "error"])
def test_results_that_somebody_has_changed_are_no_traceback(
    done: Path, alphabet: Path, tmp_path: Path, key: str
) -> None:
    for value in (None, 3, [], {}, "batch_req_1", "x" * 5000):
        first, *others = done.read_text().splitlines()
        changed = json.dumps({**json.loads(first), key: value})
        target = write(tmp_path / "out.jsonl", [changed, *others])
        before = target.read_bytes()
        batch(write(tmp_path / "in.jsonl", LINES), target, alphabet)
        assert target.read_bytes().startswith(before)


def test_results_have_the_form_of_the_batch_api(done: Path) -> None:
    for record in map(json.loads, done.read_text().splitlines()):
        assert {"id", "custom_id", "response", "error"} <= set(record)
        assert isinstance(record["id"], str)
        if record["error"] is not None:
            assert record["response"] is None
            assert all(isinstance(record["error"][key], str) for key in ("code", "message"))
        else:
            assert record["response"]["status_code"] == 200
            assert isinstance(record["response"]["request_id"], str)
            body = record["response"]["body"]
            assert {"id", "object", "created", "model", "choices", "usage"} <= set(body)


# The summary


def test_a_summary_counts_what_was_answered_and_what_failed(alphabet: Path, tmp_path: Path) -> None:
    lines: list[Mapping[str, Any] | str] = [line("a"), line("n", n=2), "no json", line("long", "x" * 600), line("b")]
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    for options in ((), (), ("--quiet",)):  # the second and third run find all requests answered
        result = batch(source, target, alphabet, *options)
        assert result.exit_code == 1, result.output
        assert result.stderr.rstrip().endswith(f"2 answered, 3 failed: see {target}")
        assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("options", [(), ("--quiet",)], ids=["", "quiet"])
def test_a_batch_in_which_every_line_failed_says_so_and_fails(
    alphabet: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    source, target = write(tmp_path / "in.jsonl", [line("n", n=2), "no json"]), tmp_path / "out.jsonl"
    for _ in range(2):
        result = batch(source, target, alphabet, *options)
        assert result.exit_code == 1
        assert f"0 answered, 2 failed: see {target}" in result.stderr
    target.unlink()
    write(source, [line("long", "x" * 600)])  # this line fails only once the model is loaded
    result = batch(source, target, alphabet, *options)
    assert result.exit_code == 1
    assert f"0 answered, 1 failed: see {target}" in result.stderr


def test_a_resumed_batch_counts_what_failed_before(alphabet: Path, tmp_path: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", [line("a"), line("n", n=2)]), tmp_path / "out.jsonl"
    assert batch(source, target, alphabet).exit_code == 1
    write(source, [line("a"), line("n", n=2), line("b"), line("m", n=3), line("c")])
    result = batch(source, target, alphabet, "-q")
    assert result.exit_code == 1
    assert f"3 answered, 2 failed: see {target}" in result.stderr


def test_a_batch_in_which_every_line_was_answered_succeeds(alphabet: Path, tmp_path: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", [line("a"), line("b")]), tmp_path / "out.jsonl"
    quiet = batch(source, target, alphabet, "-q")
    assert (quiet.exit_code, quiet.output) == (0, "")
    again = batch(source, target, alphabet)
    assert again.exit_code == 0
    assert re.search(r"\b2 answered\b", again.stderr)
    assert "failed" not in again.stderr


# Paths


def command(source: Path, target: Path, model: Path) -> "subprocess.CompletedProcess[str]":
    """Run the command in a separate process with limits on time and memory."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (3 * GIB, 3 * GIB))

    given = [*COMMAND, *arguments(source, target, model, "-q")]
    return subprocess.run(given, capture_output=True, text=True, timeout=20, preexec_fn=limit)


def assert_clear(code: int, stderr: str, path: Path) -> None:
    assert code in (1, 2), stderr
    assert "Traceback" not in stderr
    assert str(path) in stderr
    assert "hint:" in stderr


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


SPECIAL: dict[str, Callable[[Path], object]] = {
    "FIFO": os.mkfifo,
    "link to a FIFO": lambda path: (os.mkfifo(path.with_name("f")), path.symlink_to(path.with_name("f"))),
    "link to /dev/null": lambda path: path.symlink_to("/dev/null"),
    "link to /dev/full": lambda path: path.symlink_to("/dev/full"),
    "link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("make", SPECIAL.values(), ids=SPECIAL)
def test_an_output_that_is_no_regular_file_is_refused(
    alphabet: Path, tmp_path: Path, make: Callable[[Path], object]
) -> None:
    target = tmp_path / "out"
    make(target)
    done = command(write(tmp_path / "in.jsonl", [line("a")]), target, alphabet)
    assert_clear(done.returncode, done.stderr, target)
    assert "regular file" in done.stderr
    assert not target.is_file()


@pytest.mark.parametrize("device", ["/dev/null", "/dev/full", "/dev/zero"])
def test_an_output_that_is_a_device_is_refused(alphabet: Path, tmp_path: Path, device: str) -> None:
    done = command(write(tmp_path / "in.jsonl", [line("a")]), Path(device), alphabet)
    assert_clear(done.returncode, done.stderr, Path(device))
    assert "regular file" in done.stderr
    assert Path(device).is_char_device()


NOWHERE: dict[str, Callable[[Path], Path]] = {
    "folder that is not there": lambda folder: folder / "none" / "out.jsonl",
    "folder that is a file": lambda folder: folder / "in.jsonl" / "out.jsonl",
    "kernel's folder": lambda _: Path("/proc/out.jsonl"),
    "name too long": lambda folder: folder / ("x" * 300),
    "path too long": lambda folder: folder / "/".join(["y" * 200] * 30),
}


@pytest.mark.parametrize("where", NOWHERE.values(), ids=NOWHERE)
def test_an_output_that_cannot_be_made_has_a_hint(
    alphabet: Path, tmp_path: Path, where: Callable[[Path], Path]
) -> None:
    source, target = write(tmp_path / "in.jsonl", [line("a")]), where(tmp_path)
    result = batch(source, target, alphabet)
    assert_clear(result.exit_code, result.stderr, target)


def test_an_output_that_is_a_socket_a_folder_or_a_circle_of_links_is_refused(alphabet: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [line("a")])
    _socket(tmp_path / "s")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "dangling").symlink_to(tmp_path / "none" / "out")
    for name in ("s", "circle", "dangling"):
        result = batch(source, tmp_path / name, alphabet)
        assert_clear(result.exit_code, result.stderr, tmp_path / name)
    result = batch(source, tmp_path, alphabet)
    assert result.exit_code == 2
    assert "is a directory" in result.stderr


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOSPC, errno.EDQUOT])
def test_a_folder_that_cannot_be_written_has_a_hint(
    alphabet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    source, target, open_ = write(tmp_path / "in.jsonl", [line("a")]), tmp_path / "out.jsonl", os.open

    def refusing(path: Any, flags: int, *options: Any, **named: Any) -> int:
        if os.fspath(path) == str(target) and flags & os.O_CREAT:
            raise OSError(number, os.strerror(number), str(path))
        return open_(path, flags, *options, **named)

    monkeypatch.setattr(os, "open", refusing)
    result = batch(source, target, alphabet)
    assert_clear(result.exit_code, result.stderr, target)
    assert os.strerror(number) in result.stderr


def test_a_file_system_that_has_no_locks_is_an_error(
    alphabet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = write(tmp_path / "in.jsonl", [line("a")]), tmp_path / "out.jsonl"

    def refusing(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refusing)
    result = batch(source, target, alphabet)
    assert_clear(result.exit_code, result.stderr, target)


def test_a_disk_that_fails_twice_is_an_error(alphabet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write fails, and then the truncation of the half line."""
    source, target = write(tmp_path / "in.jsonl", [line("n", n=2)]), tmp_path / "out.jsonl"

    def failing(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pwrite", failing)
    monkeypatch.setattr(os, "ftruncate", failing)
    result = batch(source, target, alphabet)
    assert_clear(result.exit_code, result.stderr, target)


@pytest.mark.parametrize("which", ["input", "output"])
def test_a_file_without_lines_does_not_flood_the_memory(alphabet: Path, tmp_path: Path, which: str) -> None:
    source, target = write(tmp_path / "in.jsonl", [line("a")]), tmp_path / "out.jsonl"
    hollow = source if which == "input" else target
    hollow.touch()
    os.truncate(hollow, 8 * GIB)
    done = command(source, target, alphabet)
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    assert hollow.stat().st_size == 8 * GIB


def test_the_model_is_no_output(alphabet: Path, tmp_path: Path) -> None:
    model = Path(shutil.copyfile(alphabet, tmp_path / "model.gguf"))
    result = batch(write(tmp_path / "in.jsonl", [line("a")]), model, model)
    assert result.exit_code in (1, 2)
    assert model.read_bytes() == alphabet.read_bytes()


@pytest.mark.parametrize("make", [Path.symlink_to, Path.hardlink_to], ids=["symbolic link", "hard link"])
def test_a_link_to_the_input_is_no_output(alphabet: Path, tmp_path: Path, make: Callable[[Path, Path], None]) -> None:
    source, target = write(tmp_path / "in.jsonl", [line("a")]), tmp_path / "out.jsonl"
    before = source.read_bytes()
    make(target, source)
    result = batch(source, target, alphabet)
    assert result.exit_code == 2
    assert "same file" in result.stderr
    assert source.read_bytes() == before


UNREADABLE: dict[str, Callable[[Path], Path]] = {
    "nothing": lambda folder: folder / "none.jsonl",
    "folder": lambda folder: folder,
    "file in a file": lambda folder: folder / "x" / "in.jsonl",
    "name too long": lambda folder: folder / ("x" * 300),
    "circle of links": lambda folder: folder / "circle",
    "device": lambda _: Path("/dev/zero"),
}


@pytest.mark.parametrize("where", UNREADABLE.values(), ids=UNREADABLE)
def test_an_input_that_cannot_be_read_is_an_error_and_leaves_no_output(
    alphabet: Path, tmp_path: Path, where: Callable[[Path], Path]
) -> None:
    (tmp_path / "x").touch()
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    source, target = where(tmp_path), tmp_path / "out.jsonl"
    if source == Path("/dev/zero"):
        done = command(source, target, alphabet)
        code, stderr = done.returncode, done.stderr
    else:
        result = batch(source, target, alphabet)
        code, stderr = result.exit_code, result.stderr
    assert code == 2, stderr
    assert_clear(code, stderr, source)
    assert not target.exists()


def test_the_input_may_come_through_a_pipe(alphabet: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "pipe", tmp_path / "out.jsonl"
    os.mkfifo(source)
    writer = threading.Thread(target=write, args=(source, [line("a"), line("b", "b")]), daemon=True)
    writer.start()
    result = batch(source, target, alphabet)
    writer.join(10)
    assert result.exit_code == 0, result.output
    assert {name: text_of(record) for name, record in records(target).items()} == {"a": "bcd", "b": "cde"}
