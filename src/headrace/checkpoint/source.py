"""Where the bytes of a header come from: a file of this machine, or anything else that can answer `pread`."""

import os
import stat
from collections.abc import Callable
from typing import Protocol, TypeAlias

from headrace.errors import CheckpointError


class Source(Protocol):
    """Random access to the bytes of one file. Untrusted: it may end anywhere, and change meanwhile.

    Made from a path by a function that raises `CheckpointError` where nothing lies at that path, and only then: a reader
    that need not have a file (an index, a configuration) takes it for absent. A connection that fails is a `ReadError`.
    `path` is the one asked for.
    """

    path: str
    size: int

    def pread(self, count: int, offset: int) -> bytes:
        """At most `count` bytes from `offset`; none at the end. Raises `OSError`."""

    def close(self) -> None:
        """Give it back."""


# Opens a file by its path; where there is none, a `CheckpointError` whose cause is a `FileNotFoundError`.
OpenSource: TypeAlias = Callable[[str], Source]


class LocalSource:
    """A regular file of this machine. By `pread` rather than mapped: a file that shrinks is an error and not a signal."""

    def __init__(self, path: str, hint: str = "name a .gguf file"):
        """Raises `CheckpointError` where the operating system refuses, or it is no regular file."""
        self.path = path
        try:
            # A pipe would be waited for; it is refused below.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"cannot open {path}: {getattr(error, 'strerror', error)}",
                hint="check the path and its permissions",
            ) from error
        status = os.fstat(self._fd)
        self.size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            os.close(self._fd)
            raise CheckpointError(f"{path} is not a file", hint=hint)

    def __enter__(self) -> "LocalSource":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def pread(self, count: int, offset: int) -> bytes:
        """See `Source.pread`."""
        return os.pread(self._fd, count, offset)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
