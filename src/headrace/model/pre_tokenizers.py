"""Pre-tokenizers, which split text into words before BPE merges, by the names that GGUF converters give them.

transformers knows some. Others are defined here: as aliases of those, as GPT-2's, with every digit split first, or by
patterns applied in turn. With a pre-tokenizer other than the one of training, text becomes tokens that the model has
hardly seen, without any error. An unknown name is therefore refused.
"""

from typing import Any

from tokenizers import Regex, pre_tokenizers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

LIKE = {
    "chatglm-bpe": "llama3",
    "glm4": "llama3",
    "glm5": "llama3",
    "grok-2": "qwen2",
    "hunyuan": "qwen2",
    "solar-open": "qwen2",
    "stablelm2": "qwen2",
}
_AS_GPT2 = frozenset(
    {"a.x-4.0", "exaone4", "gigachat", "gpt-2", "granite-docling", "jais", "mellum", "modern-bert", "mpt"}
    | {"olmo", "phi-2", "trillion"}
)
_AT_DIGITS = frozenset(
    {"codeshell", "command-r", "exaone", "mellum2", "minerva-7b", "refact", "smollm", "starcoder"}
)  # fmt: skip
_EAST_ASIAN = r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_ENDING, _SPACES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"\s*[\r\n]+|\s+(?!\S)|\s+"
_BETWEEN_MARKS = r" ?[^(\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_OF_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_MARKS = r"[\p{P}\$\+<=>\^~\|]+"
_PATTERNS: dict[str, tuple[str, ...]] = {  # patterns applied one after another
    "bloom": (_BETWEEN_MARKS,),
    "default": (_MARKS, _OF_GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN, r"\p{N}"),
    "deepseek-llm": (
        r"[\r\n]", r"\s?[\p{Lu}\p{Ll}\p{Lt}]+", r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+", r"\s+$",
        _EAST_ASIAN, r"\p{N}+",
    ),
    "deepseek-v3": (
        r"\p{N}{1,3}", r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|" + _SPACES,
    ),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _OF_GPT2, r"[0-9][0-9][0-9]"),
    "kimi-k2": (
        rf"\p{{Han}}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}?"
        rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
    ),
    "seed-coder": (
        rf"{_ENDING}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",
    ),
    "tiny_aya": (r"\d{1,3}(?=(?:\d{3})*\b)", GGUF_PRE_TOKENIZER_SPLITS["gpt-4o"]),
    "viking": (_BETWEEN_MARKS, r"\p{N}"),
}  # fmt: skip
_PATTERNS |= dict.fromkeys(("gpt3-finnish", "poro-chat"), _PATTERNS["bloom"])
_PATTERNS |= dict.fromkeys(("hunyuan-dense", "joyai-llm", "hy_v4"), _PATTERNS["deepseek-v3"])
_PATTERNS |= {"cohere2moe": _PATTERNS["tiny_aya"]}

# Defaults for files that do not say: prompts get a BOS token (ADD_BOS), a word that is a token needs no merges (IGNORE_MERGES).
_AS_LLAMA3 = {name for name, split in GGUF_PRE_TOKENIZER_SPLITS.items() if split == GGUF_PRE_TOKENIZER_SPLITS["llama3"]}
ADD_BOS = frozenset(_AS_LLAMA3 - {"dbrx", "smaug-bpe"} | {"tekken", "chameleon"})
IGNORE_MERGES = frozenset(_AS_LLAMA3 - {"dbrx", "smaug-bpe"} | {"tekken", "glm4", "glm5", "youtu"})


def pre_tokenizer(name: str) -> Any:
    """The pre-tokenizer of this name: it splits text into words and maps them to bytes. None: the name is unknown."""
    if name in _AS_GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in _AT_DIGITS:
        first: Any = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([first, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    patterns = _PATTERNS.get(name) or (GGUF_PRE_TOKENIZER_SPLITS.get(LIKE.get(name, name)),)
    if patterns == (None,):
        return None
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
