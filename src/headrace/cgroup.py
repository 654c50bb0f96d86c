"""The control groups (version 1 or 2) above this process, and the limits that they set."""

import os
from collections.abc import Iterator
from pathlib import Path


def groups(root: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """Folders of the groups above this process with this controller, and whether each is version 2."""
    for line in lines_of(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base = root / "sys/fs/cgroup"
            if not (base / "cgroup.controllers").exists():
                base = root / "sys/fs/cgroup/unified"
        elif controller in controllers.split(","):
            base = root / "sys/fs/cgroup" / controller
        else:
            continue
        folder = base / path.lstrip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(base):
                break
            yield group, controllers == ""


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use, by CPU affinity and quota. `root` is for tests."""
    cores = len(os.sched_getaffinity(0))
    for group, unified in groups(root, "cpu"):
        if unified:
            words = " ".join(lines_of(group / "cpu.max")).split()
        else:
            words = [*lines_of(group / "cpu.cfs_quota_us"), *lines_of(group / "cpu.cfs_period_us")]
        if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):
            cores = min(cores, int(words[0]) // int(words[1]))
    return max(1, cores)


def lines_of(path: Path) -> list[str]:
    """The lines of a small file; none if it cannot be read."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
