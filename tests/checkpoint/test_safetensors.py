"""Folders of safetensors files, good ones and bad ones. The bad ones are made by hand, since no writer makes them."""

import json
import os
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from headrace.checkpoint import Tensor
from headrace.checkpoint.safetensors import INDEX, MAX_HEADER_BYTES, Folder, read_folder, read_safetensors
from headrace.checkpoint.source import LocalSource
from headrace.errors import CheckpointError, HeadraceError, ReadError, UnsupportedError
from headrace.units import MIB

Json = dict[str, Any]


def entry(begin: int = 0, end: int = 8, *, dtype: Any = "F32", shape: Any = (2,)) -> Json:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def raw(header: bytes | str, data: int = 0, length: int | None = None) -> bytes:
    """A file of this header and `data` bytes of data."""
    header = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(header) if length is None else length) + header + bytes(data)


def content(entries: Json, data: int = 8) -> bytes:
    return raw(json.dumps(entries), data)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def opened(path: Path, data: bytes) -> dict[str, Tensor]:
    path.write_bytes(data)
    return read_safetensors(str(path))


def fails(action: Callable[[], object], match: str, kind: type[HeadraceError] = CheckpointError) -> HeadraceError:
    with pytest.raises(kind, match=match) as caught:
        action()
    assert type(caught.value) is kind
    assert caught.value.hint
    assert len(str(caught.value)) < 1500
    return caught.value


def refused(path: Path, data: bytes, match: str, kind: type[HeadraceError] = CheckpointError) -> HeadraceError:
    error = fails(lambda: opened(path, data), match, kind)
    assert str(path) in str(error)
    return error


# One file


@pytest.mark.parametrize(
    ("dtype", "nbytes"),
    [
        *[(name, 1) for name in ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")],
        *[(name, 2) for name in ("U16", "I16", "F16", "BF16")],
        *[(name, 4) for name in ("U32", "I32", "F32")],
        *[(name, 8) for name in ("U64", "I64", "F64", "C64")],
    ],
)
def test_a_tensor_of_every_type_of_whole_bytes_is_read(path: Path, dtype: str, nbytes: int) -> None:
    data = content({"a": entry(0, 6 * nbytes, dtype=dtype, shape=[2, 3])}, 6 * nbytes)

    tensor = opened(path, data)["a"]

    assert (tensor.name, tensor.type, tensor.shape, tensor.path) == ("a", dtype, (2, 3), str(path))
    assert (tensor.offset, tensor.nbytes) == (len(data) - 6 * nbytes, 6 * nbytes)
    assert (tensor.rows, tensor.columns, tensor.row_bytes) == (2, 3, 3 * nbytes)


def test_a_scalar_has_no_dimensions_and_an_empty_tensor_no_bytes(path: Path) -> None:
    entries = {"empty": entry(4, 4, shape=[0, 1 << 40]), "scalar": entry(0, 4, shape=[]), "end": entry(4, 8, shape=[1])}

    tensors = opened(path, content(entries))

    assert tensors["scalar"].shape == ()
    assert (tensors["empty"].shape, tensors["empty"].nbytes) == ((0, 1 << 40), 0)
    assert list(tensors) == ["empty", "scalar", "end"]


def test_a_file_of_no_tensors_is_a_file(path: Path) -> None:
    assert opened(path, raw("{}")) == opened(path, raw('{"__metadata__": {"format": "pt"}}   ')) == {}


def test_a_name_may_hold_any_character(path: Path) -> None:
    for text in ('{"ü/大\\ud83d\\ude00": %s}', '{"ü/大😀": %s}'):
        assert list(opened(path, raw(text % json.dumps(entry()), 8))) == ["ü/大😀"]


def test_unknown_keys_are_ignored(path: Path) -> None:
    assert opened(path, content({"a": {**entry(), "compressed": None}}))["a"].nbytes == 8


@pytest.mark.parametrize("length", [0, 1, 11, MAX_HEADER_BYTES + 1, 1 << 63, (1 << 64) - 1])
def test_a_header_of_impossible_length_is_not_read(path: Path, length: int) -> None:
    refused(path, raw("{}", 8, length), f"would have {length} bytes; 2 to 10 are possible")


def test_a_header_above_the_limit_of_the_format_is_not_read(path: Path) -> None:
    path.write_bytes(raw("{}", 0, MAX_HEADER_BYTES + 1))
    os.truncate(path, 1 << 40)

    fails(lambda: read_safetensors(str(path)), f"2 to {MAX_HEADER_BYTES} are possible")


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_file_without_a_length_is_truncated(path: Path, size: int) -> None:
    refused(path, bytes(size), "empty" if not size else "truncated|1 bytes|zeros")


def test_a_pointer_of_git_lfs_is_known(path: Path) -> None:
    error = refused(path, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer")

    assert error.hint is not None
    assert "git lfs pull" in error.hint


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ("[]", "no JSON object"),
        (" {}", "no JSON object"),
        (b"\xef\xbb\xbf{}", "no JSON object"),
        ("{} x", "not sound JSON"),
        ('{"a": 1', "not sound JSON"),
        (b'{"\xff": 1}', "not sound JSON"),
        ("{}".encode("utf-16-le"), "not sound JSON"),
        (r'{"\ud800": 1}', "not sound JSON.*surrogate"),
        (r'{"a\uD800b": 1}', "not sound JSON.*surrogate"),
        ('{"a": NaN}', "NaN is no JSON number"),
        ('{"a": -Infinity}', "-Infinity is no JSON number"),
        (f'{{"a": {"9" * 5000}}}', "not sound JSON"),
        ('{"a": ' + "[" * 100_000, "nested too deep"),
        ('{"a": ' + '{"a":' * 100_000, "nested too deep"),
        ('{"a": 1, "b": 2, "a": 3}', "'a' is given 2 times"),
        ('{"a": {"dtype": "F32", "dtype": "F16"}}', "'dtype' is given 2 times"),
    ],
)
def test_a_header_that_is_no_valid_json_object_is_refused(path: Path, header: str | bytes, match: str) -> None:
    refused(path, raw(header), match)


