"""The `headrace` command: options, errors, exit codes. Nothing here imports torch before it must.

Exit codes: 0 done, 1 failed or "no", 2 usage, 130 Ctrl-C. A closed pipe ends quietly.
"""

import math
import os
import re
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from headrace._version import __version__
from headrace.cli import show, streams
from headrace.errors import HeadraceError, UsageError
from headrace.limits import explained
from headrace.sampling_params import FIELDS, MAX_TOP_LOGPROBS, SamplingField
from headrace.text import printable
from headrace.units import parse_bytes

F = TypeVar("F", bound=Callable[..., Any])


class Size(click.ParamType[int]):
    """An option's size, like 4GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse a size to bytes."""
        try:
            return parse_bytes(value)
        except UsageError as error:
            self.fail(f"{error}; {error.hint}", param, ctx)


class LogitBias(click.ParamType[tuple[int, float]]):
    """A token id and the bias of its logit, as llama.cpp writes them: 15043+1 or 15043-2.5."""

    name = "ID(+/-)BIAS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, float]:
        """Parse to (token id, bias)."""
        match = re.fullmatch(r"(\d{1,9})([+-]\d{1,9}(?:\.\d{1,9})?)", str(value), re.ASCII)
        if match is None:
            self.fail(f"{printable(str(value), keep='')!r} is no token id with a bias, such as 15043+1", param, ctx)
        return int(match[1]), float(match[2])


class FilePath(click.Path):
    """A path. Text that cannot be a path is a usage error."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Convert as click does; turn its exceptions into usage errors."""
        try:
            return super().convert(value, param, ctx)
        except (OSError, ValueError) as error:
            self.fail(
                f"{printable(value, keep='')!r} is no path: {getattr(error, 'strerror', None) or error}", param, ctx
            )


class Group(click.Group):
    """A command group that turns our errors into message, hint and exit code. (click itself suggests near commands.)"""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command, and exit with the error's own code."""
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its warnings recommend kernels for GPUs
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's threads would spin while ggml's work
        streams.prepare()
        try:
            try:
                result = super().main(*args, **kwargs)
            except SystemExit:
                streams.finish()
                raise
            streams.finish()
            return result
        except BrokenPipeError:
            streams.abandon()
            sys.exit(0)
        except (HeadraceError, OSError, MemoryError, RuntimeError) as error:
            if os.environ.get("HEADRACE_DEBUG"):
                raise
            problem = error if isinstance(error, HeadraceError) else explained(error)
            if problem is None:
                raise
            show.error(problem)
            streams.abandon()
            sys.exit(problem.exit_code)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command. Ctrl-C and a closed pipe get exit codes of their own, where click would exit with 1."""
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, click.Abort):  # the latter at a question
            show.say("\ninterrupted")
            sys.exit(show.INTERRUPTED)
        except BrokenPipeError:  # a closed stdout; text that stderr does not take is dropped
            streams.abandon()
            sys.exit(0)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "HEADRACE"})
@click.version_option(__version__, prog_name="headrace")
def main() -> None:
    """Run language models larger than your memory, at the speed of your disk."""


def shared(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


memory_option = click.option(
    "--memory", type=Size(), help="Ceiling for the whole process, like 4GiB. [default: what is free, less 10%]"
)
context_option = click.option("-c", "--ctx-size", type=click.IntRange(1), help="Tokens of prompt and answer together.")
draft_option = click.option(
    "--draft",
    default="auto",
    show_default=True,
    metavar="none|prompt|self|auto|FILE",
    help="Draft tokens that a pass then verifies: from the prompt, by a low-bit copy of the model, or by a smaller model.",
)
kv_option = click.option(
    "--kv-bits", type=click.Choice([8, 16]), default=16, show_default=True, help="Bits of each element of the KV cache."
)
deterministic_option = click.option(
    "--deterministic/--no-deterministic",
    default=True,
    show_default=True,
    help="Same prompt, seed and settings give the same answer, whatever ran before or beside it. Off: a conversation's next "
    "turn starts sooner, and its answer may differ where two tokens are almost equally likely.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="No plan, progress or stats on stderr.")


def _sampling_option(one: SamplingField) -> Callable[[F], F]:
    """The option of a sampling parameter. Without it, the model's own recommendation counts."""
    lowest = one.least if one.off is None else min(one.least, one.off)
    least, most = (None if math.isinf(limit) else limit for limit in (lowest, one.most))
    kind: click.ParamType[Any] = (
        click.FloatRange(least, most, min_open=not one.least_is_allowed)
        if one.kind is float
        else click.IntRange(None if least is None else int(least), None if most is None else int(most))
    )
    default = " [default: the model's]" if one.gguf_key else ""
    return click.option(*one.flags, one.name, type=kind, help=one.help + default)


