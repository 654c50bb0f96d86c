"""Result files: what was measured, on which machine, at which commit, by which command. One JSON file per run in `results/`."""

import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from headrace.plan.profile import machine_name

FOLDER = Path(__file__).resolve().parent / "results"


def provenance() -> dict[str, str]:
    """Date, machine, commit and command of this run."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=FOLDER.parent, capture_output=True, text=True, check=False
    )
    return {
        "date": datetime.now().isoformat(timespec="minutes"),
        "machine": machine_name(),
        "commit": commit.stdout.strip() or "unknown",
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *_without_paths(sys.argv[1:])]),
    }


def _without_paths(arguments: list[str]) -> list[str]:
    """Folders of this machine as `DIR`."""
    return ["DIR" if "/" in one else one for one in arguments]


def load(kind: str) -> list[dict[str, Any]]:
    """Every result file of a kind, the oldest first: files are named `DATE-MACHINE-KIND.json`."""
    return [json.loads(path.read_text()) for path in sorted(FOLDER.glob(f"*-{kind}.json"))]