@pytest.mark.parametrize("metadata", [None, [], "text", {"format": 1}, {"format": {"a": "b"}}, {"format": None}])
def test_metadata_that_is_not_of_texts_is_refused(path: Path, metadata: object) -> None:
    refused(path, content({"__metadata__": metadata, "a": entry()}), "__metadata__")


@pytest.mark.parametrize("key", ["dtype", "shape", "data_offsets"])
def test_an_entry_that_lacks_a_key_is_refused(path: Path, key: str) -> None:
    refused(path, content({"a": {k: v for k, v in entry().items() if k != key}}), "tensor `a` is .* not an object with")


@pytest.mark.parametrize("value", [None, 1, "text", [], {}, [["dtype", "F32"]], {"x": {"y": list(range(100_000))}}])
def test_an_entry_that_is_no_object_is_refused(path: Path, value: object) -> None:
    refused(path, content({"a": value}), "tensor `a` is .* not an object with")


def test_a_name_beyond_the_limit_is_refused(path: Path) -> None:
    refused(path, content({"a" * 1025: entry()}), "1025 characters, the limit is 1024")


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2"])
def test_types_of_less_than_a_byte_are_not_supported(path: Path, dtype: str) -> None:
    refused(path, content({"a": entry(dtype=dtype, shape=[16])}), f"stored as {dtype}", UnsupportedError)


@pytest.mark.parametrize("dtype", ["F99", "f32", "Q4_K", "", "x" * 100_000])
def test_an_unknown_type_is_not_supported(path: Path, dtype: str) -> None:
    refused(path, content({"a": entry(dtype=dtype)}), "unknown type", UnsupportedError)


@pytest.mark.parametrize("dtype", [None, 1, ["F32"], {"F32": 1}])
def test_a_type_that_is_no_word_is_refused(path: Path, dtype: object) -> None:
    refused(path, content({"a": entry(dtype=dtype)}), "not a word")


@pytest.mark.parametrize(
    "shape",
    [
        None,
        2,
        "2",
        {"2": 2},
        [-1],
        [-1, -2],
        [2.0],
        ["2"],
        [True, 2],
        [None],
        [[2]],
        [1 << 63],
        [0, 1 << 63],
        [1 << 32, 1 << 32],
        [0, 1 << 32, 1 << 32],
        [1] * 65,
        [10**4000] * 64,
    ],
)
def test_an_invalid_shape_is_refused(path: Path, shape: object) -> None:
    refused(path, content({"a": entry(shape=shape)}), "tensor `a` has the shape")


