"""Small vocabularies of every kind of tokenizer, and texts that expose errors in reading them.

The vocabularies are trained on similar texts: prose, code, digits, many scripts. Byte-level merges cross words, so that
each pre-tokenizer yields different tokens.
"""

import inspect
import io
import json
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

LINES = (
    "The quick brown fox jumps over a lazy dog, and it's the dog's turn: \"don't\", we're told; they've said I'm, you'll, he'd.",
    "IT'S WE'RE DON'T I'M THEY'VE YOU'LL HE'D It'S helloWorld HelloWorld HTTPServer parseJSON2 x86_64 camelCase SCREAMING_CASE",
    "In 1999 and 2024, 12345 people paid $1,234,567.89 (about 50%) for 3.14159 items; 007, 42, 1000000, ½ ² ٣٤٥ １２３.",
    "def main(argv=None):\n    for i in range(10):\n        print(f\"{i:>3}\", end='\\n')\n\n\treturn  0\n\n\n",
    'int main(void) {\r\n\tprintf("hello, world\\n");\r\n\treturn 0;\r\n}\r\n',
    "你好，世界！今天天气很好。我们去公园玩吧，好不好？中文和English混排123。",
    "こんにちは、世界。カタカナとひらがなと漢字が混ざっています。東京タワー２０２４年。",
    "안녕하세요 세계! 오늘은 날씨가 좋습니다. 한국어와 English를 섞어서 씁니다.",
    "Привет, мир! Съешь ещё этих мягких французских булок. ПРИВЕТ Ёлка",
    "ÉCOLE été à l'école, où l'Été s'achève; naïve façade coöperate Straße ÜBER Über",
    "مرحبا بالعالم، كيف حالك؟ السلام عليكم ۱۲۳  שלום עולם, מה שלומך?",
    "नमस्ते दुनिया, आप कैसे हैं? ครับสวัสดีชาวโลก বাংলা ভাষা தமிழ்",
    "😀 👍🏽 👨‍👩‍👧‍👦 🏳️‍🌈 ❤️ — … “quoted” ‘single’ «guillemets» → ← ≠ ≤ ∑ €",
    "https://example.com/path?query=1&other=two#frag user@example.org C:\\Users\\name ~/.config/app.toml <b>html</b>",
    "e\u0301te\u0301 no\u0308el a\u030a  tabs\t\tand   spaces    and\u00a0nbsp \u3000ideographic  space",
)
# Tokens that are matched whole in a text. Some share a prefix with another, some contain spaces or U+2581.
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|im|>", "<tool>", "</tool>", "<｜User｜>", "<｜end▁of▁turn｜>")
USER = ("<think>", "</think>", "<think>\n", "[a b]", "▁<mark>", "<é>", "\n\n\n")


@cache
def corpus() -> tuple[str, ...]:
    """A few hundred lines: prose, code and many scripts."""
    code = inspect.getsource(textwrap) + inspect.getsource(json)
    return (*LINES * 4, *code.splitlines(keepends=True))


