"""Searches over forecasts: suggestions, the cheapest configuration for a speed, and Pareto frontiers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from headrace.errors import UsageError
from headrace.forecast.architecture import Architecture, published, table
from headrace.forecast.machine import Machine, find_machine
from headrace.forecast.money import break_even_batch, markup
from headrace.forecast.predict import Forecast, Workload, forecast

BITS = (16.0, 8.5, 6.56, 4.85, 3.9)  # F16, Q8_0, Q6_K, Q4_K_M, Q3_K_M
BATCHES = (1, 2, 4, 8, 16, 32, 64)
COUNTS = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class ForecastSuggestion:
    """A change of machine or workload, and the predicted speed with it."""

    what: str
    tok_per_s: float
    gain: float  # factor of total tokens per second
    forecast: Forecast


def changes(now: Forecast, most: int = 6) -> list[ForecastSuggestion]:
    """Changes that would increase the speed, best first, each predicted by its own forecast."""
    workload, machine = now.workload, now.machine
    tried: list[tuple[str, Machine, Workload]] = []
    if not machine.unified and (now.placement.host or now.placement.disk):
        for count in (2, 4):
            tried.append(
                (
                    f"{count * machine.devices}x {machine.device}",
                    with_devices(machine, count * machine.devices),
                    workload,
                )
            )
    if now.placement.disk:
        tried.append(
            ("twice the host's memory", replace(machine, host_memory_bytes=2 * machine.host_memory_bytes), workload)
        )
        tried.append(("a second disk", replace(machine, disk_bytes_per_s=2 * machine.disk_bytes_per_s), workload))
        if machine.unified:
            tried.append(
                ("twice the memory", replace(machine, device_memory_bytes=2 * machine.device_memory_bytes), workload)
            )
    elif machine.devices * machine.nodes == 1 and not machine.unified and not now.placement.host:
        tried.append((f"2x {machine.device}, each layer over both", with_devices(machine, 2), workload))
    tried += [
        (f"{bits:g} bits per weight", machine, replace(workload, bits=bits))
        for bits in BITS
        if bits < 0.9 * workload.bits
    ][:2]
    if workload.draft is None and (draft := draft_for(now.model)) is not None:
        tried.append((f"{draft.name} as a draft", machine, replace(workload, draft=draft)))
    tried += [
        (f"a batch of {batch}", machine, replace(workload, batch=batch))
        for batch in (8, 32)
        if batch > 2 * workload.batch
    ]
    for name in _other_machines(machine):
        tried.append((f"{name} instead", find_machine(name), workload))
    found = []
    for what, other, asked in tried:
        if (predicted := _try(now.model, other, asked)) is not None:
            gain = predicted.tok_per_s / now.tok_per_s
            found.append(ForecastSuggestion(what=what, tok_per_s=predicted.tok_per_s, gain=gain, forecast=predicted))
    return sorted((change for change in found if change.gain > 1.03), key=lambda change: -change.gain)[:most]


@dataclass(frozen=True, kw_only=True)
class Seller:
    """A seller's price of the model's tokens, compared with their cost here."""

    name: str
    date: str
    usd_per_million_output: float
    markup: float  # price over cost of output tokens at the workload's batch
    request_markup: float  # price over cost of a whole request, including its prompt
    break_even_batch: int | None  # min concurrent sequences whose sold output alone pays for the hardware


def sellers(now: Forecast) -> list[Seller]:
    """Offers for this model in the table of prices, most expensive first."""
    if now.usd_per_h is None or now.usd_per_million_output is None or now.usd_per_million_input is None:
        return []
    keys = {key for key, entry in table("models").items() if entry["name"] == now.model.name}
    offers = [(key, entry) for key, entry in table("prices").items() if entry.get("model") in keys]
    passes: dict[int, float] = {}
    for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256) if offers else ():
        if (predicted := _try(now.model, now.machine, replace(now.workload, batch=batch))) is not None:
            passes[batch] = predicted.s_per_token.expected
    prompt, tokens = now.workload.prompt_tokens, now.workload.tokens
    cost = (prompt * now.usd_per_million_input.expected + tokens * now.usd_per_million_output.expected) / 1e6
    found = []
    for key, entry in offers:
        output, given = float(entry["usd_per_million_output"]), float(entry["usd_per_million_input"])
        found.append(
            Seller(
                name=key,
                date=str(entry["date"]),
                usd_per_million_output=output,
                markup=markup(output, now.usd_per_million_output.expected),
                request_markup=markup((prompt * given + tokens * output) / 1e6, cost),
                break_even_batch=break_even_batch(output / 1e6, now.usd_per_h, passes),
            )
        )
    return sorted(found, key=lambda seller: -seller.usd_per_million_output)


def with_devices(machine: Machine, count: int) -> Machine:
    """The machine with another number of devices in each node, prices and watts in proportion."""
    ratio = count / machine.devices

    def scaled(value: float | None) -> float | None:
        return None if value is None else value * ratio

    parts = machine.parts
    if parts is not None and parts.device is not None:
        parts = replace(parts, device=(count, parts.device[1]))
    return replace(
        machine,
        name=parts.text() if parts is not None else f"{count}x {machine.name}",
        parts=parts,
        devices=count,
        watts=scaled(machine.watts),
        price_usd=scaled(machine.price_usd),
        rent_usd_per_h=scaled(machine.rent_usd_per_h),
        spot_usd_per_h=scaled(machine.spot_usd_per_h),
    )


def draft_for(model: Architecture) -> Architecture | None:
    """The table's model of the same family closest to a thirtieth of the size, or None.

    Models of a family share a vocabulary; vocabularies of equal size count as the same.
    """
    near = [
        published(key)
        for key, entry in table("models").items()
        if entry.get("vocab") == model.vocab
        and "experts" not in entry
        and entry["params"] < 0.2 * (model.active_params or model.params)
    ]
    return min(near, key=lambda other: abs(other.params - 0.03 * (model.active_params or model.params)), default=None)


def configurations(
    model: Architecture,
    machine: Machine | None,
    workload: Workload,
    *,
    all_bits: Sequence[float] = BITS,
    batches: Sequence[int] = BATCHES,
    drafts: bool = True,
) -> list[Forecast]:
    """Forecasts over bits, batches, drafts and numbers of devices; without a machine, over all priced devices of the table."""
    machines = [machine] if machine is not None else [find_machine(f"{name} + 256GB + nvme-gen4") for name in _priced()]
    found = []
    draft_model = (workload.draft or draft_for(model)) if drafts else None
    for one in machines:
        for count in COUNTS:
            if one.unified and count > 1:
                continue
            many = with_devices(one, one.devices * count)
            for bits in all_bits:
                for batch in batches:
                    for draft in (None, draft_model) if draft_model is not None else (None,):
                        predicted = _try(model, many, replace(workload, bits=bits, batch=batch, draft=draft))
                        if predicted is not None and (draft is None or predicted.draft_tokens):
                            found.append(predicted)
    return found


def cheapest(found: Sequence[Forecast], *, tok_per_s: float | None, usd: float | None, each: bool = True) -> Forecast:
    """The cheapest configuration that meets the requirements; at equal cost, the one with the most bits.

    Args:
        found: forecasts to choose from.
        tok_per_s: min expected speed, per sequence if `each`, else in total.
        usd: max dollars per hour.
        each: True if the speed is per sequence.

    Raises:
        UsageError: no configuration meets them; the message gives the nearest.
    """
    if not found:
        raise UsageError("the model fits no configuration that was tried", hint="add memory or a disk to the machine")
    priced = [one for one in found if one.usd_per_h is not None]
    if not priced:
        raise UsageError(
            "no configuration has a price", hint="name devices with a price, or a machine file with rent_usd_per_h"
        )

    def speed(one: Forecast) -> float:
        return 1 / one.s_per_token.expected if each else one.tok_per_s

    def cost(one: Forecast) -> float:
        assert one.usd_per_h is not None
        return one.usd_per_h

    good = [
        one for one in priced if (tok_per_s is None or speed(one) >= tok_per_s) and (usd is None or cost(one) <= usd)
    ]
    if not good:
        affordable = [one for one in priced if usd is None or cost(one) <= usd]
        near = max(affordable, key=speed, default=None)
        if near is None:
            least = min(priced, key=cost)
            raise UsageError(
                f"nothing costs ${usd:.2f} an hour or less",
                hint=f"{least.machine.name} is the cheapest: ${cost(least):.2f}",
            )
        raise UsageError(
            f"nothing reaches {tok_per_s:g} tok/s{'' if usd is None else f' for ${usd:.2f} an hour'}",
            hint=(
                f"the fastest is {speed(near):.3g} tok/s: {near.machine.name}, {near.workload.bits:g} bits, batch "
                f"{near.workload.batch}, ${cost(near):.2f} an hour"
            ),
        )
    if tok_per_s is None:  # the fastest within the budget
        return max(good, key=lambda one: (speed(one), -cost(one)))
    return min(good, key=lambda one: (cost(one), -one.workload.bits, -speed(one)))


def frontier(found: Iterable[Forecast], against: str) -> list[Forecast]:
    """The Pareto frontier: no other configuration is faster for less money, or with more bits.

    Args:
        found: all forecasts.
        against: `cost` (dollars per million output tokens) or `bits`.
    """
    usable = [one for one in found if against == "bits" or one.usd_per_million_output is not None]

    def price(one: Forecast) -> float:
        if against == "bits":
            return -one.workload.bits
        assert one.usd_per_million_output is not None
        return one.usd_per_million_output.expected

    kept: list[Forecast] = []
    fastest = 0.0
    for one in sorted(usable, key=lambda one: (price(one), -1 / one.s_per_token.expected)):
        speed = 1 / one.s_per_token.expected
        if speed > fastest * 1.001:
            kept.append(one)
            fastest = speed
    return kept


def _try(model: Architecture, machine: Machine, workload: Workload) -> Forecast | None:
    try:
        return forecast(model, machine, workload)
    except UsageError:
        return None


def _priced() -> list[str]:
    return [
        name
        for name, entry in table("devices").items()
        if "rent_usd_per_h" in entry and "memory_gb_per_s" in entry and "fp16_tflops" in entry
    ]


def _other_machines(machine: Machine) -> list[str]:
    """Common machines other than this one."""
    usual = (
        "rtx-4090 + 64GB + nvme-gen4",
        "rtx-5090 + 64GB + nvme-gen4",
        "m4-max-40 + 128GB + apple-ssd-m4-max",
        "h100-sxm + 256GB + nvme-gen4",
    )
    return [name for name in usual if not name.startswith(f"{machine.device} ")]