@pytest.mark.parametrize("span", [None, 8, [], [8], [0, 8, 8], ["0", "8"], [0, 8.0], [False, 8], {"0": 8}])
def test_a_span_that_is_not_two_numbers_is_refused(path: Path, span: object) -> None:
    refused(path, content({"a": {**entry(), "data_offsets": span}}), "not two whole numbers")


@pytest.mark.parametrize("span", [(-8, 0), (8, 0), (0, 9), (1, 9), (1 << 70, 1 << 71), (0, 10**4000), (-(10**4000), 8)])
def test_a_span_outside_of_the_data_is_refused(path: Path, span: tuple[int, int]) -> None:
    refused(path, content({"a": entry(*span)}), "of 8 bytes of data")


@pytest.mark.parametrize(("shape", "needs"), [([1], 4), ([3], 12), ([], 4), ([0], 0), ([1 << 40], 4 << 40)])
def test_a_span_of_another_size_than_the_shape_is_refused(path: Path, shape: list[int], needs: int) -> None:
    refused(path, content({"a": entry(shape=shape)}), f"needs {needs} bytes as F32, it has 8")


def test_a_file_that_ends_before_its_last_tensor_is_refused(path: Path) -> None:
    error = refused(path, content({"a": entry(0, 8), "b": entry(8, 16)}, 15), "`b` lies from 8 to 16 of 15 bytes")

    assert error.hint is not None
    assert "truncated" in error.hint


def test_bytes_that_belong_to_no_tensor_are_refused(path: Path) -> None:
    refused(path, content({"a": entry()}, 9), "the last 1 of .* bytes belong to no tensor")
    refused(path, raw("{}", 1), "the last 1 of 11 bytes belong to no tensor")
    refused(path, content({"b": entry(12, 20), "a": entry(0, 8)}, 20), "`a` and tensor `b` leave 4 bytes between them")
    refused(path, content({"a": entry(4, 12)}, 12), "the header and tensor `a` leave 4 bytes between them")


@pytest.mark.parametrize(
    "second", [entry(0, 8), entry(4, 12), entry(4, 8, shape=[1]), entry(4, 4, shape=[0]), entry(0, 4, shape=[1])]
)
def test_tensors_that_overlap_are_refused(path: Path, second: Json) -> None:
    refused(path, content({"a": entry(0, 8), "b": second}, max(8, second["data_offsets"][1])), "overlap at")


@pytest.mark.parametrize("count", [1, 8])
def test_a_file_that_shrinks_or_fails_meanwhile_is_an_error(path: Path, count: int) -> None:
    path.write_bytes(content({"a": entry()}))

    class Shrinking(LocalSource):
        def pread(self, _: int, offset: int) -> bytes:
            return super().pread(max(count - offset, 0), offset)

    with pytest.raises(CheckpointError, match="ended at"):
        read_safetensors(str(path), Shrinking)


