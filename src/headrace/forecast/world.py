"""The number of model copies that the world's hardware could run, and the max speed of one.

Copies are limited by FLOP/s, by memory bandwidth, and by memory for the KV caches; the smallest limit counts. The
claims consider FLOP/s alone.
"""

from dataclasses import dataclass
from math import inf, log2, sqrt

WORDS_PER_TOKEN = 0.75
READING_WORDS_PER_MIN = 250.0


def reading_tok_per_s(words_per_min: float = READING_WORDS_PER_MIN, words_per_token: float = WORDS_PER_TOKEN) -> float:
    """Tokens per second of a human reader: 250 words per minute are 5.56."""
    return words_per_min / words_per_token / 60


@dataclass(frozen=True, kw_only=True)
class Stock:
    """Hardware of one kind: the number of devices, and the rates of each."""

    devices: float
    flop_per_s: float
    bytes_per_s: float
    memory_bytes: float
    utilisation: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Mind:
    """A running model: FLOP per token, and memory of weights and of a conversation's KV cache."""

    flop_per_token: float
    weights_bytes: float
    conversation_bytes: float
    tok_per_s: float  # tokens per second of one copy


@dataclass(frozen=True, kw_only=True)
class Copies:
    """The number of copies that each limit allows, and the smallest."""

    by_flop: float
    by_bandwidth: float
    by_memory: float

    @property
    def least(self) -> float:
        """The number of copies that can run."""
        return min(self.by_flop, self.by_bandwidth, self.by_memory)

    @property
    def binding(self) -> str:
        """The smallest limit."""
        values = {"flop": self.by_flop, "bandwidth": self.by_bandwidth, "memory": self.by_memory}
        return min(values, key=lambda name: values[name])


def copies(stock: Stock, mind: Mind, *, group: int) -> Copies:
    """Copies that a stock of hardware can run in groups of `group` devices, each group with one copy of the weights.

    Every pass of a group reads its weights once and each conversation's cache once; conversations share a pass.
    """
    groups = stock.devices / group
    free_bytes = group * stock.memory_bytes - mind.weights_bytes
    if free_bytes < mind.conversation_bytes:
        return Copies(by_flop=0.0, by_bandwidth=0.0, by_memory=0.0)
    by_flop = stock.devices * stock.flop_per_s * stock.utilisation / (mind.flop_per_token * mind.tok_per_s)
    bytes_per_s = group * stock.bytes_per_s * stock.utilisation
    per_pass = bytes_per_s / mind.tok_per_s - mind.weights_bytes  # cache bytes readable in the time of one token
    by_bandwidth = groups * max(0.0, per_pass) / mind.conversation_bytes
    return Copies(by_flop=by_flop, by_bandwidth=by_bandwidth, by_memory=groups * free_bytes / mind.conversation_bytes)


def grown(now: float, years: float, per_year: float) -> float:
    """A stock that multiplies by `per_year` every year."""
    return now * float(per_year**years)


def years_until(now: float, wanted: float, per_year: float) -> float:
    """Years until a growing stock reaches `wanted`; infinite if it does not grow."""
    if wanted <= now:
        return 0.0
    return log2(wanted / now) / log2(per_year) if per_year > 1 else inf


def halving_months(factor: float, months: float) -> float:
    """Months per halving of a cost that fell by `factor` within `months`."""
    return months / log2(factor)


def least_token_s(
    params: float, layers: float, bits: float, bytes_per_s: float, hop_s: float = 1.7e-6, reductions: float = 2.0
) -> float:
    """The shortest time per token at batch 1 over any number of devices.

    On n devices in a square grid, reading a token's bytes takes a / n with a = p * bits / 8 / B. Each of its L * r reductions
    takes 2 sqrt(n) hops. At the best n the time is

        3 * (L * r * t_hop) ** (2/3) * a ** (1/3)                (Erdil 2025, section 3)

    which is a square-root law in the parameters if depth grows with their fourth root.
    """
    reduce_s = layers * reductions * hop_s
    read_s = params * bits / 8 / bytes_per_s
    devices = max(1.0, (read_s / reduce_s) ** (2 / 3))
    return float(read_s / devices + 2 * reduce_s * sqrt(devices))
