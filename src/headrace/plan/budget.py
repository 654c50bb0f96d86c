"""How much memory the process may have: what the user says, or what cgroup and free memory leave, with a margin."""

import re
from dataclasses import dataclass
from pathlib import Path

from headrace.cgroup import groups, lines_of
from headrace.units import gib, parse_bytes

# Left to the system when nobody says how much to take: page cache, other programs, our own errors.
MARGIN = 0.1


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A ceiling for the whole process in bytes, and why it is that; and one for pinned weights alone, if wanted."""

    nbytes: int
    reason: str
    pinned_limit_bytes: int | None = None


def given_budget(nbytes: int) -> Budget:
    """The ceiling that the user asked for."""
    return Budget(nbytes=nbytes, reason=f"--memory {gib(nbytes)}")


def budget_of(memory: str | int | Budget | None) -> Budget:
    """The ceiling for the process: what is given, as a size or ready made, else what the system leaves."""
    if isinstance(memory, Budget):
        return memory
    return detect_budget() if memory is None else given_budget(parse_bytes(memory))


def detect_budget(root: Path = Path("/")) -> Budget:
    """The smaller of what the cgroup and the free memory leave, less the margin. `root` is for tests."""
    free = _available(root)
    source = f"{gib(free)} of memory is available"
    limit = _cgroup_room(root)
    if limit is not None and limit < free:
        free, source = limit, f"the cgroup leaves {gib(limit)}"
    return Budget(nbytes=int(free * (1 - MARGIN)), reason=f"no --memory; {source}, less {MARGIN:.0%}")


def _available(root: Path) -> int:
    text = (root / "proc/meminfo").read_text()
    match = re.search(r"MemAvailable:\s+(\d+) kB", text) or re.search(r"MemFree:\s+(\d+) kB", text)
    return int(match.group(1)) * 1024 if match else 0


def _cgroup_room(root: Path) -> int | None:
    """What the tightest cgroup above this process leaves; None without a limit."""
    rooms = []
    for group, unified in groups(root, "memory"):
        limit, used = ("memory.max", r"^anon (\d+)") if unified else ("memory.limit_in_bytes", r"^total_rss (\d+)")
        room = _room(group, limit, used)
        if room is not None:
            rooms.append(room)
    return min(rooms, default=None)


def _room(group: Path, limit_name: str, used_pattern: str) -> int | None:
    lines = lines_of(group / limit_name)
    if not lines or not lines[0].isdigit() or int(lines[0]) >= 1 << 60:
        return None
    used = re.search(used_pattern, "\n".join(lines_of(group / "memory.stat")), re.MULTILINE)
    return max(0, int(lines[0]) - (int(used.group(1)) if used else 0))
