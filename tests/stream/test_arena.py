"""Memory that is populated before it is written, or is the pages of a file."""

import os
from pathlib import Path

import pytest

from headrace.process import resident_bytes
from headrace.stream import Arena

MIB = 1 << 20
PAGE = 4096


def test_populating_memory_keeps_its_contents() -> None:
    arena = Arena(48 * MIB + 5)
    arena.view[3 * MIB] = 7
    before = resident_bytes()
    assert arena.populate(2 * MIB + 1, 30 * MIB)
    populated = resident_bytes() - before
    assert 26 * MIB < populated < 34 * MIB
    assert arena.view[3 * MIB] == 7
    assert arena.populate(40 * MIB, 1 << 40)  # as far as there is memory
    assert populated < resident_bytes() - before < 50 * MIB


def test_pages_of_a_file_take_the_place_of_memory(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(PAGE) + b"a" * PAGE + b"b" * PAGE)
    arena = Arena(4 * PAGE)
    arena.view[:] = b"." * 4 * PAGE
    fd = os.open(tmp_path / "f", os.O_RDONLY)
    assert arena.map(PAGE, 2 * PAGE, fd, PAGE)
    os.close(fd)
    assert bytes(arena.view) == b"." * PAGE + b"a" * PAGE + b"b" * PAGE + b"." * PAGE


@pytest.mark.parametrize("path", ["/proc/self/status", "/dev/null"])
def test_where_a_file_cannot_be_mapped_the_memory_stays_ours(path: str) -> None:
    arena = Arena(4 * PAGE)
    fd = os.open(path, os.O_RDONLY)
    assert not arena.map(PAGE, PAGE, fd, 0)
    os.close(fd)
    arena.view[:] = b"." * 4 * PAGE
    assert bytes(arena.view) == b"." * 4 * PAGE


def test_a_page_behind_the_end_of_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(PAGE))
    fd = os.open(tmp_path / "f", os.O_RDONLY)
    with pytest.raises(OSError, match="Input/output error"):
        Arena(4 * PAGE).map(0, 2 * PAGE, fd, 0)
    os.close(fd)
