"""Hugging Face model folders: headers of the safetensors files, index and configuration.

Layout of a file (the format's specification): eight bytes of length, JSON of that length, data. The JSON has a type, a
shape and a span for each tensor; the spans must cover the data without gap or overlap. The `safetensors` package maps the
file and imports a framework to return more than names. This reader parses only the JSON and returns offsets for streaming.
Files are untrusted: lengths are checked against the size of the file, and file names must not leave the folder. Nothing is
unpickled, and no data is read.
"""

import json
import os
import re
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from math import prod
from operator import attrgetter
from reprlib import repr as brief
from typing import Any

from headrace.bounded import json_of
from headrace.checkpoint.foreign import SIGNATURE_BYTES, check_names, foreign_name, identify_format
from headrace.checkpoint.header import Header
from headrace.checkpoint.source import LocalSource, OpenSource, Source
from headrace.checkpoint.tensor import Tensor, block_of
from headrace.errors import CheckpointError, UnsupportedError, did_you_mean

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_CONFIG_BYTES = 32 << 20
MAX_NAME_LENGTH = 1 << 10
MAX_DIMENSIONS = 64
MAX_ELEMENTS = (1 << 63) - 1
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

# Dtypes of whole bytes. Each name is stored once, so that a tensor keeps no copy.
_DTYPES = {
    name: (name, block_of(name)[1])
    for name in (
        "BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F16", "BF16", "F32", "F64", "C64",
        "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ",
    )
}  # fmt: skip
_INTEGERS = frozenset({int})  # not bool
_SUB_BYTE = frozenset({"F4", "F6_E2M3", "F6_E3M2"})
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors", re.DOTALL)
_AGAIN = "the file is truncated or damaged; download or copy it again"


@dataclass(frozen=True, kw_only=True)
class Folder:
    """Contents of a Hugging Face folder, from headers alone."""

    path: str
    paths: tuple[str, ...]  # weight files that hold tensors, sorted
    tensors: dict[str, Tensor]  # stored tensors by name
    config: dict[str, Any]  # config.json
    generation: dict[str, Any]  # generation_config.json, empty if absent


@dataclass(frozen=True, kw_only=True)
class _Place:
    """A local folder, or its counterpart at another source."""

    path: str
    names: frozenset[str] | None  # files in it; None where the source cannot list them
    open_source: OpenSource

    def join(self, name: str) -> str:
        return os.path.join(self.path, name)

    def read(self, name: str, limit: int) -> bytes | None:
        """The content of a small file; None if it is absent."""
        if self.names is not None and name not in self.names:
            return None
        try:
            source = self.open_source(self.join(name))
        except CheckpointError:
            if self.names is not None:
                raise
            return None
        with closing(source):
            return _content(source, limit)


def read_folder(path: str, open_source: OpenSource = LocalSource) -> Folder:
    """Read the headers and the configuration of a folder, or of the folder around one .safetensors file or set.

    The weights are the files in `model.safetensors.index.json`, else `model.safetensors`. Else a local folder must hold one
    .safetensors file or one complete set NAME-00001-of-0000N.safetensors. Other sources cannot list files: the names above
    are requested below `path`, see `Source`.

    Raises:
        CheckpointError: a file is missing, damaged, or inconsistent.
        UnsupportedError: weights in another format, an adapter, or types of less than a byte.
    """
    local = open_source is LocalSource
    if path.endswith(".safetensors") and not (local and os.path.isdir(path)):
        folder, name = os.path.split(path)
        place = _place(folder or ".", open_source)
        names, weight_map = _named(place, name), dict[str, str]()
    else:
        place = _place(path, open_source)
        if place.names is not None and "adapter_config.json" in place.names:
            check_names(place.path, {"adapter_config.json"})
        weight_map = _read_index(place)
        names = tuple(dict.fromkeys(weight_map.values())) or _without_index(place)
    config = _read_config(place, "config.json")
    if config is None:
        raise CheckpointError(f"{place.path} has no config.json", hint="get it from where the weights are from")
    tensors = _read_shards(place, names)
    _check_index(place, weight_map, tensors)
    return Folder(
        path=place.path,
        paths=tuple(sorted({tensor.path for tensor in tensors.values()})),
        tensors=tensors,
        config=config,
        generation=_read_config(place, "generation_config.json") or {},
    )


