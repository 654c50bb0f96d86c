"""A BF16 folder against its packed copy (`headrace pack`), under one budget, from the disk as it is and from slower ones.

    python benchmarks/pack.py PLAIN PACKED [--memory 2000MiB] [--rates 200,500,0] [--tokens 8] [--rounds 3]

Slower disks are this one behind a token bucket: a read of n bytes of a real file ends after n / rate seconds of the bucket at
the earliest. Decoded bytes are not counted. 0 is the disk as it is. Every run is a separate process, the two folders take
turns. Seconds per token are those between the first token and the last, drafts off, greedy.

OpenMP's threads sleep while they wait (OMP_WAIT_POLICY=passive). Spinning ones make passes up to three times as long when
anything else runs on this machine. Their time would hide that of the decoder.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from itertools import product
from pathlib import Path
from typing import Any

PROMPT = "Write a Python function that reverses a string."


class Bucket:
    """Limit of bytes per second, for all files together. Idle time is not saved up."""

    def __init__(self, bytes_per_s: float):
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = 0.0
        self.taken = 0

    def take(self, nbytes: int) -> float:
        """Time at which `nbytes` would have arrived, by `time.perf_counter`."""
        with self._lock:
            self.taken += nbytes
            start = max(self._free_at, time.perf_counter())
            self._free_at = start + (nbytes / self._bytes_per_s if self._bytes_per_s else 0.0)
            return self._free_at


def throttled(bucket: Bucket) -> Any:
    """A `WeightFile` class whose reads wait for the bucket."""
    from headrace.stream import WeightFile

    class ThrottledFile(WeightFile):
        def read(self, offset: int, target: memoryview, needed: int) -> int:
            due = bucket.take(len(target))
            count = super().read(offset, target, needed)
            time.sleep(max(0.0, due - time.perf_counter()))
            return count

    return ThrottledFile


def once(folder: str, memory: str, rate: float, tokens: int) -> dict[str, Any]:
    """One run, in this process."""
    import headrace
    from headrace.sampling_params import SamplingParams

    bucket = Bucket(rate)
    request = {"context_tokens": 512, "prompt_tokens": 64, "draft": "none"}
    with headrace.load(folder, memory=memory, open_file=throttled(bucket), **request) as model:  # type: ignore[arg-type]
        chunks = []
        for chunk in model.stream(PROMPT, max_tokens=tokens, sampling=SamplingParams(temperature=0.0)):
            chunks.append((time.perf_counter(), time.process_time(), bucket.taken, chunk))
        later = [p for p in chunks if p[3].token is not None]
        (start, start_cpu, start_bytes, _), (end, end_cpu, end_bytes, _) = later[0], later[-1]
        count = len(later) - 1
        return {
            "s_per_token": (end - start) / count,
            "core_s_per_token": (end_cpu - start_cpu) / count,
            "disk_bytes_per_token": (end_bytes - start_bytes) / count,
            "ttft_s": later[0][3].ttft_s,
            "predicted_s": model.plan.decode_s_per_token.expected,
            "streamed_bytes": model.plan.streamed_bytes_per_pass,
            "pinned_bytes": model.plan.pinned_bytes,
            "text": "".join(p[3].text for p in chunks),
            "load": os.getloadavg()[0],
        }


def run(folder: Path, arguments: argparse.Namespace, rate: float) -> dict[str, Any]:
    """One run, in a separate process."""
    command = [sys.executable, __file__, str(folder), "-", "--memory", arguments.memory, "--once"]
    command += ["--rates", str(rate), "--tokens", str(arguments.tokens)]
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def row(name: str, rate: float, runs: list[dict[str, Any]]) -> str:
    """A line of Markdown: medians, and the range of seconds."""
    median = {key: statistics.median(r[key] for r in runs) for key in runs[0] if key != "text"}
    times = [r["s_per_token"] for r in runs]
    disk = f"{rate:.0f} MB/s" if rate else "as it is"
    return (
        f"| {disk} | {name} | {median['disk_bytes_per_token'] / 1e9:.2f} GB | {median['s_per_token']:.2f} s"
        f" ({min(times):.2f} to {max(times):.2f}) | {median['core_s_per_token']:.2f} s | {median['ttft_s']:.1f} s"
        f" | {max(r['load'] for r in runs):.1f} |"
    )


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plain", type=Path)
    parser.add_argument("packed", type=Path)
    parser.add_argument("--memory", default="2000MiB")
    parser.add_argument("--rates", default="200,500,0", help="MB/s, 0 is the disk as it is")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("pack.json"))
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    rates = [float(rate) for rate in arguments.rates.split(",")]
    if arguments.once:
        print(json.dumps(once(str(arguments.plain), arguments.memory, rates[0] * 1e6, arguments.tokens)))
        return
    found: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for _, rate, name in product(range(arguments.rounds), rates, ("plain", "packed")):
        result = run(getattr(arguments, name), arguments, rate)
        found.setdefault((rate, name), []).append(result)
        print(rate, name, {k: v for k, v in result.items() if k != "text"}, file=sys.stderr)
    arguments.out.write_text(json.dumps({f"{rate:.0f} {name}": runs for (rate, name), runs in found.items()}, indent=1))
    print("| disk | folder | read per token | per token | core time per token | first token | load |")
    print("|---|---|---|---|---|---|---|")
    for (rate, name), runs in found.items():
        print(row(name, rate, runs))
    assert len({r["text"] for runs in found.values() for r in runs}) == 1, "all runs write the same text"


if __name__ == "__main__":
    main()
