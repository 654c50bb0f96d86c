"""Encoding and decoding with every kind of tokenizer, against llama.cpp, sentencepiece and transformers."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

import headrace
import support.zoo.vocabularies as made
from headrace.checkpoint import open_checkpoint
from headrace.model.pre_tokenizers import pre_tokenizer
from headrace.model.tokenizer import Tokenizer
from headrace.plan import Profile
from headrace.plan.profile import save_profile
from headrace.sampling_params import SamplingParams
from support.llama_cpp import LlamaVocabulary
from support.zoo.scripted import in_turn, sentencepiece, write_scripted

pytestmark = pytest.mark.zoo

# Every pre-tokenizer name that the pinned llama.cpp accepts, found by trying them.
LLAMA_CPP_NAMES = (
    "default", "minicpm5", "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
    "jina-v5-nano", "deepseek-llm", "deepseek-coder", "deepseek-v3", "spark2_5", "youtu", "falcon", "mpt", "starcoder",
    "gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de", "a.x-4.0", "mellum", "modern-bert",
    "jais-2", "granite-embed-multi-311m", "sarvam-moe", "jina-v1-en", "jina-v2-code", "roberta-bpe", "whitespace", "refact",
    "command-r", "qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "qwen35", "stablelm2", "olmo", "dbrx", "smaug-bpe",
    "poro-chat", "glm4", "chatglm-bpe", "glm5", "viking", "jais", "tekken", "smollm", "codeshell", "bloom", "gpt3-finnish",
    "exaone", "exaone4", "exaone-moe", "chameleon", "minerva-7b", "megrez", "gpt-4o", "llama4", "kanana2", "talkie",
    "granite-embed-multi-97m", "tiny_aya", "cohere2moe", "superbpe", "trillion", "granite-docling", "bailingmoe",
    "bailingmoe2", "llada-moe", "seed-coder", "hunyuan", "hunyuan-dense", "hy_v4", "joyai-llm", "kimi-k2", "ufakzeka",
    "grok-2", "afmoe", "laguna", "minimax-m2", "solar-open", "mellum2",
)  # fmt: skip
ACCEPTED = [name for name in LLAMA_CPP_NAMES if (pre_tokenizer(name) is not None)]

# Names for which llama.cpp only approximates the published pattern: it takes every letter outside ASCII for upper and lower
# case, leaves marks out of words, ignores case in words, or takes all white space for U+000B before it matches ranges. For
# texts that show the difference the oracle is the published pattern, run by `tokenizers`.
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
)
NOT_HAN_UPPER, NOT_HAN_LOWER = UPPER[:-1] + r"&&[^\p{Han}]]", LOWER[:-1] + r"&&[^\p{Han}]]"
KIMI = (
    rf"[\p{{Han}}]+|[^\r\n\p{{L}}\p{{N}}]?{NOT_HAN_UPPER}*{NOT_HAN_LOWER}+{CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{NOT_HAN_UPPER}+{NOT_HAN_LOWER}*{CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"
)
EAST_ASIAN = r"[一-龥ࠀ-一가-퟿]+"
PUBLISHED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), (O200K,)),
    "tekken": (O200K.replace(CONTRACTIONS + "?", "").replace("{1,3}", ""),),
    **dict.fromkeys(("tiny_aya", "cohere2moe"), (r"\d{1,3}(?=(?:\d{3})*\b)", O200K)),
    "kimi-k2": (KIMI,),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", EAST_ASIAN, r"\p{N}"),
    "deepseek-llm": (
        r"[\r\n]", r"\s?[\p{Lu}\p{Ll}\p{Lt}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", EAST_ASIAN, r"\p{N}+",
    ),
}  # fmt: skip


def opened(path: Path) -> Tokenizer:
    return Tokenizer(open_checkpoint(path))


def written(path: Path, metadata: Mapping[str, Any], architecture: str = "llama") -> tuple[Tokenizer, LlamaVocabulary]:
    """One vocabulary, read by headrace and by llama.cpp."""
    made.write_vocabulary(path, metadata, architecture=architecture)
    return opened(path), LlamaVocabulary(path)


def expected(oracle: LlamaVocabulary, text: str) -> list[int]:
    """llama.cpp's tokens of a raw prompt: at most one BOS token, and no end token after the text."""
    ids = oracle.tokens(text, add_special=False)
    return ids if oracle.begin is None or ids[:1] == [oracle.begin] else [oracle.begin, *ids]


def wrong(
    ours: Callable[[str], list[int]], theirs: Callable[[str], list[int]], texts: Iterable[str], tokens: Sequence[str]
) -> dict[str, tuple[list[str], list[str]]]:
    """The texts with wrong tokens, with (found, expected)."""
    found = {}
    for text in texts:
        got, right = ours(text), theirs(text)
        if got != right:
            found[text] = ([tokens[i] for i in got], [tokens[i] for i in right])
    return found


