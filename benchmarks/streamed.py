"""Published measurements of models that did not fit: dense weights from host or disk in every pass, and experts on demand.

A row counts only if it states the rows per pass and the source of the bytes. Without these no prediction is possible.
"""

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
from measurements import device_of, model_of, number
from scipy.optimize import least_squares

from headrace.forecast.architecture import Architecture
from headrace.forecast.passes import DeviceSpec, Parallelism, PassShape, Rates
from headrace.forecast.streaming import ExpertHitModel, FeedRates, Placement, expert_pass, place, streamed_pass
from headrace.forecast.topology import Pipe, Topology

# Device memory that an engine needs for its runtime and workspaces.
RESERVED = 1.2e9
HOST_LEFT = 20e9  # host memory for the system and for buffers


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """One measurement. The engine's constants are in `FeedRates`."""

    id: str
    source: str
    category: str  # dense streaming, MoE streaming
    model: Architecture
    device: DeviceSpec
    work: PassShape  # a decode pass
    prompt: float
    passes: float  # decode passes in the number; plus a prefill if `prompt`
    placement: Placement
    link_bytes_per_s: float
    disk_bytes_per_s: float
    hits: float | None  # expert hit rate; None: predicted from the cache
    cache_bytes: float
    seconds: float
    hardware: str

    @property
    def family(self) -> str:
        return self.category

    def predict(self, rates: Rates, feed: FeedRates) -> float:
        """Seconds by the planner."""
        split = Parallelism()
        if self.category == "MoE streaming":
            hits = self.hits
            if hits is None:
                hits = ExpertHitModel(cache_bytes=self.cache_bytes).hits(self.model, self.work.bits)
            rate = self.disk_bytes_per_s or self.link_bytes_per_s
            return expert_pass(self.model, self.device, split, self.work, hits, rate, rates, feed).seconds
        pipes = [Pipe("link", self.link_bytes_per_s), Pipe("disk", self.disk_bytes_per_s or 1.0)]
        routes: Mapping[str, tuple[str, ...]] = {"host": ("link",), "disk": ("disk",)}

        def one(work: PassShape) -> float:
            return streamed_pass(
                self.model, self.device, split, work, self.placement, Topology(pipes), routes, rates, feed
            ).seconds

        total = self.passes * one(self.work)
        if self.prompt:
            # Prefill writes the KV cache and does not read it back: only the weights are streamed.
            first = replace(self.work, rows=self.work.sequences * self.prompt, context=self.prompt / 2, sequences=1e-9)
            total += one(first)
        return total


def read_streamed(path: Path, *, known: bool = True) -> list[Streamed]:
    """The rows with enough data. `known`: only engines that the constants are fitted to, whose design is understood."""
    with path.open(newline="") as file:
        return [
            case for row in csv.DictReader(file) if (case := _dense(row, known) or _experts(row, known)) is not None
        ]


def _from_outside(row: dict[str, str]) -> bool:
    """True if the weights came over a link or from a disk of known speed, by any engine."""
    link = row["link"]
    return (
        bool(link)
        and not re.search(r"NVLink|NVSwitch|IB|Infinity|ICI|Ethernet", link)
        and bool(number(row["link_GBps"]) or _bus(row["hardware"]))
    )


def source_of(row: dict[str, str]) -> str:
    """Source of a row: all pages of one repository are one source."""
    source = row["source"].split("(secondary)")[0]
    if re.match(r"(FlexGen|sqliteai/waste|together|deepnewz|danveloper)", source):
        return source.split(" ")[0].replace("deepnewz", "together.ai/blog/sequoia").split("/blog")[0]
    return source


BUSES = {
    "T4": 15.75,
    "V100": 15.75,
    "A6000": 31.5,
    "4090": 31.5,
    "2080": 15.75,
    "Titan RTX": 15.75,
    "A100": 31.5,
    "3060": 15.75,
    "3080": 31.5,
    "A5000": 31.5,
}
HOSTS = {"T4": 208e9, "A6000": 252e9, "V100": 1500e9}
BITS = {4.0: 4.5, 8.0: 8.5}


def _bus(hardware: str) -> float | None:
    found = [rate for name, rate in BUSES.items() if name in hardware]
    return found[0] * 1e9 if found else None


