"""GGUF headers, good ones and bad ones. The bad ones are made by hand, since no writer makes them."""

import errno
import os
import struct
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, quantize

from headrace.checkpoint import Checkpoint, open_checkpoint
from headrace.errors import CheckpointError, HeadraceError, UnsupportedError
from headrace.units import MIB

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
HUGE = (1 << 60, 1 << 63, (1 << 64) - 1)


def text(value: str | bytes) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(element: int, count: int, values: bytes) -> bytes:
    return struct.pack("<IQ", element, count) + values


def entry(name: str | bytes, shape: tuple[int, ...], kind: GGMLQuantizationType | int, offset: int) -> bytes:
    """A row of the tensor table; the shape is in torch's order, and reversed in the file."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, offset)


def header(
    pairs: list[bytes],
    entries: list[bytes],
    *,
    version: int = 3,
    tensor_count: int | None = None,
    pair_count: int | None = None,
) -> bytes:
    tensor_count = len(entries) if tensor_count is None else tensor_count
    pair_count = len(pairs) if pair_count is None else pair_count
    return b"GGUF" + struct.pack("<IQQ", version, tensor_count, pair_count) + b"".join(pairs + entries)


def padded(head: bytes, data: int, alignment: int = 32) -> bytes:
    """A header and `data` bytes of tensors behind it."""
    return head + bytes(-len(head) % alignment) + bytes(data)


NAMED = pair("general.architecture", STRING, text("llama"))
F32_TYPE, F16_TYPE, Q8_0_TYPE, Q4_0_TYPE = (GGMLQuantizationType[name] for name in ("F32", "F16", "Q8_0", "Q4_0"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def opened(path: Path, content: bytes) -> Checkpoint:
    path.write_bytes(content)
    return open_checkpoint(path)


def written(path: Path, fill: Callable[[GGUFWriter], None], **options: int) -> Path:
    """A file written by the `gguf` package, filled by `fill`."""
    writer = GGUFWriter(path, "llama", **options)
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refused(path: Path, content: bytes, match: str, kind: type[HeadraceError] = CheckpointError) -> HeadraceError:
    with pytest.raises(kind, match=match) as caught:
        opened(path, content)
    assert type(caught.value) is kind
    assert str(path) in str(caught.value)
    return caught.value


def peak_bytes(action: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# Metadata


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (GGUFValueType.UINT8, 200),
        (GGUFValueType.INT8, -100),
        (GGUFValueType.UINT16, 60_000),
        (GGUFValueType.INT16, -30_000),
        (GGUFValueType.UINT32, 4_000_000_000),
        (GGUFValueType.INT32, -2_000_000_000),
        (GGUFValueType.UINT64, (1 << 64) - 1),
        (GGUFValueType.INT64, -(1 << 63)),
        (GGUFValueType.FLOAT32, 0.5),
        (GGUFValueType.FLOAT64, 1e-300),
        (GGUFValueType.BOOL, True),
        (GGUFValueType.BOOL, False),
        (GGUFValueType.STRING, "größer, 大きい"),
        (GGUFValueType.STRING, ""),
    ],
)
def test_a_scalar_of_every_type_is_read(path: Path, kind: GGUFValueType, value: object) -> None:
    checkpoint = open_checkpoint(written(path, lambda writer: writer.add_key_value("llama.key", value, kind)))

    assert checkpoint.get("llama.key") == value
    assert type(checkpoint.get("llama.key")) is type(value)


def test_a_key_is_found_without_the_name_of_its_architecture(path: Path) -> None:
    pairs = [
        NAMED,
        pair("llama.block_count", U32, struct.pack("<I", 22)),
        pair("llama.a", U8, b"\1"),
        pair("a", U8, b"\2"),
    ]
    checkpoint = opened(path, header(pairs, []))

    assert checkpoint.architecture == "llama"
    assert checkpoint.get("block_count") == checkpoint.get("llama.block_count") == 22
    assert checkpoint.get("a") == 2
    assert checkpoint.get("absent") is None


def test_an_array_is_skipped_and_read_on_request(path: Path) -> None:
    words = ["<s>", "", "größer", "x" * 3000]

    def fill(writer: GGUFWriter) -> None:
        writer.add_array("words", words)
        writer.add_array("numbers", [1, -2, 3])
        writer.add_array("scores", [0.5, -1.25])
        writer.add_array("flags", [True, False])
        writer.add_uint32("after", 7)

    checkpoint = open_checkpoint(written(path, fill))

    assert checkpoint.get("after") == 7
    assert [checkpoint.get(key) for key in ("words", "numbers", "scores", "flags")] == [None] * 4
    assert checkpoint.array("words") == words
    assert checkpoint.array("numbers") == [1, -2, 3]
    assert checkpoint.array("scores") == [0.5, -1.25]
    assert checkpoint.array("flags") == [True, False]


@pytest.mark.parametrize(
    ("element", "code", "values"),
    [
        (U8, "B", [0, 255]),
        (I8, "b", [-128, 127]),
        (U16, "H", [0, 65535]),
        (I16, "h", [-32768]),
        (U32, "I", [4_000_000_000]),
        (I32, "i", [-1, 1]),
        (F32, "f", [0.5, -0.25, 8.0]),
        (BOOL, "?", [True, False, True]),
        (U64, "Q", [(1 << 64) - 1]),
        (I64, "q", [-(1 << 63), 5]),
        (F64, "d", [1e300]),
        (I32, "i", []),
    ],
)
def test_an_array_of_every_type_is_read(path: Path, element: int, code: str, values: list[object]) -> None:
    data = array(element, len(values), struct.pack(f"<{len(values)}{code}", *values))
    checkpoint = opened(path, header([NAMED, pair("llama.list", ARRAY, data), pair("after", U8, b"\7")], []))

    assert checkpoint.array("list") == checkpoint.array("llama.list") == values
    assert checkpoint.get("after") == 7


def test_an_array_that_is_absent_or_a_scalar_is_empty(path: Path) -> None:
    checkpoint = opened(path, header([NAMED, pair("one", U8, b"\1"), pair("none", ARRAY, array(STRING, 0, b""))], []))

    assert checkpoint.array("absent") == checkpoint.array("one") == checkpoint.array("none") == []


def test_an_array_whose_file_shrank_since_is_an_error(path: Path) -> None:
    data = array(U32, 100, bytes(400))
    checkpoint = opened(path, header([NAMED, pair("list", ARRAY, data)], []))
    os.truncate(path, path.stat().st_size - 1)

    with pytest.raises(CheckpointError, match="truncated"):
        checkpoint.array("list")


def test_an_array_whose_file_is_gone_is_an_error(path: Path) -> None:
    checkpoint = opened(path, header([NAMED, pair("list", ARRAY, array(U8, 1, b"\1"))], []))
    path.unlink()

    with pytest.raises(CheckpointError, match="cannot open"):
        checkpoint.array("list")


def test_a_number_is_a_scalar_or_the_largest_of_a_list(path: Path) -> None:
    pairs = [
        NAMED,
        pair("llama.layers", U32, struct.pack("<I", 3)),
        pair("llama.heads", ARRAY, array(U32, 3, struct.pack("<3I", 4, 8, 2))),
        pair("llama.empty", ARRAY, array(U32, 0, b"")),
    ]
    checkpoint = opened(path, header(pairs, []))

    assert checkpoint.number("layers") == 3
    assert checkpoint.number("llama.layers", 9) == 3
    assert checkpoint.number("heads") == 8
    assert checkpoint.number("absent", 9) == 9
    assert checkpoint.number("empty", 9) == 9


@pytest.mark.parametrize(
    "value",
    [
        pair("other", U8, b"\1"),
        pair("llama.key", F32, struct.pack("<f", 2.0)),
        pair("llama.key", BOOL, b"\1"),
        pair("llama.key", STRING, text("2")),
        pair("llama.key", ARRAY, array(F32, 1, struct.pack("<f", 2.0))),
        pair("llama.key", ARRAY, array(BOOL, 1, b"\1")),
        pair("llama.key", ARRAY, array(U8, 0, b"")),
    ],
)
def test_a_value_that_is_no_integer_is_an_error_where_one_is_needed(path: Path, value: bytes) -> None:
    checkpoint = opened(path, header([NAMED, value], []))

    with pytest.raises(CheckpointError, match=r"`llama\.key` is .*, not a number"):
        checkpoint.number("key")


def test_the_name_is_the_models_own_or_the_files(path: Path) -> None:
    assert opened(path, header([NAMED, pair("general.name", STRING, text("Tiny Llama"))], [])).name == "Tiny Llama"
    assert opened(path, header([NAMED, pair("general.name", STRING, text(""))], [])).name == "model"
    assert opened(path, header([NAMED], [])).name == "model"


def test_bytes_that_are_no_text_do_not_stop_the_reader(path: Path) -> None:
    checkpoint = opened(path, header([NAMED, pair("general.name", STRING, text(b"caf\xe9"))], []))

    assert checkpoint.name == "caf\N{REPLACEMENT CHARACTER}"


# Tensors


def test_the_table_has_the_offset_of_every_tensor(path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {
        "token_embd.weight": (quantize(rng.standard_normal((5, 64), np.float32), Q8_0_TYPE), Q8_0_TYPE),
        "blk.0.ffn_up.weight": (quantize(rng.standard_normal((3, 96), np.float32), Q4_0_TYPE), Q4_0_TYPE),
        "blk.0.norm.weight": (rng.standard_normal(7, np.float32), F32_TYPE),
        "conv": (rng.standard_normal((2, 3, 4, 5), np.float32).astype(np.float16), F16_TYPE),
    }

    def fill(writer: GGUFWriter) -> None:
        for name, (data, kind) in weights.items():
            writer.add_tensor(name, data, raw_dtype=kind)

    checkpoint = open_checkpoint(written(path, fill))

    content = path.read_bytes()
    tensors = checkpoint.tensors
    assert list(tensors) == list(weights)
    assert [tensor.shape for tensor in tensors.values()] == [(5, 64), (3, 96), (7,), (2, 3, 4, 5)]
    assert [tensor.type for tensor in tensors.values()] == ["Q8_0", "Q4_0", "F32", "F16"]
    # Q8_0: 34 bytes for 32 weights. Q4_0: 18 bytes for 32 weights.
    assert [tensor.row_bytes for tensor in tensors.values()] == [2 * 34, 3 * 18, 7 * 4, 5 * 2]
    assert [tensor.rows for tensor in tensors.values()] == [5, 3, 1, 24]
    assert [tensor.columns for tensor in tensors.values()] == [64, 96, 7, 5]
    for name, (data, _) in weights.items():
        tensor = tensors[name]
        assert (tensor.name, tensor.path) == (name, str(path))
        assert tensor.nbytes == tensor.rows * tensor.row_bytes == data.nbytes
        assert content[tensor.offset : tensor.offset + tensor.nbytes] == data.tobytes()
    assert checkpoint.nbytes == sum(data.nbytes for data, _ in weights.values())
    assert checkpoint.vocab_size == 5
    assert checkpoint.paths == (str(path),)


def test_a_model_without_an_embedding_has_no_vocabulary(path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor `token_embd\.weight`"):
        _ = opened(path, header([NAMED], [])).vocab_size


def test_a_file_without_an_architecture_is_an_error_rather_than_a_missing_key(path: Path) -> None:
    with pytest.raises(CheckpointError, match="architecture"):
        opened(path, header([pair("llama.block_count", U8, b"\1")], [])).number("block_count")


@pytest.mark.parametrize("version", [2, 3])
def test_versions_2_and_3_are_read(path: Path, version: int) -> None:
    head = header([NAMED], [entry("a", (2, 4), F32_TYPE, 0)], version=version)

    assert opened(path, padded(head, 32)).tensors["a"].shape == (2, 4)


@pytest.mark.parametrize("alignment", [8, 16, 64, 4096])
def test_the_alignment_of_the_file_is_honoured(path: Path, alignment: int) -> None:
    head = header(
        [NAMED, pair("general.alignment", U32, struct.pack("<I", alignment))],
        [entry("a", (1, 1), F32_TYPE, 0), entry("b", (1, 1), F32_TYPE, alignment)],
    )
    tensors = opened(path, padded(head, alignment + 4, alignment)).tensors

    assert tensors["a"].offset == -(-len(head) // alignment) * alignment
    assert tensors["b"].offset == tensors["a"].offset + alignment


@pytest.mark.parametrize("alignment", [0, 1, 4, 24, (1 << 20) * 2, (1 << 32) - 1])
def test_an_alignment_that_is_no_power_of_two_from_8_to_a_mebibyte_is_an_error(path: Path, alignment: int) -> None:
    pairs = [NAMED, pair("general.alignment", U32, struct.pack("<I", alignment))]

    refused(path, padded(header(pairs, []), 64), "alignment")


@pytest.mark.parametrize(
    "value", [pair("general.alignment", STRING, text("32")), pair("general.alignment", F32, bytes(4))]
)
def test_an_alignment_that_is_no_number_is_an_error(path: Path, value: bytes) -> None:
    refused(path, padded(header([NAMED, value], []), 64), "alignment")


def test_tensors_may_lie_in_any_order_with_gaps(path: Path) -> None:
    entries = [entry("b", (1, 8), F32_TYPE, 128), entry("a", (1, 8), F32_TYPE, 0)]

    tensors = opened(path, padded(header([NAMED], entries), 160)).tensors

    assert tensors["b"].offset - tensors["a"].offset == 128


def test_a_name_of_the_greatest_length_is_read_and_a_longer_one_is_an_error(path: Path) -> None:
    assert "a" * 1024 in opened(path, padded(header([NAMED], [entry("a" * 1024, (1, 8), F32_TYPE, 0)]), 32)).tensors
    refused(path, padded(header([NAMED], [entry("a" * 1025, (1, 8), F32_TYPE, 0)]), 32), "1025 bytes long")


# Splits


def split(folder: Path, parts: int = 3) -> list[Path]:
    """A model of `parts` files, one tensor in each, by the writer of the `gguf` package."""

    def fill(writer: GGUFWriter) -> None:
        writer.add_uint32("llama.block_count", 5)
        writer.add_array("words", ["a", "b"])
        for number in range(parts):
            writer.add_tensor(f"t{number}", np.full((2, 4), number, np.float32))

    written(folder / "big.gguf", fill, split_max_tensors=1)
    return [folder / f"big-{number:05d}-of-{parts:05d}.gguf" for number in range(1, parts + 1)]


@pytest.mark.parametrize("named", [0, 1, 2])
def test_any_part_of_a_split_opens_all_of_it(tmp_path: Path, named: int) -> None:
    parts = split(tmp_path)

    checkpoint = open_checkpoint(parts[named])

    assert checkpoint.paths == tuple(map(str, parts))
    assert {name: tensor.path for name, tensor in checkpoint.tensors.items()} == {
        f"t{number}": str(part) for number, part in enumerate(parts)
    }
    assert checkpoint.number("block_count") == 5
    assert checkpoint.array("words") == ["a", "b"]
    for number, tensor in enumerate(checkpoint.tensors.values()):
        data = Path(tensor.path).read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
        assert data == np.full((2, 4), number, np.float32).tobytes()


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_missing_part_is_an_error_that_names_it(tmp_path: Path, gone: int) -> None:
    parts = split(tmp_path)
    parts[gone].unlink()

    with pytest.raises(CheckpointError, match="1 of 3 parts are missing") as caught:
        open_checkpoint(parts[1])
    assert str(parts[gone]) in str(caught.value)
    assert "one folder" in str(caught.value.hint)


def test_a_damaged_later_part_is_an_error_that_names_it(tmp_path: Path) -> None:
    parts = split(tmp_path)
    os.truncate(parts[2], 50)

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(parts[0])
    assert str(caught.value).startswith(str(parts[2]))


def test_a_part_with_another_name_is_an_error_that_tells_the_right_one(tmp_path: Path) -> None:
    lost = split(tmp_path)[0].rename(tmp_path / "model.gguf")

    with pytest.raises(CheckpointError, match="one of 3 parts") as caught:
        open_checkpoint(lost)
    assert "-00001-of-00003.gguf" in str(caught.value.hint)


@pytest.mark.parametrize("count", [2, 4])
def test_a_split_count_that_differs_from_the_number_of_files_is_an_error(tmp_path: Path, count: int) -> None:
    for number in range(1, 4):
        pairs = [NAMED] if number == 1 else []
        content = header([*pairs, pair("split.count", U16, struct.pack("<H", count))], [])
        (tmp_path / f"m-{number:05d}-of-00003.gguf").write_bytes(content)

    with pytest.raises(CheckpointError, match=f"one of {count} parts"):
        open_checkpoint(tmp_path / "m-00001-of-00003.gguf")


def test_a_tensor_in_two_parts_is_an_error(tmp_path: Path) -> None:
    parts = split(tmp_path)
    parts[2].write_bytes(parts[1].read_bytes())

    with pytest.raises(CheckpointError, match="two tensors are named `t1`"):
        open_checkpoint(parts[0])


def test_a_split_of_one_part_opens(tmp_path: Path) -> None:
    content = header([NAMED, pair("split.count", U16, b"\1\0")], [])

    assert opened(tmp_path / "m-00001-of-00001.gguf", content).architecture == "llama"


def test_a_folder_with_a_line_break_in_its_name_holds_a_split_like_any_other(tmp_path: Path) -> None:
    folder = tmp_path / "two\nlines"
    folder.mkdir()

    assert len(open_checkpoint(split(folder)[0]).paths) == 3


@pytest.mark.parametrize("name", ["m-00001-of-00000.gguf", "m-00000-of-00002.gguf", "m-00003-of-00002.gguf"])
def test_a_number_that_no_part_can_have_is_an_error_or_just_a_name(tmp_path: Path, name: str) -> None:
    for file in ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf", name):
        (tmp_path / file).write_bytes(header([NAMED], []))

    try:
        checkpoint = open_checkpoint(tmp_path / name)
    except CheckpointError:
        return
    assert str(tmp_path / name) in checkpoint.paths  # never other files instead of the one that was named


# Paths that cannot be read


def test_a_path_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot open .*: No such file") as caught:
        open_checkpoint(tmp_path / "absent.gguf")
    assert caught.value.hint


def test_a_path_below_a_file_is_an_error(path: Path) -> None:
    path.write_bytes(b"")

    with pytest.raises(CheckpointError, match="cannot open"):
        open_checkpoint(path / "below.gguf")


def test_a_link_to_itself_is_an_error(path: Path) -> None:
    path.symlink_to(path)

    with pytest.raises(CheckpointError, match="cannot open"):
        open_checkpoint(path)


def test_a_path_longer_than_any_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot open"):
        open_checkpoint(tmp_path / ("a" * 5000))


def test_a_path_with_a_zero_byte_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="cannot open"):
        open_checkpoint("model\0.gguf")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_path_without_permission_is_an_error(path: Path) -> None:
    path.write_bytes(header([NAMED], []))
    path.chmod(0)

    with pytest.raises(CheckpointError, match="Permission denied"):
        open_checkpoint(path)


def test_a_folder_without_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no weights") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.hint == "name a folder with a model.safetensors, or a .gguf file"


def test_a_folder_with_the_name_of_a_part_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(header([NAMED], []))
    (tmp_path / "m-00002-of-00002.gguf").mkdir()

    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "m-00001-of-00002.gguf")


def test_a_pipe_that_nobody_writes_is_an_error_and_not_waited_for(path: Path) -> None:
    os.mkfifo(path)
    raised: list[BaseException] = []

    def work() -> None:
        try:
            open_checkpoint(path)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(3)
    waited = thread.is_alive()
    if waited:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        thread.join()
    assert not waited
    assert isinstance(raised[0], CheckpointError)


def test_a_disk_that_fails_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(header([NAMED], []))

    def fail(fd: int, count: int, offset: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(HeadraceError, match="Input/output error"):
        open_checkpoint(path)


def test_a_file_that_ends_before_its_size_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(header([NAMED], []))
    monkeypatch.setattr(os, "pread", lambda fd, count, offset: b"")

    with pytest.raises(CheckpointError, match="ended at 0 bytes"):
        open_checkpoint(path)


def test_a_disk_that_returns_a_few_bytes_at_a_time_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(padded(header([NAMED], [entry("a", (2, 4), F32_TYPE, 0)]), 32))
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, count, offset: pread(fd, min(count, 7), offset))

    assert open_checkpoint(path).tensors["a"].shape == (2, 4)


# Files with false contents


@pytest.mark.parametrize(
    "content", [b"", b"G", b"GGU", b"GGML" + bytes(60), b"PK\3\4" + bytes(60), bytes(1000), b"FUGG" * 9]
)
def test_a_file_without_the_magic_is_not_a_gguf_file(path: Path, content: bytes) -> None:
    error = refused(path, content, "is not a GGUF file")
    assert error.hint


@pytest.mark.parametrize("version", [0, 1, 4, (1 << 32) - 1])
def test_an_unknown_version_is_an_error(path: Path, version: int) -> None:
    refused(path, padded(header([NAMED], [], version=version), 64), f"version {version}")


def test_a_truncated_header_is_an_error(path: Path) -> None:
    pairs = [
        NAMED,
        pair("a", U64, bytes(8)),
        pair("b", BOOL, b"\1"),
        pair("c", ARRAY, array(STRING, 3, text("x") + text("") + text("yz"))),
        pair("d", ARRAY, array(F64, 2, bytes(16))),
    ]
    entries = [entry("one", (2, 8), F32_TYPE, 0), entry("two", (1, 2, 32), Q8_0_TYPE, 64)]
    content = padded(header(pairs, entries), 64 + 68)
    assert len(opened(path, content).tensors) == 2

    for length in range(len(content) - 1, -1, -1):
        os.truncate(path, length)
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(path)
        assert type(caught.value) is CheckpointError, length


def test_truncated_tensor_data_is_an_error_with_the_next_step(path: Path) -> None:
    head = header([NAMED], [entry("a", (2, 4), F32_TYPE, 0)])

    assert opened(path, padded(head, 32)).nbytes == 32
    error = refused(path, padded(head, 31), r"tensor `a` \(32 bytes at \d+\) ends after the file")
    assert "download" in str(error.hint)


@pytest.mark.parametrize("offset", [32, 64, 1 << 40, *HUGE[:2], (1 << 64) - 32])
def test_an_offset_beyond_the_file_is_an_error(path: Path, offset: int) -> None:
    refused(path, padded(header([NAMED], [entry("a", (2, 4), F32_TYPE, offset)]), 32), "ends after the file")


@pytest.mark.parametrize("offset", [1, 4, 16, 33])
def test_a_misaligned_tensor_is_an_error(path: Path, offset: int) -> None:
    refused(path, padded(header([NAMED], [entry("a", (1, 4), F32_TYPE, offset)]), 128), "is not aligned to 32")


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 32), (32, 0), (0, 96)])
def test_overlapping_tensors_are_an_error(path: Path, first: int, second: int) -> None:
    entries = [entry("a", (4, 8), F32_TYPE, first), entry("b", (4, 8), F32_TYPE, second)]

    refused(path, padded(header([NAMED], entries), 512), "overlap")


def test_a_tensor_inside_of_another_is_an_error(path: Path) -> None:
    entries = [entry("a", (16, 8), F32_TYPE, 0), entry("c", (1, 8), F32_TYPE, 512), entry("b", (1, 8), F32_TYPE, 64)]

    refused(path, padded(header([NAMED], entries), 1024), "tensors `a` and `b` overlap")


def test_two_tensors_of_one_name_are_an_error(path: Path) -> None:
    entries = [entry("a", (1, 8), F32_TYPE, 0), entry("a", (1, 8), F32_TYPE, 32)]

    refused(path, padded(header([NAMED], entries), 64), "two tensors are named `a`")


def test_a_key_that_is_given_twice_is_an_error(path: Path) -> None:
    refused(path, header([NAMED, NAMED], []), "`general.architecture` is given twice")


@pytest.mark.parametrize(
    "value", [pair("general.architecture", U32, bytes(4)), pair("general.architecture", ARRAY, array(STRING, 0, b""))]
)
def test_an_architecture_that_is_no_word_is_an_error(path: Path, value: bytes) -> None:
    refused(path, header([value], []), "`general.architecture` is not a word")


@pytest.mark.parametrize("kind", [13, 255, (1 << 32) - 1])
def test_an_unknown_type_of_metadata_is_an_error(path: Path, kind: int) -> None:
    refused(path, header([NAMED, pair("a", kind, bytes(64))], []), f"unknown type {kind}")


@pytest.mark.parametrize("element", [ARRAY, 13, (1 << 32) - 1])
def test_an_array_of_arrays_or_of_an_unknown_type_is_an_error(path: Path, element: int) -> None:
    refused(path, header([NAMED, pair("a", ARRAY, array(element, 1, bytes(64)))], []), f"unknown type {element}")


@pytest.mark.parametrize("kind", [4, 5, 31, 36, 42, 1000, (1 << 32) - 1])
def test_an_unknown_quantisation_is_unsupported(path: Path, kind: int) -> None:
    error = refused(
        path, padded(header([NAMED], [entry("a", (1, 32), kind, 0)]), 256), f"number {kind}", UnsupportedError
    )
    assert error.hint


@pytest.mark.parametrize("kind", ["I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"])
def test_a_known_type_that_cannot_be_multiplied_is_unsupported(path: Path, kind: str) -> None:
    content = padded(header([NAMED], [entry("a", (1, 256), GGMLQuantizationType[kind], 0)]), 4096)

    error = refused(path, content, f"quantised as {kind}", UnsupportedError)
    assert error.hint


@pytest.mark.parametrize("shape", [(0,), (0, 32), (32, 0), (1, 2, 0, 4)])
def test_a_dimension_of_zero_is_an_error(path: Path, shape: tuple[int, ...]) -> None:
    refused(path, padded(header([NAMED], [entry("a", shape, F32_TYPE, 0)]), 64), "cannot be stored")


@pytest.mark.parametrize("shape", [(), (1, 1, 1, 1, 8)])
def test_no_dimension_and_more_than_four_are_an_error(path: Path, shape: tuple[int, ...]) -> None:
    refused(path, padded(header([NAMED], [entry("a", shape, F32_TYPE, 0)]), 64), f"{len(shape)} dimensions")


@pytest.mark.parametrize(("kind", "columns"), [("Q8_0", 16), ("Q8_0", 33), ("Q4_0", 48), ("Q4_K", 128), ("Q6_K", 32)])
def test_rows_that_do_not_fill_their_last_block_are_an_error(path: Path, kind: str, columns: int) -> None:
    # 32 rows: the number of all weights does fill blocks.
    content = padded(header([NAMED], [entry("a", (256, columns), GGMLQuantizationType[kind], 0)]), 1 << 17)

    refused(path, content, f"cannot be stored as {kind}")


# Numbers that are impossible for the file's size

ABSURD = {
    f"{what} {number:#x}": content
    for number in HUGE
    for what, content in {
        "tensors": header([], [], tensor_count=number),
        "pairs": header([], [], pair_count=number),
        "length of a key": header([struct.pack("<Q", number)], []),
        "length of a word": header([pair("a", STRING, struct.pack("<Q", number))], []),
        "array of bytes": header([pair("a", ARRAY, array(U8, number, b""))], []),
        "array of numbers": header([pair("a", ARRAY, array(F64, number, b""))], []),
        "array of words": header([pair("a", ARRAY, array(STRING, number, b""))], []),
        "length of a word in an array": header([pair("a", ARRAY, array(STRING, 1, struct.pack("<Q", number)))], []),
        "length of a name": header([], [struct.pack("<Q", number)]),
        "a dimension": header([], [entry("a", (number,), F32_TYPE, 0)]),
        "rows": header([], [entry("a", (number, 1), F32_TYPE, 0)]),
        "all dimensions": header([], [entry("a", (number,) * 4, F32_TYPE, 0)]),
        "an offset": header([], [entry("a", (1,), F32_TYPE, number & ~31)]),
    }.items()
} | {
    "dimensions 0xffffffff": header([], [text("a") + struct.pack("<I", (1 << 32) - 1)]),
    "alignment 0x80000000": header([pair("general.alignment", U32, struct.pack("<I", 1 << 31))], []),
}


@pytest.mark.parametrize("what", ABSURD)
def test_an_absurd_number_in_a_hundred_bytes_is_an_error_that_takes_no_memory(path: Path, what: str) -> None:
    path.write_bytes(ABSURD[what].ljust(100, b"\0"))

    def attempt() -> None:
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(path)
        assert type(caught.value) is CheckpointError

    assert peak_bytes(attempt) < 8 * MIB


def test_a_big_vocabulary_takes_little_memory(path: Path) -> None:
    count = 200_000
    words = b"".join(text(f"token{number}") for number in range(count))
    kinds = array(I32, count, bytes(4 * count))
    pairs = [
        NAMED,
        pair("words", ARRAY, array(STRING, count, words)),
        pair("kinds", ARRAY, kinds),
        pair("z", U8, b"\7"),
    ]
    path.write_bytes(padded(header(pairs, [entry("a", (2, 4), F32_TYPE, 0)]), 32))
    del words, kinds, pairs

    # Twice the header of 5 MB while it grows; as Python's strings the words alone would be 12 MB.
    assert peak_bytes(lambda: open_checkpoint(path)) < 32 * MIB
    checkpoint = open_checkpoint(path)
    assert checkpoint.get("z") == 7
    assert checkpoint.tensors["a"].nbytes == 32
    assert checkpoint.array("words")[:: count - 1] == ["token0", f"token{count - 1}"]


def test_a_skipped_array_takes_no_memory(path: Path) -> None:
    # 96 MiB that are a hole in the file: it takes nothing on the disk either.
    size = 96 * MIB
    with open(path, "wb") as file:
        file.write(header([NAMED, pair("big", ARRAY, array(U8, size, b""))], [], pair_count=3))
        file.seek(size, os.SEEK_CUR)
        file.write(pair("z", U8, b"\7"))

    assert peak_bytes(lambda: open_checkpoint(path)) < 32 * MIB
    checkpoint = open_checkpoint(path)
    assert checkpoint.get("z") == 7
    with pytest.raises(CheckpointError, match=f"claims {size} values in `big`, the limit is 4194304"):
        checkpoint.array("big")