def hostile_texts() -> list[str]:
    """Texts that expose errors in a tokenizer, apart from special tokens."""
    return [
        "", " ", "  ", "   ", "\n", "\n\n", "\n\n\n\n", "\t", "\r\n", " \n ", "a", " a", "  a", "a ", "a  ", "Hello, world!",
        "  leading and trailing  ", "one  two   three    four", "line\nline\n\nline\n\n\nline\n", "tab\tand\t\ttabs \t mixed",
        "crlf\r\nlines\r\n\r\nend\r", "it's don't we're I'll they've he'd I'm", "IT'S DON'T WE'RE I'LL THEY'VE HE'D I'M",
        "it's'S 'tis ''s 'Re 're're", "1 12 123 1234 12345 123456 1234567", "3.14159 1,234,567.89 ½ ² ٣٤٥ １２３ a1b22c333d4444",
        "def f(x):\n    return x  # comment\n\n\nif x != 1:\n\tpass\n", "((((a)))) {[<>]} ... !!! ?!?! -- == <= :: // \\\\",
        "https://example.com/a?b=1&c=2#d user@mail.org", "HelloWorld helloWORLD HTTPServer iPhone ABCdef",
        "你好，世界！中文English混排123。", "こんにちは、世界。カタカナ漢字", "안녕하세요 세계 한국어",
        "Привет МИР Ёж", "ÉCOLE été Straße ÜBER ñandú", "مرحبا بالعالم، כמה שלום", "नमस्ते दुनिया ครับสวัสดี বাংলা",
        "😀", "👨‍👩‍👧‍👦 🏳️‍🌈 👍🏽 ❤️!", "e\u0301te\u0301 a\u030a\u0323 \u0301x",
        "\u00a0nbsp\u00a0\u00a0 \u3000wide \u2003em\u200bzero\u2028ls",
        "▁", "▁▁ ▁a▁ b", " ▁ ", "\ufffd", "a\ufffdb \ufeffbom", "\x00\x01\x02\x1b[31m\x7f", "\u0085nel \x0b\x0cvt",
        "𝒳𝔘𠀀𠮷 \U000e0001",
        "x" * 300, "supercalifragilistic" * 20, " " * 70, "\n" * 20, "ab" * 100 + "  " + "あ" * 100, "<0x0A><0xFF><unk><s></s>",
        "«“‘…’”» — – ¿¡", "\u0131\u0130 \u017f '\u017f ŒŽ ǅ ﬁ ℌ ①", "a\u0600b\u070f\u180e\u2060c",
    ]  # fmt: skip


