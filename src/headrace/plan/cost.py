"""What a pass over the weights takes.

    seconds = max(streamed bytes / disk rate, compute(rows))        both go on at the same time
    compute(rows) = sum over types of weights / kernel rate + layers * (layer_s + rows * layer_row_s)

The first pass reads everything, the later ones what is not pinned. Sources: the disk and kernel rates are measured by
the probe; that both overlap fully is what the stream is for, and what the benchmarks check.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from headrace.kernels.limits import FEW_ROWS, PRECISE_TYPES
from headrace.plan.profile import Profile


@dataclass(frozen=True, kw_only=True)
class PassCost:
    """Seconds that the disk and the compute need for one pass, and the longer of them."""

    disk_s: float
    compute_s: float

    @property
    def seconds(self) -> float:
        """Length of the pass: the slower of the two."""
        return max(self.disk_s, self.compute_s)

    @property
    def binding(self) -> str:
        """Which of the two it is."""
        return "disk" if self.disk_s > self.compute_s else "compute"


def compute_seconds(
    profile: Profile,
    weights: Mapping[str, int],
    layers: int,
    rows: int,
    interleaved: frozenset[str] = frozenset(),
    exact: bool | None = None,
) -> float:
    """Seconds of compute of a pass.

    Args:
        profile: measured rates.
        weights: multiplied weights by type.
        layers: decoder layers.
        rows: of the pass.
        interleaved: types that have an interleaved copy.
        exact: whether rows are computed one by one, by the packed kernels; None: if they are few.
    """
    small = layers * (profile.layer_s + (rows - 1) * profile.layer_row_s)
    if rows <= FEW_ROWS if exact is None else exact:
        return small + sum(
            count / profile.kernel(kind, rows, interleaved=kind in interleaved) for kind, count in weights.items()
        )
    return small + sum(
        count / profile.unpack(kind)
        + 2 * count * rows / profile.product(rows, kind in PRECISE_TYPES or not profile.bf16_pays)
        for kind, count in weights.items()
    )


def pass_cost(
    profile: Profile,
    disk_bytes_per_s: float,
    read_bytes: int,
    weights: Mapping[str, int],
    layers: int,
    rows: int,
    interleaved: frozenset[str] = frozenset(),
    exact: bool | None = None,
) -> PassCost:
    """The cost of one pass that reads `read_bytes`; the other arguments as for `compute_seconds`."""
    return PassCost(
        disk_s=read_bytes / disk_bytes_per_s,
        compute_s=compute_seconds(profile, weights, layers, rows, interleaved, exact),
    )
