"""`headrace bench`: a short run compared with its plan, pass by pass."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click

from headrace import slim_import
from headrace.cli import show
from headrace.cli.plan import profile_for, timeline_strips
from headrace.forecast.sparkline import sparklines
from headrace.plan import Budget
from headrace.plan.pipeline import pipeline
from headrace.plan.record import keep_record
from headrace.units import gigabytes, seconds

PROMPT = "The water wheel is one of the oldest machines that people have used to"


def bench_command(
    model: str, memory: int | Budget | None, kv_bits: int, draft: str, max_tokens: int, html: Path | None, as_json: bool
) -> None:
    """Run the model, compare it with the plan, print both."""
    if html is not None:
        show.check_writable(html)
    profile = profile_for(model, say=True)
    load = slim_import.import_api().load  # torch: seconds
    from headrace.sampling_params import SamplingParams

    with load(
        model,
        memory=memory,
        context_tokens=len(PROMPT.encode()) + 8 + max_tokens,  # a token has at least one byte
        prompt_tokens=16,
        kv_bits=kv_bits,
        draft=draft,
        profile=profile,
        trace=True,
    ) as loaded:
        loaded.generate(PROMPT, max_tokens=max_tokens, raw=True, sampling=SamplingParams(temperature=0.0))
        record, plan, trace, last = loaded.record(), loaded.plan, loaded.trace, loaded.passes[-1]
        assert trace is not None
        # An answer may end with the first token: then the only pass is the prefill.
        start, end = last.start_s, last.start_s + last.seconds
        measured = {
            kind: [(max(a, start) - start, min(b, end) - start) for a, b in trace.spans(kind) if b > start and a < end]
            for kind in ("read", "compute", "stall")
        }
    keep_record(record)
    predicted = pipeline(plan, rows=last.rows)
    if html is not None:
        from headrace.cli.page import plan_page, write_page

        rows = [
            (
                f"{g.rows} rows x {g.count}",
                seconds(g.seconds),
                f"disk {seconds(g.disk_s)}, kernels {seconds(g.kernel_s)}, rest {seconds(g.layer_s)}; waited "
                f"{seconds(g.stall_s)}",
            )
            for g in record.passes
        ]
        write_page(html, plan_page(plan, predicted, rows, measured))
        show.say(f"wrote {html}")
    if as_json:
        click.echo(json.dumps(asdict(record) | {"schedule_s": predicted.pass_s(1)}, allow_nan=False))
        return
    show.note(plan.line())
    for group in record.passes:
        cost = plan.cost(group.rows)
        limit = max(cost.disk_s, cost.compute_s)
        click.echo(
            f"{group.count} passes of {group.rows} rows: {seconds(group.seconds)}, predicted "
            f"{seconds(cost.seconds)} ({cost.seconds / group.seconds - 1:+.0%});"
            f" limit {seconds(limit)} (disk {seconds(cost.disk_s)}, compute {seconds(cost.compute_s)}), reached "
            f"{limit / group.seconds:.0%};"
            f" read {gigabytes(group.read_bytes)}, waited {seconds(group.stall_s)}"
        )
    click.echo("\npredicted")
    for line in timeline_strips(predicted):
        click.echo(f"  {line}")
    click.echo("measured, the last pass")
    for line in sparklines(measured, 0.0, end - start):
        click.echo(f"  {line}")
    if record.s_per_token is None:
        show.say("no token after the first: ask for more with -n")
        sys.exit(1)
