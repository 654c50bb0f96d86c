"""Lossless copy of a BF16 folder in three quarters of its bytes (`encodings.exponents`).

Each shard is read twice, because the row with the most escapes sets a record's size: once to measure, once to write. Memory
holds one block of rows at a time. The copy grows in a folder beside its target, gets its config.json last, and is renamed at
the end. The remains of a killed run do not open as a model, and the next run overwrites them. The original is only read.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from headrace.checkpoint.encodings import Encoding
from headrace.checkpoint.encodings.encoding import Bytes
from headrace.checkpoint.encodings.exponents import (
    COLUMN_MULTIPLE,
    MAX_COLUMNS,
    METHOD,
    SUFFIX,
    VERSION,
    Numbers,
    encode,
    escapes_of,
    record_bytes,
)
from headrace.checkpoint.folder import open_folder
from headrace.checkpoint.gguf import Checkpoint
from headrace.checkpoint.safetensors import INDEX, Folder, read_folder
from headrace.checkpoint.source import LocalSource
from headrace.checkpoint.tensor import Tensor
from headrace.errors import CheckpointError, HeadraceError, ReadError, UnsupportedError, UsageError
from headrace.units import gigabytes

BLOCK_BYTES = 2 << 20  # bytes of the original in memory at a time; working copies take about ten times as much
LARGEST_SHARE = 0.9  # max packed size relative to the original; other tensors stay unpacked
LARGEST_COPIED_BYTES = 256 << 20  # max size of a copied file beside the weights
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", INDEX)
_CONFIG = "config.json"

Progress = Callable[[int, int], None]  # (bytes done, total bytes) of the original; each byte counts twice


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Result of packing a folder."""

    path: str
    tensors: int
    packed_tensors: int
    original_bytes: int
    packed_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """A tensor of the copy. `capacity` is the max escapes of a row, None if it stays unpacked."""

    tensor: Tensor
    capacity: int | None

    @property
    def name(self) -> str:
        return self.tensor.name if self.capacity is None else self.tensor.name + SUFFIX

    @property
    def shape(self) -> tuple[int, ...]:
        if self.capacity is None:
            return self.tensor.shape
        return (*self.tensor.shape[:-1], record_bytes(self.tensor.columns, self.capacity))

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes if self.capacity is None else self.tensor.rows * self.shape[-1]


class _Reader:
    """Reader of tensors in blocks of rows. A context manager."""

    def __init__(self) -> None:
        self._sources: dict[str, LocalSource] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def stored(self, tensor: Tensor, start: int, count: int) -> Bytes:
        """The `count` bytes of a stored tensor from byte `start`."""
        if tensor.path not in self._sources:
            self._sources[tensor.path] = self._stack.enter_context(LocalSource(tensor.path))
        try:
            data = self._sources[tensor.path].pread(count, tensor.offset + start)
        except OSError as error:
            raise ReadError(f"reading {tensor.path} failed: {error.strerror}", hint="check the disk") from error
        if len(data) < count:
            raise ReadError(f"{tensor.path} ended while it was read", hint="it must not change while it is packed")
        return np.frombuffer(data, np.uint8)

    def rows(self, tensor: Tensor, encoding: Encoding | None, first: int, last: int) -> Bytes:
        """Rows [first, last) of a tensor, decoded if it has an encoding."""
        if encoding is None:
            return self.stored(tensor, first * tensor.row_bytes, (last - first) * tensor.row_bytes)
        out = np.empty((last - first) * tensor.row_bytes, np.uint8)
        encoding.decode([self.stored(*read) for read in encoding.reads(first, last)], first, last, out)
        return out


@dataclass(kw_only=True)
class _Walk:
    """Progress over the original's bytes."""

    total: int
    progress: Progress
    done: int = 0

    def add(self, nbytes: int) -> None:
        self.done += nbytes
        self.progress(self.done, self.total)


