"""Seconds of a pass over the weights on a machine, by resource.

    seconds     = launches + max(memory, compute) + unhidden * min(memory, compute) + collectives

    memory      = (weights + KV caches) / (devices * memory_share * bytes/s)
    compute     = rows * FLOP / (devices * flop_share * FLOP/s)
    launches    = layers * layer_s + expert layers * routing_s
    collectives = layers * 2 * (hop_s * log2(devices) + start_s + bytes / link)

Launches take a fixed time, because a single efficiency does not describe a decoder. Sources: the roofline is Williams,
Waterman, Patterson 2009; weights and caches over bandwidth as in Pope et al. 2022 ("Efficiently scaling transformer
inference", sections 3 and 4.1: 2 reductions per layer, 2 (n - 1) / n of the activations each over a ring, or 8 /
sqrt(n) of them on a two-dimensional split); latency of a reduction growing with the logarithm of the devices: Thakur,
Rabenseifner, Gropp 2005. Unfused kernels first dequantise packed weights to 16 bits in memory: they write and read two
more bytes per weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import log2, sqrt

from headrace.forecast.architecture import Architecture
from headrace.forecast.expert_hits import distinct

NODE_DEVICES = 8  # devices that share the fast link, by default


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Efficiency of software on hardware: the only fitted constants."""

    memory_share: float = 0.8  # share of the peak bandwidth
    die_share: float = 0.85  # further factor if two dies share a device's memory
    flop_share: float = 0.6  # share of the peak FLOP/s in prefill
    layer_s: float = 60e-6  # fixed seconds per layer: launches and non-overlapping work
    routing_s: float = 60e-6  # fixed seconds per MoE layer: routing and gathering
    start_s: float = 10e-6  # fixed seconds per collective
    hop_s: float = 10e-6  # seconds of a collective per doubling of the devices
    unhidden: float = 0.3  # share of the shorter of memory and compute that is not overlapped
    chain_bytes: float = 60.0  # bytes moved per packed element if a framework dequantises one operation at a time


@dataclass(frozen=True, kw_only=True)
class DeviceSpec:
    """One device for the formulas."""

    bytes_per_s: float
    flop_per_s: float
    memory_bytes: float
    peer_bytes_per_s: float = 0.0  # rate to the other devices of its node, one way
    dies: int = 1


@dataclass(frozen=True, kw_only=True)
class Parallelism:
    """Tensor parallelism of every layer over `width` devices, pipeline parallelism over `depth` groups of those."""

    width: int = 1
    depth: int = 1
    nodes: int = 1  # nodes that one tensor-parallel group spans
    node_bytes_per_s: float = 0.0
    node_hop_s: float = 15e-6


@dataclass(frozen=True, kw_only=True)
class PassShape:
    """The size of a pass: `rows` new rows of `sequences` sequences, each with `context` tokens before them."""

    rows: float
    sequences: float
    context: float
    bits: float = 16.0
    kv_bits: float = 16.0
    unpacking: str = "fused"  # dequantisation: "fused" into the kernel, through "memory", or a "chain" of operations
    skew: float = 0.0  # Zipf exponent of expert routing


@dataclass(frozen=True, kw_only=True)
class PassForecast:
    """Predicted seconds of a pass, and the busy seconds of each resource."""

    seconds: float
    parts: Mapping[str, float] = field(default_factory=dict)  # busy seconds by resource, overlapped or not
    weight_bytes: float = 0.0
    kv_bytes: float = 0.0
    flop: float = 0.0

    @property
    def binding(self) -> str:
        """The resource that is busy longest."""
        return max(self.parts, key=lambda name: self.parts[name])


def weight_traffic(model: Architecture, work: PassShape, rates: Rates) -> float:
    """Bytes of weights that a pass moves through memory."""
    touched = None
    if model.is_moe:
        touched = distinct(model.experts, model.experts_per_token, max(1, round(work.rows)), skew=work.skew)
    read = model.read_bytes(work.bits, touched)
    return read + read * 8 / work.bits * unpack_bytes(work.bits, work.unpacking, rates)