def with_types(metadata: Mapping[str, Any], tokens: Sequence[str], kind: int) -> list[int]:
    """The token types of a file, with `kind` for these tokens."""
    types = zip(metadata["tokens"], metadata["token_type"], strict=True)
    return [kind if token in tokens else one for token, one in types]


def specials(metadata: Mapping[str, Any]) -> list[str]:
    """A file's control and user-defined tokens except BOS."""
    kinds = zip(metadata["tokens"], metadata["token_type"], strict=True)
    begin = metadata["tokens"][metadata.get("bos_token_id", 0)]
    return [token for token, kind in kinds if kind in (made.CONTROL, made.USER_DEFINED) and token != begin]


# Byte-level BPE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vocabularies")


def published(metadata: Mapping[str, Any], patterns: Sequence[str]) -> Backend:
    """A byte-level vocabulary with a published pre-tokenizer, as in a tokenizer.json."""
    vocabulary = {token: i for i, token in enumerate(metadata["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["merges"]]
    found = Backend(models.BPE(vocabulary, merges, ignore_merges=metadata["pre"] == "tekken"))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found.pre_tokenizer = pre_tokenizers.Sequence([*splits, last])
    kinds = list(zip(metadata["tokens"], metadata["token_type"], strict=True))
    found.add_special_tokens([token for token, kind in kinds if kind == made.CONTROL])
    found.add_tokens([AddedToken(token, normalized=False) for token, kind in kinds if kind == made.USER_DEFINED])
    return found


def test_every_pre_tokenizer_of_transformers_is_compared() -> None:
    assert set(GGUF_PRE_TOKENIZER_SPLITS) <= set(ACCEPTED)
    assert len(ACCEPTED) >= 66


@pytest.mark.parametrize("pre", [*ACCEPTED, None])
def test_byte_level_bpe_encodes_like_llama_cpp(pre: str | None, folder: Path) -> None:
    metadata = made.byte_level(pre)
    ours, oracle = written(folder / "byte-level.gguf", metadata)
    by_pattern = published(metadata, PUBLISHED[str(pre)]) if pre in PUBLISHED else None

    def right(text: str) -> list[int]:
        ids = expected(oracle, text)
        if by_pattern is None or not shows_the_approximation(pre, text):
            return ids
        begins = [] if oracle.begin is None else [oracle.begin]
        return [*begins, *by_pattern.encode(text, add_special_tokens=False).ids]

    texts = [text for text in made.hostile_texts() if "'\u017f" not in text] + made.texts_with(
        [*made.SPECIAL, *made.USER]
    )
    assert wrong(ours.encode, right, texts, metadata["tokens"]) == {}


def shows_the_approximation(pre: str | None, text: str) -> bool:
    if pre in ("deepseek-coder", "deepseek-llm"):
        return any(character.isspace() and ord(character) > 127 for character in text)
    cases = any(a.isupper() != b.isupper() for a, b in pairwise(text) if a.isalpha() and b.isalpha())
    return cases or not text.isascii()


@pytest.mark.parametrize("flag", [None, True, False])
@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe", "default", "deepseek-r1-qwen"])
def test_a_bos_token_is_added_by_the_files_flag_or_the_pre_tokenizers_default(
    pre: str, flag: bool | None, folder: Path
) -> None:
    metadata = made.byte_level(pre, add_bos_token=flag)
    ours, oracle = written(folder / "begins.gguf", metadata)
    texts = ["", "a", " a", "<s>", "<s>a", " <s>a", "<s><s>", "</s>a", "<|im_start|>"]
    right = {text: expected(oracle, text) for text in texts}
    right["<s><s>"] = oracle.tokens("<s><s>", add_special=False)
    assert wrong(ours.encode, right.__getitem__, texts, metadata["tokens"]) == {}


@pytest.mark.parametrize("flag", ["add_eos_token", "add_sep_token"])
def test_a_raw_prompt_gets_no_end_token(flag: str, folder: Path) -> None:
    for metadata in (made.byte_level("qwen2"), made.sentencepiece_bpe()):
        metadata |= {flag: True, "seperator_token_id": metadata["tokens"].index("</tool>")}
        ours, oracle = written(folder / "ends.gguf", metadata)
        texts = ["", "a", "a</s>", "<|im_start|>user\nhi"]
        assert wrong(ours.encode, lambda text: expected(oracle, text), texts, metadata["tokens"]) == {}  # noqa: B023


DEEPSEEK = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜tool▁calls▁begin｜>",
)


@pytest.mark.parametrize("kind", [made.CONTROL, made.USER_DEFINED])
def test_special_tokens_outside_the_byte_alphabet_are_matched_whole(kind: int, folder: Path) -> None:
    metadata = made.byte_level(
        "deepseek-r1-qwen", special=DEEPSEEK, user=("<think>", "</think>", "日本", "né", "a b", "\t\t")
    )
    number = metadata["tokens"].index
    metadata["token_type"] = with_types(metadata, DEEPSEEK[2:], kind)
    metadata |= {"bos_token_id": number(DEEPSEEK[0]), "eos_token_id": number(DEEPSEEK[1]), "add_bos_token": True}
    metadata[".tokenizer.chat_template"] = (
        "{{ bos_token }}{% for m in messages %}<｜User｜>{{ m.content }}{{ eos_token }}{% endfor %}<｜Assistant｜>"
    )
    ours, oracle = written(folder / "deepseek.gguf", metadata)
    assert len(ours.encode("<｜User｜>hi<｜Assistant｜>")) == 3 + len(oracle.tokens("hi", add_special=False))
    assert ours.chat([{"role": "user", "content": "hi"}]) == oracle.tokens(f"<｜User｜>hi{DEEPSEEK[1]}<｜Assistant｜>")
    assert number(DEEPSEEK[1]) in ours.end_ids
    texts = [
        *made.texts_with(DEEPSEEK[1:]),
        *made.texts_with(["日本", "né", "a b", "\t\t"]),
        "n\u00e9",
        "ne\u0301",
        "日本語 日 本",
        "a  b a b",
    ]
    assert wrong(ours.encode, lambda text: expected(oracle, text), texts, metadata["tokens"]) == {}


# SentencePiece


SPM_TEXTS = [*made.hostile_texts(), *made.texts_with([*made.SPECIAL, *made.USER, "</s>", "<unk>"])]


@pytest.mark.parametrize("prefix", [None, True, False])
def test_sentencepiece_bpe_encodes_like_llama_cpp(prefix: bool | None, folder: Path) -> None:
    metadata = made.sentencepiece_bpe(add_space_prefix=prefix)
    ours, oracle = written(folder / "sentencepiece.gguf", metadata)
    assert wrong(ours.encode, lambda text: expected(oracle, text), SPM_TEXTS, metadata["tokens"]) == {}


def test_texts_without_special_tokens_encode_like_sentencepiece(folder: Path) -> None:
    metadata = made.sentencepiece_bpe(special=(), user=())
    ours = opened(made.write_vocabulary(folder / "plain.gguf", metadata))
    texts = [text for text in made.hostile_texts() if "<s>" not in text and holds_words(text)]
    assert wrong(lambda text: ours.encode(text, special=False), made.trained().encode, texts, metadata["tokens"]) == {}


@pytest.mark.parametrize("begins", [None, True, False])
@pytest.mark.parametrize("ends", [None, True, False])
def test_sentencepiece_files_add_bos_by_their_flag(begins: bool | None, ends: bool | None, folder: Path) -> None:
    metadata = made.sentencepiece_bpe(add_bos_token=begins, add_eos_token=ends)
    ours, oracle = written(folder / "flags.gguf", metadata)
    texts = ["", "a", " a", "<s>", "<s>a", "<s>[INST] hi [/INST]", "a</s>", "</s>hi", "</s> hi", " <s> a"]
    assert wrong(ours.encode, lambda text: expected(oracle, text), texts, metadata["tokens"]) == {}


def test_user_defined_tokens_with_spaces_are_matched_by_their_text(folder: Path) -> None:
    user = ("▁<a>", " <b>", "<c> ", "<d e>", "▁▁▁▁▁▁▁▁▁▁", "          ", "\u00a0", "ﬁ", "</s>>")
    metadata = made.sentencepiece_bpe(special=("<|x|>", "<|x|>y", "x|>y"), user=user)
    ours, oracle = written(folder / "spaces.gguf", metadata)
    texts = [
        *made.texts_with([*user, "<|x|>", "<|x|>y", "x|>y"]),
        "a <a> b",
        "a▁<a>▁b",
        "a  <b>  b",
        " " * 25,
        "▁" * 25,
        *made.hostile_texts(),
    ]
    assert wrong(ours.encode, lambda text: expected(oracle, text), texts, metadata["tokens"]) == {}


@pytest.mark.parametrize("architecture", ["gemma", "gemma2", "gemma3", "llama"])
def test_gemma_encodes_like_llama_cpp_and_sentencepiece(architecture: str, folder: Path) -> None:
    metadata = made.gemma()
    ours, oracle = written(folder / "gemma.gguf", metadata, architecture)
    texts = [
        *made.hostile_texts(),
        *made.texts_with(specials(metadata)),
        *("\n" * n for n in range(12)),
        *(" " * n + "a" for n in range(24)),
    ]
    assert wrong(ours.encode, lambda text: expected(oracle, text), texts, metadata["tokens"]) == {}
    texts = [text for text in made.hostile_texts() if "▁" not in text and "<s>" not in text]
    model = made.gemma_model()
    assert wrong(lambda text: ours.encode(text, special=False), model.encode, texts, metadata["tokens"]) == {}


def test_gemma_4_encodes_like_llama_cpp(folder: Path) -> None:
    metadata = made.gemma4()
    ours, oracle = written(folder / "gemma4.gguf", metadata, "gemma4")
    texts = [
        *made.hostile_texts(),
        *made.texts_with(specials(metadata)),
        *("\n" * n for n in range(12)),
        "a\n\nb\n\n\n \n\n",
    ]
    assert wrong(ours.encode, lambda text: expected(oracle, text), texts, metadata["tokens"]) == {}


def test_phi_3_special_tokens_strip_the_white_space_after_them(folder: Path) -> None:
    turns = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}<|assistant|>\n"
    metadata = made.phi3(**{".tokenizer.chat_template": turns})
    ours, oracle = written(folder / "phi3.gguf", metadata, "phi3")
    specials_of_phi3 = [*made.PHI3, "</s>", "<unk>"]
    texts = [*made.hostile_texts(), *made.texts_with(specials_of_phi3)]
    assert wrong(ours.encode, lambda text: expected(oracle, text), texts, metadata["tokens"]) == {}
    theirs = AutoTokenizer.from_pretrained(str(phi3_folder(folder / "phi3", metadata)))
    # transformers also strips white space unknown to C, and keeps U+2581 before a special token
    texts = [text for text in texts if "\u00a0" not in text]
    assert wrong(ours.encode, lambda text: theirs(text).input_ids, texts, metadata["tokens"]) == {}
    messages = [
        {"role": "user", "content": " hi\n"},
        {"role": "assistant", "content": "so"},
        {"role": "user", "content": "  ho"},
    ]
    assert (
        ours.chat(messages)
        == theirs("<|user|>\n hi\n<|end|>\n<|assistant|>\nso<|end|>\n<|user|>\n  ho<|end|>\n<|assistant|>\n").input_ids
    )


# Unigram


def holds_words(text: str) -> bool:
    """False for texts or parts of only spaces: llama.cpp encodes these differently from sentencepiece."""
    parts = re.split(r"<extra_id_\d>|</s>", text)
    return all(part.replace("▁", "").strip() or not part for part in parts)


@pytest.mark.parametrize(
    ("normalise", "merges"),
    [("nmt_nfkc", True), ("nmt_nfkc_cf", True), ("identity", True), ("identity", False), ("nfkc", False)],
)
def test_unigram_encodes_like_llama_cpp_and_sentencepiece(normalise: str, merges: bool, folder: Path) -> None:
    metadata = made.t5(normalise=normalise, merge_spaces=merges)
    ours, oracle = written(folder / "t5.gguf", metadata, "t5")
    texts = [text for text in (*made.hostile_texts(), *made.texts_with([*made.T5_USER, "</s>"])) if holds_words(text)]
    right = lambda text: oracle.tokens(text, add_special=False)  # noqa: E731
    assert wrong(lambda text: ours.encode(text, special=False), right, texts, metadata["tokens"]) == {}
    model = made.t5_model(normalise=normalise, merge_spaces=merges)
    texts = [text for text in made.hostile_texts() if "<s>" not in text and holds_words(text)]
    assert wrong(lambda text: ours.encode(text, special=False), model.encode, texts, metadata["tokens"]) == {}


@pytest.mark.parametrize("prefix", [None, True, False])
def test_unigram_files_add_a_space_prefix_by_their_flag(prefix: bool | None, folder: Path) -> None:
    metadata = made.t5(normalise="identity", merge_spaces=False) | {"add_space_prefix": prefix}
    ours, oracle = written(folder / "t5.gguf", metadata, "t5")
    texts = [text for text in (*made.hostile_texts(), *made.texts_with(made.T5_USER)) if holds_words(text)]
    right = lambda text: oracle.tokens(text, add_special=False)  # noqa: E731
    assert wrong(lambda text: ours.encode(text, special=False), right, texts, metadata["tokens"]) == {}


def test_encoder_input_ends_with_the_end_token(folder: Path) -> None:
    encoder = {".t5.decoder_start_token_id": 0, ".t5.vocab_size": len(made.t5()["tokens"])}
    for flag in (None, True):
        ours, oracle = written(folder / "t5.gguf", {**made.t5(), "add_eos_token": flag, **encoder}, "t5")
        for text in ("", "a b", "a</s>", " a "):
            assert ours.encode(text) == oracle.tokens(text)


def test_t5_sentinels_stored_as_padding_are_matched_whole(folder: Path) -> None:
    metadata = made.t5()
    sentinels = metadata["tokens"][-len(made.T5_USER) :]
    size = len(metadata["tokens"])
    metadata["tokens"] = [
        *metadata["tokens"][: -len(sentinels)],
        *(f"[PAD{i}]" for i in range(size - len(sentinels), size - len(sentinels) + 100)),
    ]
    metadata["token_type"] = [*metadata["token_type"][: -len(sentinels)], *[made.UNUSED] * 100]
    metadata["scores"] = [*metadata["scores"][: -len(sentinels)], *[-10000.0] * 100]
    ours = opened(made.write_vocabulary(folder / "blanks.gguf", metadata, architecture="t5"))
    last = len(metadata["tokens"]) - 1  # T5 numbers its sentinels from the end
    for text, sentinel in (("a <extra_id_0> b", last), ("<extra_id_99>", last - 99), ("x<extra_id_7>y", last - 7)):
        assert [token for token in ours.encode(text, special=False) if token > last - 100] == [sentinel]


# Tokens whose type in the file llama.cpp overrides by their text


BY_TEXT = {
    "qwen": (
        "<|im_end|>", "<|endoftext|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>", "<|repo_name|>",
        "<|file_sep|>",
    ),
    "gpt-oss": ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|return|>", "<|call|>", "<|endoftext|>"),
    "gemma": ("<end_of_turn>", "<eos>", "<start_of_turn>"),
    "gemma 4": ("<|turn>", "<turn|>", "<|tool_response>", "</s>"),
    "llama 3": ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|start_header_id|>"),
    "deepseek": ("<｜end▁of▁sentence｜>", "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    "granite": ("<|end_of_text|>", "<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<fim_pad>", "<reponame>"),
    "kimi": ("[EOT]", "[EOS]", "[PAD]"),
    "others": ("<EOT>", "_<EOT>", "<end_of_utterance>", "<|flush|>", "<|calls|>", "<PRE>", "<SUF>", "<MID>", "<PAD>", "<REPO>"),
}  # fmt: skip


@pytest.mark.parametrize("kind", [made.CONTROL, made.USER_DEFINED])
@pytest.mark.parametrize("family", BY_TEXT)
def test_tokens_that_llama_cpp_knows_by_their_text_are_matched_whole(family: str, kind: int, folder: Path) -> None:
    tokens = BY_TEXT[family]
    metadata = made.byte_level("qwen2", special=[token for token in tokens if token != "</s>"], user=())
    metadata["token_type"] = with_types(metadata, tokens, kind)
    metadata["eos_token_id"] = metadata["tokens"].index(tokens[0])
    ours, oracle = written(folder / "by-text.gguf", metadata)
    texts = made.texts_with([token for token in tokens if token != "</s>"])
    assert wrong(ours.encode, lambda text: expected(oracle, text), texts, metadata["tokens"]) == {}
    assert {metadata["eos_token_id"]} <= ours.end_ids


# Text from tokens


KINDS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "byte-level": (lambda: made.byte_level("qwen2"), "qwen2"),
    "deepseek": (lambda: made.byte_level("deepseek-v3", special=DEEPSEEK, user=("<think>", "né", "日本", "a b")), "deepseek2"),
    "sentencepiece": (made.sentencepiece_bpe, "llama"),
    "sentencepiece without a prefix": (lambda: made.sentencepiece_bpe(add_space_prefix=False), "llama"),
    "gemma": (made.gemma, "gemma3"),
    "gemma4": (made.gemma4, "gemma4"),
    "phi3": (made.phi3, "phi3"),
    "t5": (lambda: made.t5(normalise="identity", merge_spaces=False), "t5"),
}  # fmt: skip


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest, folder: Path) -> tuple[Tokenizer, LlamaVocabulary, dict[str, Any]]:
    build, architecture = KINDS[request.param]
    metadata = build()
    return *written(folder / "kind.gguf", metadata, architecture), metadata


