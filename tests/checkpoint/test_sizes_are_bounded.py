"""Lengths, counts and sizes that a file only claims: nothing is allocated for them, and nothing is read needlessly.

The files are sparse: as large as they claim, without taking disk space. Each is opened by a process with bounded memory.
"""

import json
import struct
import tempfile
import zlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGUFReader
from safetensors.numpy import save_file
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from headrace.checkpoint import open_checkpoint
from headrace.checkpoint.gguf import open_gguf
from headrace.checkpoint.packing import pack_folder
from headrace.checkpoint.source import LocalSource
from headrace.cli import main
from headrace.model.tokenizer import Tokenizer
from headrace.plan.profile import profile_path
from headrace.plan.record import records_path
from headrace.plan.routing import routing_path
from headrace.units import GIB, MIB
from support.bounded import FINE, described, faults, refusal, verdict
from support.zoo.scripted import byte_level, write_scripted

pytestmark = pytest.mark.zoo

BOUND = 300 * MIB  # max memory for a file that claims gigabytes
HUGE = 9 * GIB
STRING, ARRAY, UINT8, UINT32, FLOAT32 = 8, 9, 0, 4, 6


def text(content: str | bytes, claimed: int | None = None) -> bytes:
    """A GGUF string, maybe with a false length."""
    data = content.encode() if isinstance(content, str) else content
    return struct.pack("<Q", len(data) if claimed is None else claimed) + data


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + data


def head(*pairs: bytes, tensors: int = 0, count: int | None = None) -> bytes:
    """The start of a GGUF file."""
    architecture = pair("general.architecture", STRING, text("llama"))
    number = len(pairs) + 1 if count is None else count
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, number) + architecture + b"".join(pairs)


