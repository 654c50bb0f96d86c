"""What the probe measures, on files too small to say much: that it measures, cleans up and refuses."""

from pathlib import Path

import pytest

from headrace.errors import HeadraceError
from headrace.probe import LEAST_READING, MOST_READING, measure_disk, measure_reading
from headrace.units import MIB


def test_disk_and_reading_are_measured_in_a_folder_and_nothing_stays(tmp_path: Path) -> None:
    assert measure_disk(tmp_path, total_bytes=64 * MIB, rounds=1) > 1e6
    share = measure_reading(tmp_path, threads=1, weights_per_s=5e9, total_bytes=64 * MIB)
    assert LEAST_READING <= share <= MOST_READING
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_an_error_with_a_hint(tmp_path: Path) -> None:
    for measure in (measure_disk, lambda target: measure_reading(target, 1, 5e9)):
        with pytest.raises(HeadraceError) as refusal:
            measure(tmp_path / "none" / "file.gguf")
        assert refusal.value.hint
