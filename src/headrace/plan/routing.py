"""What routers have chosen in earlier runs of a model, kept so that the next run begins with it, and the plan knows it.

One small file for each model, beside the profile: for every expert of every layer the share of rows that usually choose it.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from headrace.checkpoint import Checkpoint
from headrace.plan.profile import profile_path


def routing_path(checkpoint: Checkpoint) -> Path:
    """Where the shares of this model are kept: by the names and shapes of its tensors, so that a copy finds them too."""
    digest = hashlib.sha256(checkpoint.name.encode())
    for name in sorted(checkpoint.tensors):
        digest.update(f"{name}{checkpoint.tensors[name].shape}".encode())
    return profile_path().with_name("routing") / f"{digest.hexdigest()[:16]}.npy"


def load_routing(checkpoint: Checkpoint) -> npt.NDArray[np.float32] | None:
    """The shares, (layers, experts); None if there are none or the file is no such table."""
    try:
        scores = np.load(routing_path(checkpoint), allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    good = scores.dtype == np.float32 and scores.ndim == 2 and bool(((scores >= 0) & (scores <= 1)).all())
    return scores if good else None


def save_routing(checkpoint: Checkpoint, scores: npt.NDArray[np.float32]) -> None:
    """Keep the shares. A full disk is no failure; a reader sees the old file or the new one."""
    path = routing_path(checkpoint)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.save(file, scores)
        partial.replace(path)
