"""Sources of a header's bytes: a local file, or anything else that implements `pread`."""

import os
import stat
from collections.abc import Callable
from typing import Protocol, TypeAlias

from headrace.errors import CheckpointError


class Source(Protocol):
    """Random access to the bytes of one file. Untrusted: it may end anywhere, and change meanwhile.

    The function that opens a remote one raises `CheckpointError` only if nothing is at the path. A reader then treats an
    optional file (index, configuration) as absent. A failed connection is a `HubError`. `path` is the requested path.
    """

    path: str
    size: int

    def pread(self, count: int, offset: int) -> bytes:
        """At most `count` bytes from `offset`; none at the end. Raises `OSError`."""

    def close(self) -> None:
        """Release the file."""


# Function that opens a path; if absent, it raises a `CheckpointError` whose cause is a `FileNotFoundError`.
OpenSource: TypeAlias = Callable[[str], Source]


class LocalSource:
    """A regular local file, read by `pread` and not mapped: a file that shrinks is an error and not a signal."""

    def __init__(self, path: str, hint: str = "name a .gguf file"):
        """Raise `CheckpointError` if the file cannot be opened or is no regular file."""
        self.path = path
        try:
            # Opening a pipe would block; it is refused below.
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
