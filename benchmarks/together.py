"""Slowdown of compute by reads: passes of a model in memory, with and without concurrent disk reads.

    python benchmarks/together.py MODEL [--budget 21GiB] [--file FILE] [--rounds 3] [--tokens 24] [--missed MB ...]

MODEL must fit into the budget. 4 threads of another process read FILE (by default MODEL) in requests of 1 MiB past the page
cache, and compute nothing. On bare metal neither should slow the other much. It does on a virtual machine whose
host makes the reads on the guest's own cores. Reading M bytes and computing a pass then takes at least

    r = M / B'                                        B', C': rate and pass while both go on; B, C: each alone
    limit = r + (1 - r / C') * C    if r < C'         the disk is done first, the rest is computed alone
            C' + (M - C' * B') / B  otherwise

even if neither ever waits for the other. --missed prints this limit for passes that read MB megabytes.
"""

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from threading import Thread
from typing import Any

MIB = 1 << 20
READERS = 4
PROMPT = "The water wheel is one of the oldest"


def read_for_ever(path: Path, count: "Synchronized[int]") -> None:
    """Read the file from start to end, again and again."""
    from headrace.stream.arena import Arena

    arena = Arena(READERS * MIB)
    size = path.stat().st_size // MIB * MIB

    def work(number: int) -> None:
        file = os.open(path, os.O_RDONLY | os.O_DIRECT)
        target = arena.view[number * MIB : (number + 1) * MIB]
        at = number * (size // MIB // READERS) * MIB
        while True:
            done = os.preadv(file, [target], at)
            with count.get_lock():
                count.value += done
            at = (at + MIB) % size

    threads = [Thread(target=work, args=(number,), daemon=True) for number in range(READERS)]
    for thread in threads:
        thread.start()
    threads[0].join()


@contextmanager
def reading(path: Path) -> Iterator[Any]:
    """Read in another process meanwhile. Yields a function: bytes so far."""
    context = multiprocessing.get_context("spawn")
    count = context.Value("q", 0)
    process = context.Process(target=read_for_ever, args=(path, count), daemon=True)
    process.start()
    try:
        while not count.value:
            time.sleep(0.05)
        yield lambda: count.value
    finally:
        process.terminate()
        process.join()


def limit(missed: float, alone: tuple[float, float], both: tuple[float, float]) -> float:
    """Seconds of a pass that reads `missed` bytes; (bytes/s, seconds of a pass) alone and together."""
    read_s = missed / both[0]
    if read_s < both[1]:
        return read_s + (1 - read_s / both[1]) * alone[1]
    return both[1] + (missed - both[1] * both[0]) / alone[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--budget", default=None)
    parser.add_argument("--file", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--missed", type=float, nargs="*", default=[])
    arguments = parser.parse_args()
    file = arguments.file or arguments.model
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line has it

    import headrace
    from headrace.sampling_params import SamplingParams

    with headrace.load(arguments.model, memory=arguments.budget, context_tokens=128, draft="none") as model:

        def passes(count: int) -> float:
            before = len(model.passes)
            model.generate(PROMPT, max_tokens=count, sampling=SamplingParams(temperature=0), raw=True)
            return statistics.median(one.seconds for one in model.passes[before + 1 :])

        while True:  # until all that these tokens need is in memory
            before = len(model.passes)
            passes(arguments.tokens)
            if not sum(one.read_bytes for one in model.passes[before:]):
                break
        time.sleep(10)  # until the rest of the memory is taken
        rows = []
        for number in range(arguments.rounds):
            compute = passes(arguments.tokens)
            with reading(file) as read:
                before, start = read(), time.perf_counter()
                time.sleep(3)
                disk = (read() - before) / (time.perf_counter() - start)
                before, start = read(), time.perf_counter()
                slowed = passes(arguments.tokens)
                shared = (read() - before) / (time.perf_counter() - start)
            rows.append((disk, compute, shared, slowed))
            print(
                f"{number + 1}: alone {disk / 1e9:.2f} GB/s, {compute:.3f} s a pass;"
                f" together {shared / 1e9:.2f} GB/s, {slowed:.3f} s",
                flush=True,
            )
    disk, compute, shared, slowed = (statistics.median(column) for column in zip(*rows, strict=True))
    for missed in arguments.missed:
        found = limit(missed * 1e6, (disk, compute), (shared, slowed))
        print(f"{missed:.0f} MB: {found:.3f} s; by max(M / B, C) {max(missed * 1e6 / disk, compute):.3f} s")


if __name__ == "__main__":
    main()
