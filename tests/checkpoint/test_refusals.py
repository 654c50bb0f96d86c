"""Files and folders that are no model, or cannot run: each error names the format, with a hint."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
from click.testing import CliRunner

import headrace
from headrace.cli import main
from headrace.errors import HeadraceError
from headrace.plan import Profile
from headrace.plan.profile import save_profile
from headrace.sampling_params import SamplingParams
from support.zoo.gguf_files import random_model, write_gguf
from support.zoo.scripted import byte_level, write_scripted

pytestmark = pytest.mark.zoo

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4" * 64 + b"\nsize 4368438944\n"
PAGE = b'<!DOCTYPE html>\n<html lang="en"><head><title>Sign in</title></head></html>\n'
ROWS = np.zeros((8, 32), np.float32)


@pytest.fixture(autouse=True)
def kept_profile(own_home: None, profile: Profile) -> None:
    save_profile(profile)


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"x" * 100)
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.gguf"))
    return buffer.getvalue()


def refusals(path: Path) -> dict[str, str]:
    """Messages of the commands that open a model, in lower case."""
    found = {}
    for command in (
        ["plan", str(path)],
        ["run", str(path), "h", "--raw", "-n", "1"],
        ["run", str(path), "h", "-n", "1"],
    ):
        result = CliRunner().invoke(main, command)
        assert isinstance(result.exception, SystemExit), (command, repr(result.exception), result.output)
        assert result.exit_code in (1, 2)
        assert result.stderr.count("Error: ") == 1
        found[" ".join(command[:1] + command[2:])] = result.stderr.partition("Error: ")[2].lower()
    return found


def check_named(path: Path, *words: str) -> None:
    """Every word (or one of its alternatives, between bars) is in every refusal, and so is a hint."""
    for command, said in refusals(path).items():
        said = said.replace(str(path.parent).lower(), "")
        for word in words:
            assert any(one in said for one in word.lower().split("|")), (command, word, said)
        assert "hint: " in said, (command, said)


# Content under the name of a GGUF file, and the words that name its format.
CONTENT: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "nothing": (b"", ("empty", "download|copy")),
    "fewer bytes than a magic": (b"GG", ("2 bytes|truncated|too short", "download|copy")),
    "a Git LFS pointer": (POINTER, ("git lfs pull", "pointer")),
    "a page": (PAGE, ("html|web page", "download")),
    "a page after white space": (b"\n\n  <html><body>404</body></html>", ("html|web page", "download")),
    "a page in capitals": (b"<HTML><HEAD></HEAD></HTML>", ("html|web page", "download")),
    "an XML error": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', ("xml|web page", "download")),
    "a JSON error": (b'{"error":"Repository not found"}', ("json", "download")),
    "a text": (b"Entry not found", ("text", "download")),
    "gzip": (gzip.compress(b"GGUF" * 100), ("gzip", "unpack|decompress|gunzip")),
    "zip": (zipped("model.gguf"), ("zip", "unpack|decompress|unzip")),
    "xz": (lzma.compress(b"GGUF" * 100), ("xz", "unpack|decompress")),
    "bzip2": (bz2.compress(b"GGUF" * 100), ("bzip2", "unpack|decompress")),
    "Zstandard": (b"\x28\xb5\x2f\xfd" + bytes(100), ("zstandard|zstd", "unpack|decompress")),
    "7-Zip": (b"7z\xbc\xaf\x27\x1c" + bytes(100), ("7-zip|7z", "unpack|decompress")),
    "tar": (tarred(), ("tar", "unpack")),
    "zeros": (bytes(5000), ("zero", "download|copy")),
    "GGML": (b"lmgg" + struct.pack("<7I", *range(7)), ("ggml", "convert")),
    "GGMF": (b"fmgg" + struct.pack("<8I", *range(8)), ("ggmf", "convert")),
    "GGJT": (b"tjgg" + struct.pack("<I7I", 3, *range(7)), ("ggjt", "convert")),
    "GGLA": (b"algg" + struct.pack("<I7I", 1, *range(7)), ("ggla", "adapter|lora")),
    "GGUF of version 1": (b"GGUF" + struct.pack("<I", 1) + bytes(40), ("version 1", "convert")),
    "GGUF of a later version": (b"GGUF" + struct.pack("<I", 4) + bytes(40), ("version 4", "newer|later|update")),
    "GGUF of another byte order": (b"GGUF" + struct.pack(">I", 3) + bytes(40), ("big-endian|big endian", "convert")),
    "safetensors": ((30).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[', ("safetensors", "folder|rename|name")),
    "a pickle": (pickle.dumps({"a": 1}), ("pickle", "safetensors|gguf")),
    "PyTorch's zip": (zipped("archive/data.pkl"), ("pickle|pytorch", "safetensors|gguf")),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(100), ("hdf5|keras|tensorflow", "safetensors|gguf")),
    "NumPy": (b"\x93NUMPY\x01\x00" + bytes(100), ("numpy", "safetensors|gguf")),
    "an importance matrix of the old kind": (
        struct.pack("<i", 2) + struct.pack("<i", 21) + b"blk.0.ffn_down.weight" + struct.pack("<ii", 1, 4) + bytes(16),
        ("not a gguf file|importance matrix|imatrix",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".gguf", ".bin"])
@pytest.mark.parametrize("kind", CONTENT)
def test_content_that_is_no_gguf_is_named(kind: str, suffix: str, tmp_path: Path) -> None:
    content, words = CONTENT[kind]
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    check_named(path, *words)


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "pytorch_model.bin", "model.ckpt"])
def test_a_pickle_is_named_by_any_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(zipped("archive/data.pkl"))
    check_named(tmp_path / name, "pickle|pytorch", "safetensors|gguf")


@dataclass(frozen=True)
class Header:
    """Header of a GGUF file."""

    words: tuple[str, ...]
    architecture: str | None = "llama"
    metadata: Mapping[str, Any] = field(default_factory=dict)
    tensors: tuple[str, ...] = ()
    endian: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE


SIZES = {"llama.block_count": 1, "llama.context_length": 64, "llama.embedding_length": 32}
VOCABULARY = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b"]}
LORA = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 16.0}
HEADERS = {
    "a LoRA adapter": Header(
        ("lora", "merge|base model"),
        metadata=LORA,
        tensors=("blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"),
    ),
    "a LoRA adapter with the sizes of its model": Header(
        ("lora", "merge|base model"),
        metadata={**SIZES, **LORA},
        tensors=("token_embd.weight.lora_a", "token_embd.weight.lora_b"),
    ),
    "an importance matrix": Header(
        ("importance matrix|imatrix", "quantis|quantiz"),
        architecture=None,
        metadata={"general.type": "imatrix", "imatrix.datasets": ["x"], "imatrix.chunk_count": 3},
        tensors=("blk.0.attn_q.weight.in_sum2", "blk.0.attn_q.weight.counts"),
    ),
    "a projector": Header(
        ("projector|mmproj", "language model"),
        architecture="clip",
        metadata={"general.type": "mmproj", "clip.has_vision_encoder": True},
        tensors=("v.patch_embd.weight", "mm.0.weight"),
    ),
    "a projector of an older converter": Header(
        ("projector|mmproj", "language model"),
        architecture="clip",
        metadata={"clip.has_vision_encoder": True},
        tensors=("v.patch_embd.weight", "mm.0.weight"),
    ),
    "a vocabulary": Header(("vocabulary", "weights"), metadata={"general.type": "vocab", **SIZES, **VOCABULARY}),
    "a vocabulary that does not say so": Header(("vocabulary|no tensors", "weights"), metadata={**SIZES, **VOCABULARY}),
    "a control vector": Header(
        ("control vector",),
        architecture="controlvector",
        metadata={"controlvector.model_hint": "llama", "controlvector.layer_count": 1},
        tensors=("direction.1",),
    ),
    "an encoder": Header(
        ("encoder|embedding", "generate"), architecture="bert", metadata={"bert.block_count": 1},
        tensors=("token_embd.weight",),
    ),
    "a model of pictures": Header(
        ("flux", "not a language model|no language model|pictures|image"), architecture="flux",
        tensors=("img_in.weight",),
    ),
    "big-endian": Header(
        ("big-endian|big endian", "convert"), metadata=SIZES, tensors=("token_embd.weight",), endian=gguf.GGUFEndian.BIG
    ),
}  # fmt: skip


def write_header(path: Path, header: Header) -> Path:
    writer = gguf.GGUFWriter(path, header.architecture or "none", endianess=header.endian)
    if header.architecture is None:
        del writer.kv_data[0]["general.architecture"]
    adders: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
        list: writer.add_array,
    }  # fmt: skip
    for key, value in header.metadata.items():
        adders[type(value)](key, value)
    for name in header.tensors:
        writer.add_tensor(name, ROWS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", HEADERS)
def test_a_gguf_file_that_is_no_model_is_named(kind: str, tmp_path: Path) -> None:
    check_named(write_header(tmp_path / "model.gguf", HEADERS[kind]), *HEADERS[kind].words)


def test_an_unknown_architecture_is_not_said_to_be_a_known_one(tmp_path: Path) -> None:
    path = write_header(tmp_path / "model.gguf", Header((), architecture="wavtokenizer-dec", tensors=("x",)))
    check_named(path, "wavtokenizer-dec", "architecture")


# Folders


def safetensors(*names: str) -> bytes:
    """A safetensors file with a one-byte tensor for each name."""
    entries = {name: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i, name in enumerate(names)}
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + bytes(len(names))


CONFIG = b'{"model_type": "llama"}'
ADAPTER = b'{"peft_type": "LORA", "base_model_name_or_path": "org/base"}'
SOUND = safetensors("x")
FOLDERS: dict[str, tuple[Mapping[str, bytes], tuple[str, ...]]] = {
    "an adapter": (
        {"adapter_config.json": ADAPTER, "adapter_model.safetensors": safetensors("a.lora_A.weight")},
        ("lora", "merge|base model"),
    ),
    "an adapter beside a config": (
        {"adapter_config.json": ADAPTER, "adapter_model.safetensors": SOUND, "config.json": CONFIG},
        ("lora", "merge|base model"),
    ),
    "a pickled adapter": (
        {"adapter_config.json": ADAPTER, "adapter_model.bin": b"x"}, ("lora", "merge|base model"),
    ),
    "pickled weights": ({"config.json": CONFIG, "pytorch_model.bin": b"x"}, ("pickle", "safetensors")),
    "pickled shards": ({"config.json": CONFIG, "pytorch_model-00001-of-00002.bin": b"x"}, ("pickle", "safetensors")),
    "Meta's own files": ({"params.json": b"{}", "consolidated.00.pth": b"x"}, ("pickle", "safetensors")),
    "GGUF files": ({"a.gguf": b"GGUF", "b.gguf": b"GGUF"}, ("gguf", "a.gguf")),
    "weights that are Git LFS pointers": ({"config.json": CONFIG, "model.safetensors": POINTER}, ("git lfs pull",)),
    "a config that is a Git LFS pointer": ({"config.json": POINTER, "model.safetensors": SOUND}, ("git lfs pull",)),
    "an index that is a Git LFS pointer": (
        {"config.json": CONFIG, "model.safetensors.index.json": POINTER}, ("git lfs pull",),
    ),
    "weights that are a page": ({"config.json": CONFIG, "model.safetensors": PAGE + bytes(200)}, ("html|web page",)),
    "a config that is a page": ({"config.json": PAGE, "model.safetensors": SOUND}, ("html|web page",)),
    "weights that are empty": ({"config.json": CONFIG, "model.safetensors": b""}, ("empty", "download|copy")),
    "a config that is empty": ({"config.json": b"", "model.safetensors": SOUND}, ("empty", "download|copy")),
    "weights that are GGUF": (
        {"config.json": CONFIG, "model.safetensors": b"GGUF\3\0\0\0" + bytes(50)}, ("gguf", "rename|name"),
    ),
    "a pipeline of pictures": ({"model_index.json": b'{"_class_name": "FluxPipeline"}'}, ("diffusion|diffusers",)),
    "ONNX": ({"config.json": CONFIG, "model.onnx": b"x"}, ("onnx", "safetensors|gguf")),
    "TensorFlow": ({"config.json": CONFIG, "tf_model.h5": b"x"}, ("tensorflow", "safetensors|gguf")),
    "Flax": ({"config.json": CONFIG, "flax_model.msgpack": b"x"}, ("flax", "safetensors|gguf")),
    "nothing": ({}, ("holds no weights|empty",)),
    "a tokenizer alone": ({"tokenizer.json": b"{}"}, ("holds no weights",)),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_that_is_no_model_is_named(kind: str, tmp_path: Path) -> None:
    files, words = FOLDERS[kind]
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    check_named(folder, *words)


# Tokenizers and templates of folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Weights without a tokenizer."""
    random_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refusal(folder: Path, *options: str) -> str:
    result = CliRunner().invoke(main, ["run", str(folder), "hello", "-n", "1", *options])
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code in (1, 2), result.output
    assert "hint: " in result.stderr
    return result.stderr.partition("Error: ")[2]


