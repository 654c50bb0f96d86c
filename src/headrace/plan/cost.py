"""Seconds of a pass over the weights.

    seconds = max(disk, compute(rows) + io_cpu_share * disk)        disk = streamed bytes * read share / rate
    compute(rows) = sum over types of weights / kernel rate + layers * (layer_s + rows * layer_row_s * width)

Compute includes the wait for experts that were not prefetched. The first pass reads everything, later passes only
streamed weights. The probe measures disk and kernel rates. Disk and compute overlap, but I/O takes CPU time (`plan.fit`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from headrace.checkpoint.tensor import layer_of
from headrace.kernels.thresholds import ACTIVATION_ROWS, DECODE_MAX_ROWS, TILE_ROWS
from headrace.plan.expert_cost import FOUND_LATE, LAYER_S, Experts, average_weights
from headrace.plan.profile import Profile
from headrace.plan.shape import Shape


@dataclass(frozen=True, kw_only=True)
class PassCost:
    """Seconds of disk and of compute in one pass, and the longer of them."""

    disk_s: float
    compute_s: float
    io_cpu_share: float = 0.0  # share of the disk seconds in which I/O keeps cores busy

    def __add__(self, other: "PassCost") -> "PassCost":
        """Two passes, one after the other."""
        return PassCost(
            disk_s=self.disk_s + other.disk_s,
            compute_s=self.compute_s + other.compute_s,
            io_cpu_share=self.io_cpu_share,
        )

    @property
    def seconds(self) -> float:
        """Length of the pass: disk time, or the cores' time for compute and I/O."""
        return max(self.disk_s, self.compute_s + self.io_cpu_share * self.disk_s)

    @property
    def binding(self) -> str:
        """The longer of the two: disk or compute."""
        return "disk" if self.disk_s > self.compute_s + self.io_cpu_share * self.disk_s else "compute"


class Layers(NamedTuple):
    """The decoder layers of a model, and their width in multiples of the model that the probe runs (`PROBED_OUTPUTS`)."""

    number: int
    width: float


PROBED_OUTPUTS = 11776  # results of the matmuls of a layer, in elements per row


def layers_of(shape: Shape) -> Layers:
    """The layers of a model. What a row costs outside the kernels grows with the elements that the matmuls give."""
    outputs = sum(tensor.outputs for tensor in shape.linears if layer_of(tensor.name) >= 0)
    return Layers(shape.layers, outputs / shape.layers / PROBED_OUTPUTS)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Weights that a pass multiplies, counted by type: in the file's layout, and repacked (`kernels`).

    Repacked weights also keep their own layout, for prefill, unless they were repacked in place.
    """

    plain: Mapping[str, int]
    repacked: Mapping[str, int] = field(default_factory=dict)
    in_place: bool = False
    decoding_core_s_per_byte: float = 0.0  # core seconds to transcode virtual tensors, per streamed byte
    read_share: float = 1.0  # bytes read from disk per byte that arrives; experts have their own
    experts: Experts | None = None  # routed experts; a pass multiplies those that its rows choose
    row_invariant: bool = False  # decode rows use kernels whose result is independent of batch size
    pad_decode_rows_to_tiles: bool = False  # tile kernel for decode rows, where the format has one


def compute_seconds(
    profile: Profile, weights: Weights, layers: Layers, rows: int, row_invariant: bool | None = None
) -> float:
    """Seconds of compute of a pass.

    Args:
        profile: measured rates.
        weights: multiplied weights.
        layers: decoder layers.
        rows: rows of the pass.
        row_invariant: rows go through the packed decode kernels; None: up to `DECODE_MAX_ROWS` rows do.
    """
    row_invariant = rows <= DECODE_MAX_ROWS if row_invariant is None else row_invariant
    seconds = layer_seconds(profile, layers, rows)
    for kind, count in weights.repacked.items():
        if row_invariant or weights.in_place:
            padded = -(-rows // ACTIVATION_ROWS) * ACTIVATION_ROWS if weights.row_invariant else rows
            seconds += count / profile.kernel(kind, padded, repacked=True)
        else:
            seconds += _prefill_s(profile, kind, count, rows)
    for kind, count in weights.plain.items():
        seconds += (
            count / row_invariant_rate(profile, weights, kind, rows)
            if row_invariant
            else _prefill_s(profile, kind, count, rows)
        )
    if weights.experts is not None:
        seconds += expert_seconds(profile, weights.experts, rows, row_invariant and weights.row_invariant)
    return seconds


def expert_seconds(profile: Profile, experts: Experts, rows: int, dots: bool) -> float:
    """Seconds of compute for the routed experts of `rows` rows: each expert multiplies the rows that chose it."""
    touched = max(experts.touched(rows), 1e-9)
    each = max(1, round(rows * experts.per_token / touched))  # rows per expert
    kernels = 0.0
    for kind, count in average_weights(experts).items():
        if dots:
            kernels += count / profile.dots(kind, each)
        else:
            kernels += (
                count / profile.kernel(kind, each)
                if each <= DECODE_MAX_ROWS
                else _prefill_s(profile, kind, count, each)
            )
    return experts.layers * (LAYER_S + touched * kernels)


def layer_seconds(profile: Profile, layers: Layers, rows: int) -> float:
    """Seconds of a pass outside the kernels: interpreter, norms, attention."""
    return layers.number * (profile.layer_s + (rows - 1) * profile.layer_row_s * layers.width)


def row_invariant_rate(profile: Profile, weights: Weights, kind: str, rows: int) -> float:
    """Weights per second of row-invariant rows, not repacked."""
    if not weights.row_invariant:
        return profile.kernel(kind, rows)
    if weights.pad_decode_rows_to_tiles and kind in profile.tiled:
        return profile.kernel(kind, max(rows, TILE_ROWS))
    return profile.dots(kind, rows)


def _prefill_s(profile: Profile, kind: str, count: float, rows: int) -> float:
    """Seconds of prefill for `count` weights: tile kernel, or dequantised and multiplied by torch."""
    if kind in profile.tiled:
        return count / profile.kernel(kind, max(rows, TILE_ROWS))
    return count * profile.unpacked_s(kind, rows)


def pass_cost(
    profile: Profile,
    disk_bytes_per_s: float,
    read_bytes: int,
    weights: Weights,
    layers: Layers,
    rows: int,
    row_invariant: bool | None = None,
) -> PassCost:
    """The cost of a pass that reads `read_bytes` and its missed experts; other arguments as in `compute_seconds`."""
    missed = weights.experts.missed_bytes(rows) if weights.experts is not None else 0.0
    late = FOUND_LATE * missed if rows <= DECODE_MAX_ROWS else 0.0  # prefill takes experts in order of arrival
    return PassCost(
        disk_s=(read_bytes * weights.read_share + missed) / disk_bytes_per_s,
        compute_s=compute_seconds(profile, weights, layers, rows, row_invariant)
        + read_bytes * weights.decoding_core_s_per_byte / profile.threads
        + late / disk_bytes_per_s,
        io_cpu_share=profile.io_cpu,
    )
