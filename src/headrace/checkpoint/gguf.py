"""GGUF headers: metadata and the table of tensors, for one file or all parts of a split.

Layout (ggml's docs/gguf.md): magic, version, counts, key-value pairs, tensor table, padding, tensor data. The `gguf`
package's own reader maps the file and makes a numpy object of every token. This reader skips values that are not
requested: 0.2 s and a few megabytes for 150,000 tokens. Every count, length, offset and dimension is checked against
the size of the file before any allocation.
"""

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

from headrace.bounded import json_of, read_bounded
from headrace.checkpoint.encodings import Encoding
from headrace.checkpoint.foreign import SIGNATURE_BYTES, check_bytes, check_gguf
from headrace.checkpoint.header import Header
from headrace.checkpoint.source import LocalSource, OpenSource
from headrace.checkpoint.tensor import COMPUTABLE, TYPE_NAMES, Tensor, block_of
from headrace.errors import CheckpointError, UnsupportedError, did_you_mean

Scalar: TypeAlias = int | float | bool | str

MAX_DIMENSIONS = 4
MAX_NAME_BYTES = 1 << 10
MAX_KEY_BYTES = 1 << 16
MAX_STRING_BYTES = 64 << 20  # max length; the longest known hold a whole tokenizer.json
MAX_ELEMENTS = 1 << 22  # max length of an array; a vocabulary has some 100,000 tokens
MAX_TOKENIZER_BYTES = 100 << 20  # max size of tokenizer.json in a folder
MAX_TENSORS, MAX_PAIRS = 1 << 20, 1 << 16
DEFAULT_ALIGNMENT = 32

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, kw_only=True, slots=True)
class ArrayRef:
    """A skipped metadata array: its position, for `Checkpoint.array`."""

    element: int
    count: int
    position: int


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The headers of a model: metadata without its long arrays, and the tensors by name."""

    path: str
    paths: tuple[str, ...]
    metadata: dict[str, Scalar | ArrayRef]
    tensors: dict[str, Tensor]
    config: Mapping[str, Any] | None = None  # config.json of a Hugging Face folder
    generation: Mapping[str, Any] = field(default_factory=dict)  # generation_config.json
    virtual: Mapping[str, Sequence[tuple[Tensor, Encoding]]] = field(default_factory=dict)  # virtual tensors by path
    open_source: OpenSource = field(default=LocalSource, compare=False, repr=False)

    @property
    def architecture(self) -> str:
        """The value of `general.architecture`."""
        name = self.metadata.get("general.architecture")
        if name is None:
            raise CheckpointError(
                f"{self.path} has no `general.architecture` in its metadata", hint="the file is damaged or no model"
            )
        return str(name)

    @property
    def has_encoder(self) -> bool:
        """True if an encoder reads the prompt and a decoder writes the output."""
        if self.config is not None:
            return self.config.get("is_encoder_decoder") is True
        return self.get("decoder_start_token_id") is not None

    def positions_limit(self, default: int) -> int:
        """Max positions of the model; `default` if unlimited, as with relative positions."""
        relative = self.metadata if self.config is None else self.config
        if any(key.endswith(_RELATIVE_POSITIONS) for key in relative):
            return default
        limit = self.number("context_length", default)
        if limit < 1:
            raise CheckpointError(
                f"{self.path}: the context length is {limit} (`{self.architecture}.context_length`)",
                hint="the metadata is damaged; get the file from another source",
            )
        return limit

    def context_limit(self, default: int) -> int:
        """Max tokens of prompt and output together. Encoder and decoder each have the full limit."""
        return self.positions_limit(default) * (2 if self.has_encoder else 1)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def name(self) -> str:
        """The model's name in the metadata, else the file's."""
        name = self.metadata.get("general.name")
        return name if isinstance(name, str) and name else Path(self.path).stem

    def get(self, key: str) -> Scalar | None:
        """A scalar of the metadata; None if absent or an array. The prefix `{arch}.` may be left out of keys."""
        value = self.metadata.get(key, self.metadata.get(f"{self.architecture}.{key}"))
        return None if isinstance(value, ArrayRef) else value

    def number(self, key: str, default: int | None = None) -> int:
        """An integer of the metadata; the maximum where the file has one per layer.

        Raises:
            CheckpointError: absent without a default, or not a number.
        """
        value = self.metadata.get(key, self.metadata.get(f"{self.architecture}.{key}"))
        if isinstance(value, ArrayRef):
            numbers = [n for n in self.array(key) if isinstance(n, int)]
            value = max(numbers, default=None)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int):
            raise CheckpointError(
                f"{self.path}: metadata `{self.architecture}.{key}` is {value!r}, not a number",
                hint="the file was written by a broken converter; get it from another source",
            )
        return value

    def array(self, key: str) -> list[Scalar]:
        """Values of a metadata array, read now; empty if absent."""
        value = self.metadata.get(key, self.metadata.get(f"{self.architecture}.{key}"))
        if not isinstance(value, ArrayRef):
            return []
        with closing(self.open_source(self.paths[0])) as source:
            header = Header(source)
            header.position = value.position
            return _read_array(header, value.element, value.count, key)

    def tokens(self) -> list[Any]:
        """Vocabulary in the order of token ids, read now; empty if absent or unreadable."""
        return self.array("tokenizer.ggml.tokens") if self.config is None else tokens_of_json(self.path)

    @property
    def layers(self) -> int:
        """Layers that run: the larger of encoder and decoder, without MTP layers, which GGUF files count too."""
        further = self.number("nextn_predict_layers", 0) if self.config is None else 0
        blocks = self.number("block_count")
        return max(blocks, self.number("decoder_block_count", blocks)) - further

    @property
    def vocab_size(self) -> int:
        """Rows of the token embedding."""
        if self.config is not None:
            return self.number("vocab_size")
        embedding = self.tensors.get("token_embd.weight")
        if embedding is None:
            raise CheckpointError(
                f"{self.path} has no tensor `token_embd.weight`", hint="is this a complete language model?"
            )
        return embedding.rows


_RELATIVE_POSITIONS = ("relative_attention_num_buckets", "attention.relative_buckets_count")


def tokens_of_json(path: str) -> list[Any]:
    """Vocabulary of a folder's tokenizer.json, in the order of token ids."""
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    try:
        content = json_of(read_bounded(Path(folder, "tokenizer.json"), MAX_TOKENIZER_BYTES))
        pairs = [(number, token) for token, number in content["model"]["vocab"].items()]
        pairs += [(added["id"], added["content"]) for added in content.get("added_tokens", ())]
        return [token for _, token in sorted(dict(pairs).items())]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def open_gguf(path: str | os.PathLike[str], open_source: OpenSource = LocalSource) -> Checkpoint:
    """Read the header of a GGUF file, or of all parts if the path names one part of a split.

    `open_source` opens the file at a path, by default a local one.

    Raises:
        CheckpointError: not a GGUF file, truncated, inconsistent, or a part is missing.
        UnsupportedError: a quantisation that ggml cannot multiply.
    """
    path = os.fspath(path)
    paths = _split_parts(path, open_source)
    metadata: dict[str, Scalar | ArrayRef] = {}
    tensors: dict[str, Tensor] = {}
    for part in paths:
        part_metadata, part_tensors = _read_file(part, open_source)
        metadata = part_metadata if part == paths[0] else metadata
        for tensor in part_tensors:
            if tensor.name in tensors:
                raise CheckpointError(f"{part}: two tensors are named `{tensor.name}`")
            tensors[tensor.name] = tensor
    checkpoint = Checkpoint(path=path, paths=paths, metadata=metadata, tensors=tensors, open_source=open_source)
    _check_split_count(checkpoint)
    check_gguf(path, metadata, tensors.keys())
    return checkpoint


