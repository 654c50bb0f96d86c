"""Fuzz tests of GGUF headers: damaged files, noise, and files written by the `gguf` package."""

import contextlib
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.checkpoint import Checkpoint, open_checkpoint
from headrace.errors import HeadraceError

pytestmark = pytest.mark.zoo

FUZZ = settings(max_examples=200, deadline=None)
KINDS = {"F32": 1, "F16": 1, "Q8_0": 32, "Q4_0": 32}  # weights per block

WORDS = st.text(st.characters(codec="utf-8"), max_size=20)
# The writer leaves out empty strings and empty lists.
SCALARS = st.one_of(
    st.integers(0, (1 << 32) - 1), st.booleans(), WORDS.filter(bool), st.floats(width=32, allow_nan=False)
)
LISTS = st.one_of(
    st.lists(st.integers(-(1 << 31), (1 << 31) - 1), min_size=1, max_size=5),
    st.lists(WORDS, min_size=1, max_size=5),
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=5),
)
KEYS = st.text("abcdefgh._é", min_size=1, max_size=12)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[str, tuple[int, ...]]:
    """A type and a shape that it can store."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    rows = draw(st.lists(st.integers(1, 5), max_size=3))
    return kind, (*rows, draw(st.integers(1, 4)) * KINDS[kind])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "model.gguf"


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small file with every part that a header can have."""
    path = tmp_path_factory.mktemp("valid") / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.epsilon", 1e-5)
    writer.add_bool("flag", True)
    writer.add_array("words", ["a", "", "word"])
    writer.add_array("llama.heads", [4, 8])
    writer.add_custom_alignment(32)
    writer.add_tensor("token_embd.weight", np.ones((3, 8), np.float32))
    writer.add_tensor("norm", np.ones(8, np.float32))
    packed = quantize(np.ones((2, 32), np.float32), GGMLQuantizationType.Q8_0)
    writer.add_tensor("ffn", packed, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def opened(path: Path, content: bytes) -> Checkpoint | None:
    """The checkpoint, or None if refused. Only a `HeadraceError` is caught."""
    path.write_bytes(content)
    try:
        return open_checkpoint(path)
    except HeadraceError as error:
        message = str(error)
    assert str(path) in message
    return None


Edit = tuple[str, int, int]
EDITS = st.lists(
    st.tuples(st.sampled_from(["flip", "set", "insert", "delete"]), st.integers(0, 700), st.integers(0, 255)),
    min_size=1,
    max_size=6,
)


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


def check_consistent(checkpoint: Checkpoint, size: int) -> None:
    """Check the invariants of any checkpoint."""
    spans = sorted((tensor.offset, tensor.offset + tensor.nbytes) for tensor in checkpoint.tensors.values())
    assert all(0 <= start < end <= size for start, end in spans)
    assert all(left[1] <= right[0] for left, right in pairwise(spans))
    assert all(tensor.nbytes == tensor.rows * tensor.row_bytes for tensor in checkpoint.tensors.values())


def test_the_undamaged_file_is_read(path: Path, valid: bytes) -> None:
    checkpoint = opened(path, valid)

    assert checkpoint is not None
    assert len(checkpoint.tensors) == 3
    assert len(valid) < 1000


@FUZZ
@given(edits=EDITS)
def test_a_damaged_file_is_read_or_refused(path: Path, valid: bytes, edits: list[Edit]) -> None:
    content = edited(valid, edits)
    checkpoint = opened(path, content)
    if checkpoint is not None:
        check_consistent(checkpoint, len(content))


@FUZZ
@given(noise=st.binary(max_size=300))
def test_noise_after_the_magic_is_read_or_refused(path: Path, noise: bytes) -> None:
    content = b"GGUF" + noise
    checkpoint = opened(path, content)
    if checkpoint is not None:
        check_consistent(checkpoint, len(content))


@FUZZ
@given(
    tensors=st.integers(0, 3),
    pairs=st.integers(0, 3),
    # Small numbers of 4 and 8 bytes among noise: lengths, types and counts that a reader does not refuse at once.
    noise=st.lists(
        st.one_of(
            st.integers(0, 40).map(lambda number: struct.pack("<I", number)),
            st.integers(0, 40).map(lambda number: struct.pack("<Q", number)),
            st.binary(max_size=8),
        ),
        max_size=60,
    ),
)
def test_noise_that_looks_like_a_header_is_read_or_refused(
    path: Path, tensors: int, pairs: int, noise: list[bytes]
) -> None:
    content = b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + b"".join(noise)
    checkpoint = opened(path, content)
    if checkpoint is not None:
        check_consistent(checkpoint, len(content))


@FUZZ
@given(edits=EDITS)
def test_a_damaged_file_that_opens_answers_or_refuses_every_question(
    path: Path, valid: bytes, edits: list[Edit]
) -> None:
    checkpoint = opened(path, edited(valid, edits))
    if checkpoint is None:
        return
    questions = (
        lambda: checkpoint.architecture,
        lambda: checkpoint.name,
        lambda: checkpoint.vocab_size,
        lambda: checkpoint.get("block_count"),
        lambda: checkpoint.number("block_count"),
        lambda: checkpoint.number("heads"),
        lambda: checkpoint.array("words"),
    )
    for ask in questions:
        with contextlib.suppress(HeadraceError):
            ask()


@settings(FUZZ, max_examples=100)
@given(
    tensors=st.dictionaries(
        # These endings identify adapters and importance matrices. (Hypothesis takes texts from the source.)
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=40).filter(
            lambda name: not name.endswith((".lora_a", ".lora_b", ".in_sum2"))
        ),
        shapes(),
        max_size=5,
    ),
    seed=st.integers(0, 1 << 30),
)
def test_written_tensors_are_read_back(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    writer = GGUFWriter(path, "llama")
    written = {}
    for name, (kind, shape) in tensors.items():
        number = GGMLQuantizationType[kind]
        written[name] = quantize(rng.standard_normal(shape, np.float32), number)
        writer.add_tensor(name, written[name], raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    checkpoint = open_checkpoint(path)

    content = path.read_bytes()
    assert {name: (tensor.type, tensor.shape) for name, tensor in checkpoint.tensors.items()} == tensors
    for name, tensor in checkpoint.tensors.items():
        assert content[tensor.offset : tensor.offset + tensor.nbytes] == written[name].tobytes()
    assert checkpoint.nbytes == sum(data.nbytes for data in written.values())


@settings(FUZZ, max_examples=100)
@given(scalars=st.dictionaries(KEYS, SCALARS, max_size=6), lists=st.dictionaries(KEYS, LISTS, max_size=6))
def test_written_metadata_is_read_back(
    path: Path, scalars: dict[str, int | bool | str | float], lists: dict[str, list[int] | list[str] | list[float]]
) -> None:
    writer = GGUFWriter(path, "llama")
    add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, float: writer.add_float32}
    for key, value in scalars.items():
        add[type(value)](f"one.{key}", value)
    for key, values in lists.items():
        writer.add_array(f"many.{key}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    checkpoint = open_checkpoint(path)

    assert {key: checkpoint.get(f"one.{key}") for key in scalars} == scalars
    assert {key: checkpoint.array(f"many.{key}") for key in lists} == lists
    assert checkpoint.architecture == "llama"
