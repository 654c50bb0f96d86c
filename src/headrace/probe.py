"""Measure this machine: disk at the engine's read pattern, packed kernels, dequantisation, GEMM, interpreter.

The probe uses the engine's own parts. The stream reads the disk, with a consumer that drops the weights. The engine runs the
kernels and a whole small model. Rounds are repeated and the median kept, because the machine may be shared.
"""

import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from os import stat
from pathlib import Path

import gguf
import numpy as np
import torch

from headrace.cgroup import usable_cores
from headrace.checkpoint import Checkpoint, Tensor, open_checkpoint
from headrace.checkpoint.tensor import row_bytes
from headrace.engine import Engine, Rows
from headrace.engine.model_weights import StreamOptions
from headrace.errors import HeadraceError
from headrace.kernels import DECODE_MAX_ROWS, Kernels, WeightSlice
from headrace.kernels.ggml import tile_activations
from headrace.kernels.thresholds import PRECISE_TYPES
from headrace.plan.memory_plan import MAX_RING_SLOTS, READERS, UNIT_BYTES
from headrace.plan.profile import Profile, load_profile, machine_name
from headrace.plan.shape import is_linear
from headrace.process import release_unused, resident_bytes
from headrace.stream import Arena, WeightFile, WeightStream
from headrace.stream.arena import PAGE_BYTES
from headrace.stream.layout import make_layout
from headrace.units import GIB, MIB, gib

COLUMNS, WEIGHT_ROWS = 4096, 14336  # one projection of an 8B model
USUAL_TYPES = ("Q4_K", "Q6_K", "Q5_K", "Q8_0", "F16", "BF16", "Q5_0", "Q4_0", "Q3_K", "Q2_K", "IQ4_XS", "F32")
KERNEL_ROWS = (1, 2, 4, 8, DECODE_MAX_ROWS)
GEMM_ROWS = (32, 128, 512)
DISK_BYTES = GIB
ROUNDS = 3
LEAST_IO_CPU_SHARE, MOST_IO_CPU_SHARE = 0.05, 1.5  # bounds of the measured share, against noise
PROBE_BYTES = 256 * MIB  # max bytes of weights in memory, because memory may be scarce


