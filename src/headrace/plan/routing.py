"""Router statistics from earlier runs of a model, for the start of the next run and for the plan.

Each model has one small file beside the profile. It holds an EWMA of each expert's share of rows, by layer, and the last
run's hit rate. The plan uses the hit rate: over a few hundred tokens, the largest counted shares overstate popularity.
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
    """Recorded statistics of a model's routers."""

    scores: npt.NDArray[np.float32]  # (layers, experts), share of rows that choose each expert
    cached: int  # experts in memory, over all layers
    hit_rate: float  # share of single rows' routed experts that were in memory


def routing_path(checkpoint: Checkpoint) -> Path:
    """Path of the statistics, hashed from tensor names and shapes, so that a copy of the file finds them too."""
    digest = hashlib.sha256(checkpoint.name.encode())
    for name in sorted(checkpoint.tensors):
        digest.update(f"{name}{checkpoint.tensors[name].shape}".encode())
    return profile_path().with_name("routing") / f"{digest.hexdigest()[:16]}.npz"


def load_routing(checkpoint: Checkpoint) -> Routing | None:
    """Statistics of earlier runs; None if the file is missing or invalid."""
    try:
        data = io.BytesIO(read_bounded(routing_path(checkpoint), _MOST_BYTES))
        with zipfile.ZipFile(data) as archive:
            if sum(member.file_size for member in archive.infolist()) > _MOST_BYTES:
                return None
        data.seek(0)
        with np.load(data, allow_pickle=False) as file:
            scores, cached, hit_rate = file["scores"], int(file["cached"]), float(file["hit_rate"])
    except Exception:  # a damaged archive or header raises many types in three libraries
        return None
    good = scores.dtype == np.float32 and scores.ndim == 2 and bool(((scores >= 0) & (scores <= 1)).all())
    return Routing(scores=scores, cached=cached, hit_rate=hit_rate) if good and 0 <= hit_rate <= 1 else None


def save_routing(checkpoint: Checkpoint, routing: Routing) -> None:
    """Save the statistics atomically; a full disk is ignored."""
    path = routing_path(checkpoint)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.savez(file, scores=routing.scores, cached=routing.cached, hit_rate=routing.hit_rate)
        partial.replace(path)
