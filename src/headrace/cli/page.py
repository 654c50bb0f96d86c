"""One self-contained page: no network, no script, readable in light and dark, on a telephone and on paper."""

from collections.abc import Iterable, Sequence
from html import escape as html_escape
from itertools import pairwise
from pathlib import Path

from headrace._version import __version__
from headrace.claims import Evaluation
from headrace.cli import charts
from headrace.cli.claims import number
from headrace.cli.forecast import forecast_rows
from headrace.errors import HeadraceError
from headrace.forecast.predict import Forecast
from headrace.forecast.schedule import ScheduledUnit, Timeline, simulate, slots_needed
from headrace.forecast.search import ForecastSuggestion, frontier
from headrace.plan.plan import Plan
from headrace.text import printable
from headrace.units import rate, seconds

STYLE = """
:root { color-scheme: light dark; --ink: #1c2733; --paper: #ffffff; --soft: #f2f5f8; --line: #d5dde5; --accent:
#2f6ea8; --bad: #b4432a; --good: #2c7a4b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e9ef; --paper: #12181f; --soft: #1b242e; --line: #33414f;
--accent: #7db7ea; --bad: #ef8a6f; --good: #74c896; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; color: var(--ink); background: var(--paper); font:
16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
p.lead { margin: 0; color: var(--accent); }
svg { width: 100%; height: auto; max-width: 58rem; } .wide, .chart { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; } th, td { text-align: left; padding: .3rem .6rem;
border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: break-word; } td:first-child { white-space: nowrap; }
@media (max-width: 40rem) { .chart svg { min-width: 38rem; } }
th { font-weight: 600; } td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
article { border: 1px solid var(--line); border-radius: .5rem; padding: .9rem 1rem; margin: .9rem 0; background:
var(--soft); break-inside: avoid; }
article h3 { margin: 0 0 .3rem; font-size: 1.02rem; } article p { margin: .35rem 0; } .tag { float: right; font-size:
.82rem; padding: .05rem .5rem; border-radius: 1rem; border: 1px solid currentColor; margin-left: .6rem; }
.good { color: var(--good); } .bad { color: var(--bad); } .numbers { font-variant-numeric: tabular-nums; }
.swing { display: grid; grid-template-columns: minmax(7rem, 15rem) 1fr; gap: .2rem .8rem; font-size: .86rem; align-
items: center; margin: .15rem 0; }
.track { position: relative; height: .8rem; background: var(--line); border-radius: .4rem; } .track i { position:
absolute; top: 0; bottom: 0; background: var(--accent); border-radius: .4rem; } .track b { position: absolute; top:
-.15rem; bottom: -.15rem; width: 2px; background: var(--ink); }
.track.flips i { background: var(--bad); } footer { margin-top: 3rem; font-size: .85rem; opacity: .8; } small { opacity: .8; }
nav a { margin-right: .8rem; color: var(--accent); }
@media print { body { max-width: none; font-size: 11px; color: #000; background: #fff; } article { background: none; }
nav { display: none; } }
"""


def escape(text: str) -> str:
    """Escape text for a page: neither markup nor control characters."""
    return html_escape(printable(text))