def read_safetensors(path: str, open_source: OpenSource = LocalSource) -> dict[str, Tensor]:
    """Tensors of one .safetensors file by name, in the order of its header.

    Raises:
        CheckpointError: not a safetensors file, truncated, or inconsistent.
        UnsupportedError: a type of less than a byte, or an unknown one.
    """
    with closing(open_source(path)) as source:
        header = Header(source)
        entries = _parsed(header.path, _header_json(header), "the header", strict=True)
        _check_metadata(header.path, entries.pop("__metadata__", {}))
        start = header.position
        tensors = {name: _tensor(header, start, name, entry) for name, entry in entries.items()}
    _check_coverage(header, start, tensors)
    return tensors


# One file


def _header_json(header: Header) -> bytes:
    look = header.start(SIGNATURE_BYTES)
    known = identify_format(look, header.size)
    if known is not None and known[0] != "a safetensors file":
        raise CheckpointError(f"{header.path} is not a safetensors file: it is {known[0]}", hint=known[1])
    header.position = 0
    length = header.integer("Q", "the length of the header")
    available = header.size - header.position
    if length > available or not 2 <= length <= MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{header.path}: its header would have {length} bytes; 2 to {min(available, MAX_HEADER_BYTES)} are possible",
            hint=_AGAIN,
        )
    data = header.raw(length, "the header")
    if not data.startswith(b"{"):
        raise CheckpointError(f"{header.path} is not a safetensors file: its header is no JSON object", hint=_AGAIN)
    return data


def _check_metadata(path: str, metadata: Any) -> None:
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        raise CheckpointError(f"{path}: `__metadata__` is not an object of texts", hint=_AGAIN)


def _tensor(header: Header, start: int, name: str, entry: Any) -> Tensor:
    """The checked tensor of one header entry."""
    if len(name) > MAX_NAME_LENGTH:
        raise CheckpointError(
            f"{header.path}: a tensor's name has {len(name)} characters, the limit is {MAX_NAME_LENGTH}", hint=_AGAIN
        )
    if type(entry) is not dict or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{header.path}: tensor `{name}` is {brief(entry)}, not an object with dtype, shape and data_offsets",
            hint=_AGAIN,
        )
    dtype, width = _dtype(header.path, name, entry["dtype"])
    shape = _shape(header.path, name, entry["shape"])
    begin, end = _span(header, start, name, entry["data_offsets"])
    if prod(shape) * width != end - begin:
        raise CheckpointError(
            f"{header.path}: tensor `{name}` of shape {shape} needs {prod(shape) * width} bytes as {dtype}, it has"
            f" {end - begin}",
            hint=_AGAIN,
        )
    return Tensor(name=name, shape=shape, type=dtype, path=header.path, offset=start + begin, nbytes=end - begin)


def _dtype(path: str, name: str, dtype: Any) -> tuple[str, int]:
    """Checked dtype: its name and its bytes per element."""
    if type(dtype) is not str:
        raise CheckpointError(f"{path}: tensor `{name}` has the type {brief(dtype)}, not a word", hint=_AGAIN)
    if dtype in _SUB_BYTE:
        raise UnsupportedError(
            f"{path}: tensor `{name}` is stored as {dtype}, less than a byte a value, which is not supported",
            hint="use a version of the model in BF16, or quantised as GGUF",
        )
    if dtype not in _DTYPES:
        raise UnsupportedError(
            f"{path}: tensor `{name}` has the unknown type {brief(dtype)}", hint=did_you_mean(dtype[:16], _DTYPES)
        )
    return _DTYPES[dtype]


