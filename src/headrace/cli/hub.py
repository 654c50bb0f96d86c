"""`headrace pull`, `list`, `show` and `rm`: models of the Hugging Face hub, and the facts of a model."""

import json
import os
import sys
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from headrace.checkpoint import Checkpoint, open_checkpoint
from headrace.checkpoint.source import LocalSource, OpenSource
from headrace.cli import show
from headrace.errors import CheckpointError, HeadraceError, UsageError
from headrace.hub import (
    CachedModel,
    Reference,
    cached_models,
    local_path,
    parse_reference,
    pull,
    remote_sources,
    removal,
)
from headrace.paths import exists
from headrace.plan.shape import stored_share
from headrace.text import printable
from headrace.units import gigabytes


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model's location: its path, the function that opens it, its files, and the license if it is known."""

    path: str
    open_source: OpenSource
    files: tuple[tuple[str, int], ...]
    license: str | None
    remote: bool


def path_of(model: str, *, quiet: bool = False) -> str:
    """The path of a model to run: on this disk, in the hub's cache, or fetched now.

    Raises:
        HeadraceError: there is no such model.
    """
    if exists(model):
        return model
    reference = parse_reference(model)
    if reference is None:
        raise HeadraceError(
            f"there is no file {model}",
            hint="give the path of a .gguf file or a Hugging Face folder, or org/repo of the hub; `headrace demo` brings a model",
        )
    _disable_bars_if_unwanted(quiet)
    return local_path(reference) or pull(reference, say=(lambda _: None) if quiet else show.note)


def open_anywhere(model: str) -> Checkpoint:
    """Open a model's headers: on this disk, in the hub's cache, or at the hub. Only headers are fetched."""
    found = _find(model)
    return open_checkpoint(found.path, found.open_source)


def pull_command(model: str, as_json: bool) -> int:
    """Fetch a model and print its path to stdout. Returns the exit code."""
    reference = reference_of(model)
    _disable_bars_if_unwanted(quiet=False)
    try:
        path = pull(reference, say=show.note)
    except KeyboardInterrupt:
        show.note("stopped; the same command goes on where it was")
        return show.INTERRUPTED
    click.echo(json.dumps({"model": str(reference), "path": path}) if as_json else path)
    return 0


def _disable_bars_if_unwanted(quiet: bool) -> None:
    """Disable the progress bars of huggingface_hub where none are wanted."""
    if quiet or os.environ.get("HEADRACE_NO_PROGRESS") or os.environ.get("TERM") == "dumb":
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()


def reference_of(model: str) -> Reference:
    """Parse an argument as a reference to the hub.

    Raises:
        UsageError: it is a path on this disk, or not the name of a repository.
    """
    reference = parse_reference(model)
    if reference is None or exists(model):
        what = "is on this disk" if exists(model) else "is not the name of a model at the hub"
        raise UsageError(f"`{model}` {what}", hint="write org/repo, org/repo:file or org/repo:Q4_K_M")
    return reference


def list_command(as_json: bool) -> None:
    """List the models in the cache: a table on a terminal, tab-separated lines elsewhere."""
    models = cached_models()
    if as_json:
        click.echo(json.dumps({"models": [asdict(model) for model in models]}, allow_nan=False))
    elif sys.stdout.isatty():
        _print_table(models)
    else:
        for row in (("name", "format", "files", "bytes", "last_used"), *map(_row, models)):
            click.echo("\t".join(row))


def _row(model: CachedModel) -> tuple[str, ...]:
    return printable(model.name, keep=""), model.format, str(model.files), str(model.nbytes), _day(model)


def _day(model: CachedModel) -> str:
    return datetime.fromtimestamp(model.last_used_s).isoformat(sep=" ", timespec="minutes")


def _print_table(models: list[CachedModel]) -> None:
    if not models:
        show.note("no models yet; `headrace pull org/repo` brings one")
        return
    table = Table("name", "format", box=None, pad_edge=False, header_style="bold")
    table.add_column("files", justify="right")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("last used", no_wrap=True)
    for model in models:
        name = Text(printable(model.name, keep=""), overflow="fold")
        table.add_row(name, model.format, str(model.files), gigabytes(model.nbytes), _day(model))
    show.console().print(table)


