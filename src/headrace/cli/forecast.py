"""`headrace plan` for other machines and published models, its searches, and their tables."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from rich.table import Table
from rich.text import Text

from headrace.cli import show
from headrace.cli.hub import open_anywhere
from headrace.errors import UsageError
from headrace.forecast.architecture import Architecture, of_config, of_params, published, table
from headrace.forecast.machine import Machine, find_machine
from headrace.forecast.predict import Forecast, Interval, Phase, Workload, forecast
from headrace.forecast.search import (
    BATCHES,
    BITS,
    ForecastSuggestion,
    changes,
    cheapest,
    configurations,
    frontier,
    sellers,
)
from headrace.hub import parse_reference
from headrace.paths import exists
from headrace.plan import guessed_profile, load_profile
from headrace.plan.budget import Budget, budget_of
from headrace.plan.checkpoint_architecture import architecture_of
from headrace.plan.this_machine import this_machine
from headrace.text import printable
from headrace.units import gigabytes, rate, seconds


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """The command line's options of a forecast."""

    machine: str | None
    params: float | None
    bits: float | None
    kv_bits: int
    batch: int | None
    prompt_tokens: int
    tokens: int
    draft: str
    require_tok_s: float | None
    budget_usd: float | None
    usd_per_kwh: float
    utilisation: float


def find_model(model: str | None, params: float | None) -> Architecture:
    """The architecture of a file, a folder, a published model, a hub model (headers only), or a number of parameters.

    Raises:
        UsageError: neither a model nor a number, or both.
    """
    if params is not None:
        if model is not None:
            raise UsageError(f"{model} and --params {params:g} are two models", hint="give one of them")
        return of_params(params)
    if model is None:
        raise UsageError(
            "no model is given", hint="name a file, a published model such as llama-3-70b, or --params 70e9"
        )
    path = Path(model)
    path_exists = exists(path)
    if path.is_dir() and not any(path.glob("*.safetensors*")):
        return of_config(path / "config.json")
    if path_exists:
        return architecture_of(open_anywhere(model))
    if path.suffix == ".gguf":
        raise UsageError(
            f"there is no file {model}", hint="give the path of a .gguf file, or a name such as llama-3-8b"
        )
    if model.count("/") == 1 and not model.startswith((".", "/")):
        name = model.split("/")[1].lower()
        known = table("models")
        if name in known:
            return published(name)
        if parse_reference(model) is not None:
            return architecture_of(open_anywhere(model))
    return published(model)


def forecast_command(
    model: str | None, memory: int | Budget | None, wishes: Wishes, html: Path | None, as_json: bool
) -> None:
    """Print the forecast, or the result of a search."""
    architecture = find_model(model, wishes.params)
    bits = wishes.bits or architecture.bits or architecture.native_bits
    draft = _draft(wishes.draft)
    workload = Workload(
        bits=bits,
        kv_bits=wishes.kv_bits,
        batch=wishes.batch or 1,
        prompt_tokens=wishes.prompt_tokens,
        tokens=wishes.tokens,
        draft=draft,
        usd_per_kwh=wishes.usd_per_kwh,
        utilisation=wishes.utilisation,
    )
    machine = (
        _machine(wishes.machine, memory)
        if wishes.machine or (wishes.require_tok_s is None and wishes.budget_usd is None)
        else None
    )
    searching = wishes.require_tok_s is not None or wishes.budget_usd is not None
    if searching and machine is None and memory is not None:
        raise UsageError("--memory is of a machine, and none is given", hint="add --machine, or leave --memory out")
    found = []
    if searching or (html is not None and machine is not None):
        found = configurations(
            architecture,
            machine,
            workload,
            all_bits=BITS if wishes.bits is None else (wishes.bits,),
            batches=BATCHES if wishes.batch is None else (wishes.batch,),
            drafts=wishes.draft != "none",
        )
    best = cheapest(found, tok_per_s=wishes.require_tok_s, usd=wishes.budget_usd) if searching else None
    if best is None:
        assert machine is not None
        best = forecast(architecture, machine, workload)
    better = changes(best)
    if html is not None:
        from headrace.cli.page import forecast_page, write_page

        write_page(html, forecast_page(best, better, found))
        show.say(f"wrote {html}")
    if as_json:
        answer = best.as_json() | {
            "changes": [{"what": c.what, "tok_per_s": c.tok_per_s, "gain": c.gain} for c in better]
        }
        answer["sellers"] = [asdict(seller) for seller in sellers(best)]
        if searching:
            answer["frontier"] = {name: [_point(one) for one in frontier(found, name)] for name in ("cost", "bits")}
        click.echo(json.dumps(answer, allow_nan=False))
        return
    _print(best, better, found if searching else [])