def streamed(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    stream = tokenizer.stream()
    return "".join(stream.step(token) for token in ids)


def test_every_token_decodes_like_llama_cpp(kind: tuple[Tokenizer, LlamaVocabulary, dict[str, Any]]) -> None:
    ours, oracle, metadata = kind
    found = {}
    for i, token in enumerate(metadata["tokens"]):
        data = oracle.piece(i)
        try:
            shown = data.decode()
        except UnicodeDecodeError:
            continue  # part of a character
        if streamed(ours, [i]) != shown:
            found[token] = (streamed(ours, [i]), shown)
    assert found == {}


def test_streamed_text_equals_llama_cpps_with_its_leading_space(
    kind: tuple[Tokenizer, LlamaVocabulary, dict[str, Any]],
) -> None:
    ours, oracle, metadata = kind
    found = {}
    for text in [*made.hostile_texts(), *made.texts_with(specials(metadata)[:9])]:
        ids = oracle.tokens(text, add_special=False)
        shown = b"".join(map(oracle.piece, ids)).decode()
        if streamed(ours, ids) != shown:
            found[text] = (streamed(ours, ids), shown)
    assert found == {}


def test_decoding_inverts_encoding(kind: tuple[Tokenizer, LlamaVocabulary, dict[str, Any]]) -> None:
    ours, oracle, metadata = kind
    spaces = metadata["model"] != "gpt2"  # there U+2581 in a text decodes to a space
    found = {}
    for text in made.hostile_texts():
        ids = oracle.tokens(text, add_special=False, parse_special=False)
        if metadata["model"] == "t5" and (2 in ids or not text.strip(" ")):
            continue  # unknown characters
        right = text.replace("▁", " ") if spaces else text
        if (
            "\n\n\n" in text
            and "\n\n\n" in metadata["tokens"]
            and metadata.get("add_space_prefix", True)
            and metadata["model"] == "llama"
        ):
            continue  # llama.cpp puts a space after a user-defined token
        if ours.decode(ids) != right:
            found[text] = (ours.decode(ids), right)
    assert found == {}


def test_a_character_split_over_tokens_is_held_back_until_complete(
    kind: tuple[Tokenizer, LlamaVocabulary, dict[str, Any]],
) -> None:
    ours, _, metadata = kind
    if metadata["model"] == "t5":
        pytest.skip("this vocabulary holds no bytes")
    if metadata["model"] == "gpt2":
        spelling = bytes_to_unicode()
        ids = [metadata["tokens"].index(spelling[byte]) for byte in "a🦖é".encode()]
    else:
        ids = [metadata["tokens"].index(f"<0x{byte:02X}>") for byte in "a🦖é".encode()]
    stream = ours.stream()
    assert [stream.step(token) for token in ids] == ["a", "", "", "", "🦖", "", "é"]
    assert ours.decode(ids) == "a🦖é"


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that continues "Once" with " a time" and a user's turn with " hi", then ends."""
    vocabulary = sentencepiece(
        ["▁", *"Onceatimh", "▁O", "▁On", "ce", "▁Once", "▁a", "▁t", "im", "▁tim", "▁time", "hi", "▁hi"],
        control=["<|im_start|>", "<|im_end|>"],
    )
    number = vocabulary["tokens"].index
    follows = in_turn(number("▁Once"), number("▁a"), number("▁time"), 2) | in_turn(
        number("<|im_end|>"), number("▁hi"), 2
    )
    return write_scripted(
        tmp_path_factory.mktemp("scripted") / "once.gguf", **vocabulary, follows=follows,
        template="{% for m in messages %}{{ m.content }}{% endfor %}<|im_end|>", name="once",
    )  # fmt: skip


def test_a_completion_keeps_the_space_of_its_first_token(once: Path, profile: Profile) -> None:
    save_profile(profile)
    greedy = SamplingParams(temperature=0.0)
    with headrace.load(str(once), memory="2GiB", draft="none") as model:
        assert model.generate("Once", raw=True, max_tokens=8, sampling=greedy).text == " a time"
        assert (
            "".join(chunk.text for chunk in model.stream("Once", raw=True, max_tokens=8, sampling=greedy)) == " a time"
        )
        completions = model.generate(["Once", "Once"], raw=True, max_tokens=8, sampling=greedy)
        assert [one.text for one in completions] == [" a time", " a time"]


def test_a_chat_answer_drops_the_space_of_its_first_token_like_transformers(once: Path, profile: Profile) -> None:
    save_profile(profile)
    with headrace.load(str(once), memory="2GiB", draft="none") as model:
        assert model.generate("so", max_tokens=8, sampling=SamplingParams(temperature=0.0)).text == "hi"


# Hugging Face folders


SPLIT = GGUF_PRE_TOKENIZER_SPLITS["llama3"]
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def bytes_backend(
    patterns: Sequence[str] = (SPLIT,), *, special: Sequence[str] = ("<s>", "</s>"), prefix: bool = False
) -> Backend:
    metadata = made.byte_level(
        "qwen2", special=[token for token in special if token not in ("<s>", "</s>")], user=("<think>", "né", "a b")
    )
    found = published(metadata, patterns)
    found.decoder = decoders.ByteLevel()
    if prefix:
        found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return found


def around(backend: Backend, template: str) -> Backend:
    tokens = [token for token in template.split() if token != "$A"]
    numbers = [(token, backend.token_to_id(token)) for token in dict.fromkeys(tokens)]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=numbers)
    return backend