sampling_options = shared(
    click.option("-n", "--max-tokens", type=click.IntRange(1), default=256, show_default=True, help="Limit of generated tokens."),
    *map(_sampling_option, FIELDS),
    click.option(
        "--logit-bias", type=LogitBias(), multiple=True, help="Added to the logit of a token, as 15043+1. May be repeated."
    ),
    click.option(
        "--logprobs",
        type=click.IntRange(0, MAX_TOP_LOGPROBS),
        help="With --json: log-probabilities of each token and of the N likeliest.",
    ),
    click.option("--stop", multiple=True, help="End the answer at this string. May be repeated."),
)  # fmt: skip


def find_model(function: F) -> F:
    """Replace a model's name by its path, on this disk or at the hub. A hub model is fetched if need be.

    A model that does not exist is refused before anything slow is imported.
    """

    @wraps(function)
    def found(model: str, **options: Any) -> Any:
        from headrace.cli.hub import path_of

        return function(model=path_of(model, quiet=bool(options.get("quiet"))), **options)

    return found  # type: ignore[return-value]


@main.command()
@click.argument("model")
@click.argument("prompt", required=False)
@click.option(
    "-f", "--file", "prompt_file", type=FilePath(path_type=Path), help="Read the prompt from a file, - is stdin."
)
@memory_option
@context_option
@kv_option
@draft_option
@deterministic_option
@sampling_options
@click.option("-s", "--system", help="A system message before the prompt.")
@click.option("--raw", is_flag=True, help="Complete the prompt as it is, without the chat template.")
@click.option(
    "--trace", type=FilePath(path_type=Path, dir_okay=False), help="Write a Chrome trace of every read and matmul."
)
@json_option
@quiet_option
@find_model
def run(model: str, **options: Any) -> None:
    """Generate text with MODEL: a .gguf file, a Hugging Face folder, or org/repo[:file] of the hub.

    Without a prompt on a terminal: chat.

    The text goes to stdout; the plan, progress and statistics go to stderr.
    """
    from headrace.cli.run import run_command

    sys.exit(run_command(model, **options))


@main.command()
@click.argument("model", required=False)
@memory_option
@context_option
@kv_option
@draft_option
@click.option(
    "--batch", type=click.IntRange(1), help="Prompts that are computed together. [default: 1; a search tries several]"
)
@click.option("--prompt-tokens", type=click.IntRange(1), help="Length of the prompt to plan for. [default: 512]")
@click.option(
    "--tokens", type=click.IntRange(1), default=512, show_default=True, help="Length of the answer to plan for."
)
@click.option(
    "--machine",
    metavar="PARTS|FILE",
    help='Another machine, like "2x rtx-4090 + 128GB + nvme-gen4 + 2 nodes", or a TOML file.',
)
@click.option("--params", type=float, help="Instead of a model: how many parameters a dense one has, like 175e9.")
@click.option("--bits", type=float, help="Bits per weight. [default: the file's, or the published ones]")
@click.option(
    "--require-tok-s",
    type=click.FloatRange(0, min_open=True),
    help="Find the cheapest configuration with this many tokens per second for each sequence.",
)
@click.option(
    "--budget-usd",
    type=click.FloatRange(0, min_open=True),
    help="Find the fastest configuration within this many dollars per hour.",
)
@click.option(
    "--usd-per-kwh",
    type=click.FloatRange(0),
    help="Price of electricity, where a machine is bought. [default: 0.15]",
)
@click.option(
    "--utilisation",
    type=click.FloatRange(0, 1, min_open=True),
    help="Share of the paid hours in which it computes. [default: 1.0]",
)
@click.option(
    "--html", type=FilePath(path_type=Path, dir_okay=False), help="Write a page with timeline, roofline and frontier."
)
@click.option(
    "--fit",
    "fit_runs",
    type=FilePath(path_type=Path, dir_okay=False),
    help="Learn from run records, and keep what was learnt in the profile.",
)
@json_option
def plan(model: str | None, **options: Any) -> None:
    """Say what running MODEL will cost, and what would make it faster. Reads headers only.

    MODEL is a file, a Hugging Face folder, org/repo[:file] of the hub (of which only headers are fetched), or a
    published model such as llama-3-70b (`headrace tables models` lists them). Without --machine, a model is planned for
    this machine, as `run` would run it.
    """
    from headrace.cli.plan import plan_or_forecast

    plan_or_forecast(model, **options)


@main.command()
@click.argument("number", required=False)
@click.option("--html", type=FilePath(path_type=Path, dir_okay=False), help="Write a page with all of them.")
@json_option
def claims(number: str | None, html: Path | None, as_json: bool) -> None:
    """Check statements on the size, speed and cost of language models: all, or the one with this NUMBER."""
    from headrace.cli.claims import claims_command

    claims_command(number, html, as_json)


