"""Text to tokens and back for every kind of tokenizer, against llama.cpp, sentencepiece and transformers."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vocabularies as made
from llama_cpp import LlamaVocabulary
from safetensors.numpy import save_file
from scripted import CHATML, in_turn, sentencepiece, write_scripted
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

import headrace
from headrace.checkpoint import open_checkpoint
from headrace.engine import Sampling
from headrace.model.cuts import is_known
from headrace.model.tokenizer import Tokenizer
from headrace.plan import Profile
from headrace.plan.profile import save_profile

# Every name that the pinned llama.cpp accepts, found by asking it.
LLAMA_CPP_NAMES = """
    default minicpm5 llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano deepseek-llm deepseek-coder
    deepseek-v3 spark2_5 youtu falcon mpt starcoder gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum
    modern-bert jais-2 granite-embed-multi-311m sarvam-moe jina-v1-en jina-v2-code roberta-bpe whitespace refact command-r qwen2
    deepseek-r1-qwen kormo f2llmv2 qwen35 stablelm2 olmo dbrx smaug-bpe poro-chat glm4 chatglm-bpe glm5 viking jais tekken smollm
    codeshell bloom gpt3-finnish exaone exaone4 exaone-moe chameleon minerva-7b megrez gpt-4o llama4 kanana2 talkie
    granite-embed-multi-97m tiny_aya cohere2moe superbpe trillion granite-docling bailingmoe bailingmoe2 llada-moe seed-coder hunyuan
    hunyuan-dense hy_v4 joyai-llm kimi-k2 ufakzeka grok-2 afmoe laguna minimax-m2 solar-open mellum2
""".split()
ACCEPTED = [name for name in LLAMA_CPP_NAMES if is_known(name)]

# Where llama.cpp only comes near the published pattern: it takes every letter that is not ASCII for upper and lower case, leaves
# marks out of words, sees no case in words at all, or takes all white space for U+000B before it looks for ranges. For texts that
# show it the published pattern is the oracle, run by `tokenizers`.
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
        r"[\r\n]", r"\s?\p{L}+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", EAST_ASIAN, r"\p{N}+",
    ),
}  # fmt: skip


def opened(path: Path) -> Tokenizer:
    return Tokenizer(open_checkpoint(path))


def written(path: Path, metadata: Mapping[str, Any], architecture: str = "llama") -> tuple[Tokenizer, LlamaVocabulary]:
    """A vocabulary as headrace and as llama.cpp read it."""
    made.write_vocabulary(path, metadata, architecture=architecture)
    return opened(path), LlamaVocabulary(path)


def expected(oracle: LlamaVocabulary, text: str) -> list[int]:
    """llama.cpp's tokens of a prompt to complete: one beginning token at most, and no end token after the text."""
    ids = oracle.tokens(text, add_special=False)
    return ids if oracle.begin is None or ids[:1] == [oracle.begin] else [oracle.begin, *ids]



def wrong(
    ours: Callable[[str], list[int]], theirs: Callable[[str], list[int]], texts: Iterable[str], tokens: Sequence[str]
) -> dict[str, tuple[list[str], list[str]]]:
    """The texts that give other tokens, with what was found and what is right."""
    found = {}
    for text in texts:
        got, right = ours(text), theirs(text)
        if got != right:
            found[text] = ([tokens[i] for i in got], [tokens[i] for i in right])
    return found


def specials(metadata: Mapping[str, Any]) -> list[str]:
    """A file's control and user-defined tokens, but for the beginning token."""
    kinds = zip(metadata["tokens"], metadata["token_type"], strict=True)
    begin = metadata["tokens"][metadata.get("bos_token_id", 0)]
    return [token for token, kind in kinds if kind in (made.CONTROL, made.USER_DEFINED) and token != begin]


# Byte-level BPE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vocabularies")