def write_page(path: Path, text: str) -> None:
    """Write a page atomically: a reader sees the old one or the new one.

    Raises:
        HeadraceError: it cannot be written.
    """
    try:
        partial = path.with_name(path.name + ".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise HeadraceError(f"cannot write {path}: {why}", hint="give a path that can be written") from error


def _page(title: str, lead: str, parts: Iterable[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<meta name="viewport" '
        'content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n<body>\n<h1>{escape(title)}</h1>\n<p "
        f"class=lead>{escape(lead)}</p>\n"
        + "\n".join(parts)
        + f"\n<footer>headrace {__version__}. Numbers in brackets: the middle 80 % of what was measured for "
        "predictions of this kind.</footer>\n</body>\n</html>\n"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = []
    for row in rows:
        tds = "".join(f"<td{' class=n' if at in numeric else ''}>{escape(cell)}</td>" for at, cell in enumerate(row))
        lines.append(f"<tr>{tds}</tr>")
    return f"<div class=wide><table><thead><tr>{cells}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def timeline_rows(timeline: Timeline, last: bool = True) -> dict[str, list[tuple[float, float]]]:
    """Reads, compute and stalls of a simulated pass, in seconds from its start; neighbouring spans are joined."""
    spans = timeline.spans[-timeline.units_per_pass :] if last else timeline.spans
    start = spans[0].compute_s if last else 0.0
    end = spans[-1].done_s
    reads = [(s.arrive_s - s.transfer_s, s.arrive_s) for s in timeline.spans if s.transfer_s and s.arrive_s > start]
    return {
        "read": joined([(max(a, start) - start, min(b, end) - start) for a, b in reads if a < end]),
        "compute": joined([(s.compute_s - start, s.done_s - start) for s in spans]),
        "stall": joined(
            [(a.done_s - start, b.compute_s - start) for a, b in pairwise(spans) if b.compute_s - a.done_s > 1e-9]
        ),
    }


def joined(spans: Iterable[tuple[float, float]], gap_share: float = 1e-4) -> list[tuple[float, float]]:
    """Sort spans, and join those with hardly a gap between them: a page should not hold ten thousand bars."""
    ordered = sorted(span for span in spans if span[1] > span[0])
    if not ordered:
        return []
    gap = gap_share * (ordered[-1][1] - ordered[0][0])
    found = [ordered[0]]
    for start, end in ordered[1:]:
        if start - found[-1][1] <= gap:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def plan_page(
    plan: Plan,
    timeline: Timeline,
    rows: Sequence[tuple[str, str, str]],
    measured: dict[str, list[tuple[float, float]]] | None = None,
) -> str:
    """The page of a plan for this machine. With `measured`, its spans stand under the predicted ones; `rows` are the passes."""
    panels = {f"predicted: {seconds(timeline.pass_s(timeline_passes(timeline) - 1))} per pass": timeline_rows(timeline)}
    if measured is not None:
        end = max((end for spans in measured.values() for _, end in spans), default=0.0)
        panels[f"measured: {seconds(end)}"] = {name: joined(spans) for name, spans in measured.items()}
    weights = sum(plan.weights.plain.values()) + sum(plan.weights.repacked.values())
    flop = 2.0 * weights
    per_row = plan.profile.kernel("Q4_K", 1) * 4.5 / 8
    peak = plan.profile.gemm(512, precise=not plan.profile.bf16_pays)
    points = {}
    for count in (1, 4, 16):
        cost = plan.cost(count * plan.sequences)
        points[f"decode, {count * plan.sequences} rows"] = (
            flop * count * plan.sequences / plan.pass_bytes,
            flop * count * plan.sequences / cost.seconds,
        )
    points[f"prefill, {plan.prefill_rows} rows"] = (
        flop * plan.prefill_rows / plan.pass_bytes,
        flop * plan.prefill_rows / plan.prefill.seconds,
    )
    share = plan.streamed_bytes_per_pass / plan.pass_bytes
    roofs = {"memory, as the kernels read it": per_row}
    if share:
        roofs[f"disk, {share:.0%} of each pass streamed"] = plan.disk_bytes_per_s / share
    changes = [
        (c.what, f"{seconds(c.s_per_token)} per token", f"{plan.decode_s_per_token.expected / c.s_per_token:.1f}x")
        for c in plan.changes
    ]
    parts = [
        "<h2>A pass over the weights</h2>",
        charts.timeline(panels),
        "<h2>Roofline</h2>",
        charts.roofline(roofs, peak, points),
        "<h2>The plan</h2>" if measured is None else "<h2>Passes, measured and predicted</h2>",
        _table(("", "", ""), rows),
    ]
    if changes:
        parts += ["<h2>Faster with</h2>", _table(("change", "then", "gain"), changes, numeric=(2,))]
    return _page(plan.model, plan.line(), parts)


def timeline_passes(timeline: Timeline) -> int:
    """Number of simulated passes."""
    return len(timeline.spans) // timeline.units_per_pass


def forecast_page(one: Forecast, better: Sequence[ForecastSuggestion], found: Sequence[Forecast]) -> str:
    """The page of a forecast for another machine."""
    busy = {name: value for name, value in one.decode.busy_s.items() if value > 0}
    parts = ["<h2>A decoding pass, by layer</h2>", charts.timeline(_layers(one))]
    parts += ["<h2>Busy seconds of a pass</h2>", charts.bars(busy, "busy seconds of each resource in a pass")]
    parts += ["<h2>Roofline</h2>", _forecast_roofline(one, better)]
    if found:
        parts += ["<h2>Frontier</h2>", _frontiers(found)]
        points = frontier(found, "cost") or frontier(found, "bits")
        rows = [
            (
                p.machine.name,
                f"{p.workload.bits:g}",
                str(p.workload.batch),
                str(p.draft_tokens),
                rate(1 / p.s_per_token.expected),
                f"${p.usd_per_million_output.expected:.3g}" if p.usd_per_million_output else "",
            )
            for p in points
        ]
        parts.append(
            _table(
                ("machine", "bits", "batch", "draft tokens", "each", "per million tokens"),
                rows,
                numeric=(1, 2, 3, 4, 5),
            )
        )
    parts += ["<h2>The forecast</h2>", _table(("", "", ""), forecast_rows(one))]
    if better:
        gains = [(c.what, rate(c.tok_per_s), f"{c.gain:.1f}x") for c in better]
        parts += ["<h2>Faster with</h2>", _table(("change", "tok/s in all", "gain"), gains, numeric=(1, 2))]
    sources = [*one.machine.sources, f"{one.model.name}: {one.model.source}"]
    parts += ["<h2>Sources</h2>", "<ul>" + "".join(f"<li>{escape(source)}</li>" for source in sources) + "</ul>"]
    lead = (
        f"{rate(one.tok_per_s)} [{rate(one.decode.tok_per_s.low)} .. {rate(one.decode.tok_per_s.high)}], first "
        f"token in {seconds(one.ttft_s.expected)}, {one.decode.binding}-bound"
    )
    return _page(f"{one.model.name} on {one.machine.name}", lead, parts)


def _layers(one: Forecast) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """A pass as a schedule of its layers: transfers, compute and stalls."""
    transfers = [
        value
        for name, value in one.decode.busy_s.items()
        if name not in ("memory", "compute", "launches", "collectives", "host", "drafting")
    ]
    feed_s = max(transfers, default=0.0)
    inner = max(
        one.decode.pass_s.expected - feed_s,
        one.decode.busy_s.get("memory", 0.0) + one.decode.busy_s.get("launches", 0.0),
    )
    layers = one.model.layers
    unit = ScheduledUnit(1e-4 if feed_s else 0.0, feed_s / layers, inner / layers, pinned=not feed_s)
    timeline = simulate([unit] * layers, slots_needed(unit), passes=2)
    rows = {name: spans for name, spans in timeline_rows(timeline).items() if spans}
    slots = f", {slots_needed(unit)} slots keep the pipe full" if feed_s else ""
    return {f"{layers} layers{slots}: {one.reasons[0]}": rows}


def _forecast_roofline(one: Forecast, better: Sequence[ForecastSuggestion]) -> str:
    machine = one.machine
    roofs = {"device memory": machine.device_bytes_per_s * machine.all_devices}
    if not machine.unified:
        roofs["bus"] = machine.bus_bytes_per_s * machine.all_devices
    if machine.disk_bytes_per_s:
        roofs["disk"] = machine.disk_bytes_per_s * machine.nodes
    points = {
        "decode": _point(one, one.decode.rows, one.decode.pass_s.expected),
        "prefill": _point(one, one.prefill.rows, one.prefill.pass_s.expected),
    }
    for change in better[:5]:
        other = change.forecast
        points[change.what[:44]] = _point(other, other.decode.rows, other.decode.pass_s.expected)
    return charts.roofline(roofs, machine.flop_per_s * machine.all_devices, points)


def _point(one: Forecast, rows: float, pass_s: float) -> tuple[float, float]:
    flop = rows * one.model.flop()
    return flop / max(1.0, one.model.read_bytes(one.workload.bits)), flop / pass_s


def _frontiers(found: Sequence[Forecast]) -> str:
    def each(p: Forecast) -> float:
        return 1 / p.s_per_token.expected

    panels = {
        "speed against bits": (
            "bits per weight",
            [(p.workload.bits, each(p)) for p in found],
            [(p.workload.bits, each(p)) for p in frontier(found, "bits")],
        )
    }
    priced = [p for p in found if p.usd_per_million_output is not None]
    if priced:

        def cost(p: Forecast) -> float:
            assert p.usd_per_million_output is not None
            return p.usd_per_million_output.expected

        panels = {
            "speed against cost": (
                "$ per million output tokens",
                [(cost(p), each(p)) for p in priced],
                [(cost(p), each(p)) for p in frontier(found, "cost")],
            )
        } | panels
    return charts.frontiers(panels)


def claims_page(answers: Sequence[Evaluation]) -> str:
    """The page of evaluated statements, by section."""
    sections: dict[str, list[Evaluation]] = {}
    for answer in answers:
        sections.setdefault(answer.claim.section, []).append(answer)
    parts = ["<nav>" + "".join(f'<a href="#{escape(name)}">{escape(name)}</a>' for name in sections) + "</nav>"]
    for name, group in sections.items():
        parts.append(f'<h2 id="{escape(name)}">{escape(name.capitalize())}</h2>')
        parts += [_card(answer) for answer in group]
    counts: dict[str, int] = {}
    for answer in answers:
        counts[answer.claim.verdict] = counts.get(answer.claim.verdict, 0) + 1
    lead = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items(), key=lambda item: -item[1]))
    return _page("Statements on language models, computed anew", lead, parts)


def _card(answer: Evaluation) -> str:
    claim = answer.claim
    kind = (
        "good"
        if claim.verdict.startswith(("holds", "right"))
        else "bad"
        if claim.verdict in ("wrong", "imprecise", "superseded")
        else ""
    )
    said = f"said {number(claim.said, claim.unit)}, " if claim.said is not None else ""
    found = (
        f"<p class=numbers>{escape(said)}found <b>{escape(number(answer.value, claim.unit))}</b> "
        f"<small>{escape(claim.formula or '')}</small></p>"
        if answer.value is not None
        else ""
    )
    swings = "".join(_swing(answer, at) for at in range(min(4, len(answer.swings))))
    sources = f"<p><small>{escape('; '.join(claim.sources))}</small></p>" if claim.sources else ""
    return (
        f'<article id="c{escape(claim.id)}"><span class="tag '
        f'{kind}">{escape(claim.verdict)}</span><h3>{escape(claim.id)}. {escape(claim.title)}</h3>'
        f"<p>{escape(claim.statement)}</p>{found}<p>{escape(claim.why)}</p>{swings}{sources}</article>"
    )


def _swing(answer: Evaluation, at: int) -> str:
    """One bar of the tornado chart: the range of the result over an input, and the result itself."""
    swing, unit = answer.swings[at], answer.claim.unit
    assert answer.value is not None
    ends = [answer.value, *(v for s in answer.swings[:4] for v in (s.at_low, s.at_high))]
    low, high = min(ends), max(ends)
    width = (high - low) or 1.0
    a, b = sorted((swing.at_low, swing.at_high))
    left, size, mark = (100 * (a - low) / width, max(0.8, 100 * (b - a) / width), 100 * (answer.value - low) / width)
    label = f"{swing.name} {swing.low:g} .. {swing.high:g}"
    text = (
        f"{number(swing.at_low, unit)} .. {number(swing.at_high, unit)}{', changes the verdict' if swing.flips else ''}"
    )
    return (
        f"<div class=swing><span>{escape(label)}</span><span><span "
        f'class="track{" flips" if swing.flips else ""}" style="display:block">'
        f'<i style="left:{left:.1f}%;width:{size:.1f}%"></i><b '
        f'style="left:{mark:.1f}%"></b></span><small>{escape(text)}</small></span></div>'
    )
