"""A cursor over the header of an untrusted file: every read is bounded by the file, and memory by what was read.

Bytes come by `pread` in growing steps rather than by mapping, so that a file which shrinks meanwhile is an error
and not a signal, and a 40 GB file costs the few megabytes of its header.
"""

import os
import struct

from headrace.errors import CheckpointError

FIRST_READ_BYTES = 1 << 20


class Header:
    """Reads little-endian values from the start of a file, in order.

    Raises `CheckpointError` where a value would lie beyond the end of the file.
    """

    def __init__(self, fd: int, path: str):
        self.path = path
        self.size = os.fstat(fd).st_size
        self.position = 0
        self._fd = fd
        self._bytes = b""

    def require(self, count: int, what: str) -> None:
        """Make the next `count` bytes available."""
        end = self.position + count
        if end > self.size:
            raise CheckpointError(
                f"{self.path} is truncated: {what} needs {count} bytes at {self.position}, the file ends at {self.size}",
                hint="download or copy the file again",
            )
        if end > len(self._bytes):
            self._grow(end)

    def _grow(self, end: int) -> None:
        target = min(self.size, max(end, 2 * len(self._bytes), FIRST_READ_BYTES))
        pieces = [self._bytes]
        have = len(self._bytes)
        while have < target:
            piece = os.pread(self._fd, target - have, have)
            if not piece:
                raise CheckpointError(f"{self.path} ended at {have} bytes while its header was read")
            pieces.append(piece)
            have += len(piece)
        self._bytes = b"".join(pieces)

    def unpack(self, layout: str, what: str) -> tuple[int | float | bool, ...]:
        """The next values of a `struct` layout (little-endian, unpadded)."""
        layout = "<" + layout
        count = struct.calcsize(layout)
        self.require(count, what)
        values = struct.unpack_from(layout, self._bytes, self.position)
        self.position += count
        return values

    def integer(self, code: str, what: str) -> int:
        """The next single integer."""
        return int(self.unpack(code, what)[0])

    def raw(self, count: int, what: str) -> bytes:
        """The next `count` bytes."""
        self.require(count, what)
        start = self.position
        self.position += count
        return self._bytes[start : self.position]

    def skip_strings(self, count: int, what: str) -> None:
        """Step over `count` length-prefixed strings without making them."""
        position, buffer = self.position, self._bytes
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if position + 8 > len(buffer):
                self.position = position
                self.require(8, what)
                buffer = self._bytes
            position += 8 + unpack(buffer, position)[0]
        self.position = position
        self.require(0, what)