def published(metadata: Mapping[str, Any], patterns: Sequence[str]) -> Backend:
    """A byte-level vocabulary and a published way to cut texts, as a tokenizer.json has them."""
    vocabulary = {token: i for i, token in enumerate(metadata["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["merges"]]
    found = Backend(models.BPE(vocabulary, merges, ignore_merges=metadata["pre"] == "tekken"))
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found.pre_tokenizer = pre_tokenizers.Sequence([*cuts, last])
    kinds = list(zip(metadata["tokens"], metadata["token_type"], strict=True))
    found.add_special_tokens([token for token, kind in kinds if kind == made.CONTROL])
    found.add_tokens([AddedToken(token, normalized=False) for token, kind in kinds if kind == made.USER_DEFINED])
    return found


def test_every_name_that_transformers_knows_is_among_those_compared() -> None:
    assert set(GGUF_PRE_TOKENIZER_SPLITS) <= set(ACCEPTED)
    assert len(ACCEPTED) >= 66


@pytest.mark.parametrize("pre", [*ACCEPTED, None])
def test_byte_level_texts_become_llama_cpps_tokens(pre: str | None, folder: Path) -> None:
    metadata = made.byte_level(pre)
    ours, oracle = written(folder / "byte-level.gguf", metadata)
    by_pattern = published(metadata, PUBLISHED[str(pre)]) if pre in PUBLISHED else None

    def right(text: str) -> list[int]:
        ids = expected(oracle, text)
        if by_pattern is None or not shows_where_llama_cpp_only_comes_near(text):
            return ids
        begins = [] if oracle.begin is None else [oracle.begin]
        return [*begins, *by_pattern.encode(text, add_special_tokens=False).ids]

    texts = [text for text in made.hostile_texts() if "'\u017f" not in text] + made.texts_with([*made.SPECIAL, *made.USER])
    assert wrong(ours.encode, right, texts, metadata["tokens"]) == {}


def shows_where_llama_cpp_only_comes_near(text: str) -> bool:
    beyond = any(ord(character) > 127 for character in text)
    return beyond or any(a.isupper() != b.isupper() for a, b in zip(text, text[1:], strict=False) if a.isalpha() and b.isalpha())


@pytest.mark.parametrize("flag", [None, True, False])
@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe", "default", "deepseek-r1-qwen"])
def test_a_beginning_token_is_added_where_the_file_or_the_kind_says_so(
    pre: str, flag: bool | None, folder: Path
) -> None:
    metadata = made.byte_level(pre, add_bos_token=flag)
    ours, oracle = written(folder / "begins.gguf", metadata)
    texts = ["", "a", " a", "<s>", "<s>a", " <s>a", "<s><s>", "</s>a", "<|im_start|>"]
    right = {text: expected(oracle, text) for text in texts}
    right["<s><s>"] = oracle.tokens("<s><s>", add_special=False)
    assert wrong(ours.encode, right.__getitem__, texts, metadata["tokens"]) == {}


@pytest.mark.parametrize("flag", ["add_eos_token", "add_sep_token"])
def test_a_prompt_to_complete_does_not_end_with_an_end_token(flag: str, folder: Path) -> None:
    for metadata in (made.byte_level("qwen2"), made.sentencepiece_bpe()):
        metadata |= {flag: True, "seperator_token_id": metadata["tokens"].index("</tool>")}
        ours, oracle = written(folder / "ends.gguf", metadata)
        texts = ["", "a", "a</s>", "<|im_start|>user\nhi"]
        assert wrong(ours.encode, lambda text: expected(oracle, text), texts, metadata["tokens"]) == {}  # noqa: B023


DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>")


@pytest.mark.parametrize("kind", [made.CONTROL, made.USER_DEFINED])
def test_special_tokens_outside_the_byte_alphabet_are_whole(kind: int, folder: Path) -> None:
    metadata = made.byte_level("deepseek-r1-qwen", special=DEEPSEEK, user=("<think>", "</think>", "日本", "é", "a b", "\t\t"))
    number = metadata["tokens"].index
    metadata["token_type"] = [kind if token in DEEPSEEK[2:] else one for token, one in zip(metadata["tokens"], metadata["token_type"], strict=True)]
    metadata |= {"bos_token_id": number(DEEPSEEK[0]), "eos_token_id": number(DEEPSEEK[1]), "add_bos_token": True}
    metadata[".tokenizer.chat_template"] = "{{ bos_token }}{% for m in messages %}<｜User｜>{{ m.content }}{{ eos_token }}{% endfor %}<｜Assistant｜>"
    ours, oracle = written(folder / "deepseek.gguf", metadata)
    assert len(ours.encode("<｜User｜>hi<｜Assistant｜>")) == 3 + len(oracle.tokens("hi", add_special=False))
    assert ours.chat([{"role": "user", "content": "hi"}]) == oracle.tokens(f"<｜User｜>hi{DEEPSEEK[1]}<｜Assistant｜>")
    assert number(DEEPSEEK[1]) in ours.end_ids
    texts = [*made.texts_with(DEEPSEEK[1:]), *made.texts_with(["日本", "é", "a b", "\t\t"]), "caf\u00e9", "日本語 日 本", "a  b a b"]
    assert wrong(ours.encode, lambda text: expected(oracle, text), texts, metadata["tokens"]) == {}


# SentencePiece


SPM_TEXTS = [*made.hostile_texts(), *made.texts_with([*made.SPECIAL, *made.USER, "</s>", "<unk>"])]


@pytest.mark.parametrize("prefix", [None, True, False])
def test_sentencepiece_texts_become_llama_cpps_tokens(prefix: bool | None, folder: Path) -> None:
    metadata = made.sentencepiece_bpe(add_space_prefix=prefix)
    ours, oracle = written(folder / "sentencepiece.gguf", metadata)
    assert wrong(ours.encode, lambda text: expected(oracle, text), SPM_TEXTS, metadata["tokens"]) == {}


def test_texts_without_special_tokens_become_sentencepieces_own_tokens(folder: Path) -> None:
    metadata = made.sentencepiece_bpe(special=(), user=())
    ours = opened(made.write_vocabulary(folder / "plain.gguf", metadata))
    texts = [text for text in made.hostile_texts() if "<s>" not in text]
    assert wrong(lambda text: ours.encode(text, special=False), made.trained().encode, texts, metadata["tokens"]) == {}


@pytest.mark.parametrize("begins", [None, True, False])
@pytest.mark.parametrize("ends", [None, True, False])
def test_sentencepiece_files_say_what_a_text_begins_with(begins: bool | None, ends: bool | None, folder: Path) -> None:
    metadata = made.sentencepiece_bpe(add_bos_token=begins, add_eos_token=ends)
    ours, oracle = written(folder / "flags.gguf", metadata)
    texts = ["", "a", " a", "<s>", "<s>a", "<s>[INST] hi [/INST]", "a</s>", "</s>hi", "</s> hi", " <s> a"]
    assert wrong(ours.encode, lambda text: expected(oracle, text), texts, metadata["tokens"]) == {}


def test_tokens_of_its_own_that_hold_spaces_or_their_sign_are_found_as_they_are_spelled(folder: Path) -> None:
    user = ("▁<a>", " <b>", "<c> ", "<d e>", "▁▁▁▁▁▁▁▁▁▁", "          ", "\u00a0", "ﬁ", "</s>>")
    metadata = made.sentencepiece_bpe(special=("<|x|>", "<|x|>y", "x|>y"), user=user)
    ours, oracle = written(folder / "spaces.gguf", metadata)
    texts = [*made.texts_with([*user, "<|x|>", "<|x|>y", "x|>y"]), "a <a> b", "a▁<a>▁b", "a  <b>  b", " " * 25, "▁" * 25, *made.hostile_texts()]
    assert wrong(ours.encode, lambda text: expected(oracle, text), texts, metadata["tokens"]) == {}


@pytest.mark.parametrize("architecture", ["gemma", "gemma2", "gemma3", "llama"])
def test_gemmas_texts_become_llama_cpps_tokens_and_sentencepieces(architecture: str, folder: Path) -> None:
    metadata = made.gemma()
    ours, oracle = written(folder / "gemma.gguf", metadata, architecture)
    texts = [*made.hostile_texts(), *made.texts_with(specials(metadata)), *("\n" * n for n in range(12)), *(" " * n + "a" for n in range(24))]
    assert wrong(ours.encode, lambda text: expected(oracle, text), texts, metadata["tokens"]) == {}
    texts = [text for text in made.hostile_texts() if "▁" not in text and "<s>" not in text]
    model = made.gemma_model()
    assert wrong(lambda text: ours.encode(text, special=False), model.encode, texts, metadata["tokens"]) == {}


def test_gemma_4s_texts_become_llama_cpps_tokens(folder: Path) -> None:
    metadata = made.gemma4()
    ours, oracle = written(folder / "gemma4.gguf", metadata, "gemma4")
    texts = [*made.hostile_texts(), *made.texts_with(specials(metadata)), *("\n" * n for n in range(12)), "a\n\nb\n\n\n \n\n"]
    assert wrong(ours.encode, lambda text: expected(oracle, text), texts, metadata["tokens"]) == {}


def test_phi_3s_special_tokens_absorb_the_white_space_after_them(folder: Path) -> None:
    metadata = made.phi3(**{".tokenizer.chat_template": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}<|assistant|>\n"})
    ours, oracle = written(folder / "phi3.gguf", metadata, "phi3")
    specials_of_phi3 = [*made.PHI3, "</s>", "<unk>"]
    texts = [*made.hostile_texts(), *made.texts_with(specials_of_phi3)]
    assert wrong(ours.encode, lambda text: expected(oracle, text), texts, metadata["tokens"]) == {}
    theirs = AutoTokenizer.from_pretrained(str(phi3_folder(folder / "phi3", metadata)))
    # transformers absorbs white space that C does not know too, and keeps U+2581 that stands before a special token
    texts = [text for text in texts if "\u00a0" not in text]
    assert wrong(ours.encode, lambda text: theirs(text).input_ids, texts, metadata["tokens"]) == {}
    turns = [{"role": "user", "content": " hi\n"}, {"role": "assistant", "content": "so"}, {"role": "user", "content": "  ho"}]
    assert ours.chat(turns) == theirs("<|user|>\n hi\n<|end|>\n<|assistant|>\nso<|end|>\n<|user|>\n  ho<|end|>\n<|assistant|>\n").input_ids


# Unigram


@pytest.mark.parametrize(
    ("normalise", "merges"), [("nmt_nfkc", True), ("nmt_nfkc_cf", True), ("identity", True), ("identity", False), ("nfkc", False)]
)
def test_unigram_texts_become_llama_cpps_tokens_and_sentencepieces(normalise: str, merges: bool, folder: Path) -> None:
    metadata = made.t5(normalise=normalise, merge_spaces=merges)
    ours, oracle = written(folder / "t5.gguf", metadata, "t5")
    texts = [*made.hostile_texts(), *made.texts_with([*made.T5_USER, "</s>"])]
    right = lambda text: oracle.tokens(text, add_special=False)  # noqa: E731
    assert wrong(lambda text: ours.encode(text, special=False), right, texts, metadata["tokens"]) == {}
    model = made.t5_model(normalise=normalise, merge_spaces=merges)
    texts = [text for text in made.hostile_texts() if "<s>" not in text and (merges or text.strip(" "))]
    assert wrong(lambda text: ours.encode(text, special=False), model.encode, texts, metadata["tokens"]) == {}


@pytest.mark.parametrize("prefix", [None, True, False])
def test_unigram_files_say_whether_a_space_is_put_first(prefix: bool | None, folder: Path) -> None:
    metadata = made.t5(normalise="identity", merge_spaces=False) | {"add_space_prefix": prefix}
    ours, oracle = written(folder / "t5.gguf", metadata, "t5")
    texts = [*made.hostile_texts(), *made.texts_with(made.T5_USER)]
    right = lambda text: oracle.tokens(text, add_special=False)  # noqa: E731
    assert wrong(lambda text: ours.encode(text, special=False), right, texts, metadata["tokens"]) == {}


def test_an_encoder_reads_its_end_token(folder: Path) -> None:
    for flag in (None, True):
        ours, oracle = written(folder / "t5.gguf", made.t5() | {"add_eos_token": flag}, "t5")
        for text in ("", "a b", "a</s>", " a "):
            assert ours.encode(text) == oracle.tokens(text)
