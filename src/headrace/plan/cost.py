"""What a pass over the weights takes.

    seconds = max(disk, compute(rows) + io_cpu_share * disk)        disk = streamed bytes * read share / rate
    compute(rows) = sum over types of weights / kernel rate + layers * (layer_s + rows * layer_row_s)

To the compute belongs, too, the time in which it waits for experts that nobody has foreseen. The first pass reads
everything, the later ones what is not pinned. Sources: the disk and kernel rates are measured by the probe; they overlap,
but reading takes time of the cores (`plan.fit`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from headrace.kernels.thresholds import ACTIVATION_ROWS, DECODE_MAX_ROWS, TILE_ROWS
from headrace.plan.expert_cost import FOUND_LATE, LAYER_S, Experts, average_weights
from headrace.plan.profile import Profile


@dataclass(frozen=True, kw_only=True)
class PassCost:
    """Seconds that the disk and the compute need for one pass, and the longer of them."""

    disk_s: float
    compute_s: float
    io_cpu_share: float = 0.0  # share of the disk's seconds for which the cores are busy with reading

    def __add__(self, other: "PassCost") -> "PassCost":
        """Both, one after the other."""
        return PassCost(
            disk_s=self.disk_s + other.disk_s,
            compute_s=self.compute_s + other.compute_s,
            io_cpu_share=self.io_cpu_share,
        )

    @property
    def seconds(self) -> float:
        """Length of the pass: the disk's, or that of the cores, which compute and read."""
        return max(self.disk_s, self.compute_s + self.io_cpu_share * self.disk_s)

    @property
    def binding(self) -> str:
        """Which of the two it is."""
        return "disk" if self.disk_s > self.compute_s + self.io_cpu_share * self.disk_s else "compute"


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weights that a pass multiplies, counted by type: in the file's own layout, and repacked (`kernels`).

    Interleaved ones keep their own layout beside it, for prompts, unless they were repacked in place.
    """

    plain: Mapping[str, int]
    repacked: Mapping[str, int] = field(default_factory=dict)
    in_place: bool = False
    decoding_core_s_per_byte: float = 0.0  # of one core, for what is not stored as it is multiplied
    read_share: float = 1.0  # bytes read from the disk for each byte that arrives; experts have their own
    experts: Experts | None = None  # of which a pass multiplies those that its rows choose
    row_invariant: bool = False  # exact rows do not depend on their number: by dot products, or else
    pad_decode_rows_to_tiles: bool = False  # all through tiles, where the format has them (`kernels`)


def compute_seconds(
    profile: Profile, weights: Weights, layers: int, rows: int, row_invariant: bool | None = None
) -> float:
    """Seconds of compute of a pass.

    Args:
        profile: measured rates.
        weights: what is multiplied.
        layers: decoder layers.
        rows: of the pass.
        row_invariant: whether rows are computed one by one, by the packed kernels; None: if they are few.
    """
    row_invariant = rows <= DECODE_MAX_ROWS if row_invariant is None else row_invariant
    seconds = layer_seconds(profile, layers, rows)
    for kind, count in weights.repacked.items():
        if row_invariant or weights.in_place:
            padded = -(-rows // ACTIVATION_ROWS) * ACTIVATION_ROWS if weights.row_invariant else rows
            seconds += count / profile.kernel(kind, padded, repacked=True)
        else:
            seconds += _many(profile, kind, count, rows)
    for kind, count in weights.plain.items():
        seconds += (
            count / row_invariant_rate(profile, weights, kind, rows)
            if row_invariant
            else _many(profile, kind, count, rows)
        )
    if weights.experts is not None:
        seconds += expert_seconds(profile, weights.experts, rows, row_invariant and weights.row_invariant)
    return seconds


def expert_seconds(profile: Profile, experts: Experts, rows: int, dots: bool) -> float:
    """Seconds of compute for the experts that so many rows choose: each expert multiplies those rows that chose it."""
    touched = max(experts.touched(rows), 1e-9)
    each = max(1, round(rows * experts.per_token / touched))  # rows of an expert
    kernels = 0.0
    for kind, count in average_weights(experts).items():
        if dots:
            kernels += count / profile.dots(kind, each)
        else:
            kernels += (
                count / profile.kernel(kind, each) if each <= DECODE_MAX_ROWS else _many(profile, kind, count, each)
            )
    return experts.layers * (LAYER_S + touched * kernels)


def layer_seconds(profile: Profile, layers: int, rows: int) -> float:
    """Seconds of a pass outside of the kernels: interpreter, norms, attention."""
    return layers * (profile.layer_s + (rows - 1) * profile.layer_row_s)


def row_invariant_rate(profile: Profile, weights: Weights, kind: str, rows: int) -> float:
    """Weights per second of exact rows, not repacked."""
    if not weights.row_invariant:
        return profile.kernel(kind, rows)
    if weights.pad_decode_rows_to_tiles and kind in profile.tiled:
        return profile.kernel(kind, max(rows, TILE_ROWS))
    return profile.dots(kind, rows)


def _many(profile: Profile, kind: str, count: float, rows: int) -> float:
    """Seconds of so many weights through tiles, or unpacked and multiplied by torch."""
    if kind in profile.tiled:
        return count / profile.kernel(kind, max(rows, TILE_ROWS))
    return count * profile.unpacked_s(kind, rows)


def pass_cost(
    profile: Profile,
    disk_bytes_per_s: float,
    read_bytes: int,
    weights: Weights,
    layers: int,
    rows: int,
    row_invariant: bool | None = None,
) -> PassCost:
    """The cost of one pass in which `read_bytes` arrive and the experts that it misses; the others as for `compute_seconds`."""
    missed = weights.experts.missed_bytes(rows) if weights.experts is not None else 0.0
    late = FOUND_LATE * missed if rows <= DECODE_MAX_ROWS else 0.0  # a prompt takes experts as they come
    return PassCost(
        disk_s=(read_bytes * weights.read_share + missed) / disk_bytes_per_s,
        compute_s=compute_seconds(profile, weights, layers, rows, row_invariant)
        + read_bytes * weights.decoding_core_s_per_byte / profile.threads
        + late / disk_bytes_per_s,
        io_cpu_share=profile.io_cpu,
    )