def _draft(name: str) -> Architecture | None:
    if name in ("none", "auto"):
        return None
    if name in ("prompt", "self"):
        raise UsageError(
            f"--draft {name} is for this machine and a file",
            hint="name a smaller model of the table, such as llama-3.2-1b",
        )
    return find_model(name, None)


def _machine(text: str | None, memory: int | Budget | None) -> Machine:
    if text is None:
        return this_machine(load_profile() or guessed_profile(), budget_of(memory).nbytes)
    if memory is not None:
        raise UsageError(
            "--memory and --machine contradict each other",
            hint='write the memory into the machine: --machine "... + 64GB"',
        )
    return find_machine(text)


def _point(one: Forecast) -> dict[str, object]:
    return {
        "machine": one.machine.name,
        "bits": one.workload.bits,
        "batch": one.workload.batch,
        "draft_tokens": one.draft_tokens,
        "tok_per_s_each": 1 / one.s_per_token.expected,
        "tok_per_s": one.tok_per_s,
        "usd_per_h": one.usd_per_h,
        "usd_per_million_output": None if one.usd_per_million_output is None else one.usd_per_million_output.expected,
    }


def interval(value: Interval, unit: str = "s") -> str:
    """Format the expected value and its low and high bounds with their unit."""
    if unit == "s":
        return f"{seconds(value.expected)}  [{seconds(value.low)} .. {seconds(value.high)}]"
    if unit == "tok/s":
        return f"{rate(value.expected)}  [{rate(value.low)} .. {rate(value.high)}]"
    return f"${value.expected:.3g}  [${value.low:.3g} .. ${value.high:.3g}]"


def forecast_rows(one: Forecast) -> list[tuple[str, str, str]]:
    """The forecast as rows of (name, value, remark)."""
    workload, model = one.workload, one.model
    active = f", {model.active_params / 1e9:.3g}B active" if model.active_params else ""
    conversations = f"{workload.batch} x {workload.prompt_tokens + workload.tokens} tokens"
    rows = [
        (
            "model",
            model.name,
            f"{model.params / 1e9:.4g}B parameters{active}, {model.layers} layers, {workload.bits:g} bits per weight",
        ),
        ("machine", one.machine.name, f"{gigabytes(one.safe_bytes)} can safely be given to weights and caches"),
        (
            "weights",
            gigabytes(one.weights_bytes),
            f"{one.placement.device:.0%} device, {one.placement.host:.0%} host, {one.placement.disk:.0%} disk",
        ),
        ("KV cache", gigabytes(one.kv_bytes), conversations),
        ("prefill", interval(one.prefill.tok_per_s, "tok/s"), f"{one.prefill.binding}-bound: {_used(one.prefill)}"),
        ("first token", interval(one.ttft_s), ""),
        ("decode", interval(one.decode.tok_per_s, "tok/s"), f"{one.decode.binding}-bound: {_used(one.decode)}"),
        (
            "per token",
            interval(one.s_per_token),
            f"of each sequence; pass {seconds(one.decode.pass_s.expected)}, {one.tokens_per_pass:.2g} tokens",
        ),
        ("bytes a pass", ", ".join(f"{name} {gigabytes(size)}" for name, size in one.decode.bytes_by_tier.items()), ""),
    ]
    if one.joules_per_token is not None:
        rows.append(("energy", f"{one.joules_per_token:.3g} J/token", "at the devices' full power"))
    if one.usd_per_h is not None and one.usd_per_million_output is not None and one.usd_per_million_input is not None:
        how = "rent" if one.machine.rent_usd_per_h is not None else "purchase over 4 years, and electricity"
        rows.append(("cost", f"${one.usd_per_h:.3g}/h", f"{how}; {workload.utilisation:.0%} utilisation"))
        rows.append(("output", interval(one.usd_per_million_output, "$"), "per million tokens"))
        rows.append(("input", interval(one.usd_per_million_input, "$"), "per million tokens"))
    for seller in sellers(one):
        even = f"from a batch of {seller.break_even_batch}" if seller.break_even_batch else "at no batch"
        rows.append(
            (
                "sold at",
                f"${seller.usd_per_million_output:g} per million",
                f"{seller.name}, {seller.date}: {seller.markup:.2g} times the cost of output, "
                f"{seller.request_markup:.2g} of a request; pays {even}",
            )
        )
    rows += [("", "", reason) for reason in one.reasons]
    rows += [("assumed", "", assumption) for assumption in one.machine.assumptions]
    rows.append(
        (
            "interval",
            "",
            f"80 % of measurements of this kind ({one.category}) lie in such an interval: docs/accuracy.md",
        )
    )
    return rows