@pytest.mark.parametrize("data", [content({"a": entry()}), raw("[]"), bytes(3)])
def test_a_file_is_closed_whatever_it_holds(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    closed = []

    class Watched(LocalSource):
        def close(self) -> None:
            closed.append(self.path)
            super().close()

    try:
        read_safetensors(str(path), Watched)
    except CheckpointError:
        assert not data.startswith(content({"a": entry()}))
    assert closed == [str(path)]


# Folders


def zeros(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, np.float16) for name, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a configuration and no weights."""
    (tmp_path / "config.json").write_text('{"model_type": "llama", "auto_map": {"AutoModel": "x.Y"}}')
    return tmp_path


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1e9}, "weight_map": weight_map}))


@pytest.fixture
def sharded(folder: Path) -> Path:
    """Two shards and their index."""
    save_file(zeros(a=(2, 3), b=(4,)), folder / "one.safetensors")
    save_file(zeros(c=(5,)), folder / "two.safetensors")
    write_index(folder, {"c": "two.safetensors", "a": "one.safetensors", "b": "one.safetensors"})
    return folder


def read(folder: Path) -> Folder:
    return read_folder(str(folder))


def unreadable(path: Path, match: str, kind: type[HeadraceError] = CheckpointError) -> HeadraceError:
    return fails(lambda: read(path), match, kind)


def names_of(found: Folder) -> list[str]:
    return [os.path.basename(path) for path in found.paths]


def test_a_folder_of_one_file_is_read(folder: Path) -> None:
    save_file(zeros(a=(2, 3)), folder / "model.safetensors")
    save_file(zeros(b=(2, 3)), folder / "other.safetensors")
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')

    found = read(folder)

    assert (found.path, found.paths) == (str(folder), (str(folder / "model.safetensors"),))
    assert found.tensors == read_safetensors(str(folder / "model.safetensors"))
    assert found.config == {"model_type": "llama", "auto_map": {"AutoModel": "x.Y"}}
    assert found.generation == {"eos_token_id": [1, 2]}


def test_a_folder_of_shards_is_read_by_its_index(sharded: Path) -> None:
    save_file(zeros(z=(1,)), sharded / "model.safetensors")

    found = read(sharded)

    assert names_of(found) == ["one.safetensors", "two.safetensors"]
    assert {name: os.path.basename(tensor.path) for name, tensor in found.tensors.items()} == {
        "a": "one.safetensors",
        "b": "one.safetensors",
        "c": "two.safetensors",
    }
    assert found.generation == {}


def test_only_files_that_hold_tensors_are_named(sharded: Path) -> None:
    (sharded / "two.safetensors").write_bytes(raw("{}"))
    save_file(zeros(a=(2,)), sharded / "one.safetensors")
    write_index(sharded, {"a": "one.safetensors"})

    assert names_of(read(sharded)) == ["one.safetensors"]


def test_a_tensor_missing_from_the_index_is_kept(sharded: Path) -> None:
    write_index(sharded, {"a": "one.safetensors", "c": "two.safetensors"})

    assert set(read(sharded).tensors) == {"a", "b", "c"}


def test_the_only_safetensors_file_of_a_folder_is_its_model(folder: Path) -> None:
    save_file(zeros(a=(2,)), folder / "weights.fp16.safetensors")
    save_file(zeros(x=(2,)), folder / "consolidated.safetensors")
    save_file(zeros(y=(2,)), folder / "adapter_model.safetensors")

    assert list(read(folder).tensors) == ["a"]


def test_a_set_of_parts_needs_no_index(folder: Path) -> None:
    for i in (1, 2, 3):
        save_file(zeros(**{f"t{i}": (i,)}), folder / f"w-{i:05d}-of-00003.safetensors")

    assert names_of(read(folder)) == [f"w-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert set(read(folder).tensors) == {"t1", "t2", "t3"}


def test_a_set_that_lacks_parts_says_how_many(folder: Path) -> None:
    save_file(zeros(a=(2,)), folder / "w-00002-of-00004.safetensors")

    unreadable(folder, "3 of 4 weight files are missing, the first is .*w-00001-of-00004")


def test_files_that_are_not_one_set_are_an_error(folder: Path) -> None:
    save_file(zeros(a=(2,)), folder / "w-00001-of-00001.safetensors")
    save_file(zeros(b=(2,)), folder / "v.safetensors")

    unreadable(folder, "2 .safetensors files that are not one set")


def test_one_file_may_be_named_instead_of_the_folder(sharded: Path) -> None:
    found = read(sharded / "two.safetensors")

    assert (found.path, list(found.tensors), found.config["model_type"]) == (str(sharded), ["c"], "llama")


def test_one_part_stands_for_its_set(folder: Path) -> None:
    for i in (1, 2):
        save_file(zeros(**{f"t{i}": (i,)}), folder / f"w-{i:05d}-of-00002.safetensors")

    assert set(read(folder / "w-00002-of-00002.safetensors").tensors) == {"t1", "t2"}
    (folder / "w-00001-of-00002.safetensors").unlink()
    unreadable(folder / "w-00002-of-00002.safetensors", "1 of 2 weight files are missing")


def test_a_file_may_be_named_from_within_its_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(zeros(a=(2,)), folder / "model.safetensors")
    monkeypatch.chdir(folder)

    assert list(read_folder("model.safetensors").tensors) == ["a"]


def test_a_folder_may_have_the_name_of_a_file(folder: Path) -> None:
    inner = folder / "x.safetensors"
    inner.mkdir()
    save_file(zeros(a=(2,)), inner / "model.safetensors")
    (inner / "config.json").write_text("{}")

    assert list(read(inner).tensors) == ["a"]


@pytest.mark.parametrize("name", ["missing", "missing.safetensors", "config.json", "a\0b", "no/where.safetensors"])
def test_a_path_that_is_no_folder_or_file_is_an_error(folder: Path, name: str) -> None:
    unreadable(folder / name, "cannot open")


def test_shards_far_larger_than_memory_are_read_from_their_headers(folder: Path) -> None:
    shards, each, nbytes = 5, 40, 1 << 35
    for i in range(shards):
        entries = {f"{i}.{j}": entry(j * nbytes, (j + 1) * nbytes, shape=[nbytes // 4]) for j in range(each)}
        part = folder / f"w-{i + 1:05d}-of-{shards:05d}.safetensors"
        part.write_bytes(content(entries, 0))
        os.truncate(part, part.stat().st_size + each * nbytes)

    tracemalloc.start()
    found = read(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert len(found.tensors) == shards * each
    assert sum(tensor.nbytes for tensor in found.tensors.values()) == shards * each * nbytes
    assert peak < 4 * MIB


@pytest.mark.parametrize(
    ("names", "match", "hint"),
    [
        (["consolidated.safetensors"], "Mistral's own format", "model.safetensors"),
        (["consolidated-00001-of-00002.safetensors"], "Mistral's own format", "model.safetensors"),
        (["adapter_model.safetensors"], "an adapter", "merge it"),
        (["pytorch_model.bin"], "pickled", "safetensors or GGUF version"),
        (["pytorch_model-00001-of-00002.bin", "training_args.bin"], "pickled", "safetensors or GGUF version"),
        (["consolidated.00.pth"], "pickled", "safetensors or GGUF version"),
        (["model.pt"], "pickled", "safetensors or GGUF version"),
    ],
)
def test_weights_of_another_format_are_not_supported(folder: Path, names: list[str], match: str, hint: str) -> None:
    for name in names:
        (folder / name).write_bytes(b"")

    assert hint in str(unreadable(folder, match, UnsupportedError).hint)


@pytest.mark.parametrize("name", ["consolidated.safetensors", "adapter_model.safetensors"])
def test_a_file_of_another_format_is_not_supported(folder: Path, name: str) -> None:
    save_file(zeros(a=(2,)), folder / name)

    unreadable(folder / name, name, UnsupportedError)


def test_a_folder_of_gguf_files_is_pointed_into(tmp_path: Path) -> None:
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")

    assert "model-Q4_K_M.gguf" in str(unreadable(tmp_path, "folder of 1 GGUF files").hint)


def test_a_folder_without_weights_is_an_error(folder: Path) -> None:
    unreadable(folder, "holds no weights")
    (folder / "model.safetensors").write_bytes(raw("{}"))
    unreadable(folder, "holds no tensors")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "empty"),
        ("[]", "not a JSON object"),
        ("{}", "`weight_map` is None"),
        ('{"weight_map": {}}', "`weight_map` is {}"),
        ('{"weight_map": ["a"]}', "`weight_map` is"),
        ('{"weight_map": {"a": 1}}', "not a file name"),
        ('{"weight_map": {"a": null, "b": "one.safetensors"}}', "not a file name"),
        ('{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}', "'a' is given 2 times"),
        ('{"weight_map": {"a": NaN}}', "NaN"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_an_invalid_index_is_refused(sharded: Path, text: str, match: str) -> None:
    (sharded / INDEX).write_text(text)

    assert INDEX in str(unreadable(sharded, match))


@pytest.mark.parametrize(
    "name",
    [
        "../one.safetensors",
        "/etc/one.safetensors",
        "sub/one.safetensors",
        "..\\one.safetensors",
        "C:\\one.safetensors",
        "one.safetensors\0",
        "\0.safetensors",
        "..",
        ".",
        "",
        "one.bin",
        "one.safetensors/..",
        "x" * 100_000,
    ],
)
def test_an_index_cannot_lead_out_of_its_folder(sharded: Path, name: str) -> None:
    (sharded / "sub").mkdir()
    save_file(zeros(a=(2,)), sharded / "sub" / "one.safetensors")
    write_index(sharded, {"a": name})

    unreadable(sharded, "is not the name of a .safetensors file")


def test_missing_shards_are_counted(sharded: Path) -> None:
    write_index(sharded, {"a": "one.safetensors", "d": "four.safetensors", "e": "three.safetensors"})

    unreadable(sharded, f"2 of 3 weight files are missing, the first is {sharded}/four.safetensors")


def test_tensors_that_are_not_where_the_index_says_are_counted(sharded: Path) -> None:
    write_index(sharded, {"a": "one.safetensors", "x": "two.safetensors", "b": "two.safetensors"})

    unreadable(sharded, "2 of 3 tensors are not in the files .* the first is 'x' in two.safetensors")


def test_a_tensor_in_two_shards_is_an_error(sharded: Path) -> None:
    save_file(zeros(c=(5,), b=(4,)), sharded / "two.safetensors")

    unreadable(sharded, "`b` is also in")


def test_a_damaged_shard_is_named(sharded: Path) -> None:
    (sharded / "two.safetensors").write_bytes(b"")

    unreadable(sharded, "two.safetensors is not a safetensors file: it is empty")


@pytest.mark.parametrize(
    ("text", "match"),
    [("", "empty"), ("[1]", "not a JSON object"), ("[" * 100_000, "nested too deep"), ("{", "not sound")],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_an_invalid_configuration_is_refused(sharded: Path, name: str, text: str, match: str) -> None:
    (sharded / name).write_text(text)

    assert name in str(unreadable(sharded, match))


def test_a_configuration_may_hold_what_python_writes(sharded: Path) -> None:
    (sharded / "config.json").write_text('{"time_step_limit": [0.0, Infinity], "a": 1, "a": 2}')

    assert read(sharded).config == {"time_step_limit": [0.0, float("inf")], "a": 2}


def test_a_configuration_is_needed(sharded: Path) -> None:
    (sharded / "config.json").unlink()

    unreadable(sharded, "has no config.json")


@pytest.mark.parametrize(("name", "size"), [("config.json", 32 << 20), (INDEX, MAX_HEADER_BYTES)])
def test_a_configuration_or_index_of_absurd_size_is_not_read(sharded: Path, name: str, size: int) -> None:
    os.truncate(sharded / name, size + 1)

    assert name in str(unreadable(sharded, f"has {size + 1} bytes, the limit is {size}"))


def test_a_folder_where_a_file_is_expected_is_an_error(sharded: Path) -> None:
    (sharded / "generation_config.json").mkdir()

    unreadable(sharded, "is not a file")


# Other sources


class Elsewhere:
    """Source of files outside any local folder; it records the requests."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.asked: list[str] = []
        self.open = 0

    def __call__(self, path: str) -> LocalSource:
        self.asked.append(path)
        root, name = path.rsplit("/", 1)
        assert root == "some/root"
        source = LocalSource(str(self.folder / name))
        source.path = path
        self.open += 1
        close = source.close

        def counted() -> None:
            self.open -= 1
            close()

        source.close = counted  # type: ignore[method-assign]
        return source


def test_only_names_are_requested_from_a_remote_source(sharded: Path) -> None:
    elsewhere = Elsewhere(sharded)

    found = read_folder("some/root", elsewhere)

    assert found.paths == ("some/root/one.safetensors", "some/root/two.safetensors")
    assert elsewhere.asked == [
        f"some/root/{name}"
        for name in (INDEX, "config.json", "two.safetensors", "one.safetensors", "generation_config.json")
    ]
    assert elsewhere.open == 0


def test_a_remote_source_may_have_one_file_and_no_index(folder: Path) -> None:
    save_file(zeros(a=(2, 3)), folder / "model.safetensors")

    assert list(read_folder("some/root", Elsewhere(folder)).tensors) == ["a"]
    assert list(read_folder("some/root/model.safetensors", Elsewhere(folder)).tensors) == ["a"]


@pytest.mark.parametrize("name", ["config.json", "two.safetensors"])
def test_a_file_that_a_remote_source_lacks_is_an_error(sharded: Path, name: str) -> None:
    (sharded / name).unlink()

    fails(lambda: read_folder("some/root", Elsewhere(sharded)), name)


def test_a_connection_that_fails_is_not_an_absent_file(sharded: Path) -> None:
    def broken(path: str) -> LocalSource:
        raise ReadError(f"cannot reach {path}")

    with pytest.raises(ReadError, match=INDEX):
        read_folder("some/root", broken)


def test_no_framework_is_imported() -> None:
    code = (
        "import sys, headrace.checkpoint.safetensors; print({'torch', 'safetensors', 'transformers'} & {*sys.modules})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize("length", [0x280, 0x8B1F, 0x5A42, 0x584850], ids=["pickle", "gzip", "BZ", "letters"])
def test_the_length_of_a_header_is_no_signature_of_another_format(length: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw(json.dumps({"a": entry()}).ljust(length), 8))
    assert list(read_safetensors(str(path))) == ["a"]
