"""Memory that is populated before it is written, or is the pages of a file."""

import ctypes
import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from headrace.process import resident_bytes
from headrace.stream import Arena, arena

MIB = 1 << 20
PAGE = 4096


def test_populating_memory_keeps_its_contents() -> None:
    memory = Arena(48 * MIB + 5)
    memory.view[3 * MIB] = 7
    before = resident_bytes()
    assert memory.populate(2 * MIB + 1, 30 * MIB)
    populated = resident_bytes() - before
    assert 26 * MIB < populated < 34 * MIB
    assert memory.view[3 * MIB] == 7
    assert memory.populate(40 * MIB, 1 << 40)  # as far as there is memory
    assert populated < resident_bytes() - before < 50 * MIB


def test_pages_of_a_file_take_the_place_of_memory(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(PAGE) + b"a" * PAGE + b"b" * PAGE)
    memory = Arena(4 * PAGE)
    memory.view[:] = b"." * 4 * PAGE
    fd = os.open(tmp_path / "f", os.O_RDONLY)
    assert memory.map(PAGE, 2 * PAGE, fd, PAGE)
    os.close(fd)
    assert bytes(memory.view) == b"." * PAGE + b"a" * PAGE + b"b" * PAGE + b"." * PAGE


@pytest.mark.parametrize("path", ["/proc/self/status", "/dev/null"])
def test_where_a_file_cannot_be_mapped_the_memory_stays_ours(path: str) -> None:
    memory = Arena(4 * PAGE)
    fd = os.open(path, os.O_RDONLY)
    assert not memory.map(PAGE, PAGE, fd, 0)
    os.close(fd)
    memory.view[:] = b"." * 4 * PAGE
    assert bytes(memory.view) == b"." * 4 * PAGE


def test_memory_that_cannot_come_back_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the limit of mappings, neither the file nor new memory can be mapped."""
    memory = Arena(4 * PAGE)
    failing = SimpleNamespace(mmap=lambda *_: ctypes.set_errno(errno.ENOMEM) or -1, readahead=lambda *_: 0)
    assert arena._can_populate()
    monkeypatch.setattr(arena, "_LIBC", failing)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        memory.map(0, PAGE, 0, 0)


def test_a_page_behind_the_end_of_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(PAGE))
    fd = os.open(tmp_path / "f", os.O_RDONLY)
    with pytest.raises(OSError, match="Input/output error"):
        Arena(4 * PAGE).map(0, 2 * PAGE, fd, 0)
    os.close(fd)
