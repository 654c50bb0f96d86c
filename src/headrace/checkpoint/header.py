"""A cursor over the header of an untrusted file: every read is bounded by the file, and memory by what was read.

`pread` fills a moving window; the file is not mapped. A file that shrinks meanwhile is then an error and not a signal. A
header of gigabytes takes no more memory than its largest requested value.
"""

import struct

from headrace.checkpoint.source import Source
from headrace.errors import CheckpointError

FIRST_READ_BYTES = 1 << 20


class Header:
    """Reads little-endian values from the start of a file, in order.

    Raises `CheckpointError` where a value would lie beyond the end of the file.
    """

    def __init__(self, source: Source):
        self.path = source.path
        self.size = source.size
        self.position = 0
        self._source = source
        self._bytes = b""  # window of the file, from _start
        self._start = 0

    def start(self, count: int) -> bytes:
        """At most the first `count` bytes of the file."""
        self.position = 0
        count = min(count, self.size)
        return self.raw(count, "the start") if count else b""

    def require(self, count: int, what: str) -> None:
        """Make the next `count` bytes available."""
        end = self.position + count
        if end > self.size:
            raise CheckpointError(
                f"{self.path} is truncated: {what} needs {count} bytes at {self.position}, the file ends at {self.size}",
                hint="download or copy the file again",
            )
        if self.position < self._start or end > self._start + len(self._bytes):
            self._fill(count)

    def _fill(self, count: int) -> None:
        """Move the window to the position. A source may return less than a window; `count` bytes are enough."""
        target = min(self.size - self.position, max(count, FIRST_READ_BYTES))
        chunks, have = [], 0
        while have < count:
            try:
                chunk = self._source.pread(target - have, self.position + have)
            except OSError as error:
                raise CheckpointError(f"cannot read {self.path}: {error.strerror}") from error
            if not chunk:
                raise CheckpointError(f"{self.path} ended at {self.position + have} bytes while its header was read")
            chunks.append(chunk)
            have += len(chunk)
        self._bytes, self._start = b"".join(chunks), self.position

    def unpack(self, layout: str, what: str) -> tuple[int | float | bool, ...]:
        """The next values of a `struct` layout (little-endian, unpadded)."""
        layout = "<" + layout
        count = struct.calcsize(layout)
        self.require(count, what)
        values = struct.unpack_from(layout, self._bytes, self.position - self._start)
        self.position += count
        return values

    def integer(self, code: str, what: str) -> int:
        """The next single integer."""
        return int(self.unpack(code, what)[0])

    def raw(self, count: int, what: str) -> bytes:
        """The next `count` bytes."""
        self.require(count, what)
        start = self.position - self._start
        self.position += count
        return self._bytes[start : start + count]

    def skip_strings(self, count: int, what: str) -> None:
        """Step over `count` length-prefixed strings without decoding them."""
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if not self._start <= self.position <= self._start + len(self._bytes) - 8:
                self.require(8, what)
            self.position += 8 + unpack(self._bytes, self.position - self._start)[0]
        self.require(0, what)
