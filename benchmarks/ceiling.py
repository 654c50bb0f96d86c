"""Run a command under a memory ceiling with a cold page cache: a separate cgroup, version 1 or 2. Needs root.

The ceiling counts anonymous memory and page cache together, so a mapped file cannot hide outside it.
"""

import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# A host may take free memory back after seconds, and then a first touch costs up to 2.5 s/GiB. A run right after another
# process would find it warm, so every run starts after a rest.
REST_S = 10


@dataclass(frozen=True)
class Run:
    code: int  # exit code; 137 or -9: the ceiling killed it
    seconds: float
    peak_bytes: int
    stdout: str
    stderr: str


def run_under(limit_bytes: int | None, command: Sequence[str], timeout_s: float = 1200) -> Run:
    """Run to the end; `limit_bytes=None` sets no ceiling."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")
    time.sleep(REST_S)
    group = _make_group(limit_bytes)
    start = time.monotonic()

    def enter() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    try:
        result = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=timeout_s, preexec_fn=enter
        )
        peak_name = "memory.max_usage_in_bytes" if _version_1() else "memory.peak"
        peak = int((group / peak_name).read_text())
        return Run(result.returncode, time.monotonic() - start, peak, result.stdout, result.stderr)
    finally:
        group.rmdir()


def _version_1() -> bool:
    return Path("/sys/fs/cgroup/memory").is_dir()


def _make_group(limit_bytes: int | None) -> Path:
    base = Path("/sys/fs/cgroup/memory" if _version_1() else "/sys/fs/cgroup")
    group = base / f"headrace-bench-{os.getpid()}"
    group.mkdir()
    if limit_bytes is not None and _version_1():
        (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
    elif limit_bytes is not None:
        (group / "memory.max").write_text(str(limit_bytes))
        (group / "memory.swap.max").write_text("0")
    return group
