"""Runs one case after another in processes of bounded memory, each case within a bound of time: for hostile inputs.

A flood of memory is then a `MemoryError` (or the end of a worker), and an endless loop is a case that does not answer. Both are
findings about one case, and neither takes the machine along.
"""

import gc
import multiprocessing
import os
import resource
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from headrace.errors import HeadraceError
from headrace.units import GIB

START_S = 120.0  # of a worker on a busy machine: it imports torch and transformers
FINE = "fine"


def described(error: BaseException) -> str:
    """An error that nobody foresaw, with the line of headrace that it came through last."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "headrace" in Path(frame.filename).parts]
    at = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{at}: {error}"[:300]


def verdict(action: Callable[[], object]) -> str:
    """`FINE`, or what is wrong: an answer or an error with a hint is right, everything else is a traceback for a user."""
    try:
        action()
    except HeadraceError as error:
        return _of_refusal(error)
    except BaseException as error:  # the tokenizers library panics beside Exception
        return described(error)
    return FINE


def refusal(action: Callable[[], object]) -> str:
    """The same where only an error with a hint is right."""
    try:
        found = action()
    except HeadraceError as error:
        return _of_refusal(error)
    except BaseException as error:
        return described(error)
    return f"it was accepted: {found!r}"[:300]


def _of_refusal(error: HeadraceError) -> str:
    """An error with a hint is fine, unless it says in other words that memory was flooded: without the bound, it would be."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            return f"a flood of memory: {described(cause)}"
        cause = cause.__cause__ or cause.__context__
    return FINE if error.hint else f"no hint beside {type(error).__name__}: {error}"


def outcomes(
    work: Callable[[Any], str],
    cases: Sequence[Any],
    *,
    workers: int = 2,
    seconds: float = 20.0,
    memory: int = GIB,
    most_faults: int = 3,
) -> dict[Any, str]:
    """What `work` says of each case; "ran too long" or "killed its process" for those after which no answer came.

    Args:
        work: a function of a module that can be imported, called in another process.
        cases: what it is called with.
        workers: processes.
        seconds: that one case may take.
        memory: bytes that a worker may allocate beside what it has after its imports, and that its own children may hold.
        most_faults: after a process has lost so many workers it gives up.
    """
    shares = [cases[i::workers] for i in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda share: _share(work, share, seconds, memory, most_faults), shares)
        return {case: outcome for part in found for case, outcome in part.items()}


def faults(work: Callable[[Any], str], cases: Sequence[Any], **bounds: Any) -> dict[Any, str]:
    """What is wrong, by case; bounds as for `outcomes`. Nothing if all is well."""
    found = outcomes(work, cases, **bounds)
    said = {case: found.get(case, "not reached") for case in cases}
    return {case: outcome for case, outcome in said.items() if outcome != FINE}


def _share(
    work: Callable[[Any], str], cases: Sequence[Any], seconds: float, memory: int, most_faults: int
) -> dict[Any, str]:
    context = multiprocessing.get_context("spawn")
    found: dict[Any, str] = {}
    lost = 0
    while len(found) < len(cases) and lost <= most_faults:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, work, memory), daemon=False)
        process.start()
        theirs.close()
        try:
            if not ours.poll(START_S):
                raise RuntimeError("a worker did not start")
            ours.recv()
            for case in cases[len(found) :]:
                ours.send(case)
                found[case] = ours.recv() if ours.poll(seconds) else f"ran longer than {seconds:.0f} s"
                if found[case].startswith("ran longer"):
                    lost += 1
                    break
            else:
                ours.send(None)
                process.join(10)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            process.join(10)
            found[cases[len(found)]] = f"killed its process (exit code {process.exitcode})"
            lost += 1
        finally:
            process.kill()
            process.join()
            ours.close()
    return found


def _serve(connection: Connection, work: Callable[[Any], str], memory: int) -> None:
    gc.freeze()  # what was imported need not be looked at again and again
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries that abort say a lot
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    connection.send("ready")
    while (case := connection.recv()) is not None:
        outcome = work(case)
        children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        connection.send(outcome if children <= memory else f"a process it started held {children} bytes")
