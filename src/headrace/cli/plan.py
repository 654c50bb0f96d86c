"""`headrace plan` and `headrace probe`, and the profile that `run` uses."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from headrace import slim_import
from headrace.checkpoint import Checkpoint
from headrace.checkpoint.tensor import bits_per_weight
from headrace.cli import show
from headrace.cli.fit import fit_command
from headrace.cli.forecast import Wishes, forecast_command
from headrace.cli.hub import open_anywhere
from headrace.errors import ContextError, UsageError
from headrace.forecast.schedule import Timeline
from headrace.forecast.sparkline import sparklines
from headrace.hub import parse_reference
from headrace.paths import exists
from headrace.plan import (
    Budget,
    Plan,
    Profile,
    Range,
    RunConfig,
    budget_of,
    choose_drafting,
    drafting_options,
    guessed_profile,
    load_profile,
    make_plan,
)
from headrace.plan.pipeline import pipeline
from headrace.plan.profile import profile_of, save_profile
from headrace.plan.shape import is_linear
from headrace.text import printable
from headrace.units import gib, gigabytes, rate, seconds

USUAL_PROMPT_TOKENS = 512
USUAL_USD_PER_KWH = 0.15


def profile_for(model: str, *, say: bool) -> Profile:
    """The kept profile. The first call on a machine measures it."""
    profile = load_profile()
    if profile is not None:
        return profile
    if say:
        show.note("measuring this machine once (about 15 s); `headrace probe` does it again")
    # The probe runs in a separate process: its memory must not count against this one's ceiling.
    command = [sys.executable, "-c", "from headrace.cli import main; main()", "probe", model, "--json"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace")
        printed, trouble = result.stdout, result.stderr.strip()[-200:]
    except OSError as error:
        printed, trouble = "", f"no process can be started: {error.strerror}"
    profile = load_profile() or profile_of(printed)  # the printed one, where it cannot be kept
    if profile is None:
        show.note(f"the machine could not be measured ({trouble}); planning with assumed rates")
        return guessed_profile()
    return profile


def plan_or_forecast(
    model: str | None,
    *,
    memory: int | Budget | None,
    ctx_size: int | None,
    kv_bits: int,
    draft: str,
    batch: int | None,
    prompt_tokens: int | None,
    tokens: int,
    machine: str | None,
    params: float | None,
    bits: float | None,
    require_tok_s: float | None,
    budget_usd: float | None,
    usd_per_kwh: float | None,
    utilisation: float | None,
    html: Path | None,
    fit_runs: Path | None,
    as_json: bool,
) -> None:
    """Plan a file on this machine as `run` would run it; forecast everything else from tables.

    Raises:
        UsageError: options that contradict each other.
    """
    if fit_runs is not None:
        if model is not None or machine is not None:
            raise UsageError("--fit learns from runs and plans nothing", hint="give it alone: headrace plan --fit RUNS")
        fit_command(fit_runs, as_json)
        return
    elsewhere = [machine, params, bits, require_tok_s, budget_usd]
    if model is not None and _is_model(model) and not any(value is not None for value in elsewhere):
        if usd_per_kwh is not None or utilisation is not None:
            raise UsageError(
                "the price of this machine is not known", hint="--usd-per-kwh and --utilisation are for --machine"
            )
        plan_command(
            model, memory, ctx_size, kv_bits, draft, batch or 1, prompt_tokens, as_json, tokens=tokens, html=html
        )
        return
    if ctx_size is not None:
        raise UsageError("--ctx-size is for a file on this machine", hint="use --prompt-tokens and --tokens")
    wishes = Wishes(
        machine=machine,
        params=params,
        bits=bits,
        kv_bits=kv_bits,
        batch=batch,
        prompt_tokens=prompt_tokens or USUAL_PROMPT_TOKENS,
        tokens=tokens,
        draft=draft,
        require_tok_s=require_tok_s,
        budget_usd=budget_usd,
        usd_per_kwh=USUAL_USD_PER_KWH if usd_per_kwh is None else usd_per_kwh,
        utilisation=1.0 if utilisation is None else utilisation,
    )
    forecast_command(model, memory, wishes, html, as_json)


def _is_model(model: str) -> bool:
    """True if the headers of the model's weights can be read, on this disk or at the hub."""
    path = Path(model)
    path_exists = exists(path)
    if path.is_dir():
        return any(path.glob("*.safetensors*"))
    return path_exists or parse_reference(model) is not None


