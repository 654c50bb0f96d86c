"""The engine's own runs over models, ceilings, sequences and drafts, on which `docs/accuracy.md` scores the planner.

    python benchmarks/engine_runs.py --models DIR --out runs.jsonl [--only qwen]

DIR holds the files of benchmarks/run.py; small models are fetched. The disk is measured before every run, as its rate
changes from hour to hour on shared machines; everything else is predicted with the probe's rates. Runs that do not fit
are left out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from models import HOME

MIB = 1 << 20
PROMPTS = [
    "Write a function that reads a file and counts its words.",
    "The water wheel is one of the oldest machines that",
    "List three reasons why bread rises, and explain each.",
    "def quicksort(values):\n",
]


@dataclass(frozen=True)
class Run:
    file: str
    memory_mib: int
    tokens: int
    sequences: int = 1
    draft: str = "none"  # prompt, self, or a file


GEMMA, QWEN_S, QWEN = (
    "gemma-3-270m-q4_k_m.gguf",
    "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
)
F16, SYNTH = "qwen2.5-coder-1.5b-f16.gguf", "synth-8b-q4_k_m.gguf"
GRID = [
    *(Run(GEMMA, m, 48, s) for m in (920, 1000, 4000) for s in (1, 4)),
    *(Run(QWEN_S, m, 32, s) for m in (850, 950, 3000) for s in (1, 4, 8)),
    *(Run(QWEN, m, 24, s) for m in (1000, 1200, 1500, 4000) for s in (1, 4)),
    Run(QWEN, 1500, 32, 1, "prompt"),
    Run(QWEN, 1700, 32, 1, QWEN_S),
    Run(QWEN, 1300, 24, 8),
    *(Run(F16, m, 12, s) for m in (1500, 2000, 3000, 6000) for s in (1, 4)),
    Run(F16, 2000, 32, 1, QWEN_S),
    Run(F16, 2500, 32, 1, QWEN_S),
    Run(F16, 3000, 32, 1, "self"),
    Run(F16, 2500, 24, 1, "prompt"),
    Run(F16, 2500, 10, 8),
    *(Run(SYNTH, m, 7, s) for m in (2500, 3000, 4000, 5000, 9000) for s in (1, 4)),
    Run(SYNTH, 4000, 6, 16),
    Run(SYNTH, 3500, 6, 8),
]


def one(run: Run, paths: dict[str, Path]) -> None:
    """Measure the disk, run, and keep the record, in a separate process."""
    from headrace.api import load
    from headrace.plan.profile import load_profile
    from headrace.plan.record import keep_record
    from headrace.probe import measure_disk

    path = paths[run.file]
    profile = load_profile()
    assert profile is not None, "probe first"
    before = measure_disk(path, total_bytes=1 << 29)
    rates = dict(profile.disk_bytes_per_s) | {str(path.stat().st_dev): before}
    draft = str(paths[run.draft]) if run.draft in paths else run.draft
    prompts = [PROMPTS[i % len(PROMPTS)] + "\n" * (i // len(PROMPTS)) for i in range(run.sequences)]
    with load(
        str(path),
        memory=run.memory_mib * MIB,
        context_tokens=256,
        prompt_tokens=24,
        sequences=run.sequences,
        draft=draft,
        profile=replace(profile, disk_bytes_per_s=rates),
    ) as model:
        model.generate(prompts, max_tokens=run.tokens, raw=True)
        record = model.record()
    after = measure_disk(path, total_bytes=1 << 29)
    # A disk whose speed changed during the run says nothing about the planner: the record keeps both rates.
    keep_record(record)
    print(json.dumps({"disk_before": before, "disk_after": after, "record": asdict(record)}))


def middle(rounds: list[Path], out: Path) -> None:
    """Write the median round of every run's groups of passes, by its ratio to the prediction. Disk speed differs by round."""
    runs: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for path in rounds:
        for record in map(json.loads, path.read_text().splitlines()):
            key = ("model", "weights_bytes", "budget_bytes", "sequences", "draft")
            runs.setdefault(tuple(str(record[name]) for name in key), []).append(record)

    def ratio(group: dict[str, Any]) -> float:
        return float(group["seconds"] / max(group["disk_s"], group["kernel_s"] + group["layer_s"]))

    with out.open("w") as file:
        for records in runs.values():
            groups: dict[int, list[dict[str, Any]]] = {}
            for group in (group for record in records for group in record["passes"]):
                groups.setdefault(group["rows"], []).append(group)
            kept = [
                sorted(g, key=ratio)[(len(g) - 1) // 2] for _, g in sorted(groups.items()) if 2 * len(g) >= len(records)
            ]
            if kept:
                file.write(json.dumps(records[-1] | {"passes": kept}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=HOME)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--middle", type=Path, nargs="+", help="Merge these rounds into --out instead of running.")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.middle:
        middle(arguments.middle, arguments.out)
        return
    names = {run.file for run in GRID}
    paths = {name: next((d / name for d in (arguments.models, HOME) if (d / name).exists()), Path()) for name in names}
    if arguments.one:
        one(Run(**json.loads(arguments.one)), paths)
        return
    os.environ["HEADRACE_HOME"] = str(arguments.out.resolve().parent / "engine-runs-profile")
    from headrace.plan.profile import load_profile, save_profile
    from headrace.probe import probe

    if load_profile() is None:
        save_profile(probe(next(path for path in paths.values() if path.is_file())))
    for run in GRID:
        if arguments.only not in run.file or not paths[run.file].is_file():
            continue
        command = [
            sys.executable,
            __file__,
            "--models",
            str(arguments.models),
            "--out",
            str(arguments.out),
            "--one",
            json.dumps(vars(run)),
        ]
        start = time.perf_counter()
        result = subprocess.run(command, capture_output=True, text=True, timeout=900)
        if result.returncode:
            print(f"{run}: {result.stderr.strip().splitlines()[-1:]}", file=sys.stderr, flush=True)
            continue
        found = json.loads(result.stdout.splitlines()[-1])
        record = found["record"]
        with arguments.out.open("a") as file:
            file.write(json.dumps(record | {"passes": record["passes"]}) + "\n")
        error = record["predicted_s_per_token"] / record["s_per_token"] - 1
        disks = statistics.mean((found["disk_before"], found["disk_after"])) / 1e9
        print(
            f"{run}: {record['s_per_token']:.4f} s, predicted {error:+.0%}, disk {disks:.2f} GB/s, "
            f"{time.perf_counter() - start:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
