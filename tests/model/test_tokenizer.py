"""Tokenizers read from GGUF files, against the tokenizer that each file was written from."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from headrace.checkpoint import open_checkpoint
from headrace.errors import UnsupportedError
from headrace.model.end_tokens import find_end_tokens
from headrace.model.pre_tokenizers import pre_tokenizer
from headrace.model.reasoning import Part, joined
from headrace.model.tokenizer import Tokenizer

CONTROL = ("<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|think|>")
VISIBLE = ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|turn>{{ m.role }}\n{{ m.content }}<turn|>\n{% endfor %}<|turn>model\n"
)
TEXTS = (
    "Hello, world!", "  two spaces\n\n\ttab and   more", "日本語 — ünïcödé 🙂", "x=1\nfor i in range(10):\n    print(i)\n\n\n",
    "<|turn>user\nhi<turn|>\n", "<|channel>thought\n<channel|>the answer", "", " ", "\n\n\n\n", "a<|tool_call>b",
)  # fmt: skip


@pytest.fixture(scope="module")
def backend() -> Backend:
    """A tokenizer like Gemma's: BPE over characters with byte fallback, spaces written as U+2581."""
    made = Backend(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\n]+|\n+"), "isolated")  # no token crosses a line
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    first = [*CONTROL, *VISIBLE, *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator(
        [Path(__file__).read_text(encoding="utf-8")],
        trainers.BpeTrainer(vocab_size=600, special_tokens=first, show_progress=False),
    )
    fresh = json.loads(made.to_str())
    fresh["added_tokens"] = []  # byte tokens are not special; they were listed only to get their ids
    made = Backend.from_str(json.dumps(fresh))
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL])
    made.add_tokens([AddedToken(token, normalized=False) for token in VISIBLE])
    return made


@pytest.fixture(scope="module")
def ours(backend: Backend, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The tokenizer of a file as llama.cpp's converter writes it for Gemma 4."""
    return described(backend, "gemma4", None, tmp_path_factory.mktemp("tokenizer") / "gemma4.gguf")


def described(
    backend: Backend, kind: str, pre: str | None, path: Path, *, writes_add_bos: bool = True, template: str = TEMPLATE
) -> Tokenizer:
    """The tokenizer read from a GGUF file written from `backend`."""
    tokens = [backend.id_to_token(i) for i in range(backend.get_vocab_size())]
    kinds = [3 if t in CONTROL else 4 if t in VISIBLE else 6 if t.startswith("<0x") else 1 for t in tokens]
    writer = gguf.GGUFWriter(path, "gemma4" if kind == "gemma4" else "llama")
    writer.add_tokenizer_model(kind)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_scores([-1000.0] * len(tokens))
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in json.loads(backend.to_str())["model"]["merges"]])
    for name, token in (("bos", "<bos>"), ("eos", "<eos>"), ("unk", "<unk>"), ("pad", "<pad>")):
        getattr(writer, f"add_{name}_token_id")(tokens.index(token))
    writer.add_add_space_prefix(False)
    if writes_add_bos:
        writer.add_add_bos_token(True)
    writer.add_chat_template(template)
    writer.add_tensor("token_embd.weight", np.zeros((1, 32), np.float32))  # a file without tensors would be refused
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Tokenizer(open_checkpoint(path))


@pytest.mark.parametrize("text", TEXTS)
def test_gemma4_encodes_and_decodes_like_the_source_tokenizer(ours: Tokenizer, backend: Backend, text: str) -> None:
    expected = backend.encode(text).ids
    assert ours.encode(text, special=False) == expected
    assert ours.decode(expected) == backend.decode(expected)
    stream = ours.stream()
    assert "".join(stream.step(token) for token in expected) == backend.decode(expected)


def test_gemma4_prompts_have_one_bos_token_and_its_turns_have_their_end_tokens(
    ours: Tokenizer, backend: Backend
) -> None:
    number = backend.token_to_id
    tokens = ours.chat([{"role": "user", "content": "hi"}])
    assert tokens[:2] == [number("<bos>"), number("<|turn>")]
    assert ours.encode("hi")[0] == number("<bos>")
    assert ours.end_ids == {number("<eos>"), number("<turn|>"), number("<|tool_response>")}
    assert "<|channel>" in ours.decode([number("<|channel>")])  # a channel parser needs this text


