"""Passes whose weights or KV caches are not all in device memory.

    seconds = max(feed, resident) + share * min(feed, resident)          with prefetch
    feed    = the busiest pipe between the bytes and the device (`topology`), at its attained share of the peak
    experts = bytes of missed experts / rate                             after routing, without overlap

Weights and caches outside the device cross the link in every pass. An engine that computes attention on the host instead
(FlexGen) takes about as long, by its own measurements. Source: Sheng et al. 2023 (FlexGen), section 4.3, whose model takes
the maximum over pipes. Ours adds a share of the shorter, because no measured engine overlaps perfectly.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf

from headrace.forecast.architecture import Architecture
from headrace.forecast.expert_hits import distinct, hit_rate
from headrace.forecast.passes import DeviceSpec, Parallelism, PassForecast, PassShape, Rates, resident_pass
from headrace.forecast.topology import Flow, Topology


@dataclass(frozen=True, kw_only=True)
class FeedRates:
    """Efficiency of feeding a device: attained shares of link and disk peaks, and the share that is not overlapped."""

    link_share: float = 0.7
    disk_share: float = 0.75
    unhidden: float = 0.3
    expert_share: float = 0.6  # share of the rate for experts read on demand


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Shares of the weights and of the KV caches outside device memory; the rest is in it."""

    host: float = 0.0
    disk: float = 0.0
    kv_host: float = 0.0

    def __post_init__(self) -> None:
        if min(self.host, self.disk, self.kv_host) < 0 or self.host + self.disk > 1 + 1e-9 or self.kv_host > 1:
            raise ValueError("shares are between 0 and 1, and add up to at most 1")

    @property
    def device(self) -> float:
        """Share of the weights in device memory."""
        return max(0.0, 1 - self.host - self.disk)


def place(model: Architecture, bits: float, kv_bytes: float, device_bytes: float, host_bytes: float) -> Placement:
    """Place caches, then weights, into the fastest memory with free space; the rest stays on disk.

    Args:
        model: model to place.
        bits: bits per weight.
        kv_bytes: bytes of all caches.
        device_bytes: memory of all devices, without the software's own.
        host_bytes: host memory, without the system's own; 0 if the device computes in it.
    """
    weights = model.all_bytes(bits)
    kv_on_device = min(kv_bytes, device_bytes)
    kv_host = (kv_bytes - kv_on_device) / kv_bytes if kv_bytes else 0.0
    on_device = min(weights, device_bytes - kv_on_device)
    on_host = min(weights - on_device, max(0.0, host_bytes - (kv_bytes - kv_on_device)))
    host = on_host / weights
    disk = max(0.0, 1 - on_device / weights - host)
    return Placement(host=host, disk=0.0 if disk < 1e-9 else disk, kv_host=kv_host)


def streamed_pass(
    model: Architecture,
    device: DeviceSpec,
    split: Parallelism,
    work: PassShape,
    placement: Placement,
    topology: Topology,
    ways: Mapping[str, tuple[str, ...]],
    rates: Rates,
    feed: FeedRates,
) -> PassForecast:
    """A pass with streamed weights.

    Args:
        model: model to compute.
        device: one device.
        split: parallelism over devices.
        work: rows, sequences, context, bits.
        placement: memory tiers of weights and caches.
        topology: the pipes of all nodes.
        ways: the pipes from `host` and from `disk` to the devices.
        rates: rates of the resident part.
        feed: rates of the streamed part.
    """
    inner = resident_pass(model, device, split, work, rates)
    touched = None
    if model.is_moe:
        touched = distinct(model.experts, model.experts_per_token, max(1, round(work.rows)), skew=work.skew)
    read = model.read_bytes(work.bits, touched)
    kv = work.sequences * model.kv_bytes(work.context, work.kv_bits)
    flows = [
        Flow(read * placement.host / feed.link_share, ways["host"]),
        Flow(kv * placement.kv_host / feed.link_share, ways["host"]),
    ]
    if placement.disk:
        flows.append(Flow(read * placement.disk / feed.disk_share, ways["disk"]))
    load = topology.load(flows)
    seconds = max(load.seconds, inner.seconds) + feed.unhidden * min(load.seconds, inner.seconds)
    parts = dict(inner.parts)
    for name, share in load.utilisation.items():
        parts[name] = share * load.seconds
    return replace(inner, seconds=seconds, parts=parts, weight_bytes=read, kv_bytes=kv)


@dataclass(frozen=True, kw_only=True)
class ExpertHitModel:
    """An expert cache: its bytes, and the skew and temporal locality of the routing."""

    cache_bytes: float
    skew: float = 0.5
    locality: float = 0.3

    def hits(self, model: Architecture, bits: float) -> float:
        """Share of a row's experts that are in the cache."""
        per_layer = self.cache_bytes / max(1.0, model.expert_params * bits / 8) * model.experts
        return hit_rate(model.experts, model.experts_per_token, per_layer, skew=self.skew, locality=self.locality)


def expert_pass(
    model: Architecture,
    device: DeviceSpec,
    split: Parallelism,
    work: PassShape,
    hits: float,
    bytes_per_s: float,
    rates: Rates,
    feed: FeedRates,
    *,
    host_share: float = 0.0,
    host_bytes_per_s: float = inf,
) -> PassForecast:
    """A pass of an MoE with dense weights in memory and experts read on demand after routing.

    Args:
        model: an MoE model.
        device: one device.
        split: parallelism over devices.
        work: rows and bits.
        hits: share of the routed experts that are in memory.
        bytes_per_s: read rate of missed experts.
        rates: rates of the resident part.
        feed: feed rates; `expert_share` of the read rate is attained.
        host_share: share of the routed experts that are in host memory, part of `hits`.
        host_bytes_per_s: rate at which these move to the device, or are multiplied in place.
    """
    inner = resident_pass(model, device, split, work, rates)
    touched = distinct(model.experts, model.experts_per_token, max(1, round(work.rows)), skew=work.skew)
    needed = model.expert_params * work.bits / 8 * touched / model.experts
    read_s = needed * (1 - hits) / (bytes_per_s * feed.expert_share)
    host_s = needed * host_share / host_bytes_per_s
    parts = dict(inner.parts) | {"experts": read_s} | ({"host": host_s} if host_s else {})
    return replace(inner, seconds=inner.seconds + read_s + host_s, parts=parts)
