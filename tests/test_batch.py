"""`headrace batch`: the format, resuming after a kill, bad lines, a full disk."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from headrace.batch import BadLine, BatchRequest, Results, answer_record, error_record, read_requests
from headrace.cli import main
from headrace.errors import HeadraceError
from support.command import COMMAND

pytestmark = pytest.mark.usefixtures("probed")


def line(custom_id: str, prompt: str = "hello", **body: Any) -> dict[str, Any]:
    body = {"model": "any", "prompt": prompt, "max_tokens": 4, "temperature": 0, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((text if isinstance(text, str) else json.dumps(text)) + "\n" for text in lines))
    return path


def records(path: Path) -> dict[str | None, dict[str, Any]]:
    return {record["custom_id"]: record for record in map(json.loads, path.read_text().splitlines())}


def batch(source: Path, target: Path, model: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["batch", str(source), str(target), "-m", str(model), "--memory", "2GiB", *options])


def test_every_request_gets_its_answer_in_the_format_of_openai(tiny_llama: Path, tmp_path: Path) -> None:
    lines = [line(f"r{i}", "hello " * (1 + i), max_tokens=2 + i) for i in range(5)]
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    result = batch(source, target, tiny_llama, "--parallel", "3")
    assert result.exit_code == 0, result.output
    done = records(target)
    assert set(done) == {f"r{i}" for i in range(5)}
    for i in range(5):
        response = done[f"r{i}"]["response"]
        assert (response["status_code"], done[f"r{i}"]["error"]) == (200, None)
        body = response["body"]
        assert (body["object"], body["model"]) == ("text_completion", "any")
        assert body["choices"][0]["finish_reason"] in ("stop", "length")
        usage = body["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert usage["completion_tokens"] <= 2 + i


def test_an_answer_does_not_depend_on_what_runs_beside_it(tiny_llama: Path, tmp_path: Path) -> None:
    lines = [line(f"r{i}", "tell " * i + "me", max_tokens=8, temperature=1.2, seed=i) for i in range(1, 6)]
    texts = []
    for parallel in ("1", "4"):
        target = tmp_path / f"out{parallel}.jsonl"
        source = write(tmp_path / "in.jsonl", lines)
        assert batch(source, target, tiny_llama, "--parallel", parallel).exit_code == 0
        texts.append({key: r["response"]["body"]["choices"][0]["text"] for key, r in records(target).items()})
    assert texts[0] == texts[1]


def test_bad_lines_get_errors_of_their_own_and_the_rest_goes_on(tiny_llama: Path, tmp_path: Path) -> None:
    lines = [
        line("good"),
        "{half a line",
        {"method": "POST"},
        line("good"),
        {**line("url"), "url": "/v1/embeddings"},
        line("long", "word " * 5000),
        line("tools", tools=[{"type": "function"}]),
        line("at least", min_tokens=3),
        line("usual", presence_penalty=0, response_format={"type": "text"}, n=1),
        line("hot", temperature="hot"),
        line("negative", temperature=-1),
        {"custom_id": "list", "url": "/v1/completions", "body": []},
        "",
        line("last"),
    ]
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    result = batch(source, target, tiny_llama, "--ctx-size", "64")
    assert result.exit_code == 1, result.output
    written = [json.loads(text) for text in target.read_text().splitlines()]
    codes = {_name(record): (record["error"] or {}).get("code") for record in written}
    assert codes == {
        "good": None,
        2: "invalid_json_line",
        3: "missing_custom_id",
        4: "duplicate_custom_id",
        "url": "invalid_url",
        "long": "context_length_exceeded",
        "tools": "unsupported_parameter",
        "at least": "unsupported_parameter",
        "usual": None,
        "hot": "invalid_request",
        "negative": "invalid_request",
        "list": "invalid_request",
        "last": None,
    }
    size = target.stat().st_size
    assert batch(source, target, tiny_llama).exit_code == 1
    assert target.stat().st_size == size  # no request runs twice


def _name(record: dict[str, Any]) -> str | int:
    """The custom_id of a request, or else the number of its line, which our own ids hold."""
    number = re.match(r"batch_req_(\d+)", record["id"])
    assert number
    return record["custom_id"] or int(number[1])


def test_a_conversation_that_the_template_refuses_does_not_stop_the_others(tiny_llama: Path, tmp_path: Path) -> None:
    whole = tiny_llama.read_bytes()
    first, last = whole.index(b"{% for m in messages"), whole.index(b"{% endif %}") + len(b"{% endif %}")
    template = b"{{ raise_exception('roles must alternate') }}".ljust(last - first)
    strict = tmp_path / "strict.gguf"
    strict.write_bytes(whole[:first] + template + whole[last:])
    chat = {
        "custom_id": "chat",
        "url": "/v1/chat/completions",
        "body": {"messages": [{"role": "user", "content": "a"}]},
    }
    source = write(tmp_path / "in.jsonl", [chat, line("plain"), chat | {"custom_id": "again"}])
    assert batch(source, tmp_path / "out.jsonl", strict).exit_code == 1
    found = records(tmp_path / "out.jsonl")
    assert found["plain"]["response"]["status_code"] == 200
    assert {found[name]["error"]["code"] for name in ("chat", "again")} == {"invalid_request"}
    assert "roles must alternate" in found["chat"]["error"]["message"]


def test_half_a_character_is_an_error_of_its_line(tiny_llama: Path, tmp_path: Path) -> None:
    bad = [json.dumps(line("x\ud83d")), json.dumps(line("y", "half \ud83d")), json.dumps(line("z", "whole \U0001f600"))]
    source, target = write(tmp_path / "in.jsonl", bad), tmp_path / "out.jsonl"
    assert batch(source, target, tiny_llama).exit_code == 1
    lines = [json.loads(one) for one in target.read_text().splitlines()]
    assert [one["error"]["code"] for one in lines if one["error"]] == ["invalid_json_line"] * 2
    assert [one["custom_id"] for one in lines if one["response"]] == ["z"]
    size = target.stat().st_size
    assert batch(source, target, tiny_llama).exit_code == 1
    assert target.stat().st_size == size


def test_names_that_look_like_ours_are_told_from_lines_without_a_name(tiny_llama: Path, tmp_path: Path) -> None:
    """An empty custom_id is valid, and so is one that looks like our own id of another line."""
    source = write(tmp_path / "in.jsonl", [line(""), "no json", line("batch_req_2")])
    target = tmp_path / "out.jsonl"
    assert batch(source, target, tiny_llama).exit_code == 1
    assert len(target.read_text().splitlines()) == 3
    bad = next(text for text in target.read_text().splitlines(keepends=True) if "invalid_json" in text)
    target.write_text(bad)  # as after a kill behind the bad line
    assert batch(source, target, tiny_llama).exit_code == 1
    assert set(records(target)) == {"", None, "batch_req_2"}
    size = target.stat().st_size
    assert batch(source, target, tiny_llama).exit_code == 1
    assert target.stat().st_size == size


def test_chat_requests_use_the_template_which_is_given_text_parts_as_they_are(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    body = {"messages": messages, "max_completion_tokens": 7, "stop": "x", "top_k": 3}
    source = write(tmp_path / "in.jsonl", [{"custom_id": "c", "url": "/v1/chat/completions", "body": body}])
    (request,) = read_requests(source)
    assert isinstance(request, BatchRequest)
    assert request.prompt == messages
    assert (request.max_tokens, request.stop, request.sampling) == (7, ("x",), {"top_k": 3})
    record = answer_record(request, text="hi", finish_reason="stop", prompt_tokens=3, completion_tokens=2, model="tiny")
    choice = record["response"]["body"]["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "hi"}
    fields = {"finish_reason": "stop", "prompt_tokens": 3, "completion_tokens": 2, "model": "tiny"}
    record = answer_record(request, text="hi", reasoning="hm", **fields)  # type: ignore[arg-type]
    choice = record["response"]["body"]["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "hi", "reasoning_content": "hm"}


def test_a_half_line_is_cut_off_and_its_request_done_again(tiny_llama: Path, tmp_path: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", [line("a"), line("b")]), tmp_path / "out.jsonl"
    assert batch(source, target, tiny_llama).exit_code == 0
    whole = target.read_bytes()
    first, second = whole.splitlines(keepends=True)
    for cut in (1, 12, len(second) // 2, len(second) - 1):
        target.write_bytes(first + second[:cut])
        assert batch(source, target, tiny_llama).exit_code == 0
        assert len(target.read_bytes().splitlines()) == 2
        assert set(records(target)) == {"a", "b"}


@pytest.mark.parametrize(
    "content", ["notes of mine\n", "notes without an end", '{"id": 3, "custom_id": "a"}\n', "[]\n"]
)
def test_another_file_is_not_touched(tiny_llama: Path, tmp_path: Path, content: str) -> None:
    source, target = write(tmp_path / "in.jsonl", [line("a")]), tmp_path / "notes.txt"
    target.write_text(content)
    result = batch(source, target, tiny_llama)
    assert result.exit_code == 1
    assert "something else" in result.output
    assert target.read_text() == content


def test_input_and_output_must_differ(tiny_llama: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [line("a")])
    result = batch(source, source, tiny_llama)
    assert result.exit_code == 2
    assert "same file" in result.output


def test_a_missing_input_is_a_usage_error(tiny_llama: Path, tmp_path: Path) -> None:
    result = batch(tmp_path / "none.jsonl", tmp_path / "out.jsonl", tiny_llama)
    assert result.exit_code == 2
    assert "cannot read" in result.output


def test_two_runs_do_not_write_to_one_file(tmp_path: Path) -> None:
    with Results(tmp_path / "out.jsonl"), pytest.raises(HeadraceError, match="another process"):
        Results(tmp_path / "out.jsonl")


def test_a_full_disk_leaves_whole_lines_and_says_how_to_go_on(tmp_path: Path) -> None:
    # A limit on file sizes looks like a full disk to the writer: short writes, then an error.
    script = """
