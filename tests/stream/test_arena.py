"""Memory that is populated before it is written."""

from headrace.process import resident_bytes
from headrace.stream import Arena

MIB = 1 << 20


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
