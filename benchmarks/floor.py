"""Runs at the floor and a little above it, each in a cgroup whose ceiling is the budget: killed or above it is a defect.

    python benchmarks/floor.py MODEL.gguf... [--prompt-tokens 300]

Prints one line per run: budget, the cgroup's peak, our own peak, exit code. Needs root.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from ceiling import run_under

MIB = 1 << 20
STEPS = (1.0, 1.05, 1.2, 1.5)


def floor_mib(command: list[str]) -> int:
    """Smallest budget of a run: the one that a refusal names, asked twice, since the second knows the exact prompt."""
    floor = 1
    while (refused := run_under(None, [*command, f"{floor}MiB"])).code != 0:
        found = re.search(r"--memory (\d+)MiB", refused.stderr)
        assert found is not None, refused.stderr
        floor = int(found.group(1))
    return floor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=300)
    arguments = parser.parse_args()
    failures = 0
    for model in arguments.models:
        prompt = "water " * arguments.prompt_tokens
        command = [sys.executable, "-c", "from headrace.cli import main; main()", "run", str(model), prompt, "--raw"]
        command += ["-n", "3", "-t", "0", "--json", "-q", "--memory"]
        floor = floor_mib(command)
        for step in STEPS:
            budget = int(floor * step)
            result = run_under(budget * MIB, [*command, f"{budget}MiB"])
            own = json.loads(result.stdout)["memory"]["peak_bytes"] / MIB if result.code == 0 else 0.0
            failures += result.code != 0 or own > budget
            print(
                f"{model.name}: budget {budget} MiB, cgroup peak {result.peak_bytes / MIB:.0f} MiB, own peak {own:.0f} MiB,"
                f" exit {result.code}{' ' + result.stderr[-300:] if result.code else ''}",
                flush=True,
            )
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