def plan_command(
    model: str,
    memory: int | Budget | None,
    ctx_size: int | None,
    kv_bits: int,
    draft: str,
    batch: int,
    prompt_tokens: int | None,
    as_json: bool,
    *,
    tokens: int = 512,
    html: Path | None = None,
) -> None:
    """Print the plan for a model."""
    checkpoint = open_anywhere(model)
    limit = checkpoint.context_limit(4096)
    if prompt_tokens is not None and prompt_tokens >= limit:
        raise ContextError(
            f"a prompt of {prompt_tokens} tokens is asked for, the model was made for {limit} with its answer",
            hint=f"use --prompt-tokens {limit - 1} or less",
        )
    if batch > 1 and checkpoint.has_encoder:
        raise UsageError(f"{checkpoint.name} has an encoder: it runs one prompt at a time", hint="use --batch 1")
    prompt_tokens = prompt_tokens or USUAL_PROMPT_TOKENS
    context = ctx_size or min(prompt_tokens + tokens, limit)
    run_config = RunConfig(
        context_tokens=context, prompt_tokens=min(prompt_tokens, context), sequences=batch, kv_bits=kv_bits
    )
    budget = budget_of(memory)
    profile = load_profile() or guessed_profile()
    drafting, why = choose_drafting(
        checkpoint, profile, budget, run_config, drafting_options(checkpoint, draft, profile)
    )
    plan = make_plan(checkpoint, profile, budget, replace(run_config, drafting=drafting))
    plan = replace(plan, reasons=(*plan.reasons, why))
    timeline = pipeline(plan)
    if html is not None:
        from headrace.cli.page import plan_page, write_page

        write_page(html, plan_page(plan, timeline, _rows(plan, checkpoint)))
        show.say(f"wrote {html}")
    if as_json:
        click.echo(json.dumps(plan.as_json(), allow_nan=False))
        return
    _print(plan, _rows(plan, checkpoint), timeline)


def timeline_strips(timeline: Timeline) -> list[str]:
    """The last pass of a simulation as lines of text: disk, compute, and stalls."""
    spans = timeline.spans[-timeline.units_per_pass :]
    start = spans[0].compute_s
    rows = {
        "disk": [(s.arrive_s - s.transfer_s, s.arrive_s) for s in timeline.spans if s.transfer_s],
        "compute": [(s.compute_s, s.done_s) for s in spans],
        "stall": [(a.done_s, b.compute_s) for a, b in pairwise(spans) if b.compute_s > a.done_s],
    }
    return sparklines(rows, start, spans[-1].done_s)


def _print(plan: Plan, rows: list[tuple[str, str, str]], timeline: Timeline) -> None:
    console = Console(highlight=False, soft_wrap=True)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell, keep="")) for cell in row))
    console.print(table)
    console.print(f"\na pass of {seconds(timeline.pass_s(1))}, simulated read by read")
    for line in timeline_strips(timeline):
        console.print(f"  {line}", markup=False)
    if plan.changes:
        console.print("\nfaster with")
        for change in plan.changes:
            gain = plan.decode_s_per_token.expected / change.s_per_token
            console.print(f"  {change.what}: {seconds(change.s_per_token)} per token ({gain:.1f}x)", markup=False)


def _pinned_remark(plan: Plan) -> str:
    share = f"{plan.held_bytes / plan.weights_bytes:.0%}, the same of every large tensor"
    return f"{share}; {gigabytes(plan.decode_pinned_bytes)} of it during decode" if plan.decode_pinned_bytes else share


def _encoder_rows(plan: Plan) -> list[tuple[str, str, str]]:
    if not plan.prefill_only_bytes:
        return []
    streamed = gigabytes(plan.streamed_bytes_per_prompt)
    return [("encoder", gigabytes(plan.prefill_only_bytes), f"used once per prompt, {streamed} of it streamed then")]


