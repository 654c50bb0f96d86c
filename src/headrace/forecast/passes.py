"""What a pass over the weights takes on a machine, resource by resource.

    seconds     = launches + max(memory, compute) + unhidden * min(memory, compute) + collectives

    memory      = (weights + KV caches) / (devices * memory_share * bytes/s)
    compute     = rows * FLOP / (devices * flop_share * FLOP/s)
    launches    = layers * layer_s + expert layers * routing_s
    collectives = layers * 2 * (hop_s * log2(devices) + start_s + bytes / link)

The launches are a fixed time: one efficiency alone does not describe a decoder. Sources: the roofline is Williams,
Waterman, Patterson 2009; weights and caches over bandwidth as in Pope et al. 2022 ("Efficiently scaling transformer
inference", sections 3 and 4.1: 2 reductions per layer, 2 (n - 1) / n of the activations each over a ring, or 8 /
sqrt(n) of them on a two-dimensional parallelism); latency of a reduction growing with the logarithm of the devices: Thakur,
Rabenseifner, Gropp 2005. Unfused kernels for packed weights unpack them to 16 bits in memory first: they write and read
two bytes per weight more.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import log2, sqrt

from headrace.forecast.architecture import Architecture
from headrace.forecast.expert_hits import distinct

NODE_DEVICES = 8  # that share the fast link, unless a machine says otherwise


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How well software uses hardware: the constants that are fitted, and nothing else is."""

    memory_share: float = 0.8  # of the peak bandwidth
    die_share: float = 0.85  # of that, where two dies share a device's memory
    flop_share: float = 0.6  # of the peak, with many rows
    layer_s: float = 60e-6  # fixed time of a layer: launches, and what cannot overlap
    routing_s: float = 60e-6  # the same of choosing and gathering experts
    start_s: float = 10e-6  # of one collective
    hop_s: float = 10e-6  # of it, each doubling of the devices
    unhidden: float = 0.3  # share of the shorter of memory and compute that shows
    chain_bytes: float = 60.0  # moved per packed number where a framework unpacks it one operation at a time


@dataclass(frozen=True, kw_only=True)
class DeviceSpec:
    """One device as the formulas see it."""

    bytes_per_s: float
    flop_per_s: float
    memory_bytes: float
    peer_bytes_per_s: float = 0.0  # to the others of its node, one way
    dies: int = 1


@dataclass(frozen=True, kw_only=True)
class Parallelism:
    """How the model is spread: every layer over `width` devices, its layers over `depth` groups of those."""

    width: int = 1
    depth: int = 1
    nodes: int = 1  # that one width spans
    node_bytes_per_s: float = 0.0
    node_hop_s: float = 15e-6


@dataclass(frozen=True, kw_only=True)
class PassShape:
    """What a pass computes: new rows, of so many sequences, each after so many tokens."""

    rows: float
    sequences: float
    context: float
    bits: float = 16.0
    kv_bits: float = 16.0
    unpacking: str = "fused"  # kernels multiply packed weights where they lie; or "memory", or "chain"
    skew: float = 0.0  # of the routing of experts


@dataclass(frozen=True, kw_only=True)
class PassForecast:
    """Seconds of a pass by what they go to; together they are `seconds`."""

    seconds: float
    parts: Mapping[str, float] = field(default_factory=dict)  # busy seconds of each resource, overlapped or not
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
    if model.is_mixture:
        touched = distinct(model.experts, model.experts_per_token, max(1, round(work.rows)), skew=work.skew)
    read = model.read_bytes(work.bits, touched)
    return read + read * 8 / work.bits * unpack_bytes(work.bits, work.unpacking, rates)


def unpack_bytes(bits: float, unpacking: str, rates: Rates) -> float:
    """Bytes moved for each packed number beside its own: none, written and read once in 16 bits, or by a chain of operations."""
    if bits >= 16 or unpacking == "fused":
        return 0.0
    return 4.0 if unpacking == "memory" else rates.chain_bytes


def resident_pass(
    model: Architecture, device: DeviceSpec, parallelism: Parallelism, work: PassShape, rates: Rates
) -> PassForecast:
    """A pass with everything in device memory. With `depth` above 1, the best number of micro-batches fills the stages."""
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
    """Seconds of the two reductions of every layer."""
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
