"""Budget detection on file trees of machines and containers."""

import os
from pathlib import Path

import pytest

from headrace.cgroup import usable_cores
from headrace.plan import detect_budget, given_budget
from headrace.units import GIB, MIB

NO_LIMIT_V1 = 9223372036854771712  # value of version 1 without a limit: 2**63 rounded down to a page
LESS_MARGIN = 0.9


def machine(root: Path, *, available: int, cgroup: str | None = None, files: dict[str, str] | None = None) -> Path:
    """A root with this much available memory, this /proc/self/cgroup, and these files below /sys/fs/cgroup."""
    write(root / "proc/meminfo", f"MemTotal: {1 << 30} kB\nMemFree: 1 kB\nMemAvailable: {available // 1024} kB\n")
    if cgroup is not None:
        write(root / "proc/self/cgroup", cgroup)
    for name, text in (files or {}).items():
        write(root / "sys/fs/cgroup" / name, text)
    return root


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def v2(limits: dict[str, str], anon: int = 0) -> dict[str, str]:
    """A version 2 tree: `memory.max` by group ("" is the root), each group using `anon` bytes."""
    files = {"cgroup.controllers": "cpu memory io\n"}
    for group, limit in limits.items():
        files[f"./{group}/memory.max"] = f"{limit}\n"
        files[f"./{group}/memory.stat"] = f"inactive_anon {9 * GIB}\nanon {anon}\nfile {7 * GIB}\n"
    return files


def v1(limits: dict[str, int], rss: int = 0) -> dict[str, str]:
    files = {}
    for group, limit in limits.items():
        files[f"memory/{group}/memory.limit_in_bytes"] = f"{limit}\n"
        files[f"memory/{group}/memory.stat"] = f"cache {7 * GIB}\nrss {9 * GIB}\ntotal_rss {rss}\n"
    return files


def test_without_a_cgroup_the_available_memory_counts(tmp_path: Path) -> None:
    budget = detect_budget(machine(tmp_path, available=8 * GIB))

    assert budget.nbytes == int(8 * GIB * LESS_MARGIN)
    assert budget.reason == "no --memory; 8.00 GiB of memory is available, less 10%"


def test_an_old_kernel_without_available_memory_reports_free_memory(tmp_path: Path) -> None:
    write(tmp_path / "proc/meminfo", f"MemTotal: {16 * MIB} kB\nMemFree: {2 * MIB} kB\n")

    assert detect_budget(tmp_path).nbytes == int(2 * GIB * LESS_MARGIN)


@pytest.mark.parametrize("limit", ["max", str(1 << 60), "", "nonsense"])
def test_a_group_of_version_2_without_a_limit_does_not_count(tmp_path: Path, limit: str) -> None:
    root = machine(tmp_path, available=8 * GIB, cgroup="0::/a\n", files=v2({"": limit, "a": limit}))

    assert detect_budget(root).nbytes == int(8 * GIB * LESS_MARGIN)


def test_a_limit_of_version_2_counts_less_what_is_used_without_the_page_cache(tmp_path: Path) -> None:
    root = machine(tmp_path, available=8 * GIB, cgroup="0::/a\n", files=v2({"a": str(4 * GIB)}, anon=GIB))

    budget = detect_budget(root)

    assert budget.nbytes == int(3 * GIB * LESS_MARGIN)
    assert budget.reason == "no --memory; the cgroup leaves 3.00 GiB, less 10%"


def test_a_limit_above_the_available_memory_does_not_count(tmp_path: Path) -> None:
    root = machine(tmp_path, available=2 * GIB, cgroup="0::/a\n", files=v2({"a": str(4 * GIB)}))

    budget = detect_budget(root)

    assert budget.nbytes == int(2 * GIB * LESS_MARGIN)
    assert "2.00 GiB of memory is available" in budget.reason


@pytest.mark.parametrize("tight", ["", "system.slice", "system.slice/job.service"])
def test_the_tightest_group_of_version_2_from_leaf_to_root_counts(tmp_path: Path, tight: str) -> None:
    groups = {"": "max", "system.slice": str(6 * GIB), "system.slice/job.service": "max"} | {tight: str(2 * GIB)}
    root = machine(tmp_path, available=8 * GIB, cgroup="0::/system.slice/job.service\n", files=v2(groups))

    assert detect_budget(root).nbytes == int(2 * GIB * LESS_MARGIN)


def test_a_neighbouring_group_does_not_count(tmp_path: Path) -> None:
    groups = {"a": str(6 * GIB), "b": str(GIB), "a/below": str(GIB)}
    root = machine(tmp_path, available=8 * GIB, cgroup="0::/a\n", files=v2(groups))

    assert detect_budget(root).nbytes == int(6 * GIB * LESS_MARGIN)


def test_a_container_of_version_2_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    root = machine(tmp_path, available=8 * GIB, cgroup="0::/\n", files=v2({"": str(3 * GIB)}))

    assert detect_budget(root).nbytes == int(3 * GIB * LESS_MARGIN)


def test_a_group_outside_the_namespace_does_not_fail(tmp_path: Path) -> None:
    root = machine(tmp_path, available=8 * GIB, cgroup="0::/../other\n", files=v2({"": str(3 * GIB)}))

    assert detect_budget(root).nbytes == int(3 * GIB * LESS_MARGIN)


