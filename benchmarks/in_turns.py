"""Compares two commits: the same command with both, in turns, medians and their ratio.

    git worktree add ../before COMMIT
    python benchmarks/in_turns.py --before ../before/src [--rows decode,...] [--rounds 5] [--models DIR]
        [--out benchmarks/results/DATE-MACHINE-in-turns.json]

Each row has a figure, higher is better; the ratio is that of this tree to the one before. Both plan with one profile; if their
formats differ, each measures its own. Rows with a ceiling need root and a memory cgroup; their page cache is cold.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ceiling import run_under
from models import HOME
from results import provenance

MIB = 1 << 20
SHORT = "The water wheel is one of the oldest"
LONG = " ".join(f"The {i}th wheel turns slower than the one before it." for i in range(45))
SMALL, CODER = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"
CODER_F16 = "qwen2.5-coder-1.5b-f16.gguf"
EIGHT, EXPERTS = "synth-8b-q4_k_m.gguf", "synth-experts-12-layers.gguf"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One command, and the figure taken from its output."""

    file: str
    figure: str  # decode, prompt, start, or batch
    tokens: int = 48
    ceiling_mib: int | None = None
    options: tuple[str, ...] = ("--draft", "none")


ROWS = {
    "decode": Row(file=CODER, figure="decode"),
    "decode-draft": Row(file=CODER, figure="decode", options=("--draft", "prompt")),
    "prompt": Row(file=CODER, figure="prompt", tokens=1),
    "prompt-0.5b": Row(file=SMALL, figure="prompt", tokens=1),  # not all of its matrices use the tile kernel
    "start": Row(file=CODER, figure="start", tokens=8),
    "batch": Row(file=CODER, figure="batch", tokens=24, options=("--draft", "none", "--parallel", "16")),
    "8b-4000": Row(file=EIGHT, figure="decode", tokens=10, ceiling_mib=4000),
    "8b-4000-prompt": Row(file=EIGHT, figure="prompt", tokens=1, ceiling_mib=4000),
    "f16-2000": Row(file=CODER_F16, figure="decode", tokens=12, ceiling_mib=2000),
    "f16-2000-prompt": Row(file=CODER_F16, figure="prompt", tokens=1, ceiling_mib=2000),
    "experts-decode": Row(file=EXPERTS, figure="decode"),
    "experts-prompt": Row(file=EXPERTS, figure="prompt", tokens=1),
}


def command(row: Row, models: Path, folder: Path) -> list[str]:
    """Arguments of the row's command, without the interpreter."""
    model = str(models / row.file)
    memory = ["--memory", f"{row.ceiling_mib}MiB"] if row.ceiling_mib else []
    if row.figure == "batch":
        return [
            "batch",
            str(_requests(folder, row.tokens)),
            str(folder / "out.jsonl"),
            "-m",
            model,
            *row.options,
            *memory,
        ]
    text = LONG if row.figure == "prompt" else SHORT
    shown = [] if row.figure == "start" else ["--raw"]
    return ["run", model, text, "-t", "0", "-n", str(row.tokens), "--json", "-q", *shown, *row.options, *memory]


def _requests(folder: Path, tokens: int) -> Path:
    lines = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/chat/completions",
         "body": {"messages": [{"role": "user", "content": f"Write {i + 2} lines about rivers."}], "max_tokens": tokens,
                  "temperature": 0}}
        for i in range(16)
    ]  # fmt: skip
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "out.jsonl").unlink(missing_ok=True)
    return path


def _home(source: Path, models: Path, folder: Path) -> Path:
    """The folder of a profile in the package's format, measured once."""
    schema = re.search(r"^SCHEMA = (\d+)", (source / "headrace/plan/profile.py").read_text(), re.MULTILINE)
    assert schema is not None
    home = folder / schema.group(1)
    if not home.exists():
        home.mkdir()
        environment = {**os.environ, "PYTHONPATH": str(source), "HEADRACE_HOME": str(home)}
        probe = [sys.executable, "-c", "from headrace.cli import main; main()", "probe", str(models / CODER)]
        subprocess.run(probe, env=environment, capture_output=True, text=True, check=True)
    return home


def measure(source: Path, row: Row, models: Path, folder: Path) -> float:
    """The row's figure with the package in `source`."""
    program = [sys.executable, "-c", "from headrace.cli import main; main()", *command(row, models, folder)]
    os.environ |= {"PYTHONPATH": str(source), "HEADRACE_HOME": str(_home(source, models, folder))}
    start = time.perf_counter()
    if row.ceiling_mib:
        printed = run_under(row.ceiling_mib * MIB, program).stdout
    else:
        printed = subprocess.run(program, capture_output=True, text=True, check=True).stdout
    spent = time.perf_counter() - start
    if row.figure == "start":
        return 1 / spent
    if row.figure == "batch":
        answers = [json.loads(line)["response"]["body"] for line in (folder / "out.jsonl").read_text().splitlines()]
        return float(sum(answer["usage"]["completion_tokens"] for answer in answers) / spent)
    found = json.loads(printed)
    timings = found["timings"]
    if row.figure == "prompt":
        return float(found["usage"]["prompt_tokens"] / timings["ttft_s"])
    return float(timings["decode_tok_per_s"])


def compare(
    rows: Sequence[str], before: Path, models: Path, rounds: int, say: Callable[[str], None]
) -> dict[str, object]:
    """Figures of every round, by row."""
    here = Path(__file__).resolve().parent.parent / "src"
    found: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as name:
        for row in rows:
            figures: dict[str, list[float]] = {"before": [], "after": []}
            for number in range(rounds):
                order = (("before", before), ("after", here))
                for which, source in order if number % 2 == 0 else order[::-1]:
                    figures[which].append(measure(source, ROWS[row], models, Path(name)))
            old, new = (statistics.median(figures[which]) for which in ("before", "after"))
            each = [b / a for a, b in zip(figures["before"], figures["after"], strict=True)]
            say(f"{row:16} {old:8.3f} {new:8.3f}  {new / old:5.3f}x  (each {min(each):.3f} to {max(each):.3f})")
            found[row] = figures
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="the src folder of the other commit")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", type=Path, default=HOME)
    parser.add_argument("--out", type=Path, default=Path("in_turns.json"))
    given = parser.parse_args()
    print("row                before    after   ratio", flush=True)
    found = compare(
        given.rows.split(","), given.before.resolve(), given.models, given.rounds, lambda line: print(line, flush=True)
    )
    before = subprocess.run(
        ["git", "describe", "--always"], cwd=given.before, capture_output=True, text=True, check=False
    )
    given.out.write_text(json.dumps({**provenance(), "before": before.stdout.strip(), "rows": found}, indent=1))


if __name__ == "__main__":
    main()
