"""The memory budget of the process: the user's, or the smaller of cgroup limit and free memory less a margin."""

import re
from dataclasses import dataclass
from pathlib import Path

from headrace.cgroup import groups, lines_of
from headrace.units import gib, parse_bytes

# Share of memory left to the system without --memory: page cache, other programs, our own errors.
MARGIN = 0.1


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Max bytes of the whole process, the reason for it, and optionally max bytes of pinned weights."""

    nbytes: int
    reason: str
    pinned_limit_bytes: int | None = None


def given_budget(nbytes: int) -> Budget:
    """Budget from --memory."""
    return Budget(nbytes=nbytes, reason=f"--memory {gib(nbytes)}")


def budget_of(memory: str | int | Budget | None) -> Budget:
    """Budget from a size or a ready `Budget`; None detects it."""
    if isinstance(memory, Budget):
        return memory
    return detect_budget() if memory is None else given_budget(parse_bytes(memory))


def detect_budget(root: Path = Path("/")) -> Budget:
    """The smaller of free memory and cgroup headroom, less the margin. `root` is for tests."""
    free = _available(root)
    source = f"{gib(free)} of memory is available"
    limit = _cgroup_free_bytes(root)
    if limit is not None and limit < free:
        free, source = limit, f"the cgroup leaves {gib(limit)}"
    return Budget(nbytes=int(free * (1 - MARGIN)), reason=f"no --memory; {source}, less {MARGIN:.0%}")


def _available(root: Path) -> int:
    text = (root / "proc/meminfo").read_text()
    match = re.search(r"MemAvailable:\s+(\d+) kB", text) or re.search(r"MemFree:\s+(\d+) kB", text)
    return int(match.group(1)) * 1024 if match else 0


def _cgroup_free_bytes(root: Path) -> int | None:
    """Free bytes under the tightest cgroup above this process; None without a limit."""
    candidates = []
    for group, unified in groups(root, "memory"):
        limit, used = ("memory.max", r"^anon (\d+)") if unified else ("memory.limit_in_bytes", r"^total_rss (\d+)")
        free_bytes = _group_free_bytes(group, limit, used)
        if free_bytes is not None:
            candidates.append(free_bytes)
    return min(candidates, default=None)


def _group_free_bytes(group: Path, limit_name: str, used_pattern: str) -> int | None:
    lines = lines_of(group / limit_name)
    if not lines or not lines[0].isdigit() or int(lines[0]) >= 1 << 60:
        return None
    used = re.search(used_pattern, "\n".join(lines_of(group / "memory.stat")), re.MULTILINE)
    return max(0, int(lines[0]) - (int(used.group(1)) if used else 0))