def _rows(plan: Plan, checkpoint: Checkpoint) -> list[tuple[str, str, str]]:
    """The plan as rows of (name, value, remark), for a terminal."""
    decode, ttft = plan.decode_s_per_token, plan.ttft_s
    types = sorted({t.type for t in checkpoint.tensors.values() if is_linear(t)}, key=bits_per_weight)
    buffers = f"ring {gib(plan.ring_bytes)}, activations {gib(plan.activation_bytes)}"
    measured = plan.profile.source.startswith("measured")
    passes = f"{plan.prefill_passes} pass{'es' if plan.prefill_passes > 1 else ''} of {plan.prefill_rows} rows"
    return [
        ("model", plan.model, f"{checkpoint.architecture}, {plan.type_bits:.2f} bits/weight ({', '.join(types)})"),
        ("memory", gib(plan.budget.nbytes), f"{plan.budget.reason}; floor {gib(plan.floor_bytes)}"),
        ("weights", gigabytes(plan.weights_bytes), "read in the first pass"),
        ("pinned", gigabytes(plan.held_bytes), _pinned_remark(plan)),
        *_expert_rows(plan),
        *_layout_rows(checkpoint),
        ("streamed", gigabytes(plan.streamed_bytes_per_pass), f"per pass, disk {gigabytes(plan.disk_bytes_per_s)}/s"),
        *_encoder_rows(plan),
        ("KV cache", gib(plan.kv_bytes), f"{plan.sequences} x {plan.context_tokens} tokens in {plan.kv_bits} bits"),
        ("draft", plan.drafting.name, plan.reasons[-1]),
        ("buffers", gib(plan.ring_bytes + plan.activation_bytes), buffers),
        ("runtime", gib(plan.runtime_bytes), "interpreter, libraries, tokenizer, small tensors"),
        ("prefill", seconds(ttft.expected), f"{plan.prefill.binding}-bound, {passes}  {_interval(ttft)}"),
        (
            "decode",
            f"{seconds(decode.expected)}/token",
            f"{plan.binding}-bound = {rate(1 / decode.expected)}  {_interval(decode)}",
        ),
        (
            "rates",
            plan.profile.source,
            "by `headrace probe`" if measured else "run `headrace probe` to measure this machine",
        ),
    ]


def _expert_rows(plan: Plan) -> list[tuple[str, str, str]]:
    """Expert cache of an MoE model: size, expected hit rate, bytes read per token."""
    if plan.experts is None:
        return []
    experts = plan.experts
    of = f"of {gigabytes(experts.nbytes)}; {experts.per_token} of {experts.count} for a token, in {experts.layers} layers"
    hits = f"{experts.hit_rate:.0%} of choices in memory ({experts.source})"
    return [
        ("experts", gib(plan.expert_bytes), f"{plan.expert_slots} of {experts.total} in memory, {of}"),
        ("", gigabytes(experts.missed_bytes(1)), f"read per token: {hits}"),
    ]


def _layout_rows(checkpoint: Checkpoint) -> list[tuple[str, str, str]]:
    """Stored format and in-memory type of quantised tensors, where the two differ."""
    found: dict[tuple[str, str], int] = {}
    for tensors in checkpoint.virtual.values():
        for tensor, encoding in tensors:
            found[encoding.label, tensor.type] = found.get((encoding.label, tensor.type), 0) + tensor.nbytes
    return [
        ("decoded", gigabytes(nbytes), f"{label}, in memory as {type_} ({bits_per_weight(type_):.3g} bits/weight)")
        for (label, type_), nbytes in sorted(found.items())
    ]


def _interval(prediction: Range) -> str:
    return f"[{seconds(prediction.low)} .. {seconds(prediction.high)}]"


def probe_command(target: Path, as_json: bool) -> None:
    """Measure, keep and print the profile."""
    slim_import.import_api()
    from headrace.probe import probe

    profile = probe(target, lambda what: show.note(f"measuring {what}"))
    if as_json:
        click.echo(json.dumps(asdict(profile)))
        save_profile(profile)
        return
    kept = save_profile(profile)
    device = str(target.stat().st_dev)
    one_row, sixteen_rows = profile.kernel("Q4_K", 1), profile.kernel("Q4_K", 16)
    lines = [
        ("machine", profile.machine),
        ("disk", f"{gigabytes(profile.disk_bytes_per_s[device])}/s, read as the engine reads"),
        ("I/O", f"costs the cores {profile.io_cpu_share:.0%} of its time"),
        ("Q4_K", f"{one_row / 1e9:.1f} billion weights/s for 1 row, {sixteen_rows / 1e9:.1f} for 16"),
        (
            "GEMM",
            f"{profile.gemm(512, False) / 1e9:.0f} GFLOP/s bf16, {profile.gemm(512, True) / 1e9:.0f} fp32, 512 rows",
        ),
        ("layer", f"{seconds(profile.layer_s)} outside of the kernels"),
        ("runtime", f"{gib(profile.runtime_bytes)} before any weights"),
        ("example", f"a 5 GB Q4_K model in memory: about {rate(one_row / 8.9e9)}"),
        ("kept in", str(kept)),
    ]
    for name, value in lines:
        click.echo(f"{name:9} {printable(value, keep='')}")
