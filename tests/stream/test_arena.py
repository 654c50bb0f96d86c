"""Memory that is taken before it is written."""

from headrace.process import resident_bytes
from headrace.stream import Arena

MIB = 1 << 20


def test_taking_memory_leaves_what_is_in_it() -> None:
    arena = Arena(48 * MIB + 5)
    arena.view[3 * MIB] = 7
    before = resident_bytes()
    assert arena.populate(2 * MIB + 1, 30 * MIB)
    taken = resident_bytes() - before
    assert 26 * MIB < taken < 34 * MIB
    assert arena.view[3 * MIB] == 7
    assert arena.populate(40 * MIB, 1 << 40)  # as far as there is memory
    assert taken < resident_bytes() - before < 50 * MIB
