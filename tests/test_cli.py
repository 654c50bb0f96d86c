"""The command as a user runs it: exit codes, stdout for data and stderr for messages; in a second process where that counts."""

import json
import os
import pty
import select
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from headrace.plan import load_profile
from headrace.units import MIB
from support.command import COMMAND, headrace, run_in_subprocess
from support.zoo.gguf_files import random_model, write_gguf

pytestmark = pytest.mark.usefixtures("probed")

ROOMY = "2GiB"


def restore_sigint() -> None:
    """Restore Ctrl-C: background jobs of bash start with it ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_run_prints_the_answer_to_stdout_and_the_rest_to_stderr(tiny_llama: Path) -> None:
    result = headrace("run", str(tiny_llama), "hello", "--memory", ROOMY, "-n", "5", "-t", "0")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.endswith("\n")
    assert "pinned" in result.stderr
    assert "per token" in result.stderr
    assert "pinned" not in result.stdout


def test_json_is_one_object_with_everything_measured(tiny_llama: Path) -> None:
    result = run_in_subprocess("run", tiny_llama, "hello", "--memory", ROOMY, "-n", "5", "-t", "0", "--json", "-q")
    assert result.stderr == ""
    answer = json.loads(result.stdout)
    assert answer["usage"]["completion_tokens"] == answer["usage"]["total_tokens"] - answer["usage"]["prompt_tokens"]
    assert answer["timings"]["passes"] >= answer["usage"]["completion_tokens"]
    assert answer["memory"]["peak_bytes"] < answer["memory"]["budget_bytes"]
    assert answer["plan"]["binding"] in ("disk", "compute")
    assert answer["finish_reason"] == ("length" if answer["usage"]["completion_tokens"] == 5 else "stop")


def test_the_prompt_may_come_from_stdin_or_a_file(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("hello")
    options = ("--memory", ROOMY, "-n", "4", "-t", "0", "-q")
    answers = {
        headrace("run", str(tiny_llama), "hello", *options).stdout,
        headrace("run", str(tiny_llama), *options, stdin="hello").stdout,
        headrace("run", str(tiny_llama), "-", *options, stdin="hello").stdout,
        headrace("run", str(tiny_llama), "-f", str(tmp_path / "prompt.txt"), *options).stdout,
    }
    assert len(answers) == 1


def test_streaming_and_a_budget_at_the_floor_give_the_same_text(tiny_llama: Path) -> None:
    plan = json.loads(headrace("plan", str(tiny_llama), "--memory", ROOMY, "--json").stdout)
    floor = plan["memory"]["floor_bytes"] + 2 * MIB
    options = ("-n", "8", "-t", "0", "--json", "-q", "--raw")  # so short that no prefill kernel runs
    roomy = json.loads(run_in_subprocess("run", str(tiny_llama), "hello", "--memory", ROOMY, *options).stdout)
    tight = json.loads(run_in_subprocess("run", str(tiny_llama), "hello", "--memory", str(floor), *options).stdout)
    assert tight["text"] == roomy["text"]
    assert tight["memory"]["peak_bytes"] <= floor


def test_a_trace_is_written(tiny_llama: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    headrace("run", str(tiny_llama), "hello", "--memory", ROOMY, "-n", "2", "--trace", str(trace))
    assert {e.get("cat") for e in json.loads(trace.read_text())["traceEvents"]} >= {"read", "compute", "pass"}


def test_plan_and_help_import_no_torch(tiny_llama: Path) -> None:
    code = (
        "import sys\nfrom headrace.cli import main\n"
        "try: main({!r})\nexcept SystemExit: pass\n"
        "heavy = {{'torch', 'transformers'}} & set(sys.modules)\nassert not heavy, heavy"
    )
    for arguments in (["plan", str(tiny_llama), "--memory", ROOMY], ["--help"]):
        result = subprocess.run([sys.executable, "-c", code.format(arguments)], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr


def test_plan_names_placement_floor_binding_and_changes(tiny_llama: Path) -> None:
    text = headrace("plan", str(tiny_llama), "--memory", ROOMY).stdout
    for word in ("pinned", "streamed", "floor", "KV cache", "-bound", "tok/s"):
        assert word in text


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "nowhere.gguf", "hi"], 1, "there is no file"),
        (["run", "{model}", "hi", "--memory", "50MiB"], 1, "needs at least"),
        (["run", "{model}", "hi", "--memory", "4"], 2, "unit is missing"),
        (["run", "{model}", "hi", "--memory", "lots"], 2, "not a size"),
        (["run", "{model}", "hi", "--ctx-size", "999999", "--memory", ROOMY], 1, "the model was made for"),
        (["run", "{model}", "", "--memory", ROOMY], 2, "prompt is empty"),
        (["run", "{model}", "hi", "-f", "x"], 2, "both given"),
        (["run", "{model}", "hi", "--raw", "--system", "x"], 2, "contradict"),
        (["run", "{model}", "hi", "--top-p", "0"], 2, "top-p"),
        (["run", "{text}", "hi"], 1, "not a GGUF file"),
        (["pln"], 2, "Did you mean"),
    ],
)
def test_bad_input_gets_a_message_and_the_right_exit_code(
    tiny_llama: Path, tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    (tmp_path / "text.gguf").write_text("not a model")
    filled = [a.format(model=tiny_llama, text=tmp_path / "text.gguf") for a in arguments]
    result = headrace(*filled)
    assert words in result.stderr
    assert result.exit_code == code
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_control_c_ends_the_answer_with_130(tiny_llama: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "run", str(tiny_llama), "hello", "--memory", ROOMY, "-n", "100000", "-c", "2000", "-t", "0", "--raw"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=restore_sigint,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.read(3)  # the answer has begun
    process.send_signal(signal.SIGINT)
    _, words = process.communicate(timeout=60)
    assert process.returncode == 130, words
    assert "tokens" in words
    assert "Traceback" not in words


@pytest.mark.parametrize("raised", [KeyboardInterrupt, BrokenPipeError])
def test_ctrl_c_and_a_closed_pipe_have_their_own_exit_codes(
    raised: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr("headrace.cli.forecast.tables_command", interrupted)
    result = headrace("tables", "models")
    assert result.exit_code == (130 if raised is KeyboardInterrupt else 0)
    assert "Traceback" not in result.stderr


def test_a_closed_pipe_ends_quietly(tiny_llama: Path) -> None:
    command = shlex.join([*COMMAND, "run", str(tiny_llama), "hello", "--memory", ROOMY, "-n", "200", "-t", "0", "-q"])
    result = subprocess.run(["bash", "-c", f"{command} | head -c 1"], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in result.stderr
    assert len(result.stdout) == 1


class Terminal:
    """The command on a pseudo terminal."""

    def __init__(self, *arguments: str):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            restore_sigint()
            os.execvp(COMMAND[0], [*COMMAND, *arguments])
        self.text = ""

    def seen(self, words: str, count: int, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self.text.count(words) < count and (left := deadline - time.monotonic()) > 0:
            if not select.select([self.fd], [], [], left)[0]:
                break
            try:
                self.text += os.read(self.fd, 4096).decode(errors="replace")
            except OSError:  # the command closed its end
                break
        return self.text.count(words) >= count

    def expect(self, words: str, count: int = 1) -> None:
        if not self.seen(words, count, 60):
            os.kill(self.pid, signal.SIGKILL)
            raise AssertionError(f"{words!r} did not come: {self.text}")

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def end(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_chat_keeps_the_conversation_and_survives_control_c(tiny_llama: Path) -> None:
    chat = Terminal("run", str(tiny_llama), "--memory", ROOMY, "-n", "6", "-t", "0", "-c", "400")
    chat.expect(">>> ")
    chat.type("hello\n")
    chat.expect(">>> ", 2)
    chat.type("and again\n")
    chat.expect(">>> ", 3)
    chat.type("/reset\n")
    chat.expect("is forgotten")
    chat.expect(">>> ", 4)
    for _ in range(5):  # Python's readline can miss an interrupt that comes while it begins to wait
        chat.type("\x03")
        if chat.seen("to leave", 1, 2):
            break
    chat.expect("to leave")
    chat.type("/exit\n")
    assert chat.end() == 0


def test_commands_find_the_kept_profile() -> None:
    kept = load_profile()
    assert kept is not None
    assert asdict(kept)["runtime_bytes"] == 440 * MIB


def test_a_draft_changes_nothing_but_the_passes(tiny_llama: Path) -> None:
    options = ("hello hello hello", "--raw", "--memory", ROOMY, "-n", "24", "-t", "0.9", "--seed", "5", "--json")
    answers = {
        draft: headrace("run", str(tiny_llama), *options, "--draft", draft)
        for draft in ("none", "prompt", str(tiny_llama))
    }
    assert [result.exit_code for result in answers.values()] == [0, 0, 0]
    found = {draft: json.loads(result.stdout) for draft, result in answers.items()}
    assert len({answer["text"] for answer in found.values()}) == 1
    drafted = found[str(tiny_llama)]
    assert drafted["speculation"]["accepted"] == drafted["speculation"]["drafted"] > 0
    assert drafted["timings"]["tokens_per_pass"] > found["none"]["timings"]["tokens_per_pass"] == 1
    assert drafted["memory"]["draft_bytes"] > 0
    assert sum(drafted["speculation"]["passes_bound_by"].values()) == drafted["timings"]["passes"] - 1
    assert "tokens per pass" in answers[str(tiny_llama)].stderr


def test_the_plan_compares_drafting_options(tiny_llama: Path) -> None:
    result = headrace("plan", str(tiny_llama), "--memory", ROOMY, "--draft", "prompt", "--batch", "4", "--json")
    plan = json.loads(result.stdout)
    assert plan["sequences"] == 4
    assert plan["draft"]["name"] == "prompt"
    assert any(reason.startswith("draft prompt") for reason in plan["reasons"])


def test_a_draft_that_does_not_exist_is_a_usage_error(tiny_llama: Path) -> None:
    result = headrace("plan", str(tiny_llama), "--memory", ROOMY, "--draft", "nowhere.gguf")
    assert result.exit_code == 2
    assert "no draft model" in result.stderr


def test_batch_reports_its_progress(tiny_llama: Path, tmp_path: Path) -> None:
    body = {"prompt": "hello", "max_tokens": 3}
    lines = [{"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": body} for i in range(3)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = headrace(
        "batch", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "-m", str(tiny_llama), "--memory", ROOMY
    )
    assert result.exit_code == 0, result.stderr
    assert "3 of 3 done" in result.stderr
    assert "tok/s" in result.stderr


def test_run_and_bench_keep_records_and_bench_compares_with_the_plan(tiny_llama: Path, tmp_path: Path) -> None:
    page = tmp_path / "bench.html"
    result = headrace("bench", str(tiny_llama), "--memory", ROOMY, "-n", "6", "--draft", "none", "--html", str(page))
    assert result.exit_code == 0, result.stderr
    assert "reached" in result.stdout
    assert "measured, the last pass" in result.stdout
    assert "measured:" in page.read_text()
    again = headrace("run", str(tiny_llama), "hello", "--memory", ROOMY, "-n", "4", "-t", "0", "-q")
    assert again.exit_code == 0, again.stderr
    records = (Path(os.environ["HEADRACE_HOME"]) / "runs.jsonl").read_text().splitlines()
    assert len(records) == 2
    assert json.loads(records[0])["passes"][0]["count"] >= 4


def test_bench_runs_an_moe_model(tmp_path: Path) -> None:
    model = write_gguf(random_model("mixtral"), "mixtral", tmp_path / "moe.gguf", "Q8_0")
    result = headrace("bench", str(model), "--memory", ROOMY, "-n", "4", "--draft", "none")
    assert result.exit_code == 0, result.stderr
    assert "reached" in result.stdout
