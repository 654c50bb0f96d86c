"""Weights of a file: read into our memory (O_DIRECT where it is allowed, buffered where it is not), or mapped.

Either delivers every requested byte or raises `ReadError` with the file and the offset.
"""

import errno
import fcntl
import mmap
import os
from contextlib import suppress
from typing import Protocol

from headrace.errors import ReadError
from headrace.stream.arena import PAGE_BYTES, Arena, aligned

# Bytes of one request to the disk. Larger ones are split by the kernel, smaller ones each cost a GIL switch.
REQUEST_BYTES = 2 << 20
_NOT_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP)  # errors of a file system that cannot bypass the page cache


class File(Protocol):
    """Interface of the files that the stream reads: tests make one fail, and virtual ones need not exist."""

    def read(self, offset: int, target: memoryview, needed: int) -> int:
        """Fill `target` from `offset`; see `WeightFile.read`."""

    def map(self, offset: int, arena: Arena, start: int, nbytes: int, needed: int) -> bool:
        """Put the file's pages into an arena; see `WeightFile.map`. False: this file has none."""
        return False

    def close(self) -> None:
        """Close the file."""


class WeightFile:
    """An open checkpoint file. `direct`: reads bypass the page cache; if not, `remark` says why."""

    def __init__(self, path: str):
        self.path = path
        self.direct = True
        self.remark = ""
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError as error:
            try:
                self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as refused:
                hint = "raise the limit of open files with `ulimit -n`" if refused.errno == errno.EMFILE else None
                raise ReadError(
                    f"cannot open {path}: {refused.strerror}",
                    hint=hint or "check that the file is there and may be read",
                ) from refused
            self._go_buffered(error)
            return
        with mmap.mmap(-1, PAGE_BYTES) as page, memoryview(page) as view:
            # Some file systems open a file with O_DIRECT and refuse the first read.
            try:
                os.preadv(self._fd, [view], 0)
            except OSError as error:
                if error.errno in _NOT_DIRECT:
                    self._go_buffered(error)

    def _go_buffered(self, error: OSError) -> None:
        """Read through the page cache from now on."""
        fcntl.fcntl(self._fd, fcntl.F_SETFL, fcntl.fcntl(self._fd, fcntl.F_GETFL) & ~os.O_DIRECT)
        self.direct = False
        self.remark = f"read through the page cache: the file system refuses O_DIRECT ({error.strerror})"
        with suppress(OSError, AttributeError):
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)

    def read(self, offset: int, target: memoryview, needed: int) -> int:
        """Fill `target` from a page-aligned offset; at least `needed` bytes of it must come. Returns how many came.

        Raises:
            ReadError: the disk failed, or the file ends before the bytes needed.
        """
        done = 0
        while done < len(target):
            request = target[done : done + REQUEST_BYTES]
            count = self._pread(request, offset + done)
            done += count
            if count < len(request) and (count == 0 or done % PAGE_BYTES):
                break  # the end of the file
        if done < needed:
            raise self._cut(offset + done, offset + needed)
        if not self.direct:
            with suppress(OSError, AttributeError):  # the page cache must not grow beside the budget
                os.posix_fadvise(self._fd, offset, done, os.POSIX_FADV_DONTNEED)
        return done

    def map(self, offset: int, arena: Arena, start: int, nbytes: int, needed: int) -> bool:
        """Put the file's pages from a page-aligned offset on into an arena at `start`, all in memory.

        Returns:
            False: the system cannot map this file, so it must be read.

        Raises:
            ReadError: the disk failed, or the file ends before the bytes needed.
        """
        size = os.fstat(self._fd).st_size
        if size < offset + needed:
            raise self._cut(size, offset + needed)
        try:
            return arena.map(start, min(nbytes, aligned(offset, size - offset)[1]), self._fd, offset)
        except OSError as error:
            raise self._failed(offset, error) from error

    def _cut(self, size: int, expected: int) -> ReadError:
        return ReadError(
            f"{self.path} ended at {size} bytes, weights up to {expected} were expected",
            hint="the file was cut or replaced while in use; restore it and start again",
        )

    def _failed(self, offset: int, error: OSError) -> ReadError:
        return ReadError(
            f"reading {self.path} at {offset} failed: {error.strerror}", hint="check the disk (dmesg, smartctl)"
        )

    def _pread(self, target: memoryview, offset: int) -> int:
        was_direct = self.direct  # other readers may switch to buffered reads meanwhile
        try:
            return os.preadv(self._fd, [target], offset)
        except OSError as error:
            if was_direct and error.errno in _NOT_DIRECT:
                self._go_buffered(error)
                return self._pread(target, offset)
            raise self._failed(offset, error) from error

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