def _used(phase: Phase) -> str:
    shares = sorted(phase.utilisation.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {share:.0%}" for name, share in shares if share >= 0.01)


def _print(one: Forecast, better: list[ForecastSuggestion], found: list[Forecast]) -> None:
    console = show.console()
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for row in forecast_rows(one):
        grid.add_row(*(Text(printable(cell, keep="")) for cell in row))
    console.print(grid)
    if better:
        console.print("\nfaster with")
        for change in better:
            each = 1 / change.forecast.s_per_token.expected
            line = f"  {change.what}: {rate(change.tok_per_s)} in all, {rate(each)} each ({change.gain:.1f}x)"
            console.print(line, markup=False)
    for name in ("cost", "bits") if found else ():
        console.print(f"\nfrontier of speed against {name}")
        for point in frontier(found, name)[:12]:
            money = (
                f"${point.usd_per_million_output.expected:.3g} per million"
                if point.usd_per_million_output
                else "no price"
            )
            draft = f", {point.draft_tokens} draft tokens" if point.draft_tokens else ""
            console.print(
                f"  {rate(1 / point.s_per_token.expected):>12} each  {money:>20}  {point.workload.bits:g} bits, batch "
                f"{point.workload.batch}{draft}  {point.machine.name}",
                markup=False,
            )


def tables_command(kind: str, as_json: bool) -> None:
    """List the tables that forecasts use."""
    entries = table(kind)
    if as_json:
        click.echo(json.dumps(entries))
        return
    grid = Table.grid(padding=(0, 2))
    for _ in range(4):
        grid.add_column(no_wrap=True)
    for key, entry in entries.items():
        if not isinstance(entry, dict) or "source" not in entry:
            continue
        checked = "" if entry.get("checked", True) else "not verified"
        grid.add_row(key, str(entry.get("name", entry.get("model", ""))), _facts(entry), checked)
    show.console().print(grid)


FACTS = {
    "memory_gb": "{} GB",
    "memory_gb_per_s": "{} GB/s",
    "fp16_tflops": "{} TFLOP/s",
    "rent_usd_per_h": "${}/h",
    "gb_per_s": "{} GB/s",
    "latency_us": "{} us",
    "layers": "{} layers",
    "hidden": "width {}",
    "usd_per_million_input": "${} in",
    "usd_per_million_output": "${} out",
}


def _facts(entry: dict[str, object]) -> str:
    facts = [text.format(entry[name]) for name, text in FACTS.items() if name in entry]
    params = entry.get("params")
    if isinstance(params, int | float):
        facts.insert(0, f"{params / 1e9:.4g}B")
    return ", ".join(facts)
