"""Machines put together from tables of parts: devices, a host with memory, disks, a network, nodes.

    8x a100-80gb + epyc-7763 + 512GB + 4x nvme-gen4 + 2 nodes + infiniband-hdr

Every number has an origin: measured, table or assumed. Missing parts are assumed and listed in `assumptions`. A missing
number without a default (a device's memory bandwidth) is an error.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

from headrace.errors import UsageError, did_you_mean
from headrace.forecast.architecture import table
from headrace.forecast.passes import DeviceSpec, Parallelism
from headrace.forecast.topology import Pipe, Topology
from headrace.units import GB, parse_bytes

HOST_BYTES_PER_S = 50e9  # two channels of DDR4-3200: assumed if no host is named
HOST_MEMORY_BYTES = 64 * GB
LINK_SHARE = 0.82  # share of a PCIe link's peak, measured by FlexGen's authors: 12.89 of 15.75 GB/s
DISK_SHARE = 0.9


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Nodes with equal devices, host, disks and network. Units: bytes per second, dollars, watts."""

    name: str
    family: str
    device: str
    devices: int  # devices per node
    nodes: int
    device_bytes_per_s: float
    device_memory_bytes: float
    flop_per_s: float
    unified: bool  # True if the device computes in host memory
    bus_bytes_per_s: float  # rate from host memory to one device
    peer_bytes_per_s: float
    network_bytes_per_s: float
    host_bytes_per_s: float
    host_memory_bytes: float
    host_flop_per_s: float
    root_bytes_per_s: float  # rate from the host to all devices together
    disk_bytes_per_s: float  # rate of all disks of a node together
    watts: float | None  # watts of a node
    price_usd: float | None
    rent_usd_per_h: float | None
    spot_usd_per_h: float | None
    dies: int = 1
    assumptions: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    parts: "Parts | None" = None

    @property
    def device_spec(self) -> DeviceSpec:
        """One device for the formulas."""
        return DeviceSpec(
            bytes_per_s=self.device_bytes_per_s,
            flop_per_s=self.flop_per_s,
            memory_bytes=self.device_memory_bytes,
            peer_bytes_per_s=self.peer_bytes_per_s,
            dies=self.dies,
        )

    @property
    def all_devices(self) -> int:
        """Devices of all nodes."""
        return self.devices * self.nodes

    @property
    def parallelism(self) -> Parallelism:
        """Tensor parallelism of every layer over all devices."""
        return Parallelism(width=self.all_devices, nodes=self.nodes, node_bytes_per_s=self.network_bytes_per_s)

    def topology(self) -> Topology:
        """The pipes of all nodes together: each node streams its own part of every layer."""
        pipes = [
            Pipe("device memory", self.device_bytes_per_s * self.all_devices),
            Pipe("host memory", self.host_bytes_per_s * self.nodes),
        ]
        if self.disk_bytes_per_s:
            pipes.append(Pipe("disk", self.disk_bytes_per_s * DISK_SHARE * self.nodes))
        if not self.unified:
            pipes.append(Pipe("bus", self.bus_bytes_per_s * LINK_SHARE * self.all_devices))
            pipes.append(Pipe("root complex", self.root_bytes_per_s * self.nodes))
        return Topology(pipes)

    def path_from(self, place: str) -> tuple[str, ...]:
        """The pipes from the place of the weights to the devices that multiply them.

        Weights from disk are written to host memory and read again. A device's own memory is no pipe here: the matmul
        includes it.
        """
        if place == "device":
            return ()
        way: tuple[str, ...] = ("host memory",) if place == "host" else ("disk", "host memory", "host memory")
        return way if self.unified else (*way, "root complex", "bus")


def find_machine(text: str) -> Machine:
    """A machine from a TOML file, or from the names of parts.

    Raises:
        UsageError: an unknown part, a missing number, or a contradiction.
    """
    if text.endswith(".toml"):
        return _from_file(Path(text))
    parts = [part.strip() for part in re.split(r"[+,]", text) if part.strip()]
    if not parts:
        raise UsageError(
            "the machine is empty", hint='name its parts, like --machine "2x rtx-4090 + 128GB + nvme-gen4"'
        )
    return _complete(text, _read_parts(text, parts), {})


