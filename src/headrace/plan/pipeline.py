"""The engine's schedule in the simulator: every read and compute slice of a pass, with the planned slots and readers.

Beyond `cost` it models the start of a pass, units delayed by a busy slot, and where in the pass compute stalls.
"""

from collections.abc import Iterator, Sequence
from math import ceil

from headrace.forecast.schedule import ScheduledUnit, Timeline, simulate
from headrace.kernels.thresholds import DECODE_MAX_ROWS
from headrace.plan.cost import expert_seconds, layer_seconds, layers_of, row_invariant_rate
from headrace.plan.expert_cost import FOUND_LATE, Experts
from headrace.plan.plan import Plan

# Assumed seconds before the first byte of a 2 MiB request to an SSD; the readers hide it.
READ_LATENCY_S = 150e-6

LAYERS_AHEAD = 2  # number of next layers whose experts are prefetched (`engine.expert_prefetch`)


def pass_units(plan: Plan, rows: int) -> list[ScheduledUnit]:
    """The units of a pass in order of compute: each tensor's pinned rows alternate with its streamed units."""
    linears, profile, weights = plan.shape.linears, plan.profile, plan.weights
    glue_s = layer_seconds(profile, layers_of(plan.shape), rows) / len(linears)
    units: list[ScheduledUnit] = []
    for tensor in linears:
        rate = row_invariant_rate(profile, weights, tensor.type, rows)
        repacked = tensor.type in plan.repacked_types
        pinned_rate = profile.kernel(tensor.type, rows, repacked=True) if repacked else rate
        pinned, decode_pinned = plan.pinned_rows[tensor.name], plan.decode_pinned_rows.get(tensor.name, 0)
        pinned_s = tensor.columns * (pinned / pinned_rate + decode_pinned / rate)
        left = tensor.rows - pinned - decode_pinned
        streamed = left * tensor.row_bytes
        count = ceil(streamed / plan.unit_bytes)
        units.append(ScheduledUnit(0.0, 0.0, (pinned_s + glue_s) / (count + 1), pinned=True))
        for at in range(count):
            size = min(plan.unit_bytes, streamed - at * plan.unit_bytes)
            read_s = size * weights.read_share / plan.disk_bytes_per_s
            decode_s = size * weights.decoding_core_s_per_byte / profile.threads
            each_s = left * tensor.columns / rate * size / streamed
            units.append(ScheduledUnit(READ_LATENCY_S, read_s, each_s + decode_s + profile.io_cpu * read_s))
            units.append(ScheduledUnit(0.0, 0.0, (pinned_s + glue_s) / (count + 1), pinned=True))
    return units if plan.experts is None else list(_with_experts(units, plan, plan.experts, rows))


def _with_experts(units: Sequence[ScheduledUnit], plan: Plan, experts: Experts, rows: int) -> Iterator[ScheduledUnit]:
    """The units; each layer's missed experts and expert compute follow its share of them.

    Most experts are prefetched (`engine.expert_prefetch`); the layer waits for the others.
    """
    read_s = experts.missed_bytes(rows) / experts.layers / plan.disk_bytes_per_s
    compute_s = expert_seconds(plan.profile, experts, rows, plan.weights.row_invariant) / experts.layers
    compute_s += (plan.profile.io_cpu + (FOUND_LATE if rows <= DECODE_MAX_ROWS else 0.0)) * read_s
    share = max(1, len(units) // experts.layers)
    for layer in range(experts.layers):
        last = len(units) if layer == experts.layers - 1 else (layer + 1) * share
        yield from units[layer * share : last]
        yield (
            ScheduledUnit(READ_LATENCY_S, read_s, compute_s)
            if read_s
            else ScheduledUnit(0.0, 0.0, compute_s, pinned=True)
        )


def pipeline(plan: Plan, rows: int | None = None, passes: int = 2) -> Timeline:
    """Timeline of consecutive decode passes; from the second on the pipeline is full."""
    units = pass_units(plan, rows or plan.decode_rows)
    ahead = 1 if plan.experts is None else 1 + LAYERS_AHEAD
    return simulate(units, max(ahead, plan.ring_slots), readers=max(1, plan.readers), passes=passes)
