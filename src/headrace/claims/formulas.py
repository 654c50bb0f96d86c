"""The formulas of the claims: plain numbers in, one number out. The model is in `headrace.forecast`."""

from collections.abc import Callable
from math import ceil, log, pow, sqrt
from typing import TypeVar

from headrace.forecast.architecture import Architecture
from headrace.forecast.expert_hits import distinct
from headrace.forecast.life import Life, break_even_tokens, inference_flop, training_flop
from headrace.forecast.money import Tariff, flop_price, markup
from headrace.forecast.schedule import ScheduledUnit, closed_form, grouped, period, simulate, slots_needed
from headrace.forecast.topology import Flow, Load, Pipe, Topology
from headrace.forecast.world import Copies, Mind, Stock, copies, grown, halving_months, least_token_s, reading_tok_per_s

F = TypeVar("F", bound=Callable[..., float])
ALL: dict[str, Callable[..., float]] = {}


def formula(function: F) -> F:
    """Register a function under its name."""
    ALL[function.__name__] = function
    return function


@formula
def ratio(value: float, reference: float) -> float:
    """One measurement over another."""
    return value / reference


@formula
def exponent(large: float, small: float, of_large: float, of_small: float) -> float:
    """Exponent of a power law through two points."""
    return log(large / small) / log(of_large / of_small)


@formula
def growth_per_year(now: float, then: float, years: float) -> float:
    """The factor per year that leads from one number to the other."""
    return pow(now / then, 1 / years)


@formula
def doubled(doublings: float, per_doubling: float) -> float:
    """Size after `doublings` doublings (`forecast.world.grown`)."""
    return grown(1, doublings, per_doubling)


@formula
def halving(factor: float, months: float) -> float:
    """Months in which a cost halved (`forecast.world`; Hernandez and Brown 2020, "AI and Efficiency")."""
    return halving_months(factor, months)


@formula
def pipelined_pass(layers: float, latency_ms: float, transfer_ms: float, compute_ms: float, slots: float) -> float:
    """Seconds of a pass whose layers are prefetched into `slots` slots (`forecast.schedule`)."""
    return simulate([_unit(latency_ms, transfer_ms, compute_ms)] * int(layers), int(slots)).seconds


@formula
def pipelined_pass_closed(
    layers: float, latency_ms: float, transfer_ms: float, compute_ms: float, slots: float
) -> float:
    """Seconds of that pass in closed form."""
    return closed_form(_unit(latency_ms, transfer_ms, compute_ms), int(layers), int(slots))


@formula
def pipelined_over_resident(
    layers: float, latency_ms: float, transfer_ms: float, compute_ms: float, slots: float
) -> float:
    """Time of that pass over the claim's reference: memory for all layers, which arrive together after one latency."""
    resident_s = grouped([_unit(latency_ms, 0, compute_ms)] * int(layers), int(layers))
    return pipelined_pass(layers, latency_ms, transfer_ms, compute_ms, slots) / resident_s


@formula
def grouped_pass(layers: float, latency_ms: float, transfer_ms: float, compute_ms: float, group: float) -> float:
    """Seconds of a pass that loads a group of layers, computes it, and only then loads the next."""
    return grouped([_unit(latency_ms, transfer_ms, compute_ms)] * int(layers), int(group))


@formula
def slots_for_full_rate(latency_ms: float, transfer_ms: float, compute_ms: float) -> float:
    """Fewest slots that hide the latency (Little's law)."""
    return slots_needed(_unit(latency_ms, transfer_ms, compute_ms))


@formula
def period_over_compute(latency_ms: float, transfer_ms: float, compute_ms: float, slots: float) -> float:
    """Time per layer with a full pipeline over compute alone: 1 if loading is hidden (`forecast.schedule`)."""
    return period(_unit(latency_ms, transfer_ms, compute_ms), int(slots)) * 1e3 / compute_ms


@formula
def overlap_speed_up(transfer_ms: float, compute_ms: float) -> float:
    """Speed-up of prefetching once latency is hidden: sum over maximum, at most 2 (`forecast.schedule`)."""
    unit = _unit(0, transfer_ms, compute_ms)
    return grouped([unit], 1) / period(unit, slots_needed(unit))


