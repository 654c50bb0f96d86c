"""Makes stdin, stdout and stderr safe to use when they are closed, full or of another encoding.

`prepare` makes them usable before anything is written; `finish` raises where the output has not arrived.
"""

import os
import sys
from contextlib import suppress

from headrace.errors import HeadraceError

_WIDEST_DIGITS = 4


def prepare() -> None:
    """Open closed streams, replace characters that a terminal lacks, and ignore terminal sizes that make no sense."""
    for descriptor, mode in ((0, "r"), (1, "w"), (2, "w")):
        _reopen(descriptor, mode)
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError, OSError):  # tests may replace the stream
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    for name in ("COLUMNS", "LINES"):
        value = os.environ.get(name, "0")
        if not (value.isascii() and value.isdigit() and len(value) <= _WIDEST_DIGITS):
            del os.environ[name]


def _reopen(descriptor: int, mode: str) -> None:
    """Open a closed descriptor, which the next opened file would get otherwise."""
    try:
        os.fstat(descriptor)
    except OSError:
        found = os.open(os.devnull, os.O_RDONLY if mode == "r" else os.O_WRONLY)
        if found != descriptor:
            os.dup2(found, descriptor)
            os.close(found)
    name = ("stdin", "stdout", "stderr")[descriptor]
    if getattr(sys, name) is None:
        setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8", errors="replace", closefd=False))


def finish() -> None:
    """Flush stdout.

    Raises:
        HeadraceError: stdout takes no more.
        BrokenPipeError: nobody reads it.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        raise HeadraceError(
            f"cannot write the output: {getattr(error, 'strerror', None) or error}",
            hint="free some space, or write to another place",
        ) from error


def abandon() -> None:
    """Point stdout at /dev/null, so that the interpreter does not flush it again when it ends."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def writes_utf8() -> bool:
    """True if stdout takes every character."""
    return (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"