TENSOR = text("token_embd.weight") + struct.pack("<IQIQ", 1, 32, 0, 0)
HEADERS: dict[str, bytes] = {
    "a text that nobody asks for": head(pair("x.y", STRING, text("", 8 * GIB))),
    "a text in the middle": head(pair("x.y", STRING, text("", 3 * GIB)), pair("x.z", STRING, text(""))),
    "the name": head(pair("general.name", STRING, text("", 8 * GIB))),
    "the architecture": b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + pair("general.architecture", STRING, text("", 8 * GIB)),
    "the chat template": head(pair("tokenizer.chat_template", STRING, text("", 8 * GIB))),
    "a key": head(text("", 8 * GIB), count=2),
    "a text of 2 GiB": head(pair("x.y", STRING, text("", 2 * GIB))),
    "a text of 512 MiB": head(pair("x.y", STRING, text("", 512 * MIB))),
    "a text beyond all files": head(pair("x.y", STRING, text("", (1 << 64) - 1))),
    "an array of bytes, one for each layer": head(pair("llama.attention.head_count", ARRAY, array(UINT8, 8 * GIB))),
    "an array of numbers, one for each layer": head(pair("llama.attention.head_count", ARRAY, array(UINT32, 2 * GIB))),
    "an array of bytes for the layers": head(pair("llama.block_count", ARRAY, array(UINT8, 8 * GIB))),
    "tokens without an end": head(pair("tokenizer.ggml.tokens", ARRAY, array(STRING, GIB))),
    "a token without an end": head(pair("tokenizer.ggml.tokens", ARRAY, array(STRING, 1, text("", 8 * GIB)))),
    "merges without an end": head(pair("tokenizer.ggml.merges", ARRAY, array(STRING, GIB))),
    "scores without an end": head(pair("tokenizer.ggml.scores", ARRAY, array(FLOAT32, 2 * GIB))),
    "an array of arrays": head(pair("x.y", ARRAY, array(ARRAY, GIB))),
    "an array of an unknown type": head(pair("x.y", ARRAY, array(77, GIB))),
    "tensors": head(tensors=GIB // 4),
    "pairs": head(count=GIB // 2),
    "a tensor's name": head(tensors=1) + text("", 8 * GIB),
    "dimensions of a tensor": head(tensors=1) + text("a") + struct.pack("<I", 1 << 30),
    "a shape": head(tensors=1) + text("token_embd.weight") + struct.pack("<IQQIQ", 2, 1 << 20, 1 << 10, 0, 0),
}  # fmt: skip
KEYS = ("block_count", "attention.head_count", "context_length", "embedding_length")


def use(path: Path) -> None:
    """Read all of a header that is read before the weights."""
    checkpoint = open_checkpoint(str(path))
    for key in KEYS:
        checkpoint.number(key, 0)
    Tokenizer(checkpoint)
    raise AssertionError("it was accepted")


def sparse(path: Path, content: bytes, size: int = HUGE) -> Path:
    with path.open("wb") as file:
        file.write(content)
        file.truncate(size)
    return path


def open_header(name: str) -> str:
    """Runs in a worker of bounded memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = sparse(Path(folder) / "model.gguf", HEADERS[name])
        return refusal(lambda: use(path))


def test_a_length_or_count_of_gigabytes_in_a_gguf_header_is_refused() -> None:
    assert not faults(open_header, list(HEADERS), seconds=10, memory=BOUND)


@cache
def whole_model() -> tuple[bytes, int]:
    """A scripted model, and where its tensor data begin."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_scripted(Path(folder) / "model.gguf", **byte_level(), eos=258)
        return path.read_bytes(), GGUFReader(path).data_offset


def flip(at: int) -> str:
    """Flip one bit in the header of a model in a separate large file."""
    content, _ = whole_model()
    data = bytearray(content)
    data[at] ^= 2  # in a zero byte, as the high ones of a length are, this makes the largest length that fits
    with tempfile.TemporaryDirectory() as folder:
        path = sparse(Path(folder) / "model.gguf", data)

        def ask() -> None:
            checkpoint = open_checkpoint(str(path))
            for key in KEYS:
                checkpoint.number(key, 0)

        return verdict(ask)


def test_one_flipped_bit_in_a_header_takes_no_memory() -> None:
    content, end = whole_model()
    first = content.index(b"token_embd") - 8
    lengths = [at for at in range(8, end) if not content[at] and (at < 700 or at > first - 700)]  # tokens are alike
    assert not faults(flip, lengths, seconds=10, memory=BOUND)


class Endless:
    """A source that claims any size and returns zeros after its start; it records the largest request."""

    def __init__(self, content: bytes, size: int):
        self.path, self.size, self.most, self._content = "far/model.gguf", size, 0, content

    def pread(self, count: int, offset: int) -> bytes:
        """See `Source.pread`."""
        self.most = max(self.most, count)
        return self._content[offset : offset + count].ljust(min(count, MIB), b"\0")

    def close(self) -> None:
        """See `Source.close`."""


def open_source(name: str) -> str:
    """Runs in a worker of bounded memory."""
    source = Endless(HEADERS[name], 1 << 50)

    def ask() -> None:
        checkpoint = open_gguf(source.path, lambda path: source)
        for key in KEYS:
            checkpoint.number(key, 0)

    outcome = verdict(ask)
    return f"asked for {source.most} bytes" if outcome == FINE and source.most > 256 * MIB else outcome


def test_requests_to_a_source_that_claims_any_size_are_bounded() -> None:
    """A mirror may claim any size, and would be read for ever."""
    assert not faults(open_source, list(HEADERS), seconds=10, memory=BOUND)


# Folders


def tokenizer_folder(folder: Path) -> Path:
    """A folder with a byte-level tokenizer and one matrix."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "model_type": "llama",
        "vocab_size": 260,
        "hidden_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    save_file({"model.embed_tokens.weight": np.zeros((260, 64), np.float32)}, folder / "model.safetensors")
    return folder


SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "model.safetensors.index.json",
    "model.safetensors",
    "additional_chat_templates/tool_use.jinja",
)


def open_folder_with(file: str) -> str:
    """Runs in a worker of bounded memory: one file of the folder has gigabytes."""
    with tempfile.TemporaryDirectory() as outer:
        folder = tokenizer_folder(Path(outer) / "model")
        (folder / file).parent.mkdir(exist_ok=True)
        with (folder / file).open("ab") as opened:
            opened.truncate(HUGE)

        def ask() -> None:
            checkpoint = open_checkpoint(str(folder))
            checkpoint.tokens()
            Tokenizer(checkpoint)

        return verdict(ask)


def test_a_small_file_that_has_gigabytes_is_refused_or_ignored() -> None:
    assert not faults(open_folder_with, SMALL_FILES, seconds=10, memory=BOUND)


def shallow(size: int) -> bytes:
    """JSON of `size` bytes, which takes about twenty times as many in Python."""
    return b'{"a":[' + b"[]," * (size // 3) + b"0]}"


def with_many_lists(folder: Path, file: str) -> None:
    if file == "model.safetensors":
        header = shallow(24 << 20)
        (folder / file).write_bytes(len(header).to_bytes(8, "little") + header)
    else:
        (folder / file).write_bytes(shallow(24 << 20))


def parse_many_lists(file: str) -> str:
    """Runs in a worker of bounded memory."""
    with tempfile.TemporaryDirectory() as outer:
        folder = tokenizer_folder(Path(outer) / "model")
        with_many_lists(folder, file)
        return refusal(lambda: open_checkpoint(str(folder)))


def test_json_of_a_few_megabytes_does_not_become_gigabytes() -> None:
    files = ("config.json", "model.safetensors.index.json", "model.safetensors")
    assert not faults(parse_many_lists, files, seconds=20, memory=BOUND)


SAFETENSORS: dict[str, tuple[int, dict[str, Any]]] = {
    "a header of gigabytes": (8 * GIB, {}),
    "a header beyond all files": ((1 << 64) - 1, {}),
    "a header as large as can be": (100_000_000, {}),
    "a shape beyond all files": (0, {"a": {"dtype": "F32", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 1 << 62]}}),
    "a shape with a zero": (0, {"a": {"dtype": "F32", "shape": [0, 1 << 62, 1 << 62], "data_offsets": [0, 0]}}),
    "a span beyond the file": (0, {"a": {"dtype": "U8", "shape": [1 << 33], "data_offsets": [1 << 33, 1 << 34]}}),
    "a number of many digits": (0, {"a": {"dtype": "U8", "shape": [10**4000], "data_offsets": [0, 10**4000]}}),
}


def open_safetensors(name: str) -> str:
    """Runs in a worker of bounded memory."""
    length, entries = SAFETENSORS[name]
    header = json.dumps(entries).encode()
    with tempfile.TemporaryDirectory() as outer:
        folder = tokenizer_folder(Path(outer) / "model")
        sparse(folder / "model.safetensors", (length or len(header)).to_bytes(8, "little") + header)
        return refusal(lambda: open_checkpoint(str(folder)))


def test_a_length_or_shape_of_gigabytes_in_a_safetensors_header_is_refused() -> None:
    assert not faults(open_safetensors, list(SAFETENSORS), seconds=10, memory=BOUND)


COLUMNS = (0, -1, 1, 63, 1 << 20, 1 << 40, 10**400, True, None, "x", 1.5, [])


def open_packed(number: int) -> str:
    """Runs in a worker of bounded memory: a packed copy whose config claims other columns."""
    with tempfile.TemporaryDirectory() as outer:
        import torch
        from safetensors.torch import save_file as save_torch

        source = tokenizer_folder(Path(outer) / "source")
        matrix = torch.randn(64, 4096).to(torch.bfloat16)
        save_torch({"model.embed_tokens.weight": matrix}, source / "model.safetensors", {"format": "pt"})
        target = Path(outer) / "packed"
        pack_folder(str(source), str(target))
        config = json.loads((target / "config.json").read_text())
        settings = config["quantization_config"]
        settings["columns"] = dict.fromkeys(settings["columns"], COLUMNS[number])
        (target / "config.json").write_text(json.dumps(config))
        return refusal(lambda: open_checkpoint(str(target)))


def test_columns_that_a_packed_folder_only_claims_are_refused() -> None:
    numbers = range(len(COLUMNS))
    assert not faults(open_packed, numbers, seconds=20, memory=GIB)


# Files that headrace keeps itself


def zip_of_zeros(name: str, header: bytes, mebibytes: int) -> bytes:
    """A ZIP archive of one file: some bytes, then zeros, compressed to a thousandth."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    start = packer.compress(header) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(MIB)) + packer.flush(zlib.Z_FULL_FLUSH)
    data = start + block * mebibytes + packer.flush()
    size = min(len(header) + mebibytes * MIB, (1 << 32) - 1)
    entry = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 0, 0, len(data), size, len(name), 0)
    local = b"PK\x03\x04" + entry + name.encode() + data
    central = b"PK\x01\x02" + struct.pack("<H", 20) + entry + struct.pack("<HHHII", 0, 0, 0, 0, 0) + name.encode()
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local), 0)
    return local + central + end