def sentencepiece_backend(kind: str, special: Sequence[AddedToken] = ()) -> Backend:
    """A SentencePiece vocabulary as in a tokenizer.json: "legacy" like Llama 2 and Mistral, "metaspace", or "gemma"."""
    metadata = made.gemma() if kind == "gemma" else made.sentencepiece_bpe(special=(), user=())
    tokens = [token.replace(" ", "▁") for token in metadata["tokens"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    scores = dict(zip(tokens, metadata["scores"], strict=True))
    learned = [
        token
        for token, one in zip(tokens, metadata["token_type"], strict=True)
        if one == made.NORMAL and len(token) > 1
    ]
    pairs = [
        (scores[token], -i, (token[:cut], token[cut:]))
        for i, token in enumerate(learned)
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    merges = [pair for _, _, pair in sorted(pairs, key=lambda one: (-one[0], -one[1]))]
    found = Backend(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    last = [decoders.ByteFallback(), decoders.Fuse()]
    if kind == "metaspace":
        found.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    else:
        first = [] if kind == "gemma" else [normalizers.Prepend("▁")]
        found.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    strip = [] if kind == "gemma" else [decoders.Strip(" ", 1, 0)]
    found.decoder = decoders.Sequence([decoders.Replace("▁", " "), *last, *strip])
    found.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    found.add_special_tokens(list(special))
    return found


def unigram_backend(*, charsmap: bool = True) -> Backend:
    metadata = made.t5(normalise="nmt_nfkc")
    found = Backend(models.Unigram(list(zip(metadata["tokens"], metadata["scores"], strict=True)), unk_id=2))
    table = [normalizers.Precompiled(metadata["precompiled_charsmap"])] if charsmap else []
    found.normalizer = normalizers.Sequence([*table, normalizers.Replace(Regex(" {2,}"), " ")])
    found.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    found.decoder = decoders.Metaspace("▁")
    found.add_special_tokens(["<pad>", "</s>", "<unk>", *made.T5_USER])
    return found


def phi3_folder(path: Path, metadata: Mapping[str, Any]) -> Path:
    """Phi-3's own tokenizer.json, whose special tokens strip the white space after them."""
    stripping = [AddedToken(token, rstrip=token not in ("<|endoftext|>",), normalized=False) for token in made.PHI3]
    found = sentencepiece_backend("legacy", stripping)
    found.add_special_tokens([AddedToken("</s>", rstrip=True, normalized=False)])
    assert [found.id_to_token(i) for i in range(found.get_vocab_size())] == metadata["tokens"]
    return written_folder(path, around(found, "<s> $A"), {"bos_token": "<s>", "eos_token": "<|endoftext|>"})


def written_folder(path: Path, backend: Backend, settings: Mapping[str, Any], model_type: str = "llama") -> Path:
    """A model folder with its tokenizer, its settings, and the least weights that open."""
    path.mkdir()
    backend.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **settings}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {
        "model_type": model_type, "vocab_size": backend.get_vocab_size(), "hidden_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    save_file({"model.norm.weight": np.ones(64, np.float32)}, path / "model.safetensors")
    return path


STRIPPING = [
    AddedToken("<|l|>", lstrip=True, normalized=False), AddedToken("<|r|>", rstrip=True, normalized=False),
    AddedToken("<|both|>", lstrip=True, rstrip=True, normalized=False),
    AddedToken("<|word|>", single_word=True, normalized=False),
    AddedToken("<|n|>", normalized=True, special=False),
]  # fmt: skip
GLM = ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|endoftext|>")
TURNS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
BOTH = {"bos_token": "<s>", "eos_token": "</s>"}


def truncated() -> Backend:
    found = around(bytes_backend(), "<s> $A")
    found.enable_truncation(4)
    found.enable_padding(length=16)
    return found


FOLDERS: dict[str, tuple[Callable[[], Backend], dict[str, Any]]] = {
    "qwen2": (lambda: bytes_backend((GGUF_PRE_TOKENIZER_SPLITS["qwen2"],), special=TURNS), {"eos_token": "<|im_end|>"}),
    "llama 3": (lambda: around(bytes_backend(special=TURNS), "<s> $A"), BOTH),
    "glm 4": (
        lambda: around(bytes_backend(special=GLM), "[gMASK] <sop> $A"),
        {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    ),
    "glm 4 with a bos_token": (lambda: around(bytes_backend(special=GLM), "[gMASK] <sop> $A"), BOTH),
    "bos and a prefix": (lambda: around(bytes_backend(special=GLM), "<s> <sop> $A"), BOTH),
    "a suffix other than eos": (lambda: around(bytes_backend(special=GLM), "<s> $A <|assistant|>"), BOTH),
    "eos after the text": (lambda: around(bytes_backend(), "$A </s>"), BOTH),
    "bos and eos": (lambda: around(bytes_backend(), "<s> $A </s>"), BOTH),
    "gpt2": (lambda: bytes_backend((GPT2,)), BOTH),
    "gpt2 with a space first": (lambda: bytes_backend((GPT2,), prefix=True), BOTH),
    "deepseek": (
        lambda: around(bytes_backend(PUBLISHED["deepseek-llm"], special=DEEPSEEK), f"{DEEPSEEK[0]} $A"),
        {"bos_token": DEEPSEEK[0], "eos_token": DEEPSEEK[1]},
    ),
    "says add_bos_token": (bytes_backend, {**BOTH, "add_bos_token": True}),
    "says add_bos_token and add_eos_token": (bytes_backend, {**BOTH, "add_bos_token": True, "add_eos_token": True}),
    "says add_bos_token false": (lambda: around(bytes_backend(), "<s> $A"), {**BOTH, "add_bos_token": False}),
    "truncated and padded": (truncated, BOTH),
    "llama 2": (lambda: around(sentencepiece_backend("legacy"), "<s> $A"), BOTH),
    "llama 2 by its class": (
        lambda: around(sentencepiece_backend("legacy"), "<s> $A"),
        {**BOTH, "tokenizer_class": "LlamaTokenizer", "legacy": True},
    ),
    "llama 2 by its class, not legacy": (
        lambda: around(sentencepiece_backend("metaspace"), "<s> $A"),
        {**BOTH, "tokenizer_class": "LlamaTokenizer", "legacy": False},
    ),
    "llama 2 by its class without bos": (
        lambda: sentencepiece_backend("metaspace"),
        {**BOTH, "tokenizer_class": "LlamaTokenizer", "add_bos_token": False},
    ),
    "llama 2 by its class with eos": (
        lambda: sentencepiece_backend("metaspace"),
        {**BOTH, "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": True},
    ),
    "mistral": (
        lambda: around(
            sentencepiece_backend("metaspace", [AddedToken(t, normalized=False) for t in ("[INST]", "[/INST]")]), "<s> $A"
        ),
        BOTH,
    ),
    "gemma": (lambda: around(sentencepiece_backend("gemma"), "<s> $A"), BOTH),
    "added tokens that strip": (lambda: around(sentencepiece_backend("metaspace", STRIPPING), "<s> $A"), BOTH),
    "unigram": (unigram_backend, {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}),
    "unigram with eos": (
        lambda: around(unigram_backend(), "$A </s>"),
        {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_encodes_like_transformers(name: str, tmp_path: Path) -> None:
    build, settings = FOLDERS[name]
    path = written_folder(tmp_path / "model", build(), settings)
    ours, theirs = opened(path), AutoTokenizer.from_pretrained(str(path))
    theirs.backend_tokenizer.no_truncation()
    theirs.backend_tokenizer.no_padding()
    end = theirs.eos_token_id
    empty = theirs("").input_ids

    def right(text: str) -> list[int]:
        ids = list(theirs(text).input_ids)
        if empty[-1:] == [end]:
            ids.pop()  # output cannot follow an end token
        begin = theirs.bos_token_id
        return ids[1:] if begin is not None and ids[:2] == [begin, begin] else ids

    added = [str(token) for token in theirs.added_tokens_decoder.values() if str(token) != theirs.bos_token]
    texts = [*made.hostile_texts(), *made.texts_with(added[:8]), "<s>a", "<s> a", "</s>a"]
    tokens = [ours_token or "" for ours_token in theirs.convert_ids_to_tokens(list(range(len(theirs))))]
    assert wrong(ours.encode, right, texts, tokens) == {}
    assert wrong(lambda text: ours.prompt(text, raw=True), right, [text for text in texts if right(text)], tokens) == {}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_decodes_like_transformers(name: str, tmp_path: Path) -> None:
    build, settings = FOLDERS[name]
    path = written_folder(tmp_path / "model", build(), settings)
    ours, theirs = opened(path), AutoTokenizer.from_pretrained(str(path))
    found = {}
    for text in [*made.hostile_texts(), *made.texts_with(["<think>", "</s>"])]:
        ids = theirs(text, add_special_tokens=False).input_ids
        right = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if ours.decode(ids) != right:
            found[text] = (ours.decode(ids), right)
    assert found == {}


@pytest.mark.parametrize("kind", ["legacy", "metaspace"])
def test_a_folders_completion_keeps_the_space_of_its_first_token(kind: str, tmp_path: Path) -> None:
    ours = opened(written_folder(tmp_path / "model", around(sentencepiece_backend(kind), "<s> $A"), BOTH))
    prompt = ours.prompt("The quick brown", raw=True)
    whole = ours.prompt("The quick brown fox jumps", raw=True)
    assert whole[: len(prompt)] == prompt
    stream = ours.detokenizer(prompt, raw=True)
    shown = [text for token in whole[len(prompt) :] for _, text in stream.step(token)]
    assert "".join(shown) == " fox jumps"


def test_a_folders_conversation_repeats_no_token_of_its_template(tmp_path: Path) -> None:
    template = "[gMASK]<sop>{% for m in messages %}<|user|>\n{{ m.content }}{% endfor %}<|assistant|>"
    path = written_folder(
        tmp_path / "model", around(bytes_backend(special=GLM), "[gMASK] <sop> $A"),
        {"eos_token": "<|endoftext|>", "chat_template": template},
    )  # fmt: skip
    theirs = AutoTokenizer.from_pretrained(str(path))
    turns = [{"role": "user", "content": "hi"}]
    ids = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert opened(path).chat(turns) == list(ids)