def by(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


THREE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize(
    ("pre", "split", "words"),
    [
        ("command-r", pre_tokenizers.Digits(individual_digits=True), True),
        ("refact", pre_tokenizers.Digits(individual_digits=True), True),
        ("starcoder", pre_tokenizers.Digits(individual_digits=True), True),
        ("exaone4", None, True),
        ("glm4", by(THREE), False),
        ("stablelm2", by(THREE.replace("{1,3}", "")), False),
        ("seed-coder", by(THREE.replace("{1,3}", "").replace(r"\p{N}]+[\r\n]*", r"\p{N}\r\n]+")), False),
    ],
)
def test_a_pre_tokenizer_splits_text_as_in_training(pre: str, split: Any, words: bool, tmp_path: Path) -> None:
    backend = Backend(models.BPE())
    bytes_last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    backend.decoder = decoders.ByteLevel()
    text = "in 2024 and 12345, don't  stop();\r\n\n1999 2000 2024\n((a)))\n"
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )  # so merges cross all splits
    backend.train_from_iterator(
        [text] * 9,
        trainers.BpeTrainer(
            vocab_size=400, show_progress=False, special_tokens=list(CONTROL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    backend.pre_tokenizer = pre_tokenizers.Sequence([bytes_last] if split is None else [split, bytes_last])
    ours = described(backend, "gpt2", pre, tmp_path / "tokenizer.gguf")
    assert ours.encode(text, special=False) == backend.encode(text).ids


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("deepseek-coder", ["it", "'", "s", " ", "世界", "ab", " ", "1", "2", "3", "4", "!", "x", "\n", "y"]),
        ("deepseek-llm", ["it", "'", "s", " ", "世界", "ab", " ", "1234", "!", "x", "\n", "y"]),
        ("deepseek-v3", ["it", "'s", " ", "世界", "ab", " ", "123", "4", "!x", "\n", "y"]),
        ("kimi-k2", ["it's", " ", "世界", "ab", " ", "123", "4", "!x", "\n", "y"]),
    ],
)
def test_a_pre_tokenizer_applies_several_patterns_in_order(pre: str, words: list[str]) -> None:
    text = "".join(words)
    assert text == "it's 世界ab 1234!x\ny"
    assert [text[slice(*place)] for _, place in pre_tokenizer(pre).pre_tokenize_str(text)] == words


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("bloom", ["don't", " (", "3D", ")", " x2", ",", " 12345", "!\n"]),
        ("viking", ["don't", " (", "3", "D", ")", " x", "2", ",", " ", "1", "2", "3", "4", "5", "!\n"]),
        ("falcon", ["don", "'", "t", " ", "(", "3", "D", ")", " x", "2", ",", " ", "123", "45", "!", "\n"]),
    ],
)
def test_pre_tokenizers_of_single_families_split_text_as_published(pre: str, words: list[str]) -> None:
    text = "".join(words)
    assert text == "don't (3D) x2, 12345!\n"
    assert [text[slice(*place)] for _, place in pre_tokenizer(pre).pre_tokenize_str(text)] == words


def test_an_unknown_pre_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="`somehow`"):
        described(of_bytes("ab ab"), "gpt2", "somehow", tmp_path / "tokenizer.gguf")


def test_the_end_of_one_message_does_not_end_a_turn_with_several() -> None:
    assert find_end_tokens({"<|end|>", "<|endoftext|>"}.__contains__) == (["<|end|>", "<|endoftext|>"], [])
    assert find_end_tokens({"<|end|>", "<|return|>", "<|call|>"}.__contains__) == (
        ["<|return|>", "<|call|>"],
        ["<|end|>"],
    )


def of_bytes(text: str) -> Backend:
    made = Backend(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        show_progress=False,
        special_tokens=list(CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator([text] * 9, trainer)
    return made


def test_llama_3_pre_tokenizers_add_bos_and_ignore_merges_by_default(tmp_path: Path) -> None:
    made = json.loads(of_bytes("abcd abcd").to_str())
    made["model"]["merges"] = [pair for pair in made["model"]["merges"] if pair != ["ab", "cd"]]
    backend = Backend.from_str(json.dumps(made))
    word = backend.token_to_id("abcd")
    assert word is not None
    assert word not in backend.encode("abcd").ids
    ours = described(backend, "gpt2", "llama-bpe", tmp_path / "tokenizer.gguf", writes_add_bos=False)
    assert ours.encode("abcd") == [backend.token_to_id("<bos>"), word]
    other = described(backend, "gpt2", "qwen2", tmp_path / "other.gguf", writes_add_bos=False)
    assert other.encode("abcd") == backend.encode("abcd").ids


def test_generation_tags_in_a_template_change_nothing(tmp_path: Path) -> None:
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}!{% endfor %}"
    ours = described(of_bytes("hello"), "gpt2", "gpt-2", tmp_path / "tokenizer.gguf", template=template)
    assert ours.decode(ours.chat([{"role": "user", "content": "hello"}])) == "hello!"


def test_invalid_utf8_bytes_do_not_end_the_output(ours: Tokenizer, backend: Backend) -> None:
    number = backend.token_to_id
    stream = ours.stream()
    tokens = [
        number("<0x0A>"),
        number("<0xE4>"),
        number("a"),
        number("<0x0A>"),
        number("<0xE4>"),
        number("b"),
        number("a"),
    ]
    text = "".join(stream.step(token) for token in tokens)
    assert text.endswith("ba")


def test_reasoning_is_split_from_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = of_bytes("hello so")
    marks = ["<think>", "</think>"]
    backend.add_tokens(marks)
    monkeypatch.setitem(globals(), "VISIBLE", [*VISIBLE, *marks])
    template = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n"
    ours = described(backend, "gpt2", "gpt-2", tmp_path / "tokenizer.gguf", template=template)
    prompt = ours.chat([{"role": "user", "content": "hello"}])
    said = ours.encode("so</think>\n\nhello", special=False)
    for raw, expected in ((False, ("hello", "so")), (True, ("so</think>\n\nhello", ""))):
        tail = ours.tail([{"role": "user", "content": "hello"}], raw=raw)
        stream = ours.detokenizer(prompt, raw=raw, tail=tail)
        found = [segment for token in said for segment in stream.step(token)] + stream.flush()
        assert (joined(found, Part.CONTENT), joined(found, Part.REASONING)) == expected