def pack_folder(source: str, target: str, progress: Progress = lambda done, total: None) -> Packed:
    """Write the packed copy of the folder `source` as the folder `target`.

    Raises:
        UsageError: `source` is no folder, or something is at `target`.
        UnsupportedError: the weights are quantised already, or hold no BF16 matrix.
        CheckpointError: the original is damaged.
        HeadraceError: the copy cannot be written.
    """
    folder, place = _checked_source(source), Path(target)
    _check_target(Path(source), place)
    partial = place.with_name(place.name + ".partial")
    files = _other_files(Path(source))
    own_files = {Path(path).name for path in folder.paths} | {file.name for file in files} | {_CONFIG, INDEX}
    with _writing(partial, own_files):
        walk = _Walk(total=2 * sum(tensor.nbytes for tensor in folder.tensors.values()), progress=progress)
        entries = [entry for path in folder.paths for entry in _pack_shard(folder, path, partial, walk)]
        for file in files:
            shutil.copyfile(file, partial / file.name)
        if len(folder.paths) > 1:
            _write_json(partial / INDEX, _index(entries))
        _write_json(partial / _CONFIG, folder.config | {"quantization_config": _settings(entries)})
        os.replace(partial, place)
    return Packed(
        path=target,
        tensors=len(entries),
        packed_tensors=sum(entry.capacity is not None for entry in entries),
        original_bytes=sum(entry.tensor.nbytes for entry in entries),
        packed_bytes=sum(entry.nbytes for entry in entries),
    )


def compare(source: str, target: str, progress: Progress = lambda done, total: None) -> None:
    """Read every tensor of both folders and compare all bits.

    Raises:
        CheckpointError: they differ, and in which tensor.
    """
    original, packed = open_folder(source), open_folder(target)
    encodings = {tensor.name: encoding for pairs in packed.virtual.values() for tensor, encoding in pairs}
    if set(original.tensors) != set(packed.tensors):
        raise _difference(original, packed, "they do not hold the same tensors")
    walk = _Walk(total=sum(tensor.nbytes for tensor in original.tensors.values()), progress=progress)
    with _Reader() as reader:
        for name, tensor in original.tensors.items():
            other = packed.tensors[name]
            if (tensor.type, tensor.shape) != (other.type, other.shape):
                raise _difference(original, packed, f"`{name}` is {other.type} of shape {other.shape}")
            for first, last in _blocks(tensor):
                rows = reader.rows(tensor, None, first, last)
                if not np.array_equal(rows, reader.rows(other, encodings.get(name), first, last)):
                    raise _difference(original, packed, f"`{name}` differs in the rows {first} to {last - 1}")
                walk.add(len(rows))


def _difference(original: Checkpoint, packed: Checkpoint, what: str) -> CheckpointError:
    return CheckpointError(
        f"{packed.path} is no copy of {original.path}: {what}", hint="delete it and pack the model again"
    )


# Before anything is written


def _checked_source(source: str) -> Folder:
    if not Path(source).is_dir():
        raise UsageError(f"{source} is no folder", hint="give a folder with config.json and BF16 .safetensors files")
    folder = read_folder(source)
    if folder.config.get("quantization_config"):
        raise UnsupportedError(f"{source} is quantised or packed already", hint="pack the BF16 original")
    if not any(_packable(folder, tensor) for tensor in folder.tensors.values()):
        raise UnsupportedError(f"{source} holds no BF16 matrices", hint="only BF16 weights can be packed")
    return folder


def _check_target(source: Path, target: Path) -> None:
    if target.exists():
        raise UsageError(f"{target} is there already", hint="name a folder that does not exist")
    if not target.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {target.absolute().parent}", hint="make it first")
    if source.resolve() in target.absolute().resolve().parents:
        raise UsageError(f"{target} lies in the original's folder", hint="name a folder elsewhere")


def _packable(folder: Folder, tensor: Tensor) -> bool:
    return (
        tensor.type == "BF16"
        and len(tensor.shape) >= 2
        and 0 not in tensor.shape
        and tensor.columns % COLUMN_MULTIPLE == 0
        and tensor.columns <= MAX_COLUMNS
        and tensor.name + SUFFIX not in folder.tensors
    )


def _other_files(source: Path) -> list[Path]:
    """Small files without weights: tokenizer, generation settings, license."""
    return [
        file
        for file in sorted(source.iterdir())
        if file.is_file()
        and file.name != _CONFIG
        and not file.name.endswith(_WEIGHTS)
        and file.stat().st_size <= LARGEST_COPIED_BYTES
    ]


# Writing