def unpack_bytes(bits: float, unpacking: str, rates: Rates) -> float:
    """Extra bytes moved per packed element: none, one 16-bit write and read, or those of a chain of operations."""
    if bits >= 16 or unpacking == "fused":
        return 0.0
    return 4.0 if unpacking == "memory" else rates.chain_bytes


def resident_pass(
    model: Architecture, device: DeviceSpec, parallelism: Parallelism, work: PassShape, rates: Rates
) -> PassForecast:
    """A pass with everything in device memory; with `depth` above 1, at the best number of micro-batches."""
    if parallelism.depth == 1:
        return _stage_pass(model, device, parallelism, work, rates, 1.0)
    best = None
    for batches in range(1, parallelism.depth * 2 + 1):
        if batches > max(1.0, work.sequences):
            break
        part = PassShape(**{**vars(work), "rows": work.rows / batches, "sequences": work.sequences / batches})
        stage = _stage_pass(model, device, parallelism, part, rates, 1 / parallelism.depth)
        filled = batches + parallelism.depth - 1
        found = PassForecast(
            seconds=stage.seconds * filled,
            parts={name: value * filled for name, value in stage.parts.items()},
            weight_bytes=stage.weight_bytes * parallelism.depth * batches,
            kv_bytes=stage.kv_bytes * parallelism.depth * batches,
            flop=stage.flop * parallelism.depth * batches,
        )
        if best is None or found.seconds < best.seconds:
            best = found
    assert best is not None
    return best


def _stage_pass(
    model: Architecture, device: DeviceSpec, parallelism: Parallelism, work: PassShape, rates: Rates, share: float
) -> PassForecast:
    n, layers = parallelism.width, model.layers * share
    weights = weight_traffic(model, work, rates) * share
    kv = work.sequences * model.kv_bytes(work.context, work.kv_bits) * share
    kv += (
        kv * 8 / work.kv_bits * unpack_bytes(work.kv_bits, work.unpacking, rates) if work.unpacking == "chain" else 0.0
    )
    flop = work.rows * model.flop(work.context) * share
    memory_share = rates.memory_share * rates.die_share ** (device.dies - 1)
    memory_s = (weights + kv) / (n * memory_share * device.bytes_per_s)
    compute_s = flop / (n * rates.flop_share * device.flop_per_s)
    launch_s = layers * rates.layer_s + model.expert_layers * share * rates.routing_s
    collective_s = collectives(model.hidden, layers, device, parallelism, work.rows, rates)
    busy = max(memory_s, compute_s) + rates.unhidden * min(memory_s, compute_s)
    parts = {"memory": memory_s, "compute": compute_s, "launches": launch_s, "collectives": collective_s}
    return PassForecast(
        seconds=launch_s + busy + collective_s, parts=parts, weight_bytes=weights, kv_bytes=kv, flop=flop
    )


def collectives(
    hidden: int, layers: float, device: DeviceSpec, parallelism: Parallelism, rows: float, rates: Rates
) -> float:
    """Seconds of the two all-reduces of every layer."""
    n = parallelism.width
    if n == 1:
        return 0.0
    activations = rows * hidden * 2.0
    inside = max(1, n // parallelism.nodes)
    one_s = rates.start_s + rates.hop_s * log2(n)
    if device.peer_bytes_per_s:
        ring, grid = 2 * (inside - 1) / inside, 8 / sqrt(inside)
        one_s += activations * min(ring, grid) / device.peer_bytes_per_s
    if parallelism.nodes > 1:
        one_s += parallelism.node_hop_s * log2(parallelism.nodes)
        if parallelism.node_bytes_per_s:
            one_s += activations * 2 * (parallelism.nodes - 1) / parallelism.nodes / parallelism.node_bytes_per_s
    return 2 * layers * one_s
