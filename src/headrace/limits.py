"""Limits that the system sets for this process: memory, threads, files and their sizes. Errors name the limit.

Some limits are checked before torch and ggml start, because these abort without a message.
"""

import errno
import os
import sys
import threading

from headrace.errors import HeadraceError, UsageError
from headrace.units import GIB, gib

_LEAST_ADDRESS_SPACE = 1 * GIB  # torch and transformers alone take some 800 MB of addresses


def check_address_space() -> None:
    """Check the address space before torch is imported.

    Raises:
        HeadraceError: torch does not fit into the address space of this process.
        UsageError: the interpreter leaves out docstrings, which transformers needs.
    """
    if sys.flags.optimize >= 2:
        raise UsageError("python -OO leaves out docstrings, which transformers needs", hint="use python -O, or neither")
    for name, option in (("RLIMIT_AS", "-v"), ("RLIMIT_DATA", "-d")):
        limit = _soft_limit(name)
        if limit is not None and limit < _LEAST_ADDRESS_SPACE:
            raise HeadraceError(
                f"address space is limited to {gib(limit)} ({name}), at least {gib(_LEAST_ADDRESS_SPACE)} is needed",
                hint=f"raise the limit with `ulimit {option}`; --memory is the way to bound what headrace takes",
            )


def check_threads(count: int) -> None:
    """Check that `count` threads can start, before ggml starts them: ggml aborts if one of them fails.

    Raises:
        HeadraceError: the system refuses them.
    """
    done = threading.Event()
    started: list[threading.Thread] = []
    try:
        for _ in range(count):
            thread = threading.Thread(target=done.wait)
            thread.start()
            started.append(thread)
    except RuntimeError as error:
        raise too_few_threads() from error
    finally:
        done.set()
        for thread in started:
            thread.join()


def too_few_threads() -> HeadraceError:
    """The error for a system that starts no more threads."""
    limit = _soft_limit("RLIMIT_NPROC")
    which = f" (RLIMIT_NPROC is {limit})" if limit is not None else ""
    return HeadraceError(
        f"the system starts no more threads or processes for this user{which}",
        hint="raise the limit with `ulimit -u`, or end other processes",
    )


def explained(error: BaseException) -> HeadraceError | None:
    """An error with a hint for a request that the system refused; None for other errors."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        limits = [name for name in ("RLIMIT_AS", "RLIMIT_DATA") if _soft_limit(name) is not None]
        return HeadraceError(
            "the system gives no more memory" + (f" ({', '.join(limits)} is set)" if limits else ""),
            hint="give a smaller --memory or --ctx-size, or raise the limit with `ulimit -v` or `ulimit -d`",
        )
    if isinstance(error, RuntimeError) and "not enough memory" in str(error):  # message of torch's allocator
        return explained(MemoryError())
    if isinstance(error, RuntimeError):
        return too_few_threads() if "start new thread" in str(error) else None
    if not isinstance(error, OSError):
        return None
    if error.errno == errno.EAGAIN and not hasattr(error, "characters_written"):
        return too_few_threads()
    where = f"{error.filename}: " if error.filename else ""
    return HeadraceError(
        f"{where}{error.strerror or error}", hint=_HINTS.get(error.errno or 0, "check the path and its permissions")
    )


_HINTS = {
    errno.ENOSPC: "free some space, or write to another place",
    errno.EDQUOT: "free some space, or write to another place",
    errno.EFBIG: "raise the limit of file sizes with `ulimit -f`",
    errno.EMFILE: "raise the limit of open files with `ulimit -n`",
    errno.ENFILE: "too many files are open on this machine",
}


def _soft_limit(name: str) -> int | None:
    """A soft limit in bytes or as a count; None: unlimited, or unknown to this system."""
    if os.name != "posix":
        return None
    import resource

    number = getattr(resource, name, None)
    if number is None:
        return None
    soft = resource.getrlimit(number)[0]
    return None if soft == resource.RLIM_INFINITY else int(soft)