def _split_parts(path: str, open_source: OpenSource) -> tuple[str, ...]:
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path, re.DOTALL)
    if match is None or not 1 <= int(match[2]) <= int(match[3]):
        return (path,)
    stem, _, count = match.groups()
    parts = tuple(f"{stem}-{i:05d}-of-{count}.gguf" for i in range(1, int(count) + 1))
    missing = [part for part in parts if _is_missing(part, open_source)]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(parts)} parts are missing, the first is {missing[0]}",
            hint="put all parts of the split into one folder",
        )
    return parts


def _is_missing(path: str, open_source: OpenSource) -> bool:
    try:
        open_source(path).close()
    except CheckpointError as error:
        return isinstance(error.__cause__, FileNotFoundError)
    return False


def _check_split_count(checkpoint: Checkpoint) -> None:
    count = checkpoint.metadata.get("split.count")
    if isinstance(count, int) and count not in (0, len(checkpoint.paths)):
        raise CheckpointError(
            f"{checkpoint.path} is one of {count} parts, but its name does not say so",
            hint=f"restore the names NAME-00001-of-{count:05d}.gguf",
        )


def _read_file(path: str, open_source: OpenSource) -> tuple[dict[str, Scalar | ArrayRef], list[Tensor]]:
    with closing(open_source(path)) as source:
        header = Header(source)
        if header.start(4) != b"GGUF":
            check_bytes(path, header.start(SIGNATURE_BYTES), header.size, "a GGUF file")
            raise CheckpointError(f"{path} is not a GGUF file", hint="headrace reads .gguf files")
        header.position = 4
        version = header.integer("I", "the version")
        if version not in (2, 3):
            _refuse_version(path, version)
        tensor_count = header.integer("Q", "the number of tensors")
        pair_count = header.integer("Q", "the number of metadata pairs")
        # Smallest possible entries: a tensor of one dimension, a pair of one byte.
        _check_count(header, tensor_count, 33, "tensors", MAX_TENSORS)
        _check_count(header, pair_count, 13, "metadata pairs", MAX_PAIRS)
        metadata = _read_metadata(header, pair_count)
        return metadata, _read_tensors(header, tensor_count, metadata)


