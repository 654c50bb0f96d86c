"""What routers have chosen in earlier runs of a model, kept so that the next run begins with it, and the plan knows it.

One small file for each model, beside the profile: for every expert of every layer the share of rows that usually choose it,
and how often the last run found what it needed in memory. The plan goes by the latter: the most popular of shares that were
counted over some hundred tokens look more popular than they are.
"""

import hashlib
import io
import os
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from headrace.bounded import read_bounded
from headrace.checkpoint import Checkpoint
from headrace.plan.profile import profile_path

_MOST_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What is known of a model's routers."""

    scores: npt.NDArray[np.float32]  # (layers, experts), shares of rows
    cached: int  # experts that memory held, of all layers together
    hit_rate: float  # share of the choices of single rows that were among them


def routing_path(checkpoint: Checkpoint) -> Path:
    """Where it is kept: by the names and shapes of the model's tensors, so that a copy of the file finds it too."""
    digest = hashlib.sha256(checkpoint.name.encode())
    for name in sorted(checkpoint.tensors):
        digest.update(f"{name}{checkpoint.tensors[name].shape}".encode())
    return profile_path().with_name("routing") / f"{digest.hexdigest()[:16]}.npz"


def load_routing(checkpoint: Checkpoint) -> Routing | None:
    """What earlier runs have left; None if there is nothing, or the file is no such record."""
    try:
        data = io.BytesIO(read_bounded(routing_path(checkpoint), _MOST_BYTES))
        with zipfile.ZipFile(data) as archive:
            if sum(member.file_size for member in archive.infolist()) > _MOST_BYTES:
                return None
        with np.load(data, allow_pickle=False) as file:
            scores, cached, hit_rate = file["scores"], int(file["cached"]), float(file["hit_rate"])
    except Exception:  # whatever a damaged archive, or a header in it, provokes in three libraries
        return None
    good = scores.dtype == np.float32 and scores.ndim == 2 and bool(((scores >= 0) & (scores <= 1)).all())
    return Routing(scores=scores, cached=cached, hit_rate=hit_rate) if good and 0 <= hit_rate <= 1 else None


def save_routing(checkpoint: Checkpoint, routing: Routing) -> None:
    """Keep it. A full disk is no failure; a reader sees the old file or the new one."""
    path = routing_path(checkpoint)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.savez(file, scores=routing.scores, cached=routing.cached, hit_rate=routing.hit_rate)
        partial.replace(path)
