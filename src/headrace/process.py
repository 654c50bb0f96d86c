"""Memory of this process: resident now and at its peak, and returned to the system. Refusal of forked processes."""

import ctypes
import gc
import os
import re
from contextlib import suppress
from pathlib import Path

from headrace.errors import UsageError


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """Peak resident memory of this process. (`getrusage` would include the parent's memory before the exec.)"""
    return _status("VmHWM")


def release_unused() -> None:
    """Collect garbage and return freed memory to the system, after building large objects."""
    gc.collect()
    with suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def return_pages(address: int, nbytes: int) -> None:
    """Return the whole pages of a range of anonymous memory to the system. Their contents are lost."""
    first = -(-address // PAGE_BYTES) * PAGE_BYTES
    last = (address + nbytes) // PAGE_BYTES * PAGE_BYTES
    if first < last:
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_DONTNEED)


PAGE_BYTES = 4096
_MADV_DONTNEED = 4


def keep_freed_memory() -> None:
    """Let the allocator reuse what a pass frees instead of returning it to the system after every tensor.

    Activations of a prefill are tens of megabytes, allocated and freed hundreds of times in a pass. Mapping their pages
    anew each time made 512 rows a quarter slower. The largest are mapped anew nonetheless, because they would fragment
    the heap. It then takes 260 to 290 MiB instead of 190 for 512 rows of an 8B shape.
    """
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # M_* of glibc's malloc.h
    with suppress(OSError, AttributeError):  # only glibc has it
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, (1 << 31) - 1)
        libc.mallopt(top_pad, 16 << 20)
        libc.mallopt(mmap_threshold, 4 << 20)


def not_after_a_fork() -> None:
    """Raise `UsageError` in a process that was forked after the first call.

    The threads of torch and ggml do not exist there, and waiting for them would never end.
    """
    first = _FIRST_CALL.setdefault("process", os.getpid())
    if first != os.getpid():
        raise UsageError(
            "a model was loaded before the process forked, so no other can be loaded here",
            hint="start the process with `spawn`, or load models only in children",
        )


_FIRST_CALL: dict[str, int] = {}


def _status(key: str) -> int:
    match = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(match.group(1)) * 1024 if match else 0