@formula
def in_flight(latency_ms: float, compute_ms: float) -> float:
    """Requests in flight when one completes every `compute_ms` (Little 1961)."""
    return latency_ms / compute_ms


@formula
def streamed_token(weights_gb: float, gb_per_s: float, share_read: float, rows: float) -> float:
    """Seconds per token when a pass of `rows` tokens reads a share of the weights through one pipe."""
    return Topology([Pipe("link", gb_per_s)]).load([Flow(weights_gb * share_read, ("link",))]).seconds / rows


@formula
def needed_gb_per_s(weights_gb: float, seconds: float, share_read: float, rows: float) -> float:
    """Bandwidth at which a token takes `seconds`: `streamed_token` solved for the pipe's rate."""
    return streamed_token(weights_gb, 1.0, share_read, rows) / seconds


@formula
def lanes_gb_per_s(giga_transfers: float, payload: float, lanes: float) -> float:
    """One direction of PCIe: a bit per transfer and lane, less coding (PCI-SIG base specifications 3.0 to 6.0)."""
    return giga_transfers / 8 * payload * lanes


@formula
def cards_pass(
    weights_gb: float,
    cards: float,
    card_gb: float,
    resident_share: float,
    link_gb_per_s: float,
    link_efficiency: float,
    dram_gb_per_s: float,
    disk_share: float,
    disk_gb_per_s: float,
) -> float:
    """Seconds of a pass split over cards, each with its own link to one memory (`forecast.topology`).

    Data from disk is written to that memory and read from it again.
    """
    link = link_gb_per_s * link_efficiency
    streamed_gb = weights_gb - cards * card_gb * resident_share
    return _cards(streamed_gb, int(cards), link, dram_gb_per_s, disk_share, disk_gb_per_s).seconds


@formula
def dram_over_links(
    weights_gb: float,
    cards: float,
    card_gb: float,
    resident_share: float,
    link_gb_per_s: float,
    link_efficiency: float,
    dram_gb_per_s: float,
) -> float:
    """Busy time of host memory over that of the cards' links: above 1 the host memory is the bottleneck."""
    streamed_gb = weights_gb - cards * card_gb * resident_share
    used = _cards(streamed_gb, int(cards), link_gb_per_s * link_efficiency, dram_gb_per_s, 0.0, 1.0).utilisation
    return used["dram"] / used["card 0"]


@formula
def bits_saved(bits: float, packed_bits: float) -> float:
    """Factor by which fewer bits per weight shrink a model."""
    return bits / packed_bits


@formula
def reductions_over_pass(layers: float, per_layer: float, hop_us: float, pass_s: float) -> float:
    """Share of a pass spent in all-reduces of one latency each (two per layer: Shoeybi et al. 2019)."""
    return layers * per_layer * hop_us / 1e6 / pass_s


@formula
def exchanged_bytes(batch: float, hidden: float, bits: float, devices: float, two_dimensional: float) -> float:
    """Bytes that a device exchanges per half layer (Pope et al. 2022): 2 B d, or 8 B d / sqrt(n) when split both ways."""
    values = 8 / sqrt(devices) if two_dimensional else 2.0
    return values * batch * hidden * bits / 8


@formula
def width_exponent(batch: float, hidden: float, bits: float, devices: float, two_dimensional: float) -> float:
    """Exponent of that traffic's growth with the width."""
    small, large = (exchanged_bytes(batch, h, bits, devices, two_dimensional) for h in (hidden, 2 * hidden))
    return exponent(large, small, 2, 1)


@formula
def small_batch_over_large(
    batch: float, large_batch: float, hidden: float, bits: float, latency_us: float, link_gb_per_s: float
) -> float:
    """Time of an exchange for a small batch over that for a large one: latency plus bytes over bandwidth."""
    small_s, large_s = (
        latency_us / 1e6 + exchanged_bytes(rows, hidden, bits, 1, 0) / (link_gb_per_s * 1e9)
        for rows in (batch, large_batch)
    )
    return small_s / large_s


@formula
def width_speed_up(weights_gb: float, machines: float, link_gb_per_s: float, layers: float, hop_us: float) -> float:
    """Speed-up of a streamed pass when every machine reads its own slice of each layer."""
    one_s = streamed_token(weights_gb, link_gb_per_s, 1, 1)
    slice_s = streamed_token(weights_gb / machines, link_gb_per_s, 1, 1)
    return one_s / (slice_s + layers * 2 * hop_us / 1e6)