def _refuse_version(path: str, version: int) -> None:
    if version and not version & 0xFFFF:
        raise UnsupportedError(
            f"{path} is a big-endian GGUF file",
            hint="convert it to little-endian (gguf_convert_endian.py of llama.cpp)",
        )
    hint = (
        "convert it again with a current converter"
        if version < 2
        else "update headrace, which may know this later version"
    )
    raise CheckpointError(f"{path} is GGUF version {version}; 2 and 3 are known", hint=hint)


def _check_count(header: Header, count: int, least_bytes: int, what: str, most: int = MAX_ELEMENTS) -> None:
    _check_limit(header, count, what, most)
    if count * least_bytes > header.size - header.position:
        raise CheckpointError(
            f"{header.path} claims {count} {what}, more than its {header.size} bytes can hold",
            hint="the file is damaged; download or copy it again",
        )


def _check_limit(header: Header, count: int, what: str, most: int) -> None:
    if count > most:
        raise CheckpointError(
            f"{header.path} claims {count} {what}, the limit is {most}",
            hint="the file is damaged; download or copy it again",
        )


def _read_string(header: Header, what: str, limit: int = MAX_STRING_BYTES) -> str:
    length = header.integer("Q", what)
    if length > limit:
        raise CheckpointError(
            f"{header.path}: {what} is {length} bytes long, the limit is {limit}",
            hint="the file is damaged; download or copy it again",
        )
    return header.raw(length, what).decode("utf-8", errors="replace")


def _read_metadata(header: Header, count: int) -> dict[str, Scalar | ArrayRef]:
    metadata: dict[str, Scalar | ArrayRef] = {}
    for _ in range(count):
        key = _read_string(header, "a metadata key", MAX_KEY_BYTES)
        if key in metadata:
            raise CheckpointError(f"{header.path}: metadata `{key}` is given twice")
        metadata[key] = _read_value(header, header.integer("I", f"the type of `{key}`"), key)
    if not isinstance(metadata.get("general.architecture", ""), str):
        raise CheckpointError(f"{header.path}: metadata `general.architecture` is not a word")
    return metadata


