"""Selects the files of a repository that form a model. Names and sizes in, files out: no request, no read.

Repositories are untrusted: a split or a set of shards with a missing part is an error here, before the first byte is
fetched. Pickled weights (*.bin, *.pt) are never chosen.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from headrace.errors import CheckpointError, UnsupportedError, UsageError
from headrace.units import gigabytes

DEFAULT_QUANTISATION = "Q4_K_M"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"

_BESIDE_WEIGHTS = frozenset((
    CONFIG, "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json", INDEX,
))  # fmt: skip
_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf|\.safetensors)", re.IGNORECASE)
_NO_MODEL = re.compile(r"(?:^|.*[-_./])(?:mmproj|imatrix)(?:[-_.].*)?", re.IGNORECASE)
MAX_SHOWN = 40


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file of a repository."""

    name: str
    size: int


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Needed files, the one to open (the folder if None), and the reason for the choice."""

    format: Literal["gguf", "safetensors"]
    files: tuple[RemoteFile, ...]
    opened: str | None
    reason: str

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def files_needed(files: Sequence[RemoteFile], wanted: str | None) -> Selection:
    """Choose the files to fetch. `wanted` is a GGUF file or a quantisation such as `Q4_K_M`.

    Raises:
        UsageError: `wanted` matches no model, or several match.
        CheckpointError: the repository lacks a part of the chosen model.
        UnsupportedError: neither GGUF nor safetensors weights.
    """
    if wanted is None:
        folder = _safetensors(files)
        if folder is not None:
            return folder
    chosen, reason = choose_gguf(files, wanted)
    _check_parts(chosen)
    return Selection(format="gguf", files=chosen, opened=chosen[0].name, reason=reason)


def choose_gguf(files: Sequence[RemoteFile], wanted: str | None) -> tuple[tuple[RemoteFile, ...], str]:
    """The listed parts of one GGUF model, complete or not, and the reason for the choice. Errors as `files_needed`."""
    models = gguf_models(files)
    if not models:
        raise _no_weights(files, wanted)
    name, reason = _choose(models, wanted)
    return models[name], reason


def gguf_models(files: Sequence[RemoteFile]) -> dict[str, tuple[RemoteFile, ...]]:
    """GGUF models by name, each with all its parts. Projectors (mmproj) and importance matrices are left out."""
    models: dict[str, list[RemoteFile]] = {}
    for file in sorted(files, key=lambda file: file.name):
        if file.name.lower().endswith(".gguf") and not _NO_MODEL.fullmatch(file.name[: -len(".gguf")]):
            models.setdefault(_whole_name(file.name), []).append(file)
    return {name: tuple(parts) for name, parts in models.items()}


def _whole_name(name: str) -> str:
    part = _PART.fullmatch(name)
    return f"{part['stem']}{part['suffix']}" if part else name


def _choose(models: dict[str, tuple[RemoteFile, ...]], wanted: str | None) -> tuple[str, str]:
    if wanted is not None:
        found = _called(models, wanted)
        if len(found) == 1:
            return found[0], f"asked for as `{wanted}`"
        what = f"{len(found)} GGUF models are" if found else "no GGUF model is"
        raise UsageError(f"{what} called `{wanted}` there", hint=_choices(models, found or list(models)))
    if len(models) == 1:
        return next(iter(models)), "the only GGUF model there"
    found = _called(models, DEFAULT_QUANTISATION)
    if len(found) == 1:
        return found[0], f"{DEFAULT_QUANTISATION} of {len(models)} GGUF models"
    raise UsageError(
        f"there are {len(models)} GGUF models to choose from", hint=_choices(models, found or list(models))
    )


def _called(models: dict[str, tuple[RemoteFile, ...]], wanted: str) -> list[str]:
    """Models with that name, else with that file name in any folder, else with that quantisation."""
    whole = _whole_name(wanted).lower()
    exact = [name for name in models if name.lower() in (whole, f"{whole}.gguf")]
    same_file = [name for name in models if name.lower().rsplit("/", 1)[-1] in (whole, f"{whole}.gguf")]
    # `Q4_K` is not `Q4_K_M`, and `Q4_XS` is not `IQ4_XS`.
    label = re.compile(rf"(?<![A-Za-z0-9]){re.escape(wanted)}(?![A-Za-z0-9_])", re.IGNORECASE)
    return exact or same_file or [name for name in models if label.search(name[: -len(".gguf")])]


def _choices(models: dict[str, tuple[RemoteFile, ...]], names: list[str]) -> list[str]:
    sized = sorted((sum(file.size for file in models[name]), name) for name in names)
    lines = [f"  :{name}  {gigabytes(size)}" for size, name in sized[:MAX_SHOWN]]
    more = [f"  and {len(sized) - MAX_SHOWN} more"] if len(sized) > MAX_SHOWN else []
    return ["add one of these, or its quantisation, to the name", *lines, *more]


def _check_parts(files: Sequence[RemoteFile]) -> None:
    parts = [match for file in files if (match := _PART.fullmatch(file.name))]
    numbers = {int(part["number"]) for part in parts}
    counts = {int(part["count"]) for part in parts}
    if parts and (len(counts) != 1 or len(parts) != len(files) or numbers != set(range(1, max(counts) + 1))):
        raise CheckpointError(
            f"{len(numbers)} of {max(counts)} parts of {_whole_name(files[0].name)} are there",
            hint="the repository is incomplete; choose another file or another repository",
        )


def _safetensors(files: Sequence[RemoteFile]) -> Selection | None:
    """The model in the repository's top folder. Subfolders (original/, fp32/) hold other copies of it."""
    here = sorted((file for file in files if "/" not in file.name), key=lambda file: file.name)
    shards = _shards(here)
    if not shards or all(file.name != CONFIG for file in here):
        return None
    _check_parts(shards)
    beside = [file for file in here if file.name in _BESIDE_WEIGHTS or file.name.endswith(".tiktoken")]
    reason = f"{len(shards)} safetensors file{'s' if len(shards) > 1 else ''} with {CONFIG}"
    return Selection(format="safetensors", files=(*beside, *shards), opened=None, reason=reason)


def _shards(here: Sequence[RemoteFile]) -> list[RemoteFile]:
    weights = [file for file in here if file.name.endswith(".safetensors")]
    numbered = [file for file in weights if re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", file.name)]
    if numbered and any(file.name == INDEX for file in here):
        return numbered
    single = [file for file in weights if file.name == "model.safetensors"]
    return single or numbered or [file for file in weights if not file.name.startswith(("consolidated", "adapter"))]


def _no_weights(files: Sequence[RemoteFile], wanted: str | None) -> UnsupportedError:
    if wanted is not None and _safetensors(files) is not None:
        return UnsupportedError(
            f"`{wanted}` names one file, but the repository holds a safetensors model, all files of which are needed",
            hint="leave out what follows the colon",
        )
    kinds = sorted({file.name.rsplit(".", 1)[-1] for file in files if "." in file.name.rsplit("/", 1)[-1]})
    found = ", ".join(f"*.{kind}" for kind in kinds[:MAX_SHOWN]) or "nothing"
    return UnsupportedError(
        f"the repository holds no GGUF file, and no safetensors weights beside a {CONFIG}; there is {found}",
        hint="look for the same model with GGUF or safetensors in its name, or convert it",
    )