def probe(target: Path, say: Callable[[str], None] = lambda _: None) -> Profile:
    """Measure, and return the profile.

    Args:
        target: a GGUF file, or a folder on the file system to measure.
        say: callback with the name of each measurement.

    Raises:
        HeadraceError: the disk cannot be measured at `target`.
    """
    threads = usable_cores()
    known = load_profile()
    say("disk")
    fitted = known.factors.get("disk", 1.0) if known else 1.0  # the new profile has no fit
    disks = {disk: rate * fitted for disk, rate in known.disk_bytes_per_s.items()} if known else {}
    disks[str(stat(target).st_dev)] = measure_disk(target)
    say("kernels")
    kernels = Kernels(threads, row_invariant=False)
    kernels.start(spins=True, pad_decode_rows_to_tiles=False)
    types = dict.fromkeys([*_types_of(target), *USUAL_TYPES])
    rates = {kind: _measure_kernel(kernels, kind) for kind in types}
    packed = {kind: {**plain, **_measure_tiles(threads, kind)} for kind, (plain, _) in rates.items()}
    repacked = {kind: repacked for kind, (_, repacked) in rates.items() if repacked}
    unpacked = {kind: _measure_unpack(kernels, kind) for kind in types if kind != "F32"} | {"F32": 1e12}
    say("disk and kernels together")
    io_cpu_share = measure_io_cpu_share(target, threads, rates["Q4_K"][0]["1"], DISK_BYTES // 2)
    say("matrix multiplication")
    gemm = {kind: _measure_gemm(kernels, kind) for kind in ("Q4_K", "F16")}
    kernels.close()
    say("interpreter")
    layer_s, layer_row_s = _measure_layers(threads)
    now = datetime.now()
    return Profile(
        source=f"measured {now:%Y-%m-%d}",
        probed_at=now.isoformat(timespec="seconds"),
        machine=machine_name(),
        threads=threads,
        disk_bytes_per_s=disks,
        kernel_weights_per_s=packed,
        repacked_weights_per_s=repacked,
        unpack_weights_per_s=unpacked,
        bf16_flop_per_s=gemm["Q4_K"],
        fp32_flop_per_s=gemm["F16"],
        layer_s=layer_s,
        layer_row_s=layer_row_s,
        runtime_bytes=_measure_runtime(),
        io_cpu_share=io_cpu_share,
    )


def _types_of(target: Path) -> Iterable[str]:
    with suppress(HeadraceError):
        if target.is_file():
            return sorted({t.type for t in open_checkpoint(target).tensors.values() if is_linear(t)})
    return ()


def measure_disk(target: Path, total_bytes: int = DISK_BYTES, rounds: int = ROUNDS) -> float:
    """Bytes per second of the stream alone, from the model file, or from a temporary file in a folder.

    Raises:
        HeadraceError: the file cannot be read, or the folder cannot be written to.
    """
    with _something_to_read(target, total_bytes) as path:
        nbytes, seconds = _streamed(path, total_bytes, rounds)
        return nbytes / seconds


def measure_io_cpu_share(target: Path, threads: int, weights_per_s: float, total_bytes: int = DISK_BYTES) -> float:
    """Share of the disk seconds in which I/O keeps cores busy or stalled.

    Matmuls that take slightly longer than the disk run during the reads, as in the engine. The share is the time of both
    together, less the time of the matmuls alone, over the disk seconds.

    Args:
        target: as in `measure_disk`.
        threads: number of matmul threads.
        weights_per_s: approximate Q4_K weights per second of a one-row matmul.
        total_bytes: bytes read per round.
    """
    kernels = Kernels(threads, row_invariant=False)
    with closing(kernels), _something_to_read(target, total_bytes) as path:
        nbytes, alone_s = _streamed(path, total_bytes, ROUNDS)
        units = -(-nbytes // UNIT_BYTES)
        rows = max(64, min(WEIGHT_ROWS, int(weights_per_s * alone_s / units / COLUMNS)))
        copies = max(1, PROBE_BYTES // (row_bytes("Q4_K", COLUMNS) * rows))
        arena, slice_bytes = _packed("Q4_K", rows, copies)
        x, out, done, each = torch.randn(1, COLUMNS), torch.empty(1, rows), 0, 1

        def multiply(count: int) -> None:
            nonlocal done
            for _ in range(count * each):
                weight_slice = WeightSlice("Q4_K", rows, arena.address + done % copies * slice_bytes, 0)
                kernels.matmul(x, [(0, weight_slice)], [out])
                done += 1

        def matmuls_s() -> float:
            start = time.perf_counter()
            multiply(units)
            return time.perf_counter() - start

        each = max(1, math.ceil(1.2 * alone_s / matmuls_s()))  # otherwise the share would include disk stalls
        shares = []
        for _ in range(ROUNDS):
            alone = matmuls_s()
            _, together_s = _streamed(path, total_bytes, 1, multiply)
            shares.append((together_s - alone) / alone_s)
    return min(MOST_IO_CPU_SHARE, max(LEAST_IO_CPU_SHARE, statistics.median(shares)))


@contextmanager
def _something_to_read(target: Path, total_bytes: int) -> Iterator[Path]:
    """A file on the file system of `target`: `target` itself if it is large, else a temporary file beside it.

    A small file would be in the ring before the clock starts.
    """
    with ExitStack() as stack:
        try:
            path = target
            if not (target.is_file() and target.stat().st_size >= total_bytes // 4):
                path = stack.enter_context(_written(target if target.is_dir() else target.parent, total_bytes // 2))
        except OSError as error:
            raise HeadraceError(
                f"the disk at {target} cannot be measured: {error.strerror}",
                hint=f"name a folder with {gib(total_bytes // 2)} free that may be written to",
            ) from error
        yield path


@contextmanager
def _written(folder: Path, nbytes: int) -> Iterator[Path]:
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".headrace-probe-") as file:
        block = np.random.default_rng(0).integers(0, 256, 8 * MIB, np.uint8).tobytes()
        for _ in range(nbytes // len(block)):
            file.write(block)
        file.flush()
        yield Path(file.name)


def _streamed(
    path: Path, total_bytes: int, rounds: int, use: Callable[[int], None] = lambda _: None
) -> tuple[int, float]:
    """(bytes, seconds) to stream a file as rows of one page, whatever its content.

    `use` is called with the number of units that have arrived.
    """
    rows = min(path.stat().st_size, total_bytes) // PAGE_BYTES
    whole = Tensor(
        name="probe", shape=(rows, PAGE_BYTES // 4), type="F32", path=str(path), offset=0, nbytes=rows * PAGE_BYTES
    )
    layout = make_layout([[whole]], {whole.name: 0}, UNIT_BYTES)
    times = []
    with (
        closing(WeightFile(str(path))) as file,
        WeightStream(layout, slots=MAX_RING_SLOTS, readers=READERS, file_of=lambda _: file) as stream,
    ):
        for round_ in range(rounds + 1):
            start = time.perf_counter()
            for slices in stream.weights_of(0):
                use(len(slices))
            if round_:  # the first fills the ring and starts the threads
                times.append(time.perf_counter() - start)
    return layout.streamed_bytes, statistics.median(times)


def _median_s(work: Callable[[int], object], rounds: int = ROUNDS) -> float:
    work(0)
    times = []
    for i in range(rounds):
        start = time.perf_counter()
        work(i + 1)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _packed(kind: str, rows: int, copies: int) -> tuple[Arena, int]:
    """`copies` matrices of random blocks, larger than the CPU caches, and the bytes of one.

    A constant pattern would be 15 % slower than a model's Q4_K weights. Bytes of 0 to 0x3f give finite, small values
    wherever a format has a scale.
    """
    nbytes = row_bytes(kind, COLUMNS) * rows
    arena = Arena(copies * nbytes)
    pattern = np.random.default_rng(0).integers(0, 0x40, 1 << 20, np.uint8)
    whole = np.frombuffer(arena.view, np.uint8)
    for start in range(0, copies * nbytes, len(pattern)):
        weight_slice = whole[start : min(start + len(pattern), copies * nbytes)]
        weight_slice[:] = pattern[: len(weight_slice)]
    return arena, nbytes


def _measure_kernel(kernels: Kernels, kind: str) -> tuple[dict[str, float], dict[str, float]]:
    """Weights per second by rows, from plain and from repacked blocks (empty if the format has no repacked layout).

    The two alternate: otherwise a busy neighbour could decide which is faster.
    """
    copies = max(1, PROBE_BYTES // (row_bytes(kind, COLUMNS) * WEIGHT_ROWS))
    arena, nbytes = _packed(kind, WEIGHT_ROWS, copies)
    # Random bytes are valid in both layouts, because only the kernel's speed is measured.
    addresses = [arena.address + i * nbytes for i in range(copies)]
    plain = [WeightSlice(kind, WEIGHT_ROWS, at, 0) for at in addresses]
    layouts = [plain]
    if kind in kernels.graphs.repacking.types:
        layouts.append([replace(weight_slice, repacked=weight_slice.address) for weight_slice in plain])
    rates: tuple[dict[str, float], dict[str, float]] = {}, {}
    for rows in KERNEL_ROWS:
        x, out = torch.randn(rows, COLUMNS), torch.empty(rows, WEIGHT_ROWS)
        times: list[list[float]] = [[] for _ in layouts]
        for turn in range(1 + (3 if rows == 1 else 1) * ROUNDS):
            for layout, (slices, spent) in enumerate(zip(layouts, times, strict=True)):
                at = (turn + layout * copies // 2) % copies  # a copy that the other layout has not just cached
                start = time.perf_counter()
                kernels.matmul(x, [(0, slices[at])], [out])
                spent.append(time.perf_counter() - start)
        for table, spent in zip(rates, times, strict=False):
            table[str(rows)] = WEIGHT_ROWS * COLUMNS / statistics.median(spent[1:])
    return rates


def _measure_tiles(threads: int, kind: str) -> Mapping[str, float]:
    """Weights per second of prefill through ggml's tile kernel; empty for a format without one."""
    if tile_activations(kind) is None:
        return {}
    weight_rows = 1024
    arena, _ = _packed(kind, weight_rows, 1)
    kernels = Kernels(threads, tiled=[kind])
    rates = {}
    for rows in GEMM_ROWS:
        x, out = torch.randn(rows, COLUMNS), torch.empty(rows, weight_rows)

        def work(_: int, x: torch.Tensor = x, out: torch.Tensor = out) -> None:
            kernels.matmul(x, [(0, WeightSlice(kind, weight_rows, arena.address, 0))], [out])

        rates[str(rows)] = weight_rows * COLUMNS / _median_s(work)
    kernels.close()
    return rates


def _measure_unpack(kernels: Kernels, kind: str) -> float:
    rows = 1024
    arena, nbytes = _packed(kind, rows, 4)
    half = kernels.gemm.uses_bf16 and kind not in PRECISE_TYPES
    return (
        rows
        * COLUMNS
        / _median_s(lambda i: kernels.gemm.plain(kind, arena.address + i % 4 * nbytes, rows, COLUMNS, half))
    )


def _measure_gemm(kernels: Kernels, kind: str) -> Mapping[str, float]:
    """FLOP/s of the prefill (GEMM) path, without dequantisation."""
    weight_rows = 4096
    arena, _ = _packed(kind, weight_rows, 1)
    weights = weight_rows * COLUMNS
    unpack_s = weights / _measure_unpack(kernels, kind)
    rates = {}
    for rows in GEMM_ROWS:
        x, out = torch.randn(rows, COLUMNS), torch.empty(rows, weight_rows)

        def work(_: int, x: torch.Tensor = x, out: torch.Tensor = out) -> None:
            kernels.matmul(x, [(0, WeightSlice(kind, weight_rows, arena.address, 0))], [out])

        spent = _median_s(work)
        rates[str(rows)] = 2 * weights * rows / max(spent - unpack_s, spent / 10)
    return rates


def _measure_layers(threads: int) -> tuple[float, float]:
    """Seconds per decoder layer outside the kernels, for one row and per further row, from a small model."""
    layers, prefill_rows = 4, 256
    with tempfile.TemporaryDirectory(prefix="headrace-probe-") as folder:
        checkpoint = small_model(Path(folder) / "probe.gguf", layers=layers)
        pinned = {t.name: t.rows for t in checkpoint.tensors.values()}
        options = StreamOptions(pinned_rows=pinned, unit_bytes=UNIT_BYTES, slots=1, readers=1)
        with Engine(checkpoint, options, Kernels(threads)) as engine:
            cache = engine.new_cache(2 * prefill_rows + 64)
            for _ in range(24):
                engine.step([Rows(cache=cache, tokens=[1])])
            one = statistics.median(p.seconds - p.kernel_s for p in engine.passes[4:])
            for _ in range(2):
                engine.step([Rows(cache=cache, tokens=[1] * prefill_rows)])
            last = engine.passes[-1]
            further = max(1e-9, last.seconds - last.kernel_s - one) / (prefill_rows - 1)
    return one / layers, further / layers


def small_model(path: Path, layers: int, hidden: int = 1024, feed_forward: int = 4096, vocab: int = 512) -> Checkpoint:
    """Write a llama of this size with constant Q8_0 weights, and open it."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(1024)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(hidden // 64)
    writer.add_head_count_kv(hidden // 256)
    writer.add_layer_norm_rms_eps(1e-5)
    q8 = gguf.GGMLQuantizationType.Q8_0

    def matrix(name: str, rows: int, columns: int) -> None:
        writer.add_tensor(name, np.full((rows, columns // 32 * 34), 0x11, np.uint8), raw_dtype=q8)

    matrix("token_embd.weight", vocab, hidden)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for i in range(layers):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{norm}.weight", np.ones(hidden, np.float32))
        for name in ("attn_q", "attn_output"):
            matrix(f"blk.{i}.{name}.weight", hidden, hidden)
        for name in ("attn_k", "attn_v"):
            matrix(f"blk.{i}.{name}.weight", hidden // 4, hidden)
        for name in ("ffn_gate", "ffn_up"):
            matrix(f"blk.{i}.{name}.weight", feed_forward, hidden)
        matrix(f"blk.{i}.ffn_down.weight", hidden, feed_forward)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_checkpoint(path)


def _measure_runtime() -> int:
    """Memory without weights: that of a fresh process that has built a small model and decoded a token."""
    command = [
        sys.executable,
        "-c",
        "from headrace import slim_import; slim_import.import_api(); from headrace import probe; probe.report_runtime()",
    ]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    except (subprocess.SubprocessError, OSError) as error:
        words = getattr(error, "stderr", None) or str(error)
        raise HeadraceError(
            f"a small model does not run in a separate process: {words.strip()[-200:]}",
            hint="is there memory for another Python? 1 GiB is enough",
        ) from error
    return int(result.stdout)


def report_runtime() -> None:
    """Print the memory of this process in bytes, after decoding one token of a small model."""
    with tempfile.TemporaryDirectory(prefix="headrace-probe-") as folder:
        checkpoint = small_model(Path(folder) / "probe.gguf", layers=2, hidden=256, feed_forward=512)
        pinned = {t.name: t.rows for t in checkpoint.tensors.values()}
        options = StreamOptions(pinned_rows=pinned, unit_bytes=UNIT_BYTES, slots=1, readers=1)
        with Engine(checkpoint, options, Kernels(usable_cores())) as engine:
            engine.step([Rows(cache=engine.new_cache(8), tokens=[1])])
            import headrace.model.tokenizer  # noqa: F401  (its libraries count as well)

            release_unused()
            print(resident_bytes())
