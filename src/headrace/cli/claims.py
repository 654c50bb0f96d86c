"""`headrace claims`: statements on the size, speed and cost of language models, listed or evaluated."""

import json
from pathlib import Path

import click
from rich.table import Table

from headrace.claims import Claim, Evaluation, all_claims, evaluate, find_claim
from headrace.cli import show


def claims_command(id: str | None, html: Path | None, as_json: bool) -> None:
    """List all statements, or evaluate one."""
    chosen = all_claims() if id is None else (find_claim(id.lower().lstrip("0")),)
    answers = [evaluate(claim) for claim in chosen]
    if html is not None:
        from headrace.cli.page import claims_page, write_page

        write_page(html, claims_page(answers))
        show.say(f"wrote {html}")
    if as_json:
        found = [answer.as_json() for answer in answers]
        click.echo(json.dumps(found if id is None else found[0], allow_nan=False))
    elif id is None and html is None:
        _list(answers)
    elif id is not None:
        _show(answers[0])


def number(value: float | None, unit: str) -> str:
    """Format a value with its unit, in four digits."""
    if value is None:
        return ""
    digits = f"{value:,.4g}" if 1e-3 <= abs(value) < 1e6 else f"{value:.3g}"
    return f"{digits} {unit}".strip()


def _list(answers: list[Evaluation]) -> None:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(justify="right")
    grid.add_column(overflow="fold", min_width=34)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(overflow="fold", min_width=10)
    grid.add_row("", "statement", "said", "found", "verdict", style="bold")
    for answer in answers:
        claim = answer.claim
        grid.add_row(claim.id, claim.title, number(claim.said, ""), number(answer.value, ""), claim.verdict)
    show.console().print(grid)
    click.echo("\n`headrace claims 33` runs one: its units, inputs, sources, and what the verdict depends on")


def _show(answer: Evaluation) -> None:
    claim = answer.claim
    console = show.console()
    console.print(f"[bold]{claim.id}. {claim.title}[/bold]  ({claim.section})\n{claim.statement}\n")
    if claim.formula is not None:
        console.print(f"said   {number(claim.said, claim.unit) or 'no number'}")
        console.print(f"found  {number(answer.value, claim.unit)}  ({_formula(claim)})")
    console.print(f"verdict: [bold]{claim.verdict}[/bold]. {claim.why}\n")
    grid = Table.grid(padding=(0, 2))
    for name, entry in claim.inputs.items():
        span = "" if entry.low is None else f"{entry.low:g} .. {entry.high:g}"
        grid.add_row(name, f"{entry.value:g}", entry.unit, entry.label, span, entry.source)
    if claim.inputs:
        console.print(grid)
    if answer.swings:
        console.print("\nwhat it depends on, most first")
        for swing in answer.swings:
            turns = "  changes the verdict" if swing.flips else ""
            ends = f"{number(swing.at_low, claim.unit)} .. {number(swing.at_high, claim.unit)}"
            console.print(f"  {swing.name} {swing.low:g} .. {swing.high:g}: {ends}{turns}")
    if claim.sources:
        console.print("\nsources: " + "; ".join(claim.sources))


def _formula(claim: Claim) -> str:
    from headrace.claims import formulas

    assert claim.formula is not None
    text = (formulas.ALL[claim.formula].__doc__ or "").split("\n")[0]
    return f"{claim.formula}: {text}"