def remove_command(model: str, yes: bool, as_json: bool) -> None:
    """Delete a model from the hub's cache, after asking.

    Raises:
        UsageError: nobody can be asked.
    """
    planned = removal(reference_of(model))
    show.note(f"removing {planned.what} from the cache frees {gigabytes(planned.nbytes)}")
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("nothing was removed: there is nobody to ask", hint=f"headrace rm {model} --yes")
        click.confirm("remove it?", abort=True, err=True)
    planned.execute()
    if as_json:
        click.echo(json.dumps({"removed": planned.what, "freed_bytes": planned.nbytes}))


def show_command(model: str, as_json: bool) -> None:
    """Print the facts of a model, from headers alone."""
    found = _find(model)
    facts = _facts(found)
    if as_json:
        click.echo(json.dumps({"model": model, **facts}, allow_nan=False))
        return
    for name, value in _lines(model, facts):
        click.echo(f"{name:12} {printable(value, keep='')}")


def _find(model: str) -> Opened:
    """Find a model on the disk, else in the cache, else at the hub."""
    if exists(model):
        return _local(model)
    reference = parse_reference(model)
    if reference is None:
        raise HeadraceError(f"there is no file {model}", hint="give the path of a .gguf file, or org/repo of the hub")
    path = local_path(reference)
    if path is not None:
        return _local(path)
    remote = remote_sources(reference)
    return Opened(
        path=remote.path,
        open_source=remote.open_source,
        files=tuple((file.name, file.size) for file in remote.selection.files),
        license=remote.listing.license,
        remote=True,
    )


def _local(path: str) -> Opened:
    if Path(path).is_dir():
        try:
            files = sorted(file for file in Path(path).iterdir() if file.is_file())
        except OSError as error:
            raise CheckpointError(
                f"cannot read the folder {path}: {error.strerror}", hint="check its permissions"
            ) from error
    else:
        files = [Path(part) for part in open_checkpoint(path).paths]
    sizes = tuple((file.name, file.stat().st_size) for file in files)
    return Opened(path=path, open_source=LocalSource, files=sizes, license=None, remote=False)


def _facts(found: Opened) -> dict[str, Any]:
    """Facts that `--json` shows. Unknown is null."""
    facts = _header_facts(open_checkpoint(found.path, found.open_source), found)
    files = [{"name": name, "bytes": size} for name, size in found.files]
    return {
        **facts,
        "remote": found.remote,
        "path": found.path,
        "files": files,
        "bytes": sum(s for _, s in found.files),
    }


def _header_facts(checkpoint: Checkpoint, found: Opened) -> dict[str, Any]:
    parameters = sum(tensor.rows * tensor.columns for tensor in checkpoint.tensors.values())
    share = stored_share(checkpoint, [(tensor, tensor.nbytes) for tensor in checkpoint.tensors.values()])
    license_name = checkpoint.get("general.license")
    return {
        "format": "gguf" if checkpoint.config is None else "safetensors",
        "name": checkpoint.name,
        "architecture": checkpoint.architecture,
        "parameters": parameters,
        "bits_per_weight": round(8 * checkpoint.nbytes * share / parameters, 3) if parameters else None,
        "layers": checkpoint.get("block_count"),
        "experts": checkpoint.get("expert_count") or None,
        "experts_used": checkpoint.get("expert_used_count"),
        "context_tokens": checkpoint.get("context_length"),
        "license": license_name or found.license,
    }


def _lines(model: str, facts: dict[str, Any]) -> list[tuple[str, str]]:
    parameters, experts = facts["parameters"], facts["experts"]
    used = f", {facts['experts_used']} for a token" if facts["experts_used"] else ""
    shown = [
        ("model", f"{model} ({'at the hub' if facts['remote'] else facts['path']})"),
        ("name", facts["name"]),
        ("architecture", facts["architecture"]),
        ("parameters", f"{parameters / 1e9:.3g} billion" if parameters else None),
        ("bits", f"{facts['bits_per_weight']:.2f} per weight" if facts["bits_per_weight"] else None),
        ("layers", facts["layers"]),
        ("experts", f"{experts}{used}" if experts else None),
        ("context", f"{facts['context_tokens']} tokens" if facts["context_tokens"] else None),
        ("license", facts["license"]),
        ("size", f"{gigabytes(facts['bytes'])} in {len(facts['files'])} file{'s' if len(facts['files']) > 1 else ''}"),
        *(("", f"{gigabytes(file['bytes']):>10}  {file['name']}") for file in facts["files"]),
    ]
    return [(name, str(value)) for name, value in shown if value is not None]