@pytest.mark.parametrize("configured", [False, True])
def test_a_sentencepiece_tokenizer_alone_runs_or_is_named(configured: bool, folder: Path, tmp_path: Path) -> None:
    lines = iter([f"the quick brown fox {i} jumps over the lazy dog hello world {7 * i}" for i in range(500)])
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=file, vocab_size=100, character_coverage=1.0, minloglevel=2
        )
    if configured:
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>"}')
    result = CliRunner().invoke(main, ["run", str(folder), "hello world", "-n", "1", "--raw", "-q"])
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    if result.exit_code:
        assert "tiktoken" not in result.stderr
        assert "tokenizer.model" in result.stderr
        assert "SentencePiece" in result.stderr
        assert "tokenizer.json" in result.stderr.partition("hint: ")[2]


def test_a_folder_without_a_tokenizer_is_named(folder: Path) -> None:
    said = refusal(folder, "--raw")
    assert "tokenizer" in said
    assert "prompt is empty" not in said


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("tokenizer.json", POINTER, "git lfs pull"),
        ("tokenizer.model", POINTER, "git lfs pull"),
        ("tokenizer_config.json", POINTER, "git lfs pull"),
        ("tokenizer.json", PAGE, "HTML"),
        ("tokenizer.json", b"", "empty"),
        ("tekken.json", b'{"config": {}}', "tekken.json"),
        ("qwen.tiktoken", b"IQ== 0\n", "tiktoken"),
    ],
)
def test_a_file_of_a_tokenizer_that_cannot_be_read_is_named(name: str, content: bytes, word: str, folder: Path) -> None:
    (folder / name).write_bytes(content)
    said = refusal(folder, "--raw")
    assert word.lower() in said.lower()
    assert name in said