import resource, signal, sys
from pathlib import Path
from headrace.batch import Results, error_record
from headrace.errors import HeadraceError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    with Results(Path(sys.argv[1])) as results:
        for i in range(100):
            results.add(error_record(i, f"r{i}", "code", "x" * 90))
except HeadraceError as error:
    print(error.hint)
"""
    target = tmp_path / "out.jsonl"
    result = subprocess.run([sys.executable, "-c", script, str(target)], capture_output=True, text=True, check=True)
    assert "run the same command again" in result.stdout
    assert target.read_bytes().endswith(b"\n")
    count = len(records(target))
    assert 0 < count < 100
    with Results(target) as results:
        assert results.done == count
        results.add(error_record(count, f"r{count}", "code", "more"))
    assert len(records(target)) == count + 1


def test_killed_at_any_moment_it_goes_on_without_loss_or_repetition(tiny_llama: Path, tmp_path: Path) -> None:
    count = 30
    source = write(tmp_path / "in.jsonl", [line(f"r{i}", f"number {i}", max_tokens=30) for i in range(count)])
    target = tmp_path / "out.jsonl"
    command = [*COMMAND, "batch", str(source), str(target)]
    command += ["-m", str(tiny_llama), "--memory", "2GiB", "--parallel", "2", "-q"]
    kills = 0
    for results_before_kill in (1, 15):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if target.exists() and target.read_bytes().count(b"\n") >= results_before_kill:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        process.wait(timeout=60)
    assert kills == 2
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    ids = [json.loads(text)["custom_id"] for text in target.read_text().splitlines()]
    assert sorted(ids) == sorted(f"r{i}" for i in range(count))


def test_reading_a_large_input_does_not_fail_on_odd_lines(tmp_path: Path) -> None:
    deep = "[" * 100_000
    source = write(tmp_path / "in.jsonl", ["null", "3", '"text"', deep, "\ufffd", json.dumps(line("ok"))])
    found = list(read_requests(source))
    assert [isinstance(one, BadLine) for one in found] == [True] * 5 + [False]