@main.command()
@click.argument("kind", type=click.Choice(["models", "devices", "links", "prices"]))
@json_option
def tables(kind: str, as_json: bool) -> None:
    """List the tables of `plan --machine`: published models, devices, links and disks, prices. --json adds the sources."""
    from headrace.cli.forecast import tables_command

    tables_command(kind, as_json)


@main.command()
@click.argument("model")
@memory_option
@kv_option
@draft_option
@click.option("-n", "--max-tokens", type=click.IntRange(2), default=16, show_default=True, help="Tokens to generate.")
@click.option(
    "--html",
    type=FilePath(path_type=Path, dir_okay=False),
    help="Write a page with the measured timeline under the predicted one.",
)
@json_option
@find_model
def bench(model: str, **options: Any) -> None:
    """Run MODEL for a few tokens and compare it with the plan: seconds, bytes, and stalls of a pass."""
    from headrace.cli.bench import bench_command

    bench_command(model, **options)


@main.command()
@click.argument("source", metavar="IN.jsonl", type=FilePath(path_type=Path))
@click.argument("target", metavar="OUT.jsonl", type=FilePath(path_type=Path, dir_okay=False))
@click.option(
    "-m", "--model", required=True, help="A .gguf file, a Hugging Face folder, or org/repo[:file] of the hub."
)
@memory_option
@context_option
@kv_option
@deterministic_option
@draft_option
@click.option("--parallel", type=click.IntRange(1, 256), help="Requests at a time. [default: what the plan finds best]")
@click.option(
    "-n", "--max-tokens", type=click.IntRange(1), default=512, show_default=True, help="Where a request names none."
)
@quiet_option
@find_model
def batch(model: str, **options: Any) -> None:
    """Answer the requests of IN.jsonl, in the format of the OpenAI Batch API, into OUT.jsonl.

    All requests in flight share each pass over the weights. A run that was stopped or killed resumes.
    """
    from headrace.cli.batch import batch_command

    sys.exit(batch_command(model=model, **options))


@main.command()
@click.argument("target", required=False, type=FilePath(exists=True, path_type=Path))
@json_option
def probe(target: Path | None, as_json: bool) -> None:
    """Measure disk, kernels and interpreter of this machine, and keep the profile.

    TARGET is a model file, or a folder on the disk to measure (default: the current one).
    """
    from headrace.cli.plan import probe_command

    probe_command(target or Path.cwd(), as_json)


@main.command()
@click.argument("prompt", required=False)
@click.option("--memory", type=Size(), help="Ceiling. [default: one that holds about half of the weights]")
@json_option
def demo(prompt: str | None, memory: int | None, as_json: bool) -> None:
    """Run Gemma 3 270M, which comes as a Python package, with less memory for weights than its file has bytes."""
    from headrace.cli.demo import demo_command

    sys.exit(demo_command(prompt, memory, as_json))


@main.command()
@click.argument("model")
@json_option
def pull(model: str, as_json: bool) -> None:
    """Fetch MODEL from the Hugging Face hub into its cache, and print the path to open.

    MODEL is org/repo, org/repo:FILE or org/repo:QUANTISATION (like Q4_K_M), with @REVISION after repo if need be. Files
    fetched before, by this or another program, are not fetched again; a stopped download resumes.
    """
    from headrace.cli.hub import pull_command

    sys.exit(pull_command(model, as_json))


@main.command()
@click.argument("model")
@click.argument("target", metavar="OUT")
@click.option("--check", is_flag=True, help="Compare all bits with the original afterwards.")
@json_option
@quiet_option
@find_model
def pack(model: str, **options: Any) -> None:
    """Write OUT, a copy of the BF16 folder MODEL in three quarters of its bytes, from which the same bits are read.

    For disk-bound runs, which then read a quarter less. The original is not touched; the copy opens only once it is whole.
    """
    from headrace.cli.pack import pack_command

    pack_command(model, **options)


@main.command(name="list")
@json_option
def list_models(as_json: bool) -> None:
    """List the models in the hub's cache that can be opened: name, format, files, size, last used."""
    from headrace.cli.hub import list_command

    list_command(as_json)


@main.command(name="show")
@click.argument("model")
@json_option
def show_model(model: str, as_json: bool) -> None:
    """Describe MODEL: architecture, parameters, bits, layers, experts, context, files. Reads headers only.

    MODEL is a .gguf file, a folder with config.json, or org/repo of the hub, of which only the header is fetched.
    """
    from headrace.cli.hub import show_command

    show_command(model, as_json)


@main.command(name="rm")
@click.argument("model")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@json_option
def remove(model: str, yes: bool, as_json: bool) -> None:
    """Delete MODEL from the hub's cache: org/repo with all that is cached of it, or org/repo:FILE alone."""
    from headrace.cli.hub import remove_command

    remove_command(model, yes, as_json)