def _read_value(header: Header, kind: int, key: str) -> Scalar | ArrayRef:
    if kind in _SCALARS:
        return header.unpack(_SCALARS[kind], f"`{key}`")[0]
    if kind == _STRING:
        return _read_string(header, f"`{key}`")
    if kind != _ARRAY:
        raise CheckpointError(f"{header.path}: metadata `{key}` has the unknown type {kind}")
    element = header.integer("I", f"`{key}`")
    count = header.integer("Q", f"`{key}`")
    reference = ArrayRef(element=element, count=count, position=header.position)
    if element == _STRING:
        _check_count(header, count, 8, f"strings in `{key}`")
        header.skip_strings(count, f"`{key}`")
    elif element in _WIDTHS:
        _check_count(header, count, _WIDTHS[element], f"values in `{key}`", most=header.size)
        header.position += count * _WIDTHS[element]
    else:
        raise CheckpointError(f"{header.path}: metadata `{key}` is an array of the unknown type {element}")
    return reference


def _read_array(header: Header, element: int, count: int, key: str) -> list[Scalar]:
    if element == _STRING:
        return [_read_string(header, f"`{key}`") for _ in range(count)]
    # Checked only here: skipping an array of numbers costs nothing.
    _check_limit(header, count, f"values in `{key}`", MAX_ELEMENTS)
    return list(header.unpack(f"{count}{_SCALARS[element]}", f"`{key}`"))


def _read_tensors(header: Header, count: int, metadata: dict[str, Scalar | ArrayRef]) -> list[Tensor]:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise CheckpointError(f"{header.path}: alignment {alignment!r} is not a power of two from 8 to 1 MiB")
    entries = [_read_entry(header) for _ in range(count)]
    data_start = -(-header.position // alignment) * alignment
    tensors = [_placed(header, entry, data_start, alignment) for entry in entries]
    _check_overlaps(header.path, tensors)
    return tensors


def _read_entry(header: Header) -> tuple[str, tuple[int, ...], int, int]:
    name = _read_string(header, "a tensor's name", MAX_NAME_BYTES)
    dimensions = header.integer("I", f"the shape of `{name}`")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise CheckpointError(
            f"{header.path}: tensor `{name}` has {dimensions} dimensions, 1 to {MAX_DIMENSIONS} are possible"
        )
    shape = tuple(int(n) for n in reversed(header.unpack(f"{dimensions}Q", f"the shape of `{name}`")))
    kind = header.integer("I", f"the type of `{name}`")
    return name, shape, kind, header.integer("Q", f"the offset of `{name}`")


def _placed(header: Header, entry: tuple[str, tuple[int, ...], int, int], data_start: int, alignment: int) -> Tensor:
    name, shape, kind, relative = entry
    type_name = TYPE_NAMES.get(kind)
    if type_name is None or type_name not in COMPUTABLE:
        label = type_name or f"number {kind}"
        raise UnsupportedError(
            f"{header.path}: tensor `{name}` is quantised as {label}, which headrace cannot multiply",
            hint=did_you_mean(label, COMPUTABLE),
        )
    block, size = block_of(type_name)
    if any(n < 1 for n in shape) or shape[-1] % block:
        raise CheckpointError(f"{header.path}: tensor `{name}` of shape {shape} cannot be stored as {type_name}")
    nbytes = prod(shape) // block * size
    offset = data_start + relative
    if relative % alignment or offset + nbytes > header.size:
        reason = (
            f"is not aligned to {alignment}" if relative % alignment else f"ends after the file ({header.size} bytes)"
        )
        raise CheckpointError(
            f"{header.path}: tensor `{name}` ({nbytes} bytes at {offset}) {reason}",
            hint="the file is truncated or damaged; download or copy it again",
        )
    return Tensor(name=name, shape=shape, type=type_name, path=header.path, offset=offset, nbytes=nbytes)


def _check_overlaps(path: str, tensors: list[Tensor]) -> None:
    ordered = sorted(tensors, key=lambda tensor: tensor.offset)
    for left, right in pairwise(ordered):
        if left.offset + left.nbytes > right.offset:
            raise CheckpointError(f"{path}: tensors `{left.name}` and `{right.name}` overlap at {right.offset}")
