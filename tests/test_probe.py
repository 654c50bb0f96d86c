"""The probe measures, cleans up and refuses, on small files."""

from collections.abc import Callable
from pathlib import Path

import pytest

from headrace import probe
from headrace.errors import HeadraceError
from headrace.probe import LEAST_IO_CPU_SHARE, MOST_IO_CPU_SHARE, _something_to_read, measure_disk, measure_io_cpu_share
from headrace.units import MIB


def test_disk_and_io_cpu_share_are_measured_in_a_folder_and_no_file_remains(tmp_path: Path) -> None:
    assert measure_disk(tmp_path, total_bytes=64 * MIB, rounds=1) > 1e6
    share = measure_io_cpu_share(tmp_path, threads=1, weights_per_s=5e9, total_bytes=64 * MIB)
    assert LEAST_IO_CPU_SHARE <= share <= MOST_IO_CPU_SHARE
    assert not list(tmp_path.iterdir())


def test_a_file_smaller_than_the_ring_is_not_used_to_measure_the_disk(tmp_path: Path) -> None:
    small = tmp_path / "small.gguf"
    small.write_bytes(bytes(MIB))

    with _something_to_read(small, 64 * MIB) as path:
        assert path.parent == tmp_path
        assert path.stat().st_size == 32 * MIB
    assert list(tmp_path.iterdir()) == [small]


def test_a_missing_folder_is_an_error_with_a_hint(tmp_path: Path) -> None:
    for measure in (measure_disk, lambda target: measure_io_cpu_share(target, 1, 5e9)):
        with pytest.raises(HeadraceError) as refusal:
            measure(tmp_path / "none" / "file.gguf")
        assert refusal.value.hint


@pytest.mark.parametrize(("costs", "matmul_s"), [(0.5, 0.01), (0.9, 0.001), (0.25, 0.1)])
def test_the_io_cpu_share_is_the_time_added_to_the_matmuls(
    costs: float, matmul_s: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The clock advances only with matmuls and reads; for any matmul time, disk stalls do not count."""
    alone_s, now = 0.8, 0.0

    class Timed:
        def __init__(self, *_: object, **__: object) -> None: ...

        def close(self) -> None: ...

        def matmul(self, *_: object) -> None:
            nonlocal now
            now += matmul_s

    def streamed(_path: Path, nbytes: int, _rounds: int, use: Callable[[int], None] | None = None) -> tuple[int, float]:
        if use is None:
            return nbytes, alone_s
        start = now
        use(-(-nbytes // probe.UNIT_BYTES))
        return nbytes, max(alone_s, now - start + costs * alone_s)

    monkeypatch.setattr(probe, "Kernels", Timed)
    monkeypatch.setattr(probe, "_streamed", streamed)
    monkeypatch.setattr(probe.time, "perf_counter", lambda: now)
    (tmp_path / "file").write_bytes(bytes(8192))
    found = measure_io_cpu_share(tmp_path / "file", threads=1, weights_per_s=1e9, total_bytes=64 * MIB)
    assert found == pytest.approx(costs)
