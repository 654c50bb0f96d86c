"""Packed folders: every bit of the original comes back, in any range of rows, and nothing unfinished or damaged opens."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.checkpoint import Tensor, packing
from headrace.checkpoint.encodings import decoded
from headrace.checkpoint.encodings.exponents import METHOD, Exponents, Numbers, encode, escapes_of, record_bytes
from headrace.checkpoint.folder import open_folder
from headrace.checkpoint.packing import compare, pack_folder
from headrace.cli import main
from headrace.errors import CheckpointError, HeadraceError, UnsupportedError, UsageError

pytestmark = pytest.mark.zoo

Array = np.ndarray[Any, Any]


def weights(rows: int, columns: int, seed: int = 0) -> Numbers:
    """Weights like a trained matrix: normal, each row with its own scale."""
    draw = np.random.default_rng(seed)
    values = draw.standard_normal((rows, columns)) * np.exp(draw.standard_normal((rows, 1)) - 4)
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def encoding_of(rows: Numbers) -> tuple[Exponents, Array]:
    records = encode(rows, escapes_of(rows))
    stored = Tensor(name="w.exponents", shape=records.shape, type="U8", path="m", offset=0, nbytes=records.size)
    return Exponents(stored=stored, columns=rows.shape[1]), records


def unpacked(encoding: Exponents, records: Array, first: int = 0, last: int | None = None) -> Numbers:
    last = len(records) if last is None else last
    ((_, start, count),) = encoding.reads(first, last)
    odd = np.empty(count + 1, np.uint8)[1:]  # readers promise no alignment
    odd[:] = records.reshape(-1)[start : start + count]
    out = np.full((last - first) * encoding.columns * 2, 0xA5, np.uint8)
    encoding.decode([odd], first, last, out)
    return out.view(np.uint16).reshape(last - first, encoding.columns)


EVERY_NUMBER = np.arange(1 << 16, dtype=np.uint16)
SPECIAL = {
    "zeros of both signs": np.tile(np.array([0, 0x8000], np.uint16), 64),
    "infinities and NaNs": np.tile(
        np.array([0x7F80, 0xFF80, 0x7FC1, 0xFFFF, 0x7F81, 0x3F80, 1, 0x8001], np.uint16), 16
    ),
    "subnormals": np.arange(128, dtype=np.uint16),
    "the largest exponents": np.arange(0x7F00, 0x7F80, dtype=np.uint16),
    "every number": EVERY_NUMBER,
    "every number, in no order": np.random.default_rng(0).permutation(EVERY_NUMBER),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_special_values_come_back_bit_for_bit(name: str) -> None:
    rows = SPECIAL[name].reshape(-1, 128)
    assert np.array_equal(unpacked(*encoding_of(rows)), rows)


@pytest.mark.parametrize("shape", [(1, 8), (3, 24), (7, 1000), (300, 1536), (2, 65528)])
def test_weights_come_back_bit_for_bit_and_take_three_quarters(shape: tuple[int, int]) -> None:
    rows = weights(*shape)
    encoding, records = encoding_of(rows)
    assert np.array_equal(unpacked(encoding, records), rows)
    if rows.size > 100_000:
        assert records.size / rows.nbytes < 0.77


@settings(max_examples=40, deadline=None)
@given(data=st.data(), rows=st.integers(1, 40), columns=st.integers(1, 30), spread=st.integers(0, 1 << 16))
def test_any_bits_come_back_in_any_range_of_rows(data: st.DataObject, rows: int, columns: int, spread: int) -> None:
    seed = data.draw(st.integers(0, 1 << 30))
    draw = np.random.default_rng(seed)
    numbers = draw.integers(0, max(1, spread), (rows, columns * 8)).astype(np.uint16)
    encoding, records = encoding_of(numbers)
    first = data.draw(st.integers(0, rows - 1))
    last = data.draw(st.integers(first + 1, rows))
    assert np.array_equal(unpacked(encoding, records, first, last), numbers[first:last])


def test_long_ranges_are_decoded_in_chunks_with_the_same_result() -> None:
    rows = weights(2000, 512)
    assert np.array_equal(unpacked(*encoding_of(rows)), rows)


def damaged(change: str) -> tuple[Exponents, Array]:
    rows = weights(16, 1536)
    encoding, records = encoding_of(rows)
    if change == "base":
        records[3, 0] = 122
    elif change == "count":
        records[3, 1:3] = 255
    elif change == "fewer":
        records[int(records[:, 1].argmax()), 1] -= 1
    elif change == "escape":
        records[:, 3 + 768 : 3 + 768 + encoding.capacity] = 128
    else:  # escape codes that the record does not count
        records[5, 3 : 3 + 768] = 0x77
    return encoding, records


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("base", "a base of 122"),
        ("count", "counts 65535 escapes"),
        ("fewer", "escapes for"),
        ("escape", "an escape of 128"),
        ("codes", "escapes for"),
    ],
)
def test_damaged_records_are_errors_that_say_what_is_wrong(change: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        unpacked(*damaged(change))


@pytest.mark.parametrize(
    ("settings", "shape", "kind"),
    [
        ({"columns": {"w": 12}}, (4, 21), "U8"),
        ({"columns": {"w": 0}}, (4, 21), "U8"),
        ({"columns": {"w": True}}, (4, 21), "U8"),
        ({"columns": {"w": 1 << 40}}, (4, 21), "U8"),
        ({"columns": {"w": 16}}, (4, 21), "U8"),
        ({"columns": {"w": 8}}, (4, 24), "U8"),
        ({"columns": {"w": 8}}, (15,), "U8"),
        ({"columns": {"w": 8}}, (4, 15), "I8"),
        ({"columns": {"other": 8}}, (4, 15), "U8"),
        ({"columns": 8}, (4, 15), "U8"),
        ({"version": 2, "columns": {"w": 8}}, (4, 15), "U8"),
    ],
)
def test_records_that_do_not_fit_the_configuration_are_refused(
    settings: dict[str, Any], shape: tuple[int, ...], kind: str
) -> None:
    size = int(np.prod(shape))
    stored = Tensor(name="w.exponents", shape=shape, type=kind, path="m", offset=0, nbytes=size)
    config = {"quantization_config": {"quant_method": METHOD, "version": 1, **settings}}
    with pytest.raises(CheckpointError):
        decoded({stored.name: stored}, config, "m")


# Folders


def write(path: Path, tensors: dict[str, tuple[str, Array]]) -> None:
    header, data = {}, b""
    for name, (kind, values) in tensors.items():
        span = [len(data), len(data) + values.nbytes]
        header[name] = {"dtype": kind, "shape": list(values.shape), "data_offsets": span}
        data += values.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.fixture
def original(tmp_path: Path) -> Path:
    folder = tmp_path / "original"
    folder.mkdir()
    first = {
        "a.weight": ("BF16", weights(700, 64)),
        "a.bias": ("BF16", weights(1, 64)[0]),
        "odd.weight": ("BF16", weights(9, 13)),
        "noise.weight": ("BF16", np.random.default_rng(0).integers(0, 1 << 16, (64, 64)).astype(np.uint16)),
    }
    second = {
        "stack": ("BF16", weights(6 * 40, 256).reshape(6, 40, 256)),
        "zeros.weight": ("BF16", np.zeros((3, 512), np.uint16)),
        "empty": ("BF16", np.zeros((0, 8), np.uint16)),
        "scale": ("F32", np.float32(2.5).reshape(())),
    }
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    write(folder / names[0], first)
    write(folder / names[1], second)
    weight_map = dict.fromkeys(first, names[0]) | dict.fromkeys(second, names[1])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "pytorch_model.bin").write_bytes(b"not copied")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_a_packed_folder_holds_the_same_tensors_bit_for_bit(original: Path, tmp_path: Path) -> None:
    before, seen = contents(original), []
    packed = pack_folder(str(original), str(tmp_path / "packed"), lambda done, total: seen.append((done, total)))
    assert contents(original) == before
    assert sorted(os.listdir(tmp_path)) == ["original", "packed"]
    assert {file.name for file in (tmp_path / "packed").iterdir()} == set(before) - {"pytorch_model.bin"}
    compare(str(original), packed.path)
    tensors = open_folder(packed.path).tensors
    assert {name: (t.type, t.shape) for name, t in tensors.items()} == {
        name: (t.type, t.shape) for name, t in open_folder(str(original)).tensors.items()
    }
    names = {tensor.name for pairs in open_folder(packed.path).virtual.values() for tensor, _ in pairs}
    assert names == {"a.weight", "stack", "zeros.weight"}
    assert (packed.tensors, packed.packed_tensors) == (8, 3)
    assert packed.packed_bytes < 0.85 * packed.original_bytes
    assert seen[-1][0] == seen[-1][1]


def test_blocks_of_a_few_rows_give_the_same_file(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack_folder(str(original), str(tmp_path / "large"))
    monkeypatch.setattr(packing, "BLOCK_BYTES", 300)
    pack_folder(str(original), str(tmp_path / "small"))
    assert contents(tmp_path / "small") == contents(tmp_path / "large")


def test_a_bit_that_differs_is_found(original: Path, tmp_path: Path) -> None:
    packed = pack_folder(str(original), str(tmp_path / "packed")).path
    file = tmp_path / "packed" / "model-00002-of-00002.safetensors"
    data = bytearray(file.read_bytes())
    place = next(t for t, e in next(iter(open_folder(packed).virtual.values())) if t.name == "stack")
    encoding = next(e for t, e in next(iter(open_folder(packed).virtual.values())) if t.name == "stack")
    assert isinstance(encoding, Exponents)
    data[encoding.stored.offset + 101 * encoding.stored.columns - 1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"`stack` differs in the rows 0 to 239"):
        compare(str(original), packed)
    assert place.rows == 240


def test_a_killed_run_leaves_no_model_and_the_next_run_overwrites_it(original: Path, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def kill(done: int, total: int) -> None:
        if done > 0.9 * total:
            raise Killed

    with pytest.raises(Killed):
        pack_folder(str(original), str(tmp_path / "packed"), kill)
    assert os.listdir(tmp_path) == ["original"]
    partial = tmp_path / "packed.partial"  # left by a kill, without cleanup
    partial.mkdir()
    (partial / "model-00001-of-00002.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError):
        open_folder(str(partial))
    compare(str(original), pack_folder(str(original), str(tmp_path / "packed")).path)
    assert not partial.exists()


def test_a_partial_folder_with_strange_files_is_not_touched(original: Path, tmp_path: Path) -> None:
    partial = tmp_path / "packed.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"thesis\.txt"):
        pack_folder(str(original), str(tmp_path / "packed"))
    assert (partial / "thesis.txt").read_text() == "mine"


def test_a_full_disk_is_an_error_and_leaves_nothing(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(packing.os, "fsync", full)
    with pytest.raises(HeadraceError, match="No space left on device"):
        pack_folder(str(original), str(tmp_path / "packed"))
    assert os.listdir(tmp_path) == ["original"]


def test_too_little_disk_space_is_an_error_before_a_file_is_written(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = packing.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(HeadraceError, match="free"):
        pack_folder(str(original), str(tmp_path / "packed"))
    assert os.listdir(tmp_path) == ["original"]


def test_a_folder_that_cannot_be_packed_is_refused(original: Path, tmp_path: Path) -> None:
    packed = pack_folder(str(original), str(tmp_path / "packed")).path
    with pytest.raises(UnsupportedError, match="packed already"):
        pack_folder(packed, str(tmp_path / "again"))
    with pytest.raises(UsageError, match="there already"):
        pack_folder(str(original), packed)
    with pytest.raises(UsageError, match="original's folder"):
        pack_folder(str(original), str(original / "packed"))
    with pytest.raises(UsageError, match="no folder"):
        pack_folder(str(original / "config.json"), str(tmp_path / "other"))
    plain = tmp_path / "plain"
    plain.mkdir()
    write(plain / "model.safetensors", {"a.weight": ("F16", np.zeros((8, 8), np.float16))})
    (plain / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UnsupportedError, match="no BF16"):
        pack_folder(str(plain), str(tmp_path / "other"))


def test_the_command_packs_checks_and_says_so(original: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["pack", str(original), str(tmp_path / "packed"), "--check", "--json"])
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["packed_tensors"] == 3
    assert answer["checked"] is True
    assert answer["share"] == pytest.approx(answer["packed_bytes"] / answer["original_bytes"])


def test_a_record_has_the_size_of_its_layout() -> None:
    assert record_bytes(64, 5) == 3 + 32 + 5 + 64