def _shape(path: str, name: str, shape: Any) -> tuple[int, ...]:
    if (
        type(shape) is not list
        or len(shape) > MAX_DIMENSIONS
        or not _INTEGERS.issuperset(map(type, shape))
        or min(shape, default=0) < 0
        or prod(filter(None, shape)) > MAX_ELEMENTS  # zeros left out: they would hide the other factors
    ):
        raise CheckpointError(
            f"{path}: tensor `{name}` has the shape {brief(shape)}, not up to {MAX_DIMENSIONS} whole numbers with a"
            " product below 2^63",
            hint=_AGAIN,
        )
    return tuple(shape)


def _span(header: Header, start: int, name: str, span: Any) -> tuple[int, int]:
    """Checked (begin, end) of a tensor's bytes, from the start of the data."""
    if type(span) is not list or len(span) != 2 or type(span[0]) is not int or type(span[1]) is not int:
        raise CheckpointError(
            f"{header.path}: tensor `{name}` has the data_offsets {brief(span)}, not two whole numbers", hint=_AGAIN
        )
    begin, end = span
    if not 0 <= begin <= end <= header.size - start:
        raise CheckpointError(
            f"{header.path}: tensor `{name}` lies from {brief(begin)} to {brief(end)} of {header.size - start} bytes"
            " of data",
            hint=_AGAIN,
        )
    return begin, end


def _check_coverage(header: Header, start: int, tensors: dict[str, Tensor]) -> None:
    """Raise `CheckpointError` unless each byte of data belongs to exactly one tensor."""
    position, before = start, "the header"
    for tensor in sorted(tensors.values(), key=attrgetter("offset", "nbytes")):
        if tensor.offset != position:
            fault = "overlap" if tensor.offset < position else f"leave {tensor.offset - position} bytes between them"
            raise CheckpointError(
                f"{header.path}: {before} and tensor `{tensor.name}` {fault} at {min(position, tensor.offset)}",
                hint=_AGAIN,
            )
        position, before = position + tensor.nbytes, f"tensor `{tensor.name}`"
    if position != header.size:
        raise CheckpointError(
            f"{header.path}: the last {header.size - position} of {header.size} bytes belong to no tensor", hint=_AGAIN
        )


# JSON


def _parsed(path: str, data: bytes, what: str, *, strict: bool) -> dict[str, Any]:
    """A JSON object. `strict` refuses duplicate keys and infinities, which occur in configurations."""
    options: dict[str, Any] = {"object_pairs_hook": _unique, "parse_constant": _refuse} if strict else {}
    try:
        text = data.decode()
        value = json_of(text, **options)
        if "\\ud" in text or "\\uD" in text:  # maybe a lone surrogate, which cannot be printed
            json.dumps(value, ensure_ascii=False).encode()
    except ValueError as error:
        known = identify_format(data[:SIGNATURE_BYTES], len(data))
        if known is not None and not data.lstrip().startswith((b"{", b"[")):
            raise CheckpointError(f"{path} is not JSON: it is {known[0]}", hint=known[1]) from error
        raise CheckpointError(f"{path}: {what} is not sound JSON: {error}", hint=_AGAIN) from error
    except RecursionError:
        raise CheckpointError(f"{path}: {what} is JSON that is nested too deep", hint=_AGAIN) from None
    if type(value) is not dict:
        raise CheckpointError(f"{path}: {what} is {brief(value)}, not a JSON object", hint=_AGAIN)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        key, count = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"{brief(key)} is given {count} times")
    return unique


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def _content(source: Source, limit: int) -> bytes:
    if source.size > limit:
        raise CheckpointError(
            f"{source.path} has {source.size} bytes, the limit is {limit}", hint="is this the file its name says?"
        )
    return Header(source).raw(source.size, "the content")


def _read_config(place: _Place, name: str) -> dict[str, Any] | None:
    data = place.read(name, MAX_CONFIG_BYTES)
    return None if data is None else _parsed(place.join(name), data, "the file", strict=False)


# File selection