def test_a_group_that_uses_more_than_its_limit_leaves_nothing(tmp_path: Path) -> None:
    root = machine(tmp_path, available=8 * GIB, cgroup="0::/a\n", files=v2({"a": str(GIB)}, anon=2 * GIB))

    assert detect_budget(root).nbytes == 0


def test_a_limit_without_statistics_counts_whole(tmp_path: Path) -> None:
    files = {"cgroup.controllers": "memory", "a/memory.max": str(GIB)}
    root = machine(tmp_path, available=8 * GIB, cgroup="0::/a\n", files=files)

    assert detect_budget(root).nbytes == int(GIB * LESS_MARGIN)


def test_a_limit_of_version_1_counts_less_what_is_used_by_the_group_and_those_below(tmp_path: Path) -> None:
    lines = "5:cpu,cpuacct:/elsewhere\n4:memory:/docker/abc\n1:name=systemd:/docker/abc\n"
    root = machine(tmp_path, available=8 * GIB, cgroup=lines, files=v1({"docker/abc": 4 * GIB}, rss=GIB))

    assert detect_budget(root).nbytes == int(3 * GIB * LESS_MARGIN)


@pytest.mark.parametrize("tight", ["", "docker", "docker/abc"])
def test_the_tightest_group_of_version_1_from_leaf_to_root_counts(tmp_path: Path, tight: str) -> None:
    groups = {"": NO_LIMIT_V1, "docker": 6 * GIB, "docker/abc": NO_LIMIT_V1} | {tight: 2 * GIB}
    root = machine(tmp_path, available=8 * GIB, cgroup="4:memory:/docker/abc\n", files=v1(groups))

    assert detect_budget(root).nbytes == int(2 * GIB * LESS_MARGIN)


def test_a_container_of_version_1_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    # /proc/self/cgroup names the host's path, which is not mounted inside.
    root = machine(tmp_path, available=8 * GIB, cgroup="4:memory:/docker/abc\n", files=v1({"": 3 * GIB}))

    assert detect_budget(root).nbytes == int(3 * GIB * LESS_MARGIN)


def test_no_limit_of_version_1_is_a_huge_number_that_does_not_count(tmp_path: Path) -> None:
    root = machine(tmp_path, available=8 * GIB, cgroup="4:memory:/a\n", files=v1({"a": NO_LIMIT_V1}))

    assert "available" in detect_budget(root).reason


def test_memory_mounted_with_other_controllers_of_version_1_counts(tmp_path: Path) -> None:
    root = machine(tmp_path, available=8 * GIB, cgroup="4:cpu,memory:/a\n", files=v1({"a": GIB}))

    assert detect_budget(root).nbytes == int(GIB * LESS_MARGIN)


def test_a_hybrid_of_both_versions_takes_the_limit_of_version_1(tmp_path: Path) -> None:
    # Version 2 is mounted at /sys/fs/cgroup/unified there, without the memory controller.
    files = v1({"a": GIB}) | {"unified/cgroup.controllers": "", "unified/a/cgroup.procs": "1"}
    root = machine(tmp_path, available=8 * GIB, cgroup="4:memory:/a\n0::/a\n", files=files)

    assert detect_budget(root).nbytes == int(GIB * LESS_MARGIN)


def test_a_hybrid_of_both_versions_takes_a_limit_of_version_2(tmp_path: Path) -> None:
    files = {"unified/a/memory.max": str(2 * GIB), "unified/cgroup.controllers": "memory"}
    root = machine(tmp_path, available=8 * GIB, cgroup="0::/a\n", files=files)

    assert detect_budget(root).nbytes == int(2 * GIB * LESS_MARGIN)


def test_a_group_with_a_colon_in_its_name_is_found(tmp_path: Path) -> None:
    root = machine(tmp_path, available=8 * GIB, cgroup="0::/a:b\n", files=v2({"a:b": str(GIB)}))

    assert detect_budget(root).nbytes == int(GIB * LESS_MARGIN)


def test_this_machine_has_a_budget() -> None:
    assert detect_budget().nbytes > 0


def test_a_given_budget_is_kept_to_the_byte_with_its_reason() -> None:
    budget = given_budget(4 * GIB + 1)

    assert budget.nbytes == 4 * GIB + 1
    assert budget.reason == "--memory 4.00 GiB"


@pytest.mark.parametrize(
    ("cgroup", "files", "cores"),
    [
        ("0::/a\n", {"cgroup.controllers": "cpu\n", "a/cpu.max": "max 100000\n"}, 64),
        ("0::/a/b\n", {"cgroup.controllers": "cpu\n", "a/cpu.max": "250000 100000\n"}, 2),
        ("0::/a\n", {"cgroup.controllers": "cpu\n", "a/cpu.max": "50000 100000\n"}, 1),
        ("4:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "300000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 3),
        ("4:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 64),
        (None, {}, 64),
    ],
)
def test_a_quota_of_cores_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cgroup: str | None, files: dict[str, str], cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert usable_cores(machine(tmp_path, available=GIB, cgroup=cgroup, files=files)) == cores
