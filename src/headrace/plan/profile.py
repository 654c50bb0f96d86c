"""The profile of this machine: disk, kernel and interpreter rates, measured once by `headrace probe` and saved.

Rates are in weights per second rather than bytes, so that an unmeasured quantisation can use a similar one's.
"""

import json
import os
import re
import tempfile
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from headrace.bounded import json_of, read_bounded
from headrace.cgroup import usable_cores
from headrace.errors import HeadraceError
from headrace.kernels.thresholds import PRECISE_TYPES, TILE_ROWS
from headrace.units import GIB, MIB

SCHEMA = 8
PREFILL_ROWS = 512  # prefill rows at which matmul kernels are compared
# Default share of the disk time that I/O costs the cores: 0.4 on two cores of a virtual machine (docs/accuracy.md).
IO_CPU_SHARE = 0.3


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Measured rates of one machine. `source` is `measured <date>`, or the label of `guessed_profile`."""

    source: str
    machine: str
    threads: int
    disk_bytes_per_s: Mapping[str, float]  # bytes per second by device number of the file system
    kernel_weights_per_s: Mapping[str, Mapping[str, float]]  # by type, by rows: matmul on packed blocks
    repacked_weights_per_s: Mapping[
        str, Mapping[str, float]
    ]  # by type, by rows: matmul in ggml's repacked layout, if any
    unpack_weights_per_s: Mapping[str, float]  # dequantisation rate by type
    bf16_flop_per_s: Mapping[str, float]  # by rows: torch GEMM on dequantised weights
    fp32_flop_per_s: Mapping[str, float]
    layer_s: float  # seconds of interpreter and small operations per decoder layer, one row
    layer_row_s: float  # seconds per further row
    runtime_bytes: int  # memory of interpreter, torch, transformers, the code of one model
    # Factors of `plan.fit`; the rates above already include all but `io_cpu`.
    factors: Mapping[str, float] = field(default_factory=dict)
    spread: tuple[float, float] | None = None  # measured / predicted of the middle 80 % of the fitted runs
    io_cpu_share: float = IO_CPU_SHARE  # share of the disk seconds in which I/O keeps cores busy or stalled
    probed_at: str = ""  # time of the probe, to the second; `fit` ignores runs predicted from other probes
    schema: int = field(default=SCHEMA)

    def __post_init__(self) -> None:
        by_rows = [*self.kernel_weights_per_s.values(), *self.repacked_weights_per_s.values()]
        by_rows += [self.bf16_flop_per_s, self.fp32_flop_per_s]
        if not all(by_rows) or not self.kernel_weights_per_s or not self.unpack_weights_per_s:
            raise ValueError("a profile needs a rate of every kind")
        if not all(_ROWS.fullmatch(key) for table in by_rows for key in table):
            raise ValueError("a profile's rates are for numbers of rows")
        if not all("1" in table for table in self.kernel_weights_per_s.values()):
            raise ValueError("a profile needs the rate of a single row")
        tables = (*by_rows, self.disk_bytes_per_s, self.unpack_weights_per_s)
        _check("rate", [rate for table in tables for rate in table.values()], 1, 1e18)
        _check("time", [self.layer_s, self.layer_row_s], 1e-9, 1e3)
        _check("factor", [self.io_cpu_share, *self.factors.values(), *(self.spread or ())], 1e-6, 1e6)
        _check("size", [self.runtime_bytes], 1, 1 << 40)
        _check("number of threads", [self.threads], 1, 4096)
        if not isinstance(self.threads, int) or not isinstance(self.runtime_bytes, int):
            raise ValueError("a profile counts threads and bytes in whole numbers")
        if not all(
            isinstance(text, str) and text.isprintable() for text in (self.source, self.machine, self.probed_at)
        ):
            raise ValueError("a profile's texts are printable")

    def disk(self, path: str) -> float:
        """Bytes per second of the file system that holds a file: its own rate, else the slowest known."""
        key = str(os.stat(path).st_dev) if os.path.exists(path) else ""
        return self.disk_bytes_per_s.get(key) or min(self.disk_bytes_per_s.values(), default=1e9)

    def kernel(self, type_name: str, rows: int, *, repacked: bool = False) -> float:
        """Weights per second of the packed matmul with `rows` rows."""
        table = self.repacked_weights_per_s.get(type_name) if repacked else None
        table = table or self.kernel_weights_per_s.get(type_name) or _slowest(self.kernel_weights_per_s)
        most = max(map(int, table))  # beyond it every row takes the same time
        return _interpolated(table, rows) * min(1.0, most / rows)

    def dots(self, type_name: str, rows: int) -> float:
        """Weights per second of the dot-product kernel, with one dot product per row and weight row."""
        measured_rows = min(rows, TILE_ROWS // 2)
        return self.kernel(type_name, measured_rows) * measured_rows / rows

    @property
    def tiled(self) -> frozenset[str]:
        """Formats whose tile kernel prefills faster than dequantisation plus torch GEMM."""
        rows = PREFILL_ROWS
        return frozenset(
            kind
            for kind, rates in self.kernel_weights_per_s.items()
            if str(rows) in rates and 1 / self.kernel(kind, rows) < self.unpacked_s(kind, rows)
        )

    def unpacked_s(self, type_name: str, rows: int) -> float:
        """Seconds per weight to dequantise and multiply with `rows` rows in torch."""
        precise = type_name in PRECISE_TYPES or not self.bf16_pays
        return 1 / self.unpack(type_name) + 2 * rows / self.gemm(rows, precise)

    @property
    def types_to_repack(self) -> frozenset[str]:
        """Formats that multiply one row faster repacked; the plan decides if a copy is worth its memory."""
        return frozenset(
            kind for kind in self.repacked_weights_per_s if self.kernel(kind, 1, repacked=True) > self.kernel(kind, 1)
        )

    @property
    def io_cpu(self) -> float:
        """Share of the disk seconds in which I/O keeps cores busy: they copy, and share memory bandwidth."""
        return self.factors.get("io_cpu", self.io_cpu_share)

    def unpack(self, type_name: str) -> float:
        """Weights per second dequantised to fp32."""
        return self.unpack_weights_per_s.get(type_name) or min(self.unpack_weights_per_s.values())

    def gemm(self, rows: int, precise: bool) -> float:
        """FLOP/s of torch GEMM with `rows` rows."""
        return _interpolated(self.fp32_flop_per_s if precise else self.bf16_flop_per_s, rows)

    @property
    def bf16_pays(self) -> bool:
        """True if torch multiplies faster in bf16 than in fp32 on this machine."""
        return self.gemm(256, False) > 1.2 * self.gemm(256, True)


_ROWS = re.compile(r"[1-9][0-9]{0,5}", re.ASCII)


def _check(what: str, values: Iterable[object], least: float, most: float) -> None:
    """Raise `ValueError` for a value that is no number from `least` to `most`."""
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise ValueError(f"a profile's {what} is {value!r:.40}, not {least:g} to {most:g}")


def _slowest(tables: Mapping[str, Mapping[str, float]]) -> Mapping[str, float]:
    return min(tables.values(), key=lambda table: table["1"])


def _interpolated(table: Mapping[str, float], rows: int) -> float:
    """A rate interpolated between measured numbers of rows, constant outside; time per weight is linear, not the rate."""
    points = sorted((int(key), 1 / value) for key, value in table.items())
    counts = [count for count, _ in points]
    at = bisect_left(counts, rows)
    if at == 0 or at == len(points):
        return 1 / points[min(at, len(points) - 1)][1]
    (x0, y0), (x1, y1) = points[at - 1], points[at]
    return 1 / (y0 + (y1 - y0) * (rows - x0) / (x1 - x0))


def machine_name() -> str:
    """Processor, cores and memory; a profile is valid only on the machine it was measured on."""
    model = "unknown"
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{model}, {usable_cores()} cores, {memory / GIB:.0f} GiB"


def profile_path() -> Path:
    """Path of the profile: in $HEADRACE_HOME, else in headrace's folder in the user's cache."""
    home = os.environ.get("HEADRACE_HOME")
    if home:
        return Path(home) / "profile.json"
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # the user has no known home
        cache = Path(tempfile.gettempdir())
    return cache / "headrace" / "profile.json"


_MOST_BYTES, _MOST_VALUES = 1 << 20, 10_000  # max size of a profile file


def load_profile(path: Path | None = None) -> Profile | None:
    """The saved profile, or None if it is missing, unreadable, or another machine's."""
    try:
        return profile_of(read_bounded(path or profile_path(), _MOST_BYTES).decode())
    except (OSError, ValueError):  # too large, or not text
        return None