def _place(path: str, open_source: OpenSource) -> _Place:
    if open_source is not LocalSource:
        return _Place(path=path, names=None, open_source=open_source)
    try:
        names = frozenset(os.listdir(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot open {path}: {getattr(error, 'strerror', error)}", hint="name a folder or a .safetensors file"
        ) from error
    return _Place(path=path, names=names, open_source=open_source)


def _read_index(place: _Place) -> dict[str, str]:
    """File of each tensor; empty without an index."""
    data = place.read(INDEX, MAX_HEADER_BYTES)
    if data is None:
        return {}
    path = place.join(INDEX)
    weight_map = _parsed(path, data, "the index", strict=True).get("weight_map")
    if type(weight_map) is not dict or not weight_map:
        raise CheckpointError(f"{path}: `weight_map` is {brief(weight_map)}, not an object of file names", hint=_AGAIN)
    if not all(type(name) is str for name in weight_map.values()):
        raise CheckpointError(f"{path}: `weight_map` holds something that is not a file name", hint=_AGAIN)
    for name in set(weight_map.values()):
        _check_file_name(path, name)
    _check_present(place, tuple(set(weight_map.values())))
    return weight_map


def _check_file_name(path: str, name: str) -> None:
    """Raise `CheckpointError` for a file name of the index that leaves its folder."""
    if not name.endswith(".safetensors") or re.search(r"[/\\\0]", name):
        raise CheckpointError(
            f"{path}: {brief(name)} is not the name of a .safetensors file in the same folder",
            hint="do not trust this model; get it from another source",
        )


def _check_present(place: _Place, names: tuple[str, ...]) -> None:
    missing = sorted(set(names) - place.names) if place.names is not None else []
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(names)} weight files are missing, the first is {place.join(missing[0])}",
            hint="put all of them into one folder",
        )


def _named(place: _Place, name: str) -> tuple[str, ...]:
    """The file, or all shards of its set."""
    check_names(place.path, {name})
    match = _PART.fullmatch(name)
    if match is None or not 1 <= int(match[2]) <= int(match[3]):
        return (name,)
    parts = tuple(f"{match[1]}-{i:05d}-of-{match[3]}.safetensors" for i in range(1, int(match[3]) + 1))
    _check_present(place, parts)
    return parts


def _without_index(place: _Place) -> tuple[str, ...]:
    """Weight files of a folder without an index."""
    if place.names is None or SINGLE in place.names:
        return (SINGLE,)
    found = sorted(name for name in place.names if name.endswith(".safetensors") and foreign_name(name) is None)
    if not found:
        check_names(place.path, place.names)
        raise CheckpointError(
            f"{place.path} holds no weights", hint="name a folder with a model.safetensors, or a .gguf file"
        )
    names = _named(place, found[0])
    others = sorted(set(found) - set(names))
    if others:
        raise CheckpointError(
            f"{place.path} has no {INDEX}, and {len(found)} .safetensors files that are not one set, as {names[0]} and"
            f" {others[0]}",
            hint=f"name one of them, or get {INDEX} from where the weights are from",
        )
    return names


def _read_shards(place: _Place, names: tuple[str, ...]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name in names:
        shard = read_safetensors(place.join(name), place.open_source)
        for double in shard.keys() & tensors.keys():
            raise CheckpointError(
                f"{place.join(name)}: tensor `{double}` is also in {tensors[double].path}",
                hint="remove the file that is not of this model",
            )
        tensors.update(shard)
    if not tensors:
        raise CheckpointError(f"{place.join(names[0])} holds no tensors", hint="is this a complete language model?")
    return tensors


def _check_index(place: _Place, weight_map: dict[str, str], tensors: dict[str, Tensor]) -> None:
    paths = {name: place.join(name) for name in set(weight_map.values())}
    absent = [
        (name, shard)
        for name, shard in weight_map.items()
        if (tensor := tensors.get(name)) is None or tensor.path != paths[shard]
    ]
    if absent:
        name, shard = absent[0]
        raise CheckpointError(
            f"{len(absent)} of {len(weight_map)} tensors are not in the files that {place.join(INDEX)} says, the first"
            f" is {brief(name)} in {shard}",
            hint="index and weights are not of one model; download or copy them again",
        )
