"""`headrace plan --fit`: fits this machine's profile to its runs."""

import json
from pathlib import Path

import click

from headrace.errors import UsageError
from headrace.plan import load_profile
from headrace.plan.fit import apply_fit, fit_runs
from headrace.plan.profile import save_profile
from headrace.plan.record import read_records


def fit_command(path: Path, as_json: bool) -> None:
    """Fit this machine's factors to run records, and keep them in its profile."""
    profile = load_profile()
    if profile is None:
        raise UsageError("this machine has no profile to fit", hint="run `headrace probe` first")
    fit = fit_runs(read_records(path), profile.machine, profile.probed_at, profile.io_cpu_share)
    save_profile(apply_fit(profile, fit))
    if as_json:
        click.echo(
            json.dumps(
                {
                    "factors": dict(fit.factors),
                    "spread": list(fit.spread),
                    "median_error": fit.median_error,
                    "runs": fit.runs,
                }
            )
        )
        return
    click.echo(f"fitted to {fit.runs} runs ({fit.groups} groups of passes): median error {fit.median_error:.1%}")
    for name, value in fit.factors.items():
        meaning = "of the disk's time is taken from the cores" if name == "io_cpu" else "of the probe's time"
        click.echo(f"  {name:9} {value:.3f} {meaning}")
    click.echo(f"  80 % of passes took {fit.spread[0]:.2f} to {fit.spread[1]:.2f} of their prediction")
