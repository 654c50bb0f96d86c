"""Pipes between the places that hold weights: disks, memory, root complex, switches, links, devices, nodes.

A transfer takes a route through several pipes. Concurrent transfers share their common pipes. With fixed routes, all
transfers can finish after

    seconds = max over pipes of (bytes through the pipe) / (bytes per second of the pipe)

and not earlier: in a fluid schedule with rates in proportion to sizes, the busiest pipe is never idle before. That pipe is
the bottleneck; the others have a utilisation below 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Pipe:
    """A shared resource and its bytes per second."""

    name: str
    bytes_per_s: float

    def __post_init__(self) -> None:
        if not self.bytes_per_s > 0:
            raise ValueError(f"pipe {self.name} carries nothing")


@dataclass(frozen=True)
class Flow:
    """Bytes that take a route. A pipe named twice is crossed twice: memory is written, then read."""

    nbytes: float
    route: tuple[str, ...]


@dataclass(frozen=True)
class Load:
    """The load of a set of flows on the pipes."""

    seconds: float
    binding: str
    utilisation: Mapping[str, float] = field(default_factory=dict)  # utilisation of each used pipe, 0 to 1


class Topology:
    """The pipes of a machine by name."""

    def __init__(self, pipes: Sequence[Pipe]) -> None:
        self.pipes = {pipe.name: pipe for pipe in pipes}
        if len(self.pipes) != len(pipes):
            raise ValueError("two pipes have the same name")

    def load(self, flows: Sequence[Flow]) -> Load:
        """The time of all flows together, and their bottleneck.

        Raises:
            KeyError: a route names an unknown pipe.
        """
        busy: dict[str, float] = {}
        for flow in flows:
            for name in flow.route:
                busy[name] = busy.get(name, 0.0) + flow.nbytes / self.pipes[name].bytes_per_s
        if not busy or max(busy.values()) == 0:
            return Load(seconds=0.0, binding="nothing")
        binding = max(busy, key=lambda name: busy[name])
        longest = busy[binding]
        return Load(seconds=longest, binding=binding, utilisation={name: s / longest for name, s in busy.items()})