_COUNTED = re.compile(r"(?:(\d+)\s*(?:x|\*)\s*)?(.+)", re.IGNORECASE)
_NODES = re.compile(r"(\d+)\s*nodes?|nodes?\s*=?\s*(\d+)", re.IGNORECASE)
_MEMORY = re.compile(r"\d+(?:\.\d+)?\s*[KMGT]i?B?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of a machine, by their names in the tables."""

    device: tuple[int, str] | None = None
    host: str | None = None
    memory_bytes: float | None = None
    host_memory: str | None = None
    disks: tuple[tuple[int, str], ...] = ()
    network: str | None = None
    nodes: int = 1

    def text(self) -> str:
        """The parts as text that `find_machine` parses."""
        memory = None if self.memory_bytes is None else f"{self.memory_bytes / GB:g}GB"
        device, *disks = [
            None if part is None else part[1] if part[0] == 1 else f"{part[0]}x {part[1]}"
            for part in (self.device, *self.disks)
        ]
        nodes = f"{self.nodes} nodes" if self.nodes > 1 else None
        words = (device, self.host, memory, self.host_memory, *disks, nodes, self.network)
        return " + ".join(word for word in words if word)


def _read_parts(text: str, parts: list[str]) -> Parts:
    found: dict[str, Any] = {}

    def keep(what: str, value: object, said: str) -> None:
        if what in found:
            raise UsageError(f"two {said} in `{text}`", hint="give one")
        found[what] = value

    disks: list[tuple[int, str]] = []
    for part in parts:
        if match := _NODES.fullmatch(part):
            nodes = int(match.group(1) or match.group(2))
            if nodes < 1:
                raise UsageError(f"{nodes} nodes are no machine")
            keep("nodes", nodes, "numbers of nodes")
        elif _MEMORY.fullmatch(part):
            keep("memory_bytes", parse_bytes(part), "sizes of memory")
            if not found["memory_bytes"]:
                raise UsageError("a machine without memory computes nothing")
        elif re.fullmatch(r"[\d.]+", part):
            raise UsageError(
                f"`{part}` is a number without a unit", hint=f"did you mean {part}GB of memory, or {part} nodes?"
            )
        else:
            count, name, kind = _named(part)
            if kind == "disk":
                disks.append((count, name))
            elif kind == "device":
                if "device" in found:
                    other = found["device"][1]
                    raise UsageError(f"{other} and {name} in one machine", hint="plan for one kind of device at a time")
                found["device"] = (count, name)
            elif count > 1:
                raise UsageError(f"{count} of {name} cannot be planned for", hint=_INSTEAD[kind])
            else:
                keep(kind, name, {"host": "processors", "network": "networks", "host_memory": "kinds of memory"}[kind])
    if "device" not in found and "host" not in found:
        raise UsageError(
            f"`{text}` has nothing that computes", hint="name a GPU or a processor, such as rtx-4090 or epyc-7763"
        )
    return Parts(disks=tuple(disks), **found)


_INSTEAD = {
    "host": "name one, and give the memory bandwidth of both in a TOML file: host_bytes_per_s",
    "network": "name one, and give the rate of both in a TOML file: network_bytes_per_s",
    "host_memory": "name the kind of memory once, with the channels in its name",
}


def _named(part: str) -> tuple[int, str, str]:
    """(count, name in the tables, kind of part)."""
    devices, links = table("devices"), table("links")
    match = _COUNTED.fullmatch(part)
    assert match is not None
    count, name = int(match.group(1) or 1), match.group(2).strip().lower().replace(" ", "-").replace("_", "-")
    if count < 1:
        raise UsageError(f"{count} of {name} is none")
    if name in devices:
        entry = devices[name]
        if entry.get("unified") and count > 1:
            raise UsageError(
                f"{name} has its own memory and cannot share a machine with another",
                hint=f"write them as nodes: {name} + {count} nodes + thunderbolt5",
            )
        return count, name, "host" if entry["kind"] == "cpu" else "device"
    kinds = {"disk": "disk", "network": "network", "memory": "host_memory"}
    if name in links and (kind := kinds.get(links[name]["kind"])):
        return count, name, kind
    known = [*devices, *(key for key, link in links.items() if link["kind"] in kinds)]
    raise UsageError(f"no part of a machine is called {part}", hint=did_you_mean(name, known))


def _complete(text: str, parts: Parts, given: Mapping[str, float]) -> Machine:
    """The machine of these parts; `given` are numbers that replace missing ones of the table."""
    device, host, memory_bytes, host_memory = parts.device, parts.host, parts.memory_bytes, parts.host_memory
    disks, network, nodes = parts.disks, parts.network, parts.nodes
    devices, links = table("devices"), table("links")
    assumptions: list[str] = []
    sources: list[str] = []
    count, name = device or (1, str(host))
    entry = devices[name]
    sources.append(f"{name}: {entry.get('source', '')}")
    if "memory_gb_per_s" not in entry:
        if "device_bytes_per_s" not in given:
            raise UsageError(
                f"the table has no memory bandwidth for {name}", hint="give it in a TOML file: device_bytes_per_s"
            )
        entry = entry | {"memory_gb_per_s": given["device_bytes_per_s"] / GB}
    cpu = entry["kind"] == "cpu"
    unified = cpu or bool(entry.get("unified"))
    processor = devices[host] if host else (entry if cpu else None)
    if host_memory is not None:
        host_rate = links[host_memory]["gb_per_s"] * GB
    elif unified:
        host_rate = entry["memory_gb_per_s"] * GB
    elif processor is not None:
        host_rate = processor["memory_gb_per_s"] * GB
    else:
        host_rate = HOST_BYTES_PER_S
        assumptions.append(f"host memory {host_rate / GB:.0f} GB/s (no processor is named)")
    if unified and not cpu:
        own = entry["memory_gb"] * GB if memory_bytes is None else memory_bytes
        if memory_bytes is None:
            assumptions.append(f"{entry['memory_gb']} GB of memory, the largest that {name} is sold with")
        elif own > entry["memory_gb"] * GB * 1.08:
            assumptions.append(f"{name} is sold with {entry['memory_gb']} GB at most")
        memory_bytes = own
    elif memory_bytes is None:
        memory_bytes = HOST_MEMORY_BYTES
        assumptions.append(f"{memory_bytes / GB:.0f} GB of host memory (none is given)")
    flop = next((entry[key] * 1e12 for key in ("fp16_tflops", "fp32_tflops") if key in entry), given.get("flop_per_s"))
    if flop is None:
        raise UsageError(f"the table has no arithmetic rate for {name}", hint="give it in a TOML file: flop_per_s")
    bus = links.get(str(entry.get("bus")), {"gb_per_s": 15.75})["gb_per_s"] * GB
    if not unified and "bus" not in entry:
        assumptions.append("PCIe 3.0 x16 to the devices")
    lanes = {"lanes": 64, "pcie_gen": 4} | dict(processor or {})
    lane_rate = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.56}[int(lanes["pcie_gen"])] * GB
    peer = links[entry["peer"]]["gb_per_s"] * GB if entry.get("peer") in links else bus / 2
    if count > 1 and "peer" not in entry:
        assumptions.append("devices reach each other over PCIe, through the host")
    disk_rate = sum(number * links[kind]["gb_per_s"] for number, kind in disks) * GB
    network_rate = links[network]["gb_per_s"] * GB if network else 0.0
    if nodes > 1 and not network:
        network_rate = links["ethernet-10g"]["gb_per_s"] * GB if "ethernet-10g" in links else 1.25 * GB
        assumptions.append("10 Gbit Ethernet between the nodes")
    if entry.get("checked") is False:
        assumptions.append(f"the figures of {name} were not verified")
    watts = entry.get("watts")
    rent, spot, price = entry.get("rent_usd_per_h"), entry.get("spot_usd_per_h"), entry.get("price_usd")
    return Machine(
        name=text,
        family=str(entry.get("family", "cuda")),
        device=name,
        devices=count,
        nodes=nodes,
        device_bytes_per_s=host_rate if cpu else entry["memory_gb_per_s"] * GB,
        device_memory_bytes=memory_bytes if unified else entry["memory_gb"] * GB,
        flop_per_s=flop,
        unified=unified,
        bus_bytes_per_s=bus,
        peer_bytes_per_s=peer,
        network_bytes_per_s=network_rate,
        host_bytes_per_s=host_rate,
        host_memory_bytes=memory_bytes,
        host_flop_per_s=(processor or {}).get("fp32_tflops", 0.5) * 1e12,
        root_bytes_per_s=lanes["lanes"] * lane_rate,
        disk_bytes_per_s=disk_rate,
        watts=None if watts is None else float(watts) * count,
        price_usd=None if price is None else float(price) * count * nodes,
        rent_usd_per_h=None if rent is None else float(rent) * count * nodes,
        spot_usd_per_h=None if spot is None else float(spot) * count * nodes,
        dies=int(entry.get("dies", 1)),
        assumptions=tuple(assumptions),
        sources=tuple(sources),
        parts=parts,
    )


