"""`headrace pack`: a BF16 folder in three quarters of its bytes."""

import json
import time
from dataclasses import asdict

import click

from headrace.checkpoint.packing import compare, pack_folder
from headrace.cli import show
from headrace.units import gigabytes, seconds


def pack_command(model: str, target: str, check: bool, as_json: bool, quiet: bool) -> None:
    """Write the copy, compare it if asked, and print its size."""
    start = time.monotonic()
    line = show.ProgressLine(quiet)
    packed = pack_folder(model, target, line.part("packing", start))
    if check:
        compare(model, target, line.part("checking", time.monotonic()))
    line.clear()
    share = packed.packed_bytes / packed.original_bytes
    if as_json:
        facts = {"share": share, "checked": check, "seconds": time.monotonic() - start}
        click.echo(json.dumps(asdict(packed) | facts, allow_nan=False))
        return
    click.echo(packed.path)
    if not quiet:
        same = ", every bit compared" if check else ""
        show.note(
            f"{gigabytes(packed.original_bytes)} became {gigabytes(packed.packed_bytes)} ({share:.1%}),"
            f" {packed.packed_tensors} of {packed.tensors} tensors packed{same}, {seconds(time.monotonic() - start)}"
        )
