"""Aligned memory, reserved once. Pages are taken from the system when they are first written."""

import ctypes
import mmap
from contextlib import suppress

from headrace.limits import explained

PAGE_BYTES = 4096
_MADV_POPULATE_WRITE = 23  # Linux 5.14; `mmap` has no name for it


def aligned(start: int, nbytes: int) -> tuple[int, int]:
    """The page-aligned (start, nbytes) that covers a range."""
    first = start - start % PAGE_BYTES
    last = -(-(start + nbytes) // PAGE_BYTES) * PAGE_BYTES
    return first, last - first


class Arena:
    """One block of anonymous memory. With huge pages a direct read into it is 1.4 times as fast as with small ones."""

    def __init__(self, nbytes: int):
        self.nbytes = max(nbytes, PAGE_BYTES)
        try:
            self._map = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise (explained(error) or error) from error
        with suppress(OSError, AttributeError):  # not every kernel has huge pages
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.view = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def populate(self, start: int, nbytes: int) -> bool:
        """Populate the pages of a range now, clipped to the arena, and keep their contents. False: the system cannot.

        On a virtual machine whose host gives memory lazily, a GiB takes 1 to 2.5 s, on bare metal 0.1 to 0.3.
        """
        start, nbytes = aligned(start, max(0, min(nbytes, self.nbytes - start)))
        try:  # by libc: unlike `mmap.madvise`, it runs beside other threads
            madvise = ctypes.CDLL(None).madvise
        except (OSError, AttributeError):
            return False
        failed = madvise(ctypes.c_void_p(self.address + start), ctypes.c_size_t(nbytes), _MADV_POPULATE_WRITE)
        return not failed

    def give_back(self) -> None:
        """Return the pages to the system; their contents are lost."""
        with suppress(OSError, AttributeError):
            self._map.madvise(mmap.MADV_DONTNEED)