@contextmanager
def _writing(partial: Path, own_files: set[str]) -> Iterator[None]:
    """Create the folder of an unfinished copy, or take over a killed run's; remove it on an error."""
    try:
        if partial.exists():
            strange = sorted(file.name for file in partial.iterdir() if file.name not in own_files)
            if strange:
                raise UsageError(f"{partial} holds {strange[0]}, which is none of this copy", hint="remove that folder")
            (partial / _CONFIG).unlink(missing_ok=True)
        partial.mkdir(exist_ok=True)
    except OSError as error:
        raise _unwritable(partial, error) from error
    try:
        yield
    except BaseException as error:
        _remove(partial, own_files)
        if isinstance(error, OSError):
            raise _unwritable(partial, error) from error
        raise


def _remove(partial: Path, own_files: set[str]) -> None:
    with suppress(OSError):
        for name in own_files:
            (partial / name).unlink(missing_ok=True)
        partial.rmdir()


def _unwritable(path: Path, error: OSError) -> HeadraceError:
    return HeadraceError(
        f"cannot write {path}: {error.strerror}", hint="free disk space or name another disk; nothing was left behind"
    )


def _pack_shard(folder: Folder, path: str, partial: Path, walk: _Walk) -> Sequence[_Entry]:
    """Pack one file of the original into one of the same name."""
    tensors = sorted((t for t in folder.tensors.values() if t.path == path), key=lambda tensor: tensor.offset)
    with _Reader() as reader:
        entries = [_measured(folder, tensor, reader, walk) for tensor in tensors]
        header = _header(entries)
        _check_disk_space(partial, len(header) + sum(entry.nbytes for entry in entries))
        with open(partial / Path(path).name, "wb") as file:
            file.write(header)
            for entry in entries:
                _write(file, entry, reader, walk)
            file.flush()
            os.fsync(file.fileno())
    return entries


def _measured(folder: Folder, tensor: Tensor, reader: _Reader, walk: _Walk) -> _Entry:
    """The entry of a tensor, packed if that saves enough."""
    if not _packable(folder, tensor):
        walk.add(tensor.nbytes)
        return _Entry(tensor=tensor, capacity=None)
    capacity = 0
    for first, last in _blocks(tensor):
        capacity = max(capacity, escapes_of(_bf16_rows(tensor, reader, first, last)))
        walk.add((last - first) * tensor.row_bytes)
    saves = record_bytes(tensor.columns, capacity) <= LARGEST_SHARE * tensor.row_bytes
    return _Entry(tensor=tensor, capacity=capacity if saves else None)


def _write(file: BinaryIO, entry: _Entry, reader: _Reader, walk: _Walk) -> None:
    tensor = entry.tensor
    for first, last in _blocks(tensor):
        if entry.capacity is None:
            file.write(reader.rows(tensor, None, first, last).data)
        else:
            file.write(encode(_bf16_rows(tensor, reader, first, last), entry.capacity).data)
        walk.add((last - first) * tensor.row_bytes)


def _blocks(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """The rows of a tensor, in ranges of about `BLOCK_BYTES`."""
    step = max(1, BLOCK_BYTES // max(1, tensor.row_bytes))
    return ((first, min(tensor.rows, first + step)) for first in range(0, tensor.rows, step))


def _bf16_rows(tensor: Tensor, reader: _Reader, first: int, last: int) -> Numbers:
    return reader.rows(tensor, None, first, last).view("<u2").reshape(last - first, tensor.columns)


def _header(entries: Sequence[_Entry]) -> bytes:
    """A safetensors header: its length, then JSON padded with spaces to a multiple of eight."""
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        start, end = end, end + entry.nbytes
        kind = entry.tensor.type if entry.capacity is None else "U8"
        described[entry.name] = {"dtype": kind, "shape": entry.shape, "data_offsets": (start, end)}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _check_disk_space(partial: Path, needed: int) -> None:
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise HeadraceError(
            f"the next file takes {gigabytes(needed)}, {partial} has {gigabytes(free)} free",
            hint="free disk space or name another disk; nothing was left behind",
        )


def _index(entries: Sequence[_Entry]) -> dict[str, Any]:
    return {
        "metadata": {"total_size": sum(entry.nbytes for entry in entries)},
        "weight_map": {entry.name: Path(entry.tensor.path).name for entry in entries},
    }


def _settings(entries: Sequence[_Entry]) -> dict[str, Any]:
    columns = {entry.tensor.name: entry.tensor.columns for entry in entries if entry.capacity is not None}
    return {"quant_method": METHOD, "version": VERSION, "columns": columns}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