# Numbers that a file may set, with their minimum: bytes per second, FLOP per second, counts, dollars and watts.
_LEAST = {
    **dict.fromkeys(("device_bytes_per_s", "bus_bytes_per_s", "peer_bytes_per_s", "network_bytes_per_s"), 1e6),
    **dict.fromkeys(("host_bytes_per_s", "root_bytes_per_s", "disk_bytes_per_s"), 1e6),
    **dict.fromkeys(("device_memory_bytes", "host_memory_bytes"), 1e6),
    **dict.fromkeys(("flop_per_s", "host_flop_per_s"), 1e9),
    **dict.fromkeys(("devices", "nodes", "dies"), 1),
    **dict.fromkeys(("watts", "price_usd", "rent_usd_per_h", "spot_usd_per_h"), 0),
}
_COUNTS = ("devices", "nodes", "dies")


def _from_file(path: Path) -> Machine:
    """A machine from TOML: `parts = "..."` as on the command line, and fields of `Machine` that override the parts."""
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:  # includes bytes that are no text, and invalid TOML
        raise UsageError(
            f"cannot read the machine {path}: {error}", hint='a TOML file with parts = "2x rtx-4090 + 128GB"'
        ) from error
    text = values.pop("parts", None)
    if not isinstance(text, str) or text.endswith(".toml") or not text.strip():
        raise UsageError(
            f"{path} does not say what the machine is made of", hint='add parts = "rtx-4090 + 64GB + nvme-gen4"'
        )
    name = values.pop("name", text)
    if not isinstance(name, str):
        raise UsageError(f"{path}: name is {name!r}, not a text")
    for key, value in values.items():
        _check_number(path, key, value)
    parts = _read_parts(text, [part.strip() for part in re.split(r"[+,]", text) if part.strip()])
    return replace(_complete(text, parts, values), name=name, **values)


def _check_number(path: Path, name: str, value: object) -> None:
    if name not in _LEAST:
        raise UsageError(f"{path}: a machine has no number called {name}", hint=did_you_mean(name, _LEAST))
    kind = int if name in _COUNTS else int | float
    if not isinstance(value, kind) or isinstance(value, bool) or not isfinite(value) or value < 0:
        raise UsageError(f"{path}: {name} is {value!r}, not a number", hint="bytes, bytes per second, dollars or watts")
    if value < _LEAST[name]:
        least = "a megabyte" if _LEAST[name] == 1e6 else f"{_LEAST[name]:g}"
        raise UsageError(
            f"{path}: {name} is {value}, which is less than {least}",
            hint="write it in bytes or operations, such as 2.4e9",
        )