def _device(row: dict[str, str]) -> DeviceSpec | None:
    device: dict[str, Any] = dict(device_of(row["hardware"]))
    if "Titan RTX" in row["hardware"]:
        device = {"memory_gb_per_s": 672, "fp16_tflops": 130, "memory_gb": 24}
    if "A5000" in row["hardware"]:
        device = {"memory_gb_per_s": 768, "fp16_tflops": 111, "memory_gb": 24}
    bandwidth = number(row["mem_bw_GBps"]) or device.get("memory_gb_per_s")
    if not bandwidth:
        return None
    peak = number(row["peak_TFLOPs"]) or device.get("fp16_tflops") or device.get("fp32_tflops") or float(bandwidth) / 10
    memory = float(device.get("memory_gb", 16))
    return DeviceSpec(bytes_per_s=float(bandwidth) * 1e9, flop_per_s=float(peak) * 1e12, memory_bytes=memory * 1e9)


def _dense(row: dict[str, str], known: bool) -> Streamed | None:
    text = row["id"] + row["notes"]
    engine = re.search(
        r"FlexGen|Accelerate|DeepSpeed|ZeRO|sequoia|hypura_70b|accel_|lcpp_i711", row["id"] + row["notes"]
    )
    batch, value = number(row["batch"]), number(row["value"])
    if (
        (engine is None and (known or not _from_outside(row)))
        or not value
        or batch is None
        or number(row["active_params"])
        or "SPECULATIVE" in text
        or "flexgen_t3" in row["id"]
    ):
        return None
    if (known and not re.search(r"FlexGen|zero|DENSE", row["source"] + text)) or row["metric"] == "memory_used":
        return None
    model, device = model_of(row), _device(row)
    bits = number(row["weights_bits"])
    if model is None or bits is None or model.is_moe:
        return None
    bits = BITS.get(bits, bits)
    weights = model.all_bytes(bits)
    prompt, generated = number(row["prompt"]) or 0.0, number(row["gen"]) or 0.0
    link, disk = _bus(row["hardware"]), 0.0
    kv_bits = 4.5 if "(c)" in row["id"] else 16.0  # FlexGen compresses caches, too
    kv = batch * model.kv_bytes(prompt + generated, kv_bits)
    if "lcpp_i711" in row["id"]:
        device, link, disk, where = (
            DeviceSpec(bytes_per_s=40e9, flop_per_s=4e11, memory_bytes=16e9),
            40e9,
            1e9,
            Placement(disk=1.0),
        )
    elif "hypura" in row["id"]:
        link, disk, where = 400e9, 5.1e9, Placement(disk=31.8 / 39.6)
    elif held := re.search(r"([\d.]+) GB CPU", row["notes"]):
        if "disk" in row["notes"].split("GB CPU")[1].split(";")[0]:
            return None  # its disk is not known
        where = Placement(host=float(held.group(1)) * 1e9 / weights)
    elif re.search(r"NVMe|SSD|disk|HDD", row["link"]) and not ("T4" in row["hardware"] and "PCIe" in row["link"]):
        rate = number(row["link_GBps"])
        if rate is None:
            return None
        disk, where = rate * 1e9, Placement(disk=1.0, kv_host=1.0 if batch > 1 else 0.0)
        link = link or disk
    else:
        assert device is not None
        keeps = not re.search(r"ZeRO|DeepSpeed|zi_|sequoia", row["id"])
        capacity = device.memory_bytes - RESERVED
        host = next((size for name, size in HOSTS.items() if name in row["hardware"]), 128e9) - HOST_LEFT
        if "KV offload to CPU: yes" in row["notes"]:
            where = replace(place(model, bits, 0.0, capacity if keeps else 0.0, host), kv_host=1.0)
        else:
            where = place(model, bits, kv, capacity if keeps else min(kv, capacity), host)
        if where.disk:
            disk = 2e9  # stated by FlexGen's authors for their disk
    if device is None or link is None:
        return None
    metric = row["metric"]
    seconds = {"generation_throughput": batch * generated / value, "decode_throughput": 1 / value}.get(metric)
    if metric == "decode_latency_per_token":
        seconds = value * (1e-3 if row["unit"].startswith("ms") else 1.0)
    if not seconds:
        return None
    whole = metric == "generation_throughput"
    work = PassShape(rows=batch, sequences=batch, context=prompt + generated / 2, bits=bits, kv_bits=kv_bits)
    if "FlexGen" in row["id"]:
        work = replace(work, unpacking="chain")
    return Streamed(
        id=row["id"],
        source=source_of(row),
        category="dense streaming",
        model=model,
        device=device,
        work=work,
        prompt=prompt if whole else 0.0,
        passes=max(1.0, generated - 1) if whole else 1.0,
        placement=where,
        link_bytes_per_s=link,
        disk_bytes_per_s=disk,
        hits=None,
        cache_bytes=0.0,
        seconds=seconds,
        hardware=row["hardware"],
    )