def npy_header(shape: tuple[int, ...]) -> bytes:
    described_ = str({"descr": "<f4", "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(described_) + 1) + described_ + b"\n"


def routing_file(content: bytes) -> Callable[[Path], Path]:
    def write(model: Path) -> Path:
        path = routing_path(open_checkpoint(str(model)))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    return write


def large(path: Callable[[], Path], start: bytes) -> Callable[[Path], Path]:
    def write(_: Path) -> Path:
        path().parent.mkdir(parents=True, exist_ok=True)
        return sparse(path(), start, 4 * GIB)

    return write


OWN: dict[str, Callable[[Path], Path]] = {
    "a profile of gigabytes": large(profile_path, b"{"),
    "records of gigabytes": large(records_path, b""),
    "a profile of many lists": lambda _: _written(profile_path(), shallow(24 << 20)),
    "records of many lists": lambda _: _written(records_path(), shallow(24 << 20) + b"\n"),
    "a routing that unpacks to gigabytes": routing_file(zip_of_zeros("scores.npy", npy_header((1 << 19, 2000)), 4000)),
    "a routing that claims terabytes": routing_file(zip_of_zeros("scores.npy", npy_header((1 << 30, 1 << 11)), 1)),
    "a routing beside which gigabytes lie": routing_file(zip_of_zeros("cached.npy", npy_header((1 << 30,)), 4000)),
}


def _written(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def plan_with(name: str) -> str:
    """Runs in a worker of bounded memory: the plan ignores the file, and fit names it."""
    with tempfile.TemporaryDirectory() as outer, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADRACE_HOME", str(Path(outer) / "home"))
        model = moe_model(Path(outer))
        OWN[name](model)
        for arguments in (["plan", str(model), "--memory", "2GiB"], ["fit"]):
            result = CliRunner().invoke(main, arguments)
            if result.exception is not None and not isinstance(result.exception, SystemExit):
                return described(result.exception)
            if arguments[0] == "plan" and result.exit_code:
                return f"no plan: {result.stderr}"
    return FINE


@cache
def moe_bytes() -> bytes:
    from support.zoo.gguf_files import random_model, write_gguf

    with tempfile.TemporaryDirectory() as folder:
        return write_gguf(random_model("qwen3moe"), "qwen3moe", Path(folder) / "tiny.gguf").read_bytes()


def moe_model(folder: Path) -> Path:
    """A MoE model: only for these a routing file is read."""
    path = folder / "model.gguf"
    path.write_bytes(moe_bytes())
    return path


def test_files_that_headrace_keeps_are_read_within_a_bound() -> None:
    assert not faults(plan_with, list(OWN), seconds=30, memory=2 * BOUND)


def test_files_of_usual_size_are_read_within_these_bounds(tmp_path: Path) -> None:
    """A vocabulary of 256,000 tokens, half a million merges and a template of 100 KiB, as the largest models have."""
    tokens = [f"t{i}" for i in range(256_000)]
    pairs = [
        pair("llama.block_count", UINT32, struct.pack("<I", 1)),
        pair("tokenizer.ggml.tokens", ARRAY, array(STRING, len(tokens), b"".join(map(text, tokens)))),
        pair("tokenizer.ggml.merges", ARRAY, array(STRING, 514_000, text("a b") * 514_000)),
        pair("tokenizer.chat_template", STRING, text("x" * 100_000)),
        pair("tokenizer.huggingface.json", STRING, text("y" * (36 << 20))),
        pair("llama.attention.head_count", ARRAY, array(UINT32, 200, struct.pack("<I", 8) * 200)),
    ]
    path = tmp_path / "model.gguf"
    path.write_bytes((head(*pairs, tensors=1) + TENSOR).ljust(64 << 20, b"\0"))
    checkpoint = open_gguf(str(path), partial(LocalSource))
    assert checkpoint.tokens()[-1] == "t255999"
    assert len(checkpoint.array("tokenizer.ggml.merges")) == 514_000
    assert checkpoint.number("attention.head_count") == 8
    assert len(str(checkpoint.get("tokenizer.chat_template"))) == 100_000
