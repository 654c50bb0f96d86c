"""Time and memory to open a folder of many tensors, with files that hold headers and no data.

    python benchmarks/open_checkpoint.py [--shards 100] [--tensors 100000]

Prints seconds, CPU seconds (the rest is waiting for a core or for the disk), and the growth of the process' peak. The
files are sparse, so the folder takes the disk its headers take.
"""

import argparse
import json
import multiprocessing
import struct
import tempfile
import time
from pathlib import Path

from headrace.checkpoint.safetensors import INDEX, read_folder

MIB = 1 << 20
SHAPE, BYTES = [2048, 7168], 2048 * 7168 * 2


def name_of(i: int) -> str:
    """Tensor names of a MoE model with 256 experts per layer."""
    layer, rest = divmod(i, 768)
    expert, matrix = divmod(rest, 3)
    return f"model.layers.{layer}.mlp.experts.{expert}.{('gate', 'up', 'down')[matrix]}_proj.weight"


def write_shard(path: Path, names: list[str]) -> None:
    """Write a header, then sparse zeros of the claimed size."""
    entries = {
        name: {"dtype": "BF16", "shape": SHAPE, "data_offsets": [i * BYTES, (i + 1) * BYTES]}
        for i, name in enumerate(names)
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + len(names) * BYTES)


def write_folder(folder: Path, shards: int, tensors: int) -> None:
    """Write shards, index and a configuration."""
    weight_map = {
        name_of(i): f"model-{i * shards // tensors + 1:05d}-of-{shards:05d}.safetensors" for i in range(tensors)
    }
    by_shard: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        by_shard.setdefault(shard, []).append(name)
    for shard, names in by_shard.items():
        write_shard(folder / shard, names)
    (folder / INDEX).write_text(
        json.dumps({"metadata": {"total_size": tensors * BYTES}, "weight_map": weight_map}, indent=2)
    )
    (folder / "config.json").write_text('{"model_type": "llama"}')


def peak_bytes() -> int:
    """Peak memory of this process since the last `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def reset_peak() -> None:
    """Reset the peak that Linux keeps for this process."""
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--tensors", type=int, default=100_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        # In another process: memory that writing leaves in this heap would be reused by opening.
        writer = multiprocessing.Process(target=write_folder, args=(Path(name), arguments.shards, arguments.tensors))
        writer.start()
        writer.join()
        reset_peak()
        before, start, cpu_start = peak_bytes(), time.perf_counter(), time.process_time()
        folder = read_folder(name)
        seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
        growth = peak_bytes() - before
        assert len(folder.tensors) == arguments.tensors
        counts = f"{len(folder.tensors)} tensors in {len(folder.paths)} files"
        print(f"{counts}: {seconds:.2f} s ({cpu_s:.2f} s of a core), {growth / MIB:.0f} MiB")


if __name__ == "__main__":
    main()
