"""What the system says of this process: resident memory now and at its peak."""

import ctypes
import gc
import re
from contextlib import suppress
from pathlib import Path


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most that this process has had resident. (`getrusage` would include what the parent had before the exec.)"""
    return _status("VmHWM")


def release_unused() -> None:
    """Collect garbage and give freed memory back to the system, after building things that were large."""
    gc.collect()
    with suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def _status(key: str) -> int:
    match = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(match.group(1)) * 1024 if match else 0