def profile_of(text: str) -> Profile | None:
    """A profile from its saved text, or None if it is damaged or another machine's."""
    try:
        values: dict[str, Any] = json_of(text, _MOST_VALUES)
        if values.get("spread") is not None:
            low, high = values["spread"]
            values["spread"] = (low, high)
        profile = Profile(**values)
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError):
        return None
    return profile if profile.schema == SCHEMA and profile.machine == machine_name() else None


def save_profile(profile: Profile, path: Path | None = None) -> Path:
    """Save a profile atomically: a reader sees the old one or the new one.

    Raises:
        HeadraceError: it cannot be written.
    """
    path = path or profile_path()
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(asdict(profile), indent=1))
        partial.replace(path)
    except OSError as error:
        raise HeadraceError(
            f"the measured profile cannot be kept in {path}: {error.strerror}",
            hint="set HEADRACE_HOME to a folder that can be written",
        ) from error
    return path


def guessed_profile() -> Profile:
    """A modest machine, for planning before the probe has run; every plan made with it says so."""
    return Profile(
        source="guessed",
        machine=machine_name(),
        threads=usable_cores(),
        disk_bytes_per_s={},
        kernel_weights_per_s={"Q4_K": {"1": 20e9, "4": 8e9, "16": 3e9}, "F16": {"1": 8e9, "4": 6e9, "16": 3e9}},
        repacked_weights_per_s={},
        unpack_weights_per_s={"Q4_K": 2e9},
        bf16_flop_per_s={"32": 150e9, "512": 200e9},
        fp32_flop_per_s={"32": 150e9, "512": 200e9},
        layer_s=400e-6,
        layer_row_s=20e-6,
        runtime_bytes=420 * MIB,
    )
