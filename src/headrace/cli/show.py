"""Output on a terminal: notes, errors, a line of progress that overwrites itself, statistics."""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from headrace.cli.streams import writes_utf8
from headrace.errors import HeadraceError
from headrace.text import printable
from headrace.units import gib, gigabytes, rate, seconds

if TYPE_CHECKING:
    from headrace.completion import Completion
    from headrace.engine.request import Progress

INTERRUPTED = 130  # exit code after Ctrl-C


def say(text: str = "") -> None:
    """Print a line to stderr. Where it cannot be written, it is dropped."""
    with suppress(OSError, ValueError):
        click.echo(printable(text), err=True)


def note(text: str) -> None:
    """Print a line to stderr that begins with our name."""
    say(f"headrace: {text}")


def error(problem: HeadraceError) -> None:
    """Print an error and its hint."""
    say(f"Error: {problem}")
    if problem.hint:
        say(f"\nhint: {problem.hint}")


def json_line(value: object) -> None:
    """Print an object to stdout as JSON, in characters that stdout can encode."""
    click.echo(json.dumps(value, ensure_ascii=not writes_utf8(), allow_nan=False))


def console() -> Console:
    """A console for tables on stdout: as wide as the terminal, or at least 120 columns where there is none."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=max(120, int(os.environ.get("COLUMNS") or 0)))


def check_writable(path: Path) -> None:
    """Raise `HeadraceError` where a file cannot be written, before the work that takes long."""
    folder = path.parent
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise HeadraceError(f"cannot write {path}", hint="give a path in a folder that can be written to")


class ProgressLine:
    """One line on stderr that is rewritten during a prefill. Silent where stderr is not a terminal."""

    def __init__(self, quiet: bool = False):
        dumb = os.environ.get("TERM") == "dumb" or bool(os.environ.get("HEADRACE_NO_PROGRESS"))
        self._shown = not quiet and not dumb and sys.stderr.isatty()
        self._width = 0
        self._last = 0.0

    def update(self, progress: "Progress") -> None:
        """Show the progress of the prefill: pass, step, read rate, time left."""
        now = time.monotonic()
        if not self._shown or now - self._last < 0.1:
            return
        self._last = now
        done = (progress.pass_number - 1) * progress.steps + progress.done
        total = progress.passes * progress.steps
        left = progress.seconds / done * (total - done)
        text = (
            f"prefill {done / total:4.0%}  pass {progress.pass_number}/{progress.passes}"
            f"  step {progress.done}/{progress.steps}"
            f"  {gigabytes(progress.read_bytes / max(progress.seconds, 1e-9))}/s  {seconds(left)} left"
        )
        self._write(text)

    def part(self, what: str, start: float) -> Callable[[int, int], None]:
        """A callback (bytes done, bytes in all) that shows a job's progress since `start` by `time.monotonic`."""

        def show(done: int, total: int) -> None:
            now = time.monotonic()
            if not self._shown or now - self._last < 0.1 or not done:
                return
            self._last = now
            left = (now - start) / done * (total - done)
            self._write(f"{what} {done / total:4.0%}  {seconds(left)} left")

        return show

    def clear(self) -> None:
        """Clear the line."""
        if self._width:
            self._write("")
            with suppress(OSError, ValueError):
                sys.stderr.write("\r")
                sys.stderr.flush()
            self._width = 0

    def _write(self, text: str) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.write("\r" + text.ljust(self._width))
            sys.stderr.flush()
        self._width = max(self._width, len(text))


def reasoning(text: str) -> None:
    """Print reasoning dim and to stderr: it is not part of the answer."""
    with suppress(OSError, ValueError):
        click.echo(click.style(text, dim=True), nl=False, err=True)


def stats(completion: "Completion") -> str:
    """Format one line of statistics: predicted beside measured."""
    t, plan = completion.timings, completion.plan
    parts = [f"{completion.completion_tokens} tokens"]
    if t["ttft_s"] is not None:
        parts.append(f"ttft {seconds(t['ttft_s'])} (plan {seconds(plan.ttft_s.expected)})")
    if t["decode_tok_per_s"]:
        spent = 1 / t["decode_tok_per_s"]
        expected = plan.decode_s_per_token.expected
        parts.append(
            f"{seconds(spent)} per token (plan {seconds(expected)}, {expected / spent - 1:+.0%}) = {rate(1 / spent)}"
        )
    parts.append(f"read {gigabytes(t['read_bytes'] or 0)}, {gigabytes(t['read_bytes_per_pass'] or 0)} per pass")
    speculation = completion.speculation
    if speculation["drafted"]:
        parts.append(
            f"{t['tokens_per_pass'] or 0:.1f} tokens per pass (plan {plan.decode_prediction.tokens_per_pass:.1f}),"
            f" {speculation['accepted']} of {speculation['drafted']} draft tokens accepted"
        )
    if speculation["passes_bound_by"]:
        bound = ", ".join(f"{kind} {count}" for kind, count in sorted(speculation["passes_bound_by"].items()))
        parts.append(f"passes bound by {bound}")
    busy = (t["stall_s"] or 0) + (t["compute_s"] or 0)
    parts.append(f"waited for disk {(t['stall_s'] or 0) / busy:.0%}" if busy else "no pass")
    if completion.kv_cache_type in ("BF16", "Q8 with scales in F32"):
        parts.append(f"KV cache in {completion.kv_cache_type} (keys or values overflowed the usual type)")
    parts.append(f"peak {gib(completion.memory['peak_bytes'])} of {gib(completion.memory['budget_bytes'])}")
    return f"[{' | '.join(parts)}]"