@pytest.fixture
def with_tokenizer(folder: Path) -> Path:
    """The folder with a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    return folder


TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def name_in_config(folder: Path) -> None:
    templates = [{"name": name, "template": TEMPLATE} for name in ("tool_use", "rag")]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": templates}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def name_in_files(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (folder / "additional_chat_templates").mkdir()
    for name in ("tool_use", "rag"):
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(TEMPLATE)


@pytest.mark.parametrize("write_names", [name_in_config, name_in_files])
def test_named_templates_without_a_default_are_named_and_not_needed_with_raw(
    write_names: Callable[[Path], None], with_tokenizer: Path
) -> None:
    write_names(with_tokenizer)
    result = CliRunner().invoke(main, ["run", str(with_tokenizer), "hello", "-n", "1", "--raw", "-q"])
    assert result.exit_code == 0, result.stderr
    said = refusal(with_tokenizer, "-s", "a system message")
    assert "tool_use" in said
    assert "--raw" in said


def test_named_templates_of_a_gguf_file_without_a_default_are_named(tmp_path: Path) -> None:
    vocabulary = byte_level()
    names = {"tokenizer.chat_templates": ["tool_use", "rag"]}
    names |= {f"tokenizer.chat_template.{name}": TEMPLATE for name in ("tool_use", "rag")}
    end = vocabulary["tokens"].index("<|im_end|>")
    path = write_scripted(tmp_path / "model.gguf", **vocabulary, eos=end, template=None, metadata=names)
    assert CliRunner().invoke(main, ["run", str(path), "h", "--raw", "-n", "1", "-q"]).exit_code == 0
    said = refusal(path, "-s", "a system message")
    assert "tool_use" in said
    assert "--raw" in said


# One tensor for each expert, as the first converters wrote Mixtral


@pytest.fixture(scope="module")
def mixtrals(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same weights with a layer's experts in one tensor, and in a tensor each."""
    place = tmp_path_factory.mktemp("mixtral")
    model = random_model("mixtral")
    stacked = write_gguf(model, "mixtral", place / "stacked.gguf")
    parts = {
        tensor.name.replace("_exps", f".{number}"): np.array(expert)
        for tensor in gguf.GGUFReader(stacked).tensors
        if "_exps" in tensor.name
        for number, expert in enumerate(tensor.data)
    }
    assert parts
    stacks = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
    return stacked, write_gguf(model, "mixtral", place / "parts.gguf", more=parts, without=stacks)


def test_experts_in_a_tensor_each_run_like_stacked_experts_or_are_named(
    mixtrals: tuple[Path, Path], profile: Profile
) -> None:
    stacked, parts = mixtrals

    def tokens(path: Path) -> list[int | None]:
        greedy = SamplingParams(temperature=0.0)
        with headrace.load(path, memory="2GiB", context_tokens=64, profile=profile) as loaded:
            return [piece.token for piece in loaded.stream("hello", max_tokens=8, raw=True, sampling=greedy)]

    expected = tokens(stacked)
    try:
        found = tokens(parts)
    except HeadraceError:
        check_named(parts, "expert", "convert")
    else:
        assert found == expected


def test_experts_in_a_tensor_each_are_planned_like_stacked_experts_or_refused(mixtrals: tuple[Path, Path]) -> None:
    plans = [CliRunner().invoke(main, ["plan", str(path), "--json", "--memory", "2GiB"]) for path in mixtrals]
    if plans[1].exit_code:
        assert "expert" in plans[1].stderr
        return
    stacked, parts = (json.loads(plan.stdout) for plan in plans)
    assert parts.get("experts") == stacked.get("experts")