def _experts(row: dict[str, str], known: bool) -> Streamed | None:
    source, notes = row["source"], row["notes"]
    ours = re.match(r"sqliteai/waste|danveloper/flash-moe|Eliseev", source)
    if (
        (not ours and (known or not _from_outside(row)))
        or "discarded" in notes
        or "mmap" in notes
        or "cliff" in notes
        or "CPU only" in row["hardware"]
    ):
        return None
    if "naive" in notes or "thr" in row["id"] or not (value := number(row["value"])):
        return None
    model, device = model_of(row), _device(row)
    if model is None:
        return None
    if not model.is_moe or str(model.experts) == "128":  # not in the table: sizes from the page
        sizes = {"Qwen3.5-397B-A17B": (512, 10, 60, 4096)}.get(row["model"])
        if sizes is None:
            return None
        experts, chosen, layers, hidden = sizes
        model = replace(
            model,
            experts=experts,
            experts_per_token=chosen,
            layers=layers,
            hidden=hidden,
            active_params=17e9,
            params=397e9,
        )
    bits = number(row["weights_bits"]) or (3.17 if "Kimi-Linear" in model.name or "waste" in source else 4.5)
    if bits == 4.0 and "waste" in source:
        bits = 3.17  # the container's: 19 GB for 48e9 weights
    if used := re.search(r"\bK=(\d+)", notes):
        fewer = int(used.group(1))
        per_expert = model.expert_params / model.experts
        model = replace(model, experts_per_token=fewer, active_params=model.dense_params + fewer * per_expert)
    if device is None:
        device = DeviceSpec(bytes_per_s=307e9, flop_per_s=15e12, memory_bytes=64e9)  # M5 Pro
    hit = re.search(r"(?<![\d.])(\d+(?:\.\d+)?)(?:-(\d+(?:\.\d+)?))?% hit|hit (\d+(?:\.\d+)?)", notes)
    hits = float(hit.group(1) or hit.group(3)) / 100 if hit else None
    budget = re.search(r"budget_?(?: )?([\d.]+) ?GB", row["id"] + " " + notes)
    cached = re.search(r"k=(\d+) experts cached", notes)
    if hits is None and cached:
        hits = ExpertHitModel(cache_bytes=float(cached.group(1)) / model.experts * model.expert_params * bits / 8).hits(
            model, bits
        )
        if "without LRU" in notes:
            hits = 0.0
    if hits is None and budget is None and "flashmoe" in row["id"]:
        hits = 0.71 if "page cache" in notes else 0.0
    link = _bus(row["hardware"]) or 0.0
    disk = (number(row["link_GBps"]) or 0.0) * 1e9
    seconds = value if row["metric"] == "decode_latency_per_token" else 1 / value
    if row["unit"].startswith("ms"):
        seconds /= 1e3
    return Streamed(
        id=row["id"],
        source=source_of(row),
        category="MoE streaming",
        model=model,
        device=device,
        work=PassShape(rows=1, sequences=1, context=100, bits=bits),
        prompt=0.0,
        passes=1.0,
        placement=Placement(),
        link_bytes_per_s=link,
        disk_bytes_per_s=disk,
        hits=hits,
        cache_bytes=float(budget.group(1)) * 1e9 if budget else 8e9,
        seconds=seconds,
        hardware=row["hardware"],
    )


NAMES = tuple(field.name for field in fields(FeedRates))
START = FeedRates()


def fit_feed(cases: Sequence[Streamed], rates: Rates) -> tuple[FeedRates, Rates]:
    """Constants of weight streaming, and the fixed time of a layer in engines that stream."""
    count: dict[str, int] = {}
    for case in cases:
        count[case.source] = count.get(case.source, 0) + 1
    start = np.array([log(getattr(START, name)) for name in NAMES] + [log(rates.layer_s), log(rates.chain_bytes)])
    spread = np.array([0.3, 0.3, 0.5, 0.3, 1.0, 1.0])

    def unpack(values: np.ndarray) -> tuple[FeedRates, Rates]:
        feed = FeedRates(**{name: exp(v) for name, v in zip(NAMES, values, strict=False)})
        return feed, replace(rates, layer_s=exp(values[-2]), chain_bytes=exp(values[-1]))

    def residuals(values: np.ndarray) -> np.ndarray:
        feed, own = unpack(values)
        errors = np.array([log(case.predict(own, feed) / case.seconds) for case in cases])
        errors = np.sign(errors) * np.sqrt(2 * (np.sqrt(1 + (errors / 0.15) ** 2) - 1))
        weight = np.array([count[case.source] ** -0.5 for case in cases])
        return np.concatenate([weight * errors, (values - start) / spread])

    if not cases:
        return START, rates
    found = least_squares(residuals, start, max_nfev=40)
    return unpack(found.x)
