"""Every error a user can meet, each with its exit code and a hint.

HeadraceError (1)
├── CheckpointError       the file is not what it says it is
│   └── UnsupportedError  the file is sound, but this version cannot run it
├── ReadError             the disk failed, or the file changed, while in use
├── BudgetError           the memory given is below the floor
├── HubError              the hub refuses, cannot be reached, or the connection breaks
├── ContextError          more tokens than the context holds
└── UsageError (2)        contradictory or unknown options
"""

import difflib
from collections.abc import Iterable, Sequence

from headrace.text import printable


class HeadraceError(Exception):
    """Something a user can act on. `str()` is the message, `hint` the next thing to try."""

    exit_code = 1
    usual_hint: str | None = None  # hint where no better one is known

    def __init__(self, message: str, *, hint: str | Sequence[str] | None = None):
        """`hint`: the next thing to try, in one line or several."""
        # The message holds names from files: none of them may begin a new line.
        super().__init__(printable(message, keep=""))
        lines = [hint] if isinstance(hint, str) else hint or ()
        self.hint = "\n".join(printable(line, keep="") for line in lines) or self.usual_hint


class CheckpointError(HeadraceError):
    """The model file is damaged, truncated, or not a model file."""

    usual_hint = "the file is damaged, or was written by a broken converter; get it from another source"


class UnsupportedError(CheckpointError):
    """The model file is sound, but needs a feature that headrace does not have."""

    usual_hint = "docs/architectures.md lists what runs; use another file of the model, or llama.cpp"


class ReadError(HeadraceError):
    """The disk failed, stalled, or the file changed while its weights were in use."""


class BudgetError(HeadraceError):
    """The memory given is below the model's floor."""


class ContextError(HeadraceError):
    """A prompt and its answer need more tokens than the context holds."""


class HubError(HeadraceError):
    """The model hub refuses, cannot be reached, breaks off, or delivers something else than it lists."""


class UsageError(HeadraceError):
    """The options contradict each other or name something unknown."""

    exit_code = 2


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """A hint naming the known words nearest to `name`, or all of them if none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
