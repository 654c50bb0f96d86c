"""The forecast of a model on a machine: seconds, bytes, bottleneck, joules and dollars, as low / expected / high.

Weights are placed in the fastest memory that safely holds them. The rest is streamed (dense), read on demand (experts), or
computed by the host in place, whichever is faster. The interval is the middle 80 % of the errors on held-out
measurements (`make accuracy`).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from headrace.errors import UsageError
from headrace.forecast.architecture import Architecture
from headrace.forecast.constants import SOFTWARE, load_constants
from headrace.forecast.expert_hits import distinct
from headrace.forecast.machine import DISK_SHARE, LINK_SHARE, Machine
from headrace.forecast.money import Tariff, usd_per_million
from headrace.forecast.passes import PassForecast, PassShape, Rates, resident_pass
from headrace.forecast.streaming import ExpertHitModel, FeedRates, Placement, expert_pass, place, streamed_pass
from headrace.units import gigabytes

# Memory that weights can use without the system reclaiming it: WASTE fell to an eighth of its speed on 64 GB when its
# cache grew by 6 GB past 46; Metal recommends three quarters. A card's driver and workspaces take about a gigabyte.
UNIFIED_SAFE_SHARE = 0.72
HOST_SAFE_SHARE = 0.85
HOST_LEAST_LEFT = 2e9
DEVICE_LEFT = 1.2e9
PREFILL_ROWS = 8192  # max prompt rows of a pass
# Acceptance rate of a draft model of a third of the size. Published tokens per pass at 4 / 8 / 16 draft tokens: 3.4 / 4.5 / 5.9.
SMALLER_MODEL_ACCEPTANCE_RATE = 0.8
MAX_DRAFT_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A prediction: the expected value, and the middle 80 % of measurements of such predictions."""

    low: float
    expected: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The workload of a forecast. `draft` is a draft model."""

    bits: float = 16.0
    kv_bits: float = 16.0
    batch: int = 1
    prompt_tokens: int = 512
    tokens: int = 512
    draft: Architecture | None = None
    draft_bits: float = 4.85
    usd_per_kwh: float = 0.15
    utilisation: float = 1.0
    skew: float = 0.5  # Zipf exponent of expert routing

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 32 or not 2 <= self.kv_bits <= 32:
            raise UsageError(
                f"{self.bits:g} bits per weight, {self.kv_bits:g} per KV element",
                hint="weights have 1 to 32, KV elements 2 to 32",
            )
        if min(self.batch, self.prompt_tokens, self.tokens) < 1:
            raise UsageError("batch, prompt and answer must be at least 1")
        if not 0 <= self.skew < 10 or not self.usd_per_kwh >= 0:
            raise UsageError(f"a skew of {self.skew:g}, ${self.usd_per_kwh:g} per kWh", hint="neither may be negative")
        if not 0 < self.utilisation <= 1:
            raise UsageError(f"utilisation {self.utilisation:g} is no share", hint="write 0.3 for 30 %")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Prefill or decode: one pass, and its tokens per second."""

    pass_s: Interval
    tok_per_s: Interval  # sum over all sequences
    rows: float
    binding: str
    busy_s: Mapping[str, float] = field(default_factory=dict)
    bytes_by_tier: Mapping[str, float] = field(default_factory=dict)

    @property
    def utilisation(self) -> dict[str, float]:
        """Share of the pass for which each resource is busy."""
        return {name: min(1.0, busy / self.pass_s.expected) for name, busy in self.busy_s.items() if busy > 0}


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The predicted speed, memory and cost of a model on a machine."""

    model: Architecture
    machine: Machine
    workload: Workload
    placement: Placement
    safe_bytes: float
    weights_bytes: float
    kv_bytes: float
    prefill: Phase
    decode: Phase
    ttft_s: Interval
    s_per_token: Interval  # seconds per token of each sequence
    draft_tokens: int
    tokens_per_pass: float  # tokens per pass of each sequence
    joules_per_token: float | None
    usd_per_h: float | None
    usd_per_million_output: Interval | None
    usd_per_million_input: Interval | None
    category: str
    reasons: tuple[str, ...]

    @property
    def tok_per_s(self) -> float:
        """Output tokens per second of all sequences."""
        return self.decode.tok_per_s.expected

    def as_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "model": self.model.name,
            "machine": self.machine.name,
            "bits": self.workload.bits,
            "batch": self.workload.batch,
            "prompt_tokens": self.workload.prompt_tokens,
            "tokens": self.workload.tokens,
            "memory": {
                "weights_bytes": self.weights_bytes,
                "kv_bytes": self.kv_bytes,
                "safe_bytes": self.safe_bytes,
                "device_share": self.placement.device,
                "host_share": self.placement.host,
                "disk_share": self.placement.disk,
            },
            "prefill": _phase_json(self.prefill),
            "decode": _phase_json(self.decode),
            "ttft_s": asdict(self.ttft_s),
            "s_per_token": asdict(self.s_per_token),
            "speculation": {"draft_tokens": self.draft_tokens, "tokens_per_pass": self.tokens_per_pass},
            "joules_per_token": self.joules_per_token,
            "usd_per_h": self.usd_per_h,
            "usd_per_million_output": None
            if self.usd_per_million_output is None
            else asdict(self.usd_per_million_output),
            "usd_per_million_input": None if self.usd_per_million_input is None else asdict(self.usd_per_million_input),
            "category": self.category,
            "reasons": list(self.reasons),
            "assumptions": list(self.machine.assumptions),
            "sources": [*self.machine.sources, f"{self.model.name}: {self.model.source}"],
        }


def _phase_json(phase: Phase) -> dict[str, Any]:
    return {
        "pass_s": asdict(phase.pass_s),
        "tok_per_s": asdict(phase.tok_per_s),
        "binding": phase.binding,
        "utilisation": phase.utilisation,
        "bytes_by_tier": dict(phase.bytes_by_tier),
    }


def safe_device_bytes(machine: Machine) -> float:
    """Device memory, over all devices, that weights and caches can use without being reclaimed."""
    if machine.unified:
        share = UNIFIED_SAFE_SHARE if machine.family == "metal" else HOST_SAFE_SHARE
        most = min(machine.device_memory_bytes * share, machine.device_memory_bytes - HOST_LEAST_LEFT)
        return max(0.0, most) * machine.nodes
    return max(0.0, machine.device_memory_bytes - DEVICE_LEFT) * machine.all_devices


def safe_host_bytes(machine: Machine) -> float:
    """Host memory that weights and caches can use; 0 if the device computes in it."""
    if machine.unified:
        return 0.0
    return (
        max(0.0, min(machine.host_memory_bytes * HOST_SAFE_SHARE, machine.host_memory_bytes - HOST_LEAST_LEFT))
        * machine.nodes
    )


def forecast(model: Architecture, machine: Machine, workload: Workload) -> Forecast:
    """Predict a model's speed, memory and cost on a machine.

    Raises:
        UsageError: the caches alone do not fit, the context is too long, or the weights fit nowhere.
    """
    context = workload.prompt_tokens + workload.tokens
    if model.context and context > model.context:
        raise UsageError(
            f"{context} tokens are asked of {model.name}, which was made for {model.context}",
            hint=f"use --prompt-tokens and --tokens of together {model.context} at most",
        )
    kv = workload.batch * model.kv_bytes(context, workload.kv_bits)
    device, host = safe_device_bytes(machine), safe_host_bytes(machine)
    if kv > device + host:
        most = int((device + host) / max(1.0, kv / workload.batch))
        raise UsageError(
            f"the KV caches of {workload.batch} conversations of {context} tokens take {gigabytes(kv)}, the machine has "
            f"{gigabytes(device + host)}",
            hint=f"at most {most} fit: use --batch {most}"
            if most
            else "use shorter conversations, --kv-bits 8, or more memory",
        )
    draft_bytes = (
        workload.draft.all_bytes(workload.draft_bits) + workload.batch * workload.draft.kv_bytes(context)
        if workload.draft
        else 0.0
    )
    where = place(model, workload.bits, kv, max(0.0, device - draft_bytes), host)
    if where.disk and not machine.disk_bytes_per_s:
        raise UsageError(
            f"{gigabytes(where.disk * model.all_bytes(workload.bits))} of the weights fit neither devices nor host, and "
            "the machine has no disk to stream from",
            hint='add one, like --machine "... + nvme-gen4", or use fewer --bits',
        )
    reasons: list[str] = []
    method = _method(model, machine, workload, where, device - kv - draft_bytes, host, reasons)
    decode_work = _work(workload, workload.batch, workload.prompt_tokens + workload.tokens / 2)
    single = method.run(decode_work)
    draft_tokens, tokens_per_pass, pass_s = 0, 1.0, single.seconds
    chosen = single
    if workload.draft is not None:
        draft_tokens, tokens_per_pass, pass_s, chosen = _speculate(model, machine, workload, method, single)
        reasons.append(
            f"{workload.draft.name} drafts {draft_tokens} tokens a pass: {tokens_per_pass:.1f} tokens with an acceptance rate of "
            f"{SMALLER_MODEL_ACCEPTANCE_RATE:.0%} (table)"
            if draft_tokens
            else f"{workload.draft.name} does not pay as a draft: rows cost more than they bring"
        )
    spread = load_constants().spread
    low, high = spread.get(method.category, (0.5, 2.0))
    prefill_low, prefill_high = spread.get(
        "prefill" if method.category in ("decode", "request") else method.category, (0.5, 2.0)
    )
    beyond = outside(model, machine, workload)
    if beyond:
        reasons.append(
            f"outside of what was measured ({', '.join(beyond)}): the intervals are twice as wide, in logarithms"
        )
        low, high, prefill_low, prefill_high = low**2, high**2, prefill_low**2, prefill_high**2
    rows = workload.batch * workload.prompt_tokens
    chunks = max(1, -(-rows // PREFILL_ROWS))
    first = method.run(_work(workload, rows / chunks, workload.prompt_tokens / 2, sequences=workload.batch))
    ttft = chunks * first.seconds
    s_per_token = pass_s / tokens_per_pass
    tok_per_s = workload.batch / s_per_token
    decode = Phase(
        pass_s=_interval(pass_s, low, high),
        tok_per_s=_rate(tok_per_s, low, high),
        rows=workload.batch * (1 + draft_tokens),
        binding=chosen.binding,
        busy_s=chosen.parts,
        bytes_by_tier=_tiers(chosen, where, method.missed_bytes(decode_work)),
    )
    prefill = Phase(
        pass_s=_interval(first.seconds, prefill_low, prefill_high),
        tok_per_s=_rate(rows / ttft, prefill_low, prefill_high),
        rows=rows / chunks,
        binding=first.binding,
        busy_s=first.parts,
        bytes_by_tier=_tiers(first, where, 0.0),
    )
    usd_per_h = _usd_per_h(machine, workload)
    joules = machine.watts * machine.nodes / tok_per_s if machine.watts else None
    return Forecast(
        model=model,
        machine=machine,
        workload=workload,
        placement=where,
        safe_bytes=device + host,
        weights_bytes=model.all_bytes(workload.bits),
        kv_bytes=kv,
        prefill=prefill,
        decode=decode,
        ttft_s=_interval(ttft, prefill_low, prefill_high),
        s_per_token=_interval(s_per_token, low, high),
        draft_tokens=draft_tokens,
        tokens_per_pass=tokens_per_pass,
        joules_per_token=joules,
        usd_per_h=usd_per_h,
        usd_per_million_output=None if usd_per_h is None else _price(usd_per_h, tok_per_s, low, high),
        usd_per_million_input=None if usd_per_h is None else _price(usd_per_h, rows / ttft, prefill_low, prefill_high),
        category=method.category,
        reasons=tuple(reasons),
    )


def outside(model: Architecture, machine: Machine, workload: Workload) -> list[str]:
    """Parts of a workload outside the measurements that the constants were fitted to."""
    facts = {
        f"{machine.all_devices} devices": machine.all_devices > 64,
        f"a batch of {workload.batch}": workload.batch > 1280,
        f"{workload.bits:g} bits": not 2 <= workload.bits <= 16,
        f"{workload.prompt_tokens + workload.tokens} tokens": workload.prompt_tokens + workload.tokens > 32768,
        f"{model.params / 1e12:.2g}T parameters": model.params > 1.1e12,
        f"{model.params / 1e6:.0f}M parameters": model.params < 2.5e8,
        f"{machine.family} devices": machine.family not in SOFTWARE,
    }
    return [name for name, is_beyond in facts.items() if is_beyond]


@dataclass(frozen=True, kw_only=True)
class _Method:
    """A method to compute passes on a machine: a category of measurements, and the formula."""

    category: str
    model: Architecture
    machine: Machine
    placement: Placement
    rates: Rates
    feed: FeedRates
    hits: float | None = None
    host_hits: float = 0.0  # share of hits in host memory, part of `hits`
    on_host: bool = False  # True if the host may compute the weights in its memory
    plain: Rates | None = None  # rates of software without streaming

    def run(self, work: PassShape) -> PassForecast:
        """One pass."""
        device, split = self.machine.device_spec, self.machine.parallelism
        if self.hits is not None:
            rate = self._expert_rate()
            found = expert_pass(
                self.model,
                device,
                split,
                work,
                self.hits,
                rate,
                self.rates,
                self.feed,
                host_share=self.host_hits,
                host_bytes_per_s=self._from_host(),
            )
            return min(found, self._experts_on_host(work), key=lambda one: one.seconds) if self.on_host else found
        if not (self.placement.host or self.placement.disk or self.placement.kv_host):
            return resident_pass(self.model, device, split, work, self.rates)
        streamed = streamed_pass(
            self.model,
            device,
            split,
            work,
            self.placement,
            self.machine.topology(),
            {
                "host": self.machine.path_from("host"),
                "disk": self.machine.path_from("disk") if self.machine.disk_bytes_per_s else (),
            },
            self.rates,
            replace(
                self.feed,
                link_share=self.feed.link_share / LINK_SHARE,
                disk_share=min(1.0, self.feed.disk_share) / DISK_SHARE,
            ),
        )
        if not self.on_host:
            return streamed
        return min(streamed, self._computed_on_host(work), key=lambda one: one.seconds)

    def _computed_on_host(self, work: PassShape) -> PassForecast:
        """The device multiplies its weights, then the host its own: only activations are moved."""
        inner = resident_pass(
            self.model, self.machine.device_spec, self.machine.parallelism, work, self.plain or self.rates
        )
        share, moved = self.placement.host, self.placement.kv_host
        host = load_constants().rates_of("cpu")
        read_bytes = inner.weight_bytes * share + inner.kv_bytes * moved
        read_s = read_bytes / (self.machine.host_bytes_per_s * self.machine.nodes * host.memory_share)
        flop_s = inner.flop * share / (self.machine.host_flop_per_s * self.machine.nodes * host.flop_share)
        kept = 1 - read_bytes / (inner.weight_bytes + inner.kv_bytes)
        device_s = inner.parts["memory"] * kept + inner.parts["launches"] + inner.parts["collectives"]
        parts = {
            "memory": inner.parts["memory"] * kept,
            "compute": inner.parts["compute"] * (1 - share),
            "host": max(read_s, flop_s),
        }
        return replace(inner, seconds=device_s + max(read_s, flop_s), parts=parts)

    def _experts_on_host(self, work: PassShape) -> PassForecast:
        """The device holds the dense weights and the experts that fit; the host multiplies the others in place."""
        assert self.hits is not None
        rates = self.plain or self.rates
        host = self.machine.host_bytes_per_s * self.machine.nodes * load_constants().rates_of("cpu").memory_share
        return expert_pass(
            self.model,
            self.machine.device_spec,
            self.machine.parallelism,
            work,
            1.0,
            host,
            rates,
            self.feed,
            host_share=1 - self.hits,
            host_bytes_per_s=host,
        )

    def _from_host(self) -> float:
        """Rate of experts in host memory: across the bus or multiplied by the host, whichever is faster."""
        host = self.machine.host_bytes_per_s * self.machine.nodes * load_constants().rates_of("cpu").memory_share
        return max(host, self._bus() * self.feed.expert_share)

    def _expert_rate(self) -> float:
        if self.placement.disk:
            return self.machine.disk_bytes_per_s * DISK_SHARE * self.machine.nodes
        return self._bus()

    def _bus(self) -> float:
        machine = self.machine
        return min(machine.bus_bytes_per_s * LINK_SHARE * machine.devices, machine.root_bytes_per_s) * machine.nodes

    def missed_bytes(self, work: PassShape) -> float:
        """Bytes of missed experts that a pass reads."""
        if self.hits is None:
            return 0.0
        model = self.model
        used = distinct(model.experts, model.experts_per_token, max(1, round(work.rows)), skew=work.skew)
        return model.expert_params * work.bits / 8 * used / model.experts * (1 - self.hits)


def _method(
    model: Architecture,
    machine: Machine,
    workload: Workload,
    where: Placement,
    device_free_bytes: float,
    host_free_bytes: float,
    reasons: list[str],
) -> _Method:
    constants = load_constants()
    rates = constants.rates_of(SOFTWARE.get(machine.family, "server"))
    split = machine.all_devices > 1
    if not (where.host or where.disk or where.kv_host):
        reasons.append("everything in device memory")
        return _Method(
            category="tensor parallel" if split else "decode",
            model=model,
            machine=machine,
            placement=where,
            rates=rates,
            feed=FeedRates(),
        )
    feed, own = constants.feed_of("MoE streaming" if model.is_moe else "dense streaming")
    plain, on_host = rates, not machine.unified and where.host > 0 and not where.disk
    # The slower of the two kinds of software: streaming software has longer launch times.
    rates = replace(rates, layer_s=max(rates.layer_s, own.layer_s))
    if model.is_moe and not where.kv_host:
        dense_bytes = model.dense_params * workload.bits / 8
        device_cache_bytes = device_free_bytes - dense_bytes
        cache_bytes = device_cache_bytes + (0.0 if not where.disk else host_free_bytes)
        if cache_bytes > 0:
            hits = ExpertHitModel(cache_bytes=cache_bytes, skew=workload.skew).hits(model, workload.bits)
            device_hits = ExpertHitModel(cache_bytes=max(0.0, device_cache_bytes), skew=workload.skew).hits(
                model, workload.bits
            )
            source = "disk" if where.disk else "host memory"
            reasons.append(
                f"dense weights in memory, experts from {source}: {hits:.0%} of them found in {gigabytes(cache_bytes)} (routing "
                f"assumed: Zipf {workload.skew:g})"
            )
            return _Method(
                category="MoE streaming",
                model=model,
                machine=machine,
                placement=where,
                rates=rates,
                feed=feed,
                hits=hits,
                host_hits=max(0.0, hits - device_hits) if where.disk else 0.0,
                on_host=on_host,
                plain=plain,
            )
    held = f"{where.device:.0%} of the weights in device memory"
    reasons.append(f"{held}, {where.host:.0%} in host memory, {where.disk:.0%} read from disk in every pass")
    if on_host:
        reasons.append("the host computes its share where that is quicker than moving it")
    return _Method(
        category="dense streaming",
        model=model,
        machine=machine,
        placement=where,
        rates=rates,
        feed=feed,
        on_host=on_host,
        plain=plain,
    )


def _speculate(
    model: Architecture, machine: Machine, workload: Workload, method: _Method, single: PassForecast
) -> tuple[int, float, float, PassForecast]:
    """(draft tokens, tokens per pass and sequence, seconds of drafting and pass, the pass) at the best draft length."""
    assert workload.draft is not None
    rates = load_constants().rates_of(SOFTWARE.get(machine.family, "server"))
    draft_work = PassShape(
        rows=workload.batch,
        sequences=workload.batch,
        context=workload.prompt_tokens + workload.tokens / 2,
        bits=workload.draft_bits,
    )
    draft_token_s = resident_pass(
        workload.draft, machine.device_spec, replace(machine.parallelism, width=1, nodes=1), draft_work, rates
    ).seconds
    best = (0, 1.0, single.seconds, single)
    tokens, share = 1.0, 1.0
    for draft_tokens in range(1, MAX_DRAFT_TOKENS + 1):
        share *= SMALLER_MODEL_ACCEPTANCE_RATE
        tokens += share
        found = method.run(
            _work(
                workload,
                workload.batch * (1 + draft_tokens),
                workload.prompt_tokens + workload.tokens / 2,
                sequences=workload.batch,
            )
        )
        seconds = found.seconds + draft_tokens * draft_token_s
        if seconds / tokens < best[2] / best[1]:
            best = (
                draft_tokens,
                tokens,
                seconds,
                replace(found, parts={**found.parts, "drafting": draft_tokens * draft_token_s}),
            )
    return best


def _work(workload: Workload, rows: float, context: float, sequences: float | None = None) -> PassShape:
    return PassShape(
        rows=rows,
        sequences=rows if sequences is None else sequences,
        context=context,
        bits=workload.bits,
        kv_bits=workload.kv_bits,
        skew=workload.skew,
    )


def _tiers(found: PassForecast, where: Placement, missed: float) -> dict[str, float]:
    """Bytes that a pass reads from each memory tier."""
    tiers = {"device": found.weight_bytes * where.device + found.kv_bytes * (1 - where.kv_host)}
    tiers["host"] = found.weight_bytes * where.host + found.kv_bytes * where.kv_host
    tiers["disk"] = missed if missed and where.disk else found.weight_bytes * where.disk
    return {name: size for name, size in tiers.items() if size > 0}


def _usd_per_h(machine: Machine, workload: Workload) -> float | None:
    if machine.rent_usd_per_h is not None:
        return Tariff(rent_usd_per_h=machine.rent_usd_per_h, utilisation=workload.utilisation).usd_per_h
    if machine.price_usd is None:
        return None
    watts = (machine.watts or 0.0) * machine.nodes
    return Tariff(
        price_usd=machine.price_usd, watts=watts, usd_per_kwh=workload.usd_per_kwh, utilisation=workload.utilisation
    ).usd_per_h


def _interval(expected: float, low: float, high: float) -> Interval:
    return Interval(low=expected * min(1.0, low), expected=expected, high=expected * max(1.0, high))


def _rate(expected: float, low: float, high: float) -> Interval:
    return Interval(low=expected / max(1.0, high), expected=expected, high=expected / min(1.0, low))


def _price(usd_per_h: float, tok_per_s: float, low: float, high: float) -> Interval:
    return _interval(usd_per_million(usd_per_h, tok_per_s), low, high)
