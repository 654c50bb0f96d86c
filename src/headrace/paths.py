"""A test for a path's existence that raises where the system does not tell."""

import os

from headrace.errors import CheckpointError, UsageError
from headrace.text import printable


def exists(path: str | os.PathLike[str]) -> bool:
    """True if there is a file or folder at this path.

    Raises:
        CheckpointError: a folder may not be searched, or a name is too long.
        UsageError: it is no path.
    """
    if not os.fspath(path):
        raise UsageError("the path is empty", hint="give the path of a file or a folder")
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise CheckpointError(
            f"cannot open {printable(path)}: {error.strerror}", hint="check the path and its permissions"
        ) from error
    except ValueError as error:  # a zero byte
        raise UsageError(f"{printable(path, keep='')} is no path: {error}", hint="give another path") from error
    return True
