"""Fuzz tests of safetensors headers: damaged files, noise, and files written by the format's own package.

That package is also the reference: it reads the same as we do from a damaged file.
"""

import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from headrace.checkpoint import Tensor
from headrace.checkpoint.safetensors import INDEX, Folder, read_folder, read_safetensors
from headrace.errors import HeadraceError
from headrace.units import MIB

pytestmark = pytest.mark.zoo

FUZZ = settings(max_examples=100, deadline=None)
DTYPES = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "U32": np.uint32,
    "I32": np.int32, "U64": np.uint64, "I64": np.int64, "F16": np.float16, "F32": np.float32, "F64": np.float64,
    "C64": np.complex64,
}  # fmt: skip
NAMES = st.text(st.characters(codec="utf-8"), max_size=40).filter(lambda name: name != "__metadata__")
ARRAYS = st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=4))
WORDS = [
    "a",
    "b",
    "__metadata__",
    "dtype",
    "shape",
    "data_offsets",
    "F32",
    "F16",
    "F4",
    "weight_map",
    "one.safetensors",
]
WORDS += ["../x", "model.safetensors", ""]
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2, 24), st.integers(), st.floats(), st.sampled_from(WORDS)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4),
    max_leaves=12,
)
# Nearly valid entries: each part is right more often than not.
SPANS = st.tuples(st.integers(0, 4), st.integers(0, 4)).map(lambda two: [4 * min(two), 4 * max(two)])
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32"] * 6 + ["F16", "U8", "F4", "?"]),
        "shape": st.lists(st.integers(0, 4), max_size=2) | JSON,
        "data_offsets": SPANS | JSON,
    }
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "model.safetensors"


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small file with every part that a header can have."""
    path = tmp_path_factory.mktemp("valid") / "model.safetensors"
    arrays = {
        "embed.weight": np.ones((3, 4), np.float32),
        "norm": np.ones(4, np.float16),
        "scalar": np.array(1, np.int8),
        "empty": np.ones((0, 3), np.uint8),
    }
    save_file(arrays, path, metadata={"format": "pt", "ü": "\n"})
    return path.read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid folder of two shards."""
    folder = tmp_path_factory.mktemp("folder")
    save_file({"a": np.ones(2, np.float32), "b": np.ones(3, np.float32)}, folder / "one.safetensors")
    save_file({"c": np.ones(2, np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


SOUND_INDEX = json.dumps({"weight_map": {"a": "one.safetensors", "b": "one.safetensors", "c": "model.safetensors"}})


def opened(path: Path, content: bytes) -> dict[str, Tensor] | None:
    """The tensors, or None if refused. Only a `HeadraceError` is caught."""
    path.write_bytes(content)
    try:
        return read_safetensors(str(path))
    except HeadraceError as error:
        message, hint = str(error), error.hint
    assert str(path) in message
    assert hint
    assert len(message.encode()) < 5000
    return None


def indexed(folder: Path, index: bytes) -> Folder | None:
    """The folder with that index, or None if refused."""
    (folder / INDEX).write_bytes(index)
    try:
        return read_folder(str(folder))
    except HeadraceError as error:
        message = str(error)
    assert str(folder) in message
    return None


EDITS = st.lists(
    st.tuples(st.sampled_from(["flip", "set", "insert", "delete"]), st.integers(0, 700), st.integers(0, 255)),
    min_size=1,
    max_size=6,
)
Edit = tuple[str, int, int]


def edited(content: bytes, edits: list[Edit]) -> bytes:
    data = bytearray(content)
    for action, position, value in edits:
        position %= len(data)
        if action == "flip":
            data[position] ^= 1 << value % 8
        elif action == "set":
            data[position] = value
        elif action == "insert":
            data.insert(position, value)
        else:
            del data[position]
    return bytes(data)


def check_same(tensors: dict[str, Tensor], content: bytes) -> None:
    """The format's own package reads the same."""
    theirs = dict(safetensors.deserialize(content))
    assert tensors.keys() == theirs.keys()
    for name, tensor in tensors.items():
        assert (tensor.type, list(tensor.shape)) == (theirs[name]["dtype"], theirs[name]["shape"])
        assert content[tensor.offset : tensor.offset + tensor.nbytes] == bytes(theirs[name]["data"])


def peak_bytes(action: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_undamaged_file_is_read(path: Path, valid: bytes) -> None:
    tensors = opened(path, valid)

    assert tensors is not None
    assert len(tensors) == 4
    assert len(valid) < 700
    check_same(tensors, valid)


@FUZZ
@given(edits=EDITS)
def test_a_damaged_file_is_read_as_the_package_reads_it_or_refused(path: Path, valid: bytes, edits: list[Edit]) -> None:
    content = edited(valid, edits)
    tensors = opened(path, content)
    # Python knows -0, Rust does not.
    if tensors is not None and b"-0" not in content:
        check_same(tensors, content)


@FUZZ
@given(noise=st.binary(max_size=300), length=st.integers(0, 400))
def test_noise_is_read_or_refused(path: Path, noise: bytes, length: int) -> None:
    for content in (noise, struct.pack("<Q", length) + noise, struct.pack("<Q", length) + b"{" + noise):
        opened(path, content)


@FUZZ
@given(value=JSON)
def test_json_of_any_kind_is_read_or_refused(path: Path, value: Any) -> None:
    text = json.dumps(value).encode()
    opened(path, struct.pack("<Q", len(text)) + text)


@FUZZ
@given(entries=st.dictionaries(st.sampled_from("abcd"), ENTRIES, max_size=3), data=st.integers(0, 4))
def test_nearly_valid_entries_are_read_as_the_package_reads_them_or_refused(
    path: Path, entries: dict[str, Any], data: int
) -> None:
    text = json.dumps(entries).encode()
    content = struct.pack("<Q", len(text)) + text + bytes(4 * data)
    tensors = opened(path, content)
    if tensors is not None:
        check_same(tensors, content)


@settings(FUZZ, max_examples=100)
@given(
    arrays=st.dictionaries(NAMES, ARRAYS, max_size=6),
    # For no tensors and empty metadata, safetensors 0.8.0 writes a header that it refuses itself.
    metadata=st.none()
    | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), NAMES, min_size=1, max_size=3),
    seed=st.integers(0, 1 << 30),
)
def test_written_tensors_are_read_back(
    path: Path, arrays: dict[str, tuple[str, list[int]]], metadata: dict[str, str] | None, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    written = {
        name: np.asarray(rng.integers(0, 2, shape)).astype(DTYPES[dtype]) for name, (dtype, shape) in arrays.items()
    }
    save_file(written, path, metadata)

    tensors = read_safetensors(str(path))

    content = path.read_bytes()
    assert {name: (tensor.type, list(tensor.shape)) for name, tensor in tensors.items()} == arrays
    for name, tensor in tensors.items():
        assert content[tensor.offset : tensor.offset + tensor.nbytes] == written[name].tobytes()
    check_same(tensors, content)


def test_a_valid_index_is_read(folder: Path) -> None:
    found = indexed(folder, SOUND_INDEX.encode())

    assert found is not None
    assert set(found.tensors) == {"a", "b", "c"}


@FUZZ
@given(edits=EDITS)
def test_a_damaged_index_is_read_or_refused(folder: Path, edits: list[Edit]) -> None:
    found = indexed(folder, edited(SOUND_INDEX.encode(), edits))
    if found is not None:
        assert found.tensors
        assert all(Path(path).parent == folder for path in found.paths)


@FUZZ
@given(
    index=st.one_of(
        st.binary(max_size=100),
        JSON.map(lambda value: json.dumps(value).encode()),
        JSON.map(lambda value: json.dumps({"weight_map": value}).encode()),
        st.dictionaries(st.sampled_from("abcd"), st.sampled_from(WORDS)).map(
            lambda names: json.dumps({"weight_map": names}).encode()
        ),
    )
)
def test_an_index_of_any_kind_is_read_or_refused(folder: Path, index: bytes) -> None:
    found = indexed(folder, index)
    if found is not None:
        assert all(Path(path).parent == folder for path in found.paths)


@FUZZ
@given(config=st.one_of(st.binary(max_size=100), JSON.map(lambda value: json.dumps(value).encode())))
def test_a_configuration_of_any_kind_is_read_or_refused(path: Path, config: bytes) -> None:
    save_file({"a": np.ones(2, np.float32)}, path)
    (path.parent / "config.json").write_bytes(config)
    try:
        found = read_folder(str(path.parent))
    except HeadraceError as error:
        assert "config.json" in str(error)  # noqa: PT017 - either is right
        return
    assert isinstance(found.config, dict)


@FUZZ
@given(length=st.integers(0, (1 << 64) - 1) | st.integers(0, 1 << 30), size=st.integers(0, 1 << 40))
def test_a_length_costs_no_memory_before_the_file_confirms_it(path: Path, length: int, size: int) -> None:
    path.write_bytes(struct.pack("<Q", length) + b"[")
    with path.open("r+b") as file:
        file.truncate(size)

    def attempt() -> None:
        with pytest.raises(HeadraceError):
            read_safetensors(str(path))

    if not 64 * MIB < length <= 100_000_000:  # lengths that are possible are read
        assert peak_bytes(attempt) < 70 * MIB


@pytest.mark.parametrize("filling", [b"[],", b"{},", b'"ab",', b'{"a":1},', b"1.5,", b"[[]],"])
def test_memory_is_bounded_by_the_size_of_the_header(path: Path, filling: bytes) -> None:
    text = b'{"a":[' + filling * (MIB // 4 // len(filling)) + b"0]}"
    path.write_bytes(struct.pack("<Q", len(text)) + text)

    def attempt() -> None:
        with pytest.raises(HeadraceError, match="not an object with dtype"):
            read_safetensors(str(path))

    # An empty list takes 2 bytes and a comma in JSON, and 64 bytes and a pointer in memory.
    assert peak_bytes(attempt) < 15 * MIB