@formula
def token_ms(request_ms: float, tokens: float) -> float:
    """Milliseconds per output token of a whole request, its prompt included."""
    return request_ms / tokens


@formula
def share_of_ideal(request_ms: float, tokens: float, weights_gb: float, gb_per_s: float, devices: float) -> float:
    """Time to read the weights once, split evenly, over the measured time per token."""
    return streamed_token(weights_gb / devices, gb_per_s, 1, 1) * 1e3 / token_ms(request_ms, tokens)


@formula
def least_ms(params: float, layers: float, bits: float, tb_per_s: float, hop_us: float) -> float:
    """The shortest time per token over any number of devices (Erdil 2025, in `forecast.world`)."""
    return least_token_s(params, layers, bits, tb_per_s * 1e12, hop_us / 1e6) * 1e3


@formula
def least_ms_of_scaled(
    params: float, layers: float, bits: float, tb_per_s: float, hop_us: float, factor: float, depth_exponent: float
) -> float:
    """The shortest time for a model `factor` times as large, whose depth grows with a power of that."""
    return least_ms(params * factor, layers * factor**depth_exponent, bits, tb_per_s, hop_us)


@formula
def latency_growth(
    params: float, layers: float, bits: float, tb_per_s: float, hop_us: float, factor: float, depth_exponent: float
) -> float:
    """Factor by which that shortest time grows."""
    scaled = least_ms_of_scaled(params, layers, bits, tb_per_s, hop_us, factor, depth_exponent)
    return scaled / least_ms(params, layers, bits, tb_per_s, hop_us)


@formula
def serial_speed(
    params: float,
    layers: float,
    bits: float,
    tb_per_s: float,
    hop_us: float,
    tokens_per_pass: float,
    words_per_min: float,
) -> float:
    """Max speed of one stream over a reader's pace."""
    tok_per_s = tokens_per_pass * 1e3 / least_ms(params, layers, bits, tb_per_s, hop_us)
    return tok_per_s / reading_tok_per_s(words_per_min)


@formula
def serial_tok_per_s(speed: float, words_per_min: float, words_per_token: float) -> float:
    """Tokens per second at `speed` times a reader's pace."""
    return speed * reading_tok_per_s(words_per_min, words_per_token)


@formula
def words_usd(words: float, usd_per_1000_tokens: float, words_per_token: float) -> float:
    """A seller's price of `words` words."""
    return words / words_per_token / 1e3 * usd_per_1000_tokens


@formula
def hour_usd(words_per_min: float, usd_per_1000_tokens: float, words_per_token: float) -> float:
    """A seller's price of an hour of words at a pace."""
    return words_usd(words_per_min * 60, usd_per_1000_tokens, words_per_token)


@formula
def ladder_usd(usd: float, factor: float, large: float, small: float, of_large: float, of_small: float) -> float:
    """The price of a model `factor` times as large, extrapolated from two models on sale."""
    return usd * pow(factor, exponent(large, small, of_large, of_small))


@formula
def word_gflop(params: float, words_per_token: float) -> float:
    """GFLOP per word: 2 N per token (Kaplan et al. 2020, in `forecast.life`)."""
    return inference_flop(params, 1 / words_per_token) / 1e9


@formula
def reader_flop_per_s(params: float, words_per_min: float, words_per_token: float) -> float:
    """FLOP/s of a model that keeps up with a reader."""
    return inference_flop(params, reading_tok_per_s(words_per_min, words_per_token))


@formula
def streams_of(flop_per_s: float, params: float, words_per_min: float, words_per_token: float) -> float:
    """Number of such streams that `flop_per_s` sustains."""
    return flop_per_s / reader_flop_per_s(params, words_per_min, words_per_token)


@formula
def price_over_rental(
    words: float, usd: float, params: float, words_per_token: float, rental_usd_per_h: float, utilisation: float
) -> float:
    """A seller's price over the rent of the arithmetic; the rent buys 1e14 FLOP/s for an hour (`forecast.money`)."""
    second_usd = Tariff(rent_usd_per_h=rental_usd_per_h, utilisation=utilisation).usd_per_h / 3600
    return markup(usd, second_usd * words * word_gflop(params, words_per_token) / 1e5)


