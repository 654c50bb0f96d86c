"""`headrace plan` and `headrace probe`, and how `run` gets its profile."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from headrace.checkpoint import open_checkpoint
from headrace.cli import show
from headrace.plan import (
    Budget,
    Plan,
    Profile,
    Request,
    budget_of,
    choose_drafting,
    drafting_options,
    guessed_profile,
    load_profile,
    make_plan,
)
from headrace.plan.plan import describe
from headrace.plan.profile import profile_path
from headrace.units import gib, gigabytes, rate, seconds


def profile_for(model: str, *, say: bool) -> Profile:
    """The kept profile; the first time on a machine, measure it."""
    profile = load_profile()
    if profile is not None:
        return profile
    if say:
        show.note("measuring this machine once (about 15 s); `headrace probe` does it again")
    # In a process of its own: what the probe takes must not count against this one's ceiling.
    command = [sys.executable, "-c", "from headrace.cli import main; main()", "probe", model, "--json"]
    result = subprocess.run(command, capture_output=True, text=True)
    profile = load_profile()
    if profile is None:
        show.note(f"the machine could not be measured ({result.stderr.strip()[-200:]}); planning with guesses")
        return guessed_profile()
    return profile


def plan_command(
    model: str,
    memory: int | Budget | None,
    ctx_size: int | None,
    draft: str,
    batch: int,
    prompt_tokens: int,
    as_json: bool,
) -> None:
    """Print the plan for a model."""
    checkpoint = open_checkpoint(model)
    limit = checkpoint.number("context_length", 4096)
    context = ctx_size or min(prompt_tokens + 512, limit)
    request = Request(context_tokens=context, prompt_tokens=min(prompt_tokens, context), sequences=batch)
    budget = budget_of(memory)
    profile = load_profile() or guessed_profile()
    drafting, why = choose_drafting(checkpoint, profile, budget, request, drafting_options(checkpoint, draft))
    plan = make_plan(checkpoint, profile, budget, replace(request, drafting=drafting))
    plan = replace(plan, reasons=(*plan.reasons, why))
    if as_json:
        click.echo(json.dumps(plan.as_json(), allow_nan=False))
        return
    _print(plan, describe(plan, checkpoint))


def _print(plan: Plan, rows: list[tuple[str, str, str]]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if plan.changes:
        console.print("\nfaster with")
        for change in plan.changes:
            gain = plan.decode_s_per_token.expected / change.s_per_token
            console.print(f"  {change.what}: {seconds(change.s_per_token)} per token ({gain:.1f}x)")


def probe_command(target: Path, as_json: bool) -> None:
    """Measure, keep and print the profile."""
    from headrace.probe import probe

    profile = probe(target, lambda what: show.note(f"measuring {what}"))
    if as_json:
        click.echo(json.dumps(asdict(profile)))
        return
    device = str(target.stat().st_dev)
    one, few = profile.kernel("Q4_K", 1), profile.kernel("Q4_K", 16)
    lines = [
        ("machine", profile.machine),
        ("disk", f"{gigabytes(profile.disk_bytes_per_s[device])}/s, read as the engine reads"),
        ("Q4_K", f"{one / 1e9:.1f} billion weights/s for 1 row, {few / 1e9:.1f} for 16"),
        (
            "products",
            f"{profile.product(512, False) / 1e9:.0f} GFLOP/s bf16, {profile.product(512, True) / 1e9:.0f} fp32, 512 rows",
        ),
        ("layer", f"{seconds(profile.layer_s)} outside of the kernels"),
        ("runtime", f"{gib(profile.runtime_bytes)} before any weights"),
        ("example", f"a 5 GB Q4_K model in memory: about {rate(one / 8.9e9)}"),
        ("kept in", str(profile_path())),
    ]
    for name, value in lines:
        click.echo(f"{name:9} {value}")