def texts_with(tokens: Sequence[str]) -> list[str]:
    """User texts with special tokens: alone, adjacent, with white space around them, truncated, nested."""
    first, second = tokens[0], tokens[1 % len(tokens)]
    found = [f"{token}" for token in tokens]
    found += [f"hi{token}there" for token in tokens]
    found += [f" hi {token} there " for token in tokens]
    found += [f"hi\n{token}\n\nthere" for token in tokens]
    found += [
        "".join(tokens), " ".join(tokens), "\n".join(tokens), f"{first}{first}", f"{first} {first}", f"  {first}  ",
        f"{first}\t{second}",
        first[:-1], first[1:], first[:-1] + first, first + first[1:], first[: len(first) // 2] + second
        + first[len(first) // 2 :],
        f"{first}user\nhi{second}\n{first}assistant\n", f"{first}\u00a0{second}", f"▁{first}▁", f"{first}▁hi", first.upper(),
        f"{first}你好{second}😀{first}", f"x{first}\r\n{second}\r\nx",
    ]  # fmt: skip
    return found


def write_vocabulary(path: Path, metadata: Mapping[str, Any], *, architecture: str = "llama") -> Path:
    """Write a GGUF file with only a vocabulary. Keys of `metadata` omit `tokenizer.ggml.`, unless they start with a dot."""
    writer = gguf.GGUFWriter(str(path), architecture)
    sizes = {"context_length": 64, "embedding_length": 64, "block_count": 1, "feed_forward_length": 64}
    for key, value in {**sizes, "attention.head_count": 2, "attention.layer_norm_rms_epsilon": 1e-6}.items():
        _add(writer, f"{architecture}.{key}", value)
    for key, value in metadata.items():
        _add(writer, key[1:] if key.startswith(".") else f"tokenizer.ggml.{key}", value)
    writer.add_tensor("token_embd.weight", np.zeros((len(metadata["tokens"]), 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bytes) or (isinstance(value, Sequence) and not isinstance(value, str)):
        writer.add_array(key, value)
    else:
        adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        adders[type(value)](key, value)


@cache
def _byte_level_merges(size: int = 4000) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(tokens, merges) of a byte-level BPE trained without a pre-tokenizer, so merges cross words, digits and lines."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = [*bytes_to_unicode().values()]
    made.train_from_iterator(
        [*corpus(), *(text for text in hostile_texts() * 2 if "<s>" not in text)],
        trainers.BpeTrainer(vocab_size=size, min_frequency=2, show_progress=False, initial_alphabet=alphabet),
    )
    model = json.loads(made.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return tuple(tokens), tuple(" ".join(pair) for pair in model["merges"])


def byte_level(
    pre: str | None, *, special: Sequence[str] = SPECIAL, user: Sequence[str] = USER, **more: Any
) -> dict[str, Any]:
    """Metadata of a byte-level BPE vocabulary. Its first special tokens are <s> and </s>."""
    tokens, merges = _byte_level_merges()
    # words that no merges produce: single tokens only with IGNORE_MERGES
    words = ("Hello", "Ġworld", "HelloWorld", "iPhone", "Ġtrailing", "pass")
    tokens = (*tokens, *(word for word in words if word not in tokens))
    every = [*tokens, "<s>", "</s>", *special, *user]
    assert len(set(every)) == len(every)  # llama.cpp crashes on a duplicate token
    types = [*[NORMAL] * len(tokens), *[CONTROL] * (2 + len(special)), *[USER_DEFINED] * len(user)]
    return {
        "model": "gpt2", "pre": pre, "tokens": every, "token_type": types, "merges": merges,
        "bos_token_id": every.index("<s>"), "eos_token_id": every.index("</s>"), **more,
    }  # fmt: skip


@cache
def trained(
    kind: str = "bpe", *, prefix: bool = True, normalise: str = "identity", merge_spaces: bool = False,
    user: tuple[str, ...] = (), control: tuple[str, ...] = (), byte_fallback: bool = True, pad: bool = False,
) -> sentencepiece.SentencePieceProcessor:  # fmt: skip
    """A SentencePiece model of `kind` "bpe" or "unigram", trained on the corpus."""
    model = io.BytesIO()
    ids = (
        {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
        if pad
        else {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in corpus() for line in text.split("\n") if line]),
        model_writer=model, model_type=kind, vocab_size=1400, hard_vocab_limit=False, character_coverage=0.995,
        byte_fallback=byte_fallback, add_dummy_prefix=prefix, normalization_rule_name=normalise,
        remove_extra_whitespaces=merge_spaces, allow_whitespace_only_pieces=not merge_spaces, split_digits=True,
        user_defined_symbols=list(user), control_symbols=list(control), num_threads=1, minloglevel=2, **ids,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def sentencepiece_pieces(model: sentencepiece.SentencePieceProcessor, user: Sequence[str] = ()) -> dict[str, Any]:
    """Tokens, scores and types of a trained model as llama.cpp's converter writes them; `user` are user-defined symbols."""
    ids = range(model.get_piece_size())
    tokens, types = [model.id_to_piece(i) for i in ids], []
    for i, token in enumerate(tokens):
        kinds = [(model.is_unknown(i), UNKNOWN), (model.is_control(i), CONTROL), (model.is_byte(i), BYTE)]
        kinds += [(model.is_unused(i), UNUSED), (token in user, USER_DEFINED)]
        types.append(next((kind for holds, kind in kinds if holds), NORMAL))
    # user-defined tokens are stored with real spaces
    tokens = [
        token.replace("▁", " ") if kind == USER_DEFINED else token for token, kind in zip(tokens, types, strict=True)
    ]
    return {"tokens": tokens, "scores": [float(model.get_score(i)) for i in ids], "token_type": types}


def sentencepiece_bpe(*, special: Sequence[str] = SPECIAL, user: Sequence[str] = USER, **more: Any) -> dict[str, Any]:
    """Metadata of a SentencePiece BPE vocabulary like Llama 2's and Mistral's, with added tokens."""
    found = sentencepiece_pieces(trained())
    added = [token for token in (*special, *user) if token not in found["tokens"]]
    found["tokens"] += added
    found["token_type"] += [CONTROL if token in special else USER_DEFINED for token in added]
    found["scores"] += [-1000.0] * len(added)
    assert len(set(found["tokens"])) == len(found["tokens"])
    return {
        "model": "llama",
        "pre": "default",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **found,
        **more,
    }


GEMMA_USER = (
    *("\n" * count for count in range(2, 8)), *("▁" * count for count in range(2, 10)),
    "<table>", "</table>", "<b>", "[@BOS@]", "\t\t",
)  # fmt: skip


def gemma_model() -> sentencepiece.SentencePieceProcessor:
    """A model trained like Gemma's: no space prefix, runs of newlines and of spaces as single tokens."""
    return trained(prefix=False, user=GEMMA_USER, control=("<start_of_turn>", "<end_of_turn>"))


def gemma(**more: Any) -> dict[str, Any]:
    """Metadata of a SentencePiece vocabulary like Gemma 1 to 3's."""
    found = sentencepiece_pieces(gemma_model(), GEMMA_USER)
    return {
        "model": "llama", "pre": "default", "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0,
        "add_space_prefix": False, **found, **more,
    }  # fmt: skip


T5_USER = ("<extra_id_0>", "<extra_id_1>", "<extra_id_2>")


def t5_model(*, normalise: str = "nmt_nfkc", merge_spaces: bool = True) -> sentencepiece.SentencePieceProcessor:
    """A model trained like T5's: unigram, normalised, runs of spaces merged, no byte fallback."""
    return trained("unigram", normalise=normalise, merge_spaces=merge_spaces, byte_fallback=False, pad=True)


def t5(*, normalise: str = "nmt_nfkc", merge_spaces: bool = True, **more: Any) -> dict[str, Any]:
    """Metadata of a unigram vocabulary like T5's."""
    model = t5_model(normalise=normalise, merge_spaces=merge_spaces)
    found = sentencepiece_pieces(model)
    found["tokens"] += T5_USER
    found["token_type"] += [USER_DEFINED] * len(T5_USER)
    found["scores"] += [-1000.0] * len(T5_USER)
    return {
        "model": "t5", "pre": "default", "eos_token_id": 1, "unknown_token_id": 2, "padding_token_id": 0, "add_bos_token": False,
        "add_eos_token": True, "add_space_prefix": True, "remove_extra_whitespaces": merge_spaces,
        "precompiled_charsmap": charsmap(model) or None, **found, **more,
    }  # fmt: skip


def charsmap(model: sentencepiece.SentencePieceProcessor) -> bytes:
    """SentencePiece's normalisation table: field 2 of field 3 of the model's protocol buffer."""
    return dict(_fields(dict(_fields(model.serialized_model_proto())).get(3, b""))).get(2, b"")


def _fields(data: bytes) -> list[tuple[int, bytes]]:
    found, place = [], 0

    def number() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while place < len(data):
        tag = number()
        size = {0: 0, 1: 8, 5: 4}.get(tag & 7)
        if size == 0:
            number()
            continue
        size = number() if size is None else size
        found.append((tag >> 3, data[place : place + size]))
        place += size
    return found


def gemma4(**more: Any) -> dict[str, Any]:
    """Metadata like Gemma 4's: BPE merges over characters, spaces as U+2581, byte fallback."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    lines = [text.replace(" ", "▁") for text in (*corpus(), *hostile_texts()) if "\0" not in text]
    made.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=2500, min_frequency=2, limit_alphabet=600, show_progress=False)
    )
    model = json.loads(made.to_str())["model"]
    control = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|think|>"]
    user = ["<|channel>", "<channel|>", "<|tool_call>", "<|tool_response>", "[a b]"]
    learned = [token for token in sorted(model["vocab"], key=model["vocab"].get) if token not in control]
    runs = ["\n" * count for count in range(2, 6)]
    tokens = [*control, *(f"<0x{byte:02X}>" for byte in range(256)), *runs, *learned, *user]
    assert len(set(tokens)) == len(tokens)
    return {
        "model": "gemma4", "tokens": tokens, "merges": [" ".join(pair) for pair in model["merges"]],
        "token_type": [CONTROL] * len(control) + [BYTE] * 256 + [NORMAL] * (len(runs) + len(learned))
        + [USER_DEFINED] * len(user),
        "scores": [-1000.0] * len(tokens), "bos_token_id": 2, "eos_token_id": 1, "unknown_token_id": 3, "padding_token_id": 0,
        "add_space_prefix": False, "add_bos_token": True, **more,
    }  # fmt: skip


PHI3 = ("<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|system|>", "<|end|>", "<|user|>")


def phi3(**more: Any) -> dict[str, Any]:
    """Metadata of Phi-3: Llama 2's vocabulary and control tokens that strip the white space after them."""
    name = {".general.name": "Phi-3 Mini 4K Instruct"}
    found = {**name, **sentencepiece_bpe(special=PHI3, user=()), "eos_token_id": 0, **more}
    found["eos_token_id"] = found["tokens"].index("<|endoftext|>")
    return found
