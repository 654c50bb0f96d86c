"""Runs hostile inputs one after another in processes of bounded memory, each within a time limit.

Unbounded allocation is then a `MemoryError` (or the end of a worker). An endless loop is a case that times out. Both are
findings about one case, and neither takes the machine down.
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

START_S = 120.0  # start of a worker on a busy machine: it imports torch and transformers
FINE = "fine"


def described(error: BaseException) -> str:
    """An unexpected error, with the last line of headrace in its traceback."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "headrace" in Path(frame.filename).parts]
    at = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{at}: {error}"[:300]


def verdict(action: Callable[[], object]) -> str:
    """`FINE` for a result or an error with a hint; everything else is a traceback for a user, and described."""
    try:
        action()
    except HeadraceError as error:
        return _of_refusal(error)
    except BaseException as error:  # panics of the tokenizers library are no Exception
        return described(error)
    return FINE


def refusal(action: Callable[[], object]) -> str:
    """`FINE` only for an error with a hint."""
    try:
        found = action()
    except HeadraceError as error:
        return _of_refusal(error)
    except BaseException as error:
        return described(error)
    return f"it was accepted: {found!r}"[:300]


def _of_refusal(error: HeadraceError) -> str:
    """`FINE` for an error with a hint, unless a `MemoryError` caused it: without the bound, memory would run out."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            return f"out of memory: {described(cause)}"
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
    """The result of `work` for each case; "ran longer than" or "killed its process" for cases without one.

    Args:
        work: a function of a module that can be imported, called in another process.
        cases: its arguments.
        workers: processes.
        seconds: time limit of a case.
        memory: bytes that a worker may allocate after its imports, and that its own children may hold.
        most_faults: lost workers of a share after which it gives up.
    """
    shares = [cases[i::workers] for i in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda share: _share(work, share, seconds, memory, most_faults), shares)
        return {case: outcome for part in found for case, outcome in part.items()}


def faults(work: Callable[[Any], str], cases: Sequence[Any], **bounds: Any) -> dict[Any, str]:
    """Faults by case; bounds as for `outcomes`. Empty if all is well."""
    found = outcomes(work, cases, **bounds)
    all_outcomes = {case: found.get(case, "not reached") for case in cases}
    return {case: outcome for case, outcome in all_outcomes.items() if outcome != FINE}


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
    gc.freeze()  # garbage collection need not scan imported modules again and again
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries that abort print a lot
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    connection.send("ready")
    while (case := connection.recv()) is not None:
        outcome = work(case)
        children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        connection.send(outcome if children <= memory else f"a process it started held {children} bytes")