@formula
def hourly_price_over_rental(
    usd_per_h: float, gflop_per_word: float, words_per_s: float, rental_usd_per_h: float, utilisation: float
) -> float:
    """Hourly form of that markup; the paid pace and the computed pace may differ."""
    rent = Tariff(rent_usd_per_h=rental_usd_per_h, utilisation=utilisation).usd_per_h
    return markup(usd_per_h, rent * gflop_per_word * words_per_s / 1e5)


@formula
def rental_for_markup(
    times: float, words: float, usd: float, params: float, words_per_token: float, utilisation: float
) -> float:
    """The rent of 1e14 FLOP/s for an hour at which the price is `times` the rent."""
    return price_over_rental(words, usd, params, words_per_token, 1.0, utilisation) / times


@formula
def request_markup(
    batch: float,
    request_ms: float,
    prompt_tokens: float,
    output_tokens: float,
    prompt_billed: float,
    usd_per_1000_tokens: float,
    usd_per_gpu_h: float,
    gpus: float,
    utilisation: float,
) -> float:
    """Price of a batch of requests over the rent of the devices that it occupies (`forecast.money`)."""
    tokens = batch * (prompt_tokens * prompt_billed + output_tokens)
    hour = Tariff(rent_usd_per_h=usd_per_gpu_h * gpus, utilisation=utilisation).usd_per_h
    return markup(tokens / 1e3 * usd_per_1000_tokens, hour / 3600 * request_ms / 1e3)


@formula
def usd_per_100_tflop(usd_per_gpu_h: float, tflop_per_s: float, share_of_peak: float) -> float:
    """Rent of 1e14 FLOP/s for an hour (`forecast.money`)."""
    return flop_price(usd_per_gpu_h, tflop_per_s * share_of_peak * 1e12)


@formula
def size_gb(params: float, bits: float) -> float:
    """GB of all weights."""
    return params * bits / 8 / 1e9


@formula
def devices_needed(params: float, bits: float, device_gb: float) -> float:
    """Fewest devices whose memory holds the weights."""
    return ceil(size_gb(params, bits) / device_gb - 1e-9)


@formula
def flop_for_copies(number: float, params: float, words_per_min: float, words_per_token: float) -> float:
    """FLOP/s of `number` copies that keep up with a reader."""
    return number * reader_flop_per_s(params, words_per_min, words_per_token)


@formula
def copies_by_flop(
    stock_flop_per_s: float, utilisation: float, params: float, words_per_min: float, words_per_token: float
) -> float:
    """Number of such copies that a stock of FLOP/s sustains."""
    return streams_of(stock_flop_per_s * utilisation, params, words_per_min, words_per_token)


@formula
def kv_mb_per_token(layers: float, kv_heads: float, head_dim: float) -> float:
    """MB of KV cache per token in 16 bits (`forecast.architecture`)."""
    return _conversation_bytes(layers, kv_heads, head_dim, 1) / 1e6


@formula
def kv_gb(layers: float, kv_heads: float, head_dim: float, context: float) -> float:
    """GB of KV cache of one whole conversation."""
    return _conversation_bytes(layers, kv_heads, head_dim, context) / 1e9


@formula
def resident_copies(
    devices: float,
    group: float,
    memory_gb: float,
    params: float,
    layers: float,
    kv_heads: float,
    head_dim: float,
    context: float,
) -> float:
    """Copies whose KV caches fit in memory beside one set of weights per group of devices (`forecast.world`)."""
    return _copies(devices, group, memory_gb, 1.0, params, layers, kv_heads, head_dim, context, 250).by_memory


@formula
def swapped_copies(
    devices: float,
    group: float,
    memory_gb: float,
    tb_per_s: float,
    params: float,
    layers: float,
    kv_heads: float,
    head_dim: float,
    context: float,
    words_per_min: float,
) -> float:
    """Copies by memory bandwidth alone: KV caches of idle conversations are kept elsewhere (`forecast.world`)."""
    return _copies(
        devices, group, memory_gb, tb_per_s, params, layers, kv_heads, head_dim, context, words_per_min
    ).by_bandwidth


