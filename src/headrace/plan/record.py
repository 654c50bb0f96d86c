"""The record of a run: measured and predicted passes, as one line of JSON. `fit` learns from many records."""

import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from headrace.bounded import json_of, read_bounded
from headrace.errors import UsageError
from headrace.plan.cost import layer_seconds, layers_of
from headrace.plan.plan import Plan
from headrace.plan.profile import profile_path

SCHEMA = 2


class Pass(Protocol):
    """The required fields of one pass (`engine.timeline.PassStats`)."""

    @property
    def rows(self) -> int:
        """Rows of all sequences."""
        ...

    @property
    def seconds(self) -> float:
        """Seconds from start to end of the pass."""
        ...

    @property
    def read_bytes(self) -> int:
        """Bytes that arrived during the pass."""
        ...

    @property
    def stall_s(self) -> float:
        """Seconds that compute waited for the disk."""
        ...

    @property
    def draft_s(self) -> float:
        """Seconds of drafting before the pass."""
        ...

    @property
    def drafted(self) -> int:
        """Draft tokens among its rows."""
        ...

    @property
    def accepted(self) -> int:
        """Accepted draft tokens."""
        ...


@dataclass(frozen=True, kw_only=True)
class PassGroup:
    """Decode passes with the same number of rows: count, median seconds, and predicted seconds of each resource."""

    rows: int
    count: int
    seconds: float
    read_bytes: float
    stall_s: float
    draft_s: float
    disk_s: float  # predicted seconds of the disk
    kernel_s: float  # predicted seconds of the kernels
    layer_s: float  # predicted seconds of the layers outside the kernels

    def __post_init__(self) -> None:
        numbers = (self.seconds, self.disk_s, self.kernel_s, self.layer_s, self.draft_s, self.stall_s)
        if not self.disk_s + self.kernel_s + self.layer_s > 0:
            raise ValueError("a group needs predicted seconds above 0")
        if self.rows < 1 or self.count < 1 or self.seconds <= 0 or not all(0 <= n < math.inf for n in numbers):
            raise ValueError("a group needs rows, passes and seconds")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run. `factors` come from the profile that predicted it."""

    machine: str
    model: str
    weights_bytes: int
    pinned_bytes: int
    streamed_bytes: int
    budget_bytes: int
    layers: int
    sequences: int
    draft: str
    tokens: int
    ttft_s: float | None
    predicted_ttft_s: float
    s_per_token: float | None
    predicted_s_per_token: float
    drafted: int
    accepted: int
    passes: tuple[PassGroup, ...]
    factors: Mapping[str, float] = field(default_factory=dict)
    probed_at: str = ""  # probe time of that profile
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if not all(0 < factor < math.inf for factor in self.factors.values()):
            raise ValueError("factors are positive numbers")


def make_record(
    plan: Plan, passes: Sequence[Pass], tokens: int, ttft_s: float | None, s_per_token: float | None
) -> RunRecord:
    """The record of a run.

    Args:
        plan: the executed plan.
        passes: all passes in order. The first reads everything and touches memory for the first time. The groups leave
            out that pass and passes with prompt rows.
        tokens: number of generated tokens.
        ttft_s: seconds to the first of them.
        s_per_token: seconds per further token.
    """
    most = plan.sequences * (1 + plan.max_draft_tokens)
    groups: dict[int, list[Pass]] = {}
    for one in passes[1:]:
        if one.rows <= most:
            groups.setdefault(one.rows, []).append(one)
    return RunRecord(
        machine=plan.profile.machine,
        model=plan.model,
        weights_bytes=plan.weights_bytes,
        pinned_bytes=plan.held_bytes,
        streamed_bytes=plan.streamed_bytes_per_pass,
        budget_bytes=plan.budget.nbytes,
        layers=plan.shape.layers,
        sequences=plan.sequences,
        draft=plan.drafting.name,
        tokens=tokens,
        ttft_s=ttft_s,
        predicted_ttft_s=plan.ttft_s.expected,
        s_per_token=s_per_token,
        predicted_s_per_token=plan.decode_s_per_token.expected,
        drafted=sum(one.drafted for one in passes),
        accepted=sum(one.accepted for one in passes),
        passes=tuple(_group(plan, rows, group) for rows, group in sorted(groups.items())),
        factors=dict(plan.profile.factors),
        probed_at=plan.profile.probed_at,
    )


def _group(plan: Plan, rows: int, passes: Sequence[Pass]) -> PassGroup:
    cost = plan.cost(rows)
    layer_s = layer_seconds(plan.profile, layers_of(plan.shape), rows)
    return PassGroup(
        rows=rows,
        count=len(passes),
        seconds=statistics.median(one.seconds for one in passes),
        read_bytes=statistics.mean(one.read_bytes for one in passes),
        stall_s=statistics.median(one.stall_s for one in passes),
        draft_s=statistics.median(one.draft_s for one in passes),
        disk_s=cost.disk_s,
        kernel_s=cost.compute_s - layer_s,
        layer_s=layer_s,
    )


def records_path() -> Path:
    """Path of the records, beside the profile."""
    return profile_path().with_name("runs.jsonl")


def keep_record(record: RunRecord, path: Path | None = None) -> None:
    """Append a record in one write, so that two processes do not mix their lines. A full disk is ignored."""
    path = path or records_path()
    line = json.dumps(asdict(record), allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)
    except OSError:
        pass


_MOST_BYTES, _MOST_VALUES = 256 << 20, 100_000  # max bytes of the file, max values of a line


def read_records(path: Path) -> list[RunRecord]:
    """All records of a file.

    Raises:
        UsageError: missing file, or an invalid line; the message gives its number.
    """
    try:
        lines = read_bounded(path, _MOST_BYTES).decode().splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the run records {path}: {error}", hint="`headrace run` keeps them") from error
    return list(_parse(path, lines))


def _parse(path: Path, lines: Iterable[str]) -> Iterable[RunRecord]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values: dict[str, Any] = json_of(line, _MOST_VALUES)
            if values.get("schema") in range(1, SCHEMA):
                continue  # record of an earlier version
            if values.get("schema") != SCHEMA:
                raise ValueError(f"schema {values.get('schema')}, this version reads {SCHEMA}")
            groups = tuple(PassGroup(**group) for group in values.pop("passes"))
            yield RunRecord(**values, passes=groups)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UsageError(
                f"{path}, line {number} is no run record: {error}", hint="remove the line, or the file"
            ) from error