@formula
def serving_over_training(params: float, trained_tokens: float, served_tokens_per_day: float, days: float) -> float:
    """FLOP of all tokens served over those of training, 2 N T / 6 N D (`forecast.life`)."""
    return inference_flop(params, served_tokens_per_day * days) / training_flop(params, trained_tokens)


@formula
def serving_share(params: float, trained_tokens: float, served_tokens: float) -> float:
    """Share of a model's FLOP spent on serving (`forecast.life`)."""
    making = training_flop(params, trained_tokens)
    return Life(making_flop=making, flop_per_token=inference_flop(params, 1), tokens=served_tokens).serving_share


@formula
def served_for_half(params: float, trained_tokens: float) -> float:
    """Tokens after which serving has cost as much as training (`forecast.life`)."""
    return break_even_tokens(training_flop(params, trained_tokens), inference_flop(params, 1), 0)


@formula
def cost_of_context(
    params: float, layers: float, heads: float, head_dim: float, context: float, samples: float
) -> float:
    """FLOP of `samples` samples of a token late in a context, over one sample after 2048 (`forecast.architecture`)."""
    model = _architecture(params, layers, heads, heads, head_dim)
    return samples * model.flop(context) / model.flop(2048)


@formula
def kept_share(teacher: float, student: float, dense: float) -> float:
    """Share of a teacher's gain over a dense model that its student keeps (negative log perplexities; Fedus et al. 2021)."""
    return (student - dense) / (teacher - dense)


@formula
def lost_share(teacher: float, student: float, dense: float) -> float:
    """Share of that gain that the student loses."""
    return 1 - kept_share(teacher, student, dense)


@formula
def saved_share(teacher: float, student: float) -> float:
    """Share of a teacher's size or cost that its student saves."""
    return 1 - student / teacher


@formula
def experts_touched(experts: float, per_token: float, rows: float) -> float:
    """Share of the experts that a pass of `rows` rows reads, uniform choices (Erdil 2025, in `forecast.expert_hits`)."""
    return distinct(int(experts), int(per_token), int(rows)) / experts


def _unit(latency_ms: float, transfer_ms: float, compute_ms: float) -> ScheduledUnit:
    return ScheduledUnit(latency_ms / 1e3, transfer_ms / 1e3, compute_ms / 1e3)


def _cards(streamed_gb: float, cards: int, link: float, dram: float, disk_share: float, disk: float) -> Load:
    names = [f"card {number}" for number in range(cards)]
    machine = Topology([Pipe("dram", dram), Pipe("disk", disk), *(Pipe(name, link) for name in names)])
    each = streamed_gb / cards
    from_disk = [Flow(each * disk_share, ("disk", "dram", "dram", name)) for name in names]
    return machine.load([*from_disk, *(Flow(each * (1 - disk_share), ("dram", name)) for name in names)])


def _architecture(params: float, layers: float, heads: float, kv_heads: float, head_dim: float) -> Architecture:
    return Architecture(
        name="a claim's model",
        params=params,
        layers=int(layers),
        hidden=int(heads * head_dim),
        heads=int(heads),
        kv_heads=int(kv_heads),
        head_dim=int(head_dim),
        source="the claim",
    )


def _conversation_bytes(layers: float, kv_heads: float, head_dim: float, context: float) -> float:
    return _architecture(1.0, layers, kv_heads, kv_heads, head_dim).kv_bytes(context)


def _copies(
    devices: float,
    group: float,
    memory_gb: float,
    tb_per_s: float,
    params: float,
    layers: float,
    kv_heads: float,
    head_dim: float,
    context: float,
    words_per_min: float,
) -> Copies:
    stock = Stock(devices=devices, flop_per_s=1.0, bytes_per_s=tb_per_s * 1e12, memory_bytes=memory_gb * 1e9)
    mind = Mind(
        flop_per_token=inference_flop(params, 1),
        weights_bytes=size_gb(params, 16) * 1e9,
        conversation_bytes=_conversation_bytes(layers, kv_heads, head_dim, context),
        tok_per_s=reading_tok_per_s(words_per_min),
    )
    return copies(stock, mind, group=int(group))
