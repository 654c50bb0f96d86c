"""The tokenizer that a GGUF file's metadata describes, by `tokenizer.ggml.model`:

gpt2    byte-level BPE; `tokenizer.ggml.pre` names the pre-tokenizer (`pre_tokenizers.py`)
llama   SentencePiece's BPE
gemma4  BPE over characters, spaces written as SentencePiece writes them
t5      SentencePiece's unigram model

Token ids equal llama.cpp's, except with the pre-tokenizers that llama.cpp only approximates.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.normalizers import Precompiled
from transformers.convert_slow_tokenizer import bytes_to_unicode

from headrace.checkpoint import Checkpoint
from headrace.errors import CheckpointError, UnsupportedError
from headrace.model.end_tokens import find_end_tokens
from headrace.model.panics import panics_as_errors
from headrace.model.pre_tokenizers import ADD_BOS, IGNORE_MERGES, pre_tokenizer
from headrace.model.sentencepiece import SPACE, SentencePieceBpe
from headrace.model.special_tokens import SpecialToken, SpecialTokens
from headrace.model.text_stream import ByteStream, TextStream
from headrace.model.token_texts import TokenTexts
from headrace.model.unigram import UnigramModel

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # `tokenizer.ggml.token_type`
# Default ids, where the metadata has none.
_DEFAULT_IDS = {
    "llama": {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0},
    "t5": {"eos_token_id": 1, "unknown_token_id": 2},
}
# Phi-3's special tokens strip the white space after them, except these.
_KEEP_WHITE_SPACE = frozenset({"<unk>", "<s>", "<|endoftext|>"})
# Tokens that begin every prompt of GLM-4.
_GLM_PREFIX, _GLM_PRE_TOKENIZERS = ("[gMASK]", "<sop>"), ("chatglm-bpe", "glm4")
_NAMED = {"unk": "unknown", "pad": "padding"}
_ENDS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")  # keys of tokens that end an answer
_SENTINELS, _PADDING = 100, re.compile(r"\[PAD\d+\]")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACES, _LINE_ENDS = re.compile(" +"), re.compile("(\n+)")


class GgufVocabulary:
    """Text to token ids and back."""

    def __init__(self, checkpoint: Checkpoint):
        """Raises `CheckpointError` if the metadata has no tokenizer, `UnsupportedError` if its type is unknown."""
        self._path = checkpoint.path
        tokens = [str(token) for token in checkpoint.array("tokenizer.ggml.tokens")]
        kind = checkpoint.get("tokenizer.ggml.model")
        if not tokens or not isinstance(kind, str):
            raise CheckpointError(
                f"{checkpoint.path} holds no tokenizer", hint="get a file that was converted with one"
            )
        if kind not in _ENCODERS:
            raise UnsupportedError(
                f"{checkpoint.path}: tokenizer.ggml.model is `{kind}`, which is not supported",
                hint=f"known are {', '.join(_ENCODERS)}",
            )
        self._kind = kind
        self._types = _types(checkpoint, len(tokens))
        if kind == "t5":
            self._rename_sentinels(tokens)
        ids = {token: i for i, token in reversed([*enumerate(tokens)])}  # the first of equal tokens
        self._tokens = TokenTexts(tokens)
        self.bos_id, self._eos_id = self._named(checkpoint, "bos_token_id"), self._named(checkpoint, "eos_token_id")
        self.end_ids = self._ends(checkpoint, ids)
        self._special = self._special_tokens(checkpoint)
        pre = str(checkpoint.get("tokenizer.ggml.pre") or "default")
        self._merges_spaces = kind == "llama" and _flag(checkpoint, "remove_extra_whitespaces", False)
        self._space_first = kind in ("llama", "t5") and _flag(checkpoint, "add_space_prefix", kind == "llama")
        self.adds_bos = self.bos_id is not None and (
            kind == "gemma4" or _flag(checkpoint, "add_bos_token", _adds_bos(kind, pre))
        )
        # The end token is added only to encoder input; a decoder continues its prompt.
        self._adds_eos = _flag(checkpoint, "add_eos_token", kind == "t5")
        self._prefix = [ids[one] for one in _GLM_PREFIX if pre in _GLM_PRE_TOKENIZERS and one in ids]
        try:
            with panics_as_errors(checkpoint.path):
                self._encode_part: Callable[[str, bool], list[int]] = _ENCODERS[kind](self, checkpoint, pre, ids)
        except CheckpointError:
            raise
        except Exception as error:  # whatever the untrusted vocabulary provokes in the libraries
            raise CheckpointError(f"{checkpoint.path}: the tokenizer in its metadata is unusable: {error}") from error
        template = checkpoint.get("tokenizer.chat_template")
        self.template = template if isinstance(template, str) else None
        self.template_names = tuple(sorted(map(str, checkpoint.array("tokenizer.chat_templates"))))
        names = {"bos": self.bos_id, "eos": self._eos_id}
        names |= {short: self._named(checkpoint, f"{name}_token_id") for short, name in _NAMED.items()}
        self.special_token_texts = {f"{name}_token": self._tokens[i] for name, i in names.items() if i is not None}
        self._alphabet = {char: byte for byte, char in bytes_to_unicode().items()}

    def plain(self, text: str) -> list[int]:
        """As `Vocabulary.plain`."""
        if self._merges_spaces:
            text = _SPACES.sub(" ", text).strip(" ")
        found: list[int] = []
        after_special = True  # the start of a text counts as such
        with panics_as_errors(self._path):
            for part in self._special.split(text):
                found += [part] if isinstance(part, int) else self._encode_part(part, after_special)
                after_special = isinstance(part, int)
        return found

    def rendered(self, text: str) -> list[int]:
        """As `Vocabulary.rendered`: llama.cpp adds a BOS token if the template did not."""
        return self._begun(self.plain(text))

    def raw(self, text: str) -> list[int]:
        """As `Vocabulary.raw`."""
        ids, prefix = self.plain(text), self._prefix
        return self._begun(ids if ids[: len(prefix)] == prefix else [*prefix, *ids])

    def complete(self, text: str) -> list[int]:
        """As `Vocabulary.complete`."""
        return self.raw(text) + ([self._eos_id] if self._adds_eos and self._eos_id is not None else [])

    def _begun(self, ids: list[int]) -> list[int]:
        if not self.adds_bos or ids[:1] == [self.bos_id]:
            return ids
        assert self.bos_id is not None
        return [self.bos_id, *ids]

    def special_id(self, token: str) -> int | None:
        """As `Vocabulary.special_id`."""
        found = self._special.split(token)
        return found[0] if len(found) == 1 and isinstance(found[0], int) else None

    def special_tokens(self, text: str) -> dict[int, str]:
        """As `Vocabulary.special_tokens`."""
        return {part: self._tokens[part] for part in self._special.split(text) if isinstance(part, int)}

    def decode(self, ids: Sequence[int]) -> str:
        """As `Vocabulary.decode`."""
        text = b"".join(map(self.bytes_of, ids)).decode(errors="replace")
        return text.removeprefix(" ") if self._space_first else text

    def stream(self, before: Sequence[int] = (), *, strip_space: bool = False) -> TextStream:
        """As `Vocabulary.stream`."""
        return ByteStream(self.bytes_of, strip_space=self._space_first and strip_space)

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token; none for a control token."""
        if not 0 <= token < len(self._tokens):
            return b""
        text, kind = self._tokens[token], self._types[token]
        if kind == _USER_DEFINED:
            return text.encode()
        if kind == _BYTE:
            return bytes([_byte_of(text)])
        if kind != _NORMAL:
            return b""
        if self._kind == "gpt2":
            return b"".join(bytes([self._alphabet[char]]) if char in self._alphabet else char.encode() for char in text)
        return text.replace(SPACE, " ").encode()

    def _rename_sentinels(self, tokens: list[str]) -> None:
        """Rename T5's sentinel tokens: converters store `<extra_id_N>` as `[PADn]`, in reverse order."""
        sentinels = [i for i, token in enumerate(tokens) if _PADDING.fullmatch(token)][:_SENTINELS]
        for number, i in enumerate(sentinels):
            tokens[i], self._types[i] = f"<extra_id_{_SENTINELS - 1 - number}>", _CONTROL

    def _named(self, checkpoint: Checkpoint, name: str) -> int | None:
        token = checkpoint.get(f"tokenizer.ggml.{name}")
        usual = _DEFAULT_IDS.get(self._kind, {}).get(name)  # as in llama.cpp, also where the key is out of range
        return next((one for one in (token, usual) if isinstance(one, int) and 0 <= one < len(self._tokens)), None)

    def _ends(self, checkpoint: Checkpoint, ids: Mapping[str, int]) -> frozenset[int]:
        """The tokens that end an answer, by the metadata, and special tokens by their spelling."""
        ends = {self._named(checkpoint, f"{name}_token_id") for name in _ENDS}
        special = {token for token, i in ids.items() if self._types[i] in (_CONTROL, _USER_DEFINED)}
        spelled, marks = find_end_tokens(special.__contains__)
        for token in spelled:
            self._types[ids[token]] = _CONTROL
        for token in marks:  # decoded as text
            self._types[ids[token]] = _USER_DEFINED
        return frozenset(i for i in (*ends, *(ids[token] for token in spelled)) if i is not None)

    def _special_tokens(self, checkpoint: Checkpoint) -> SpecialTokens:
        name = str(checkpoint.get("general.name") or "").lower()
        phi3 = self._kind == "llama" and (checkpoint.architecture == "phi3" or "phi-3" in name or "phi3" in name)
        return SpecialTokens(
            [
                SpecialToken(token_id=i, text=text, strips_right=phi3 and text not in _KEEP_WHITE_SPACE)
                for i, (text, kind) in enumerate(zip(self._tokens, self._types, strict=True))
                if kind in (_CONTROL, _USER_DEFINED, _UNKNOWN)
            ]
        )

    # -- encoders of the text between special tokens: (text, is it at the start or after a special token?) to ids ----------

    def _byte_level(self, checkpoint: Checkpoint, pre: str, ids: dict[str, int]) -> Callable[[str, bool], list[int]]:
        words = pre_tokenizer(pre)
        if words is None:
            raise UnsupportedError(
                f"{checkpoint.path}: the pre-tokenizer `{pre}` is not supported",
                hint="use the model's folder from the hub, whose tokenizer.json describes it",
            )
        merges = _merges(checkpoint)
        if not merges:  # as in tiktoken: the rank of a merge is the id of its result
            bpe = SentencePieceBpe(ids, [-i for i in range(len(self._tokens))], {}, None)
            return lambda text, _: [i for word, _ in words.pre_tokenize_str(text) for i in bpe.encode(word)]
        backend = Tokenizer(BPE(ids, merges, ignore_merges=pre in IGNORE_MERGES))
        backend.pre_tokenizer = words
        return lambda text, _: list(backend.encode(text, add_special_tokens=False).ids)

    def _sentencepiece(self, checkpoint: Checkpoint, _: str, ids: dict[str, int]) -> Callable[[str, bool], list[int]]:
        scores = _scores(checkpoint, len(self._tokens))
        bpe = SentencePieceBpe(ids, scores, self._byte_ids(), self._named(checkpoint, "unknown_token_id"))
        normalise = _normaliser(checkpoint)

        def encode(text: str, after_special: bool) -> list[int]:
            text = normalise(text)
            if self._space_first and after_special:
                text = " " + text
            return bpe.encode(text.replace(" ", SPACE))

        return encode

    def _characters(self, checkpoint: Checkpoint, _: str, ids: dict[str, int]) -> Callable[[str, bool], list[int]]:
        """Gemma 4: BPE runs within a line; a run of newlines that is itself a token is not split."""
        backend = Tokenizer(BPE(ids, _merges(checkpoint), byte_fallback=True, unk_token=None))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\n]+|\n+"), behavior="isolated")

        newlines = {token: i for token, i in ids.items() if token and not token.strip("\n")}

        def encode(text: str, _: bool) -> list[int]:
            found: list[int] = []
            for part in _lines(text.replace(" ", SPACE)):
                whole = newlines.get(part)
                found += backend.encode(part, add_special_tokens=False).ids if whole is None else [whole]
            return found

        return encode

    def _unigram(self, checkpoint: Checkpoint, _: str, __: dict[str, int]) -> Callable[[str, bool], list[int]]:
        merges_spaces = _flag(checkpoint, "remove_extra_whitespaces", False)
        model = UnigramModel(
            [*self._tokens],
            _scores(checkpoint, len(self._tokens)),
            self._types,
            unknown_id=self._named(checkpoint, "unknown_token_id"),
            charsmap=_charsmap(checkpoint),
            space_first=self._space_first or merges_spaces,
            merges_spaces=merges_spaces,
        )
        return lambda text, _: model.encode(text)

    def _byte_ids(self) -> dict[int, int]:
        return {_byte_of(text): i for i, text in enumerate(self._tokens) if self._types[i] == _BYTE}


_ENCODERS: Mapping[str, Any] = {
    "gpt2": GgufVocabulary._byte_level,
    "llama": GgufVocabulary._sentencepiece,
    "gemma4": GgufVocabulary._characters,
    "t5": GgufVocabulary._unigram,
}


def _adds_bos(kind: str, pre: str) -> bool:
    return kind == "llama" or (kind == "gpt2" and pre in ADD_BOS)


def _flag(checkpoint: Checkpoint, name: str, usual: bool) -> bool:
    value = checkpoint.get(f"tokenizer.ggml.{name}")
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{checkpoint.path}: metadata `tokenizer.ggml.{name}` is {value!r}, not true or false")
    return usual if value is None else value


def _types(checkpoint: Checkpoint, count: int) -> list[int]:
    """The type of each token; all are normal if the file has no types."""
    found = checkpoint.array("tokenizer.ggml.token_type")
    if found and (len(found) != count or not all(isinstance(kind, int) for kind in found)):
        raise CheckpointError(
            f"{checkpoint.path}: metadata `tokenizer.ggml.token_type` has {len(found)} types for {count} tokens"
        )
    return [int(kind) for kind in found] or [_NORMAL] * count


def _scores(checkpoint: Checkpoint, count: int) -> list[float]:
    scores = [float(one) for one in checkpoint.array("tokenizer.ggml.scores") if isinstance(one, int | float)]
    if len(scores) < count:
        raise ValueError(f"{len(scores)} scores for {count} tokens")
    return scores


def _merges(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    found = []
    for merge in checkpoint.array("tokenizer.ggml.merges"):
        at = str(merge).find(" ", 1)  # a space may be the first part
        if at < 0:
            raise ValueError(f"the merge {merge!r} has no two parts")
        found.append((str(merge)[:at], str(merge)[at + 1 :]))
    return found


def _charsmap(checkpoint: Checkpoint) -> bytes:
    return bytes(one % 256 for one in checkpoint.array("tokenizer.ggml.precompiled_charsmap") if isinstance(one, int))


def _normaliser(checkpoint: Checkpoint) -> Callable[[str], str]:
    charsmap = _charsmap(checkpoint)
    return Precompiled(charsmap).normalize_str if charsmap else str


def _byte_of(text: str) -> int:
    """The byte of a byte token such as `<0x0A>`."""
    match = _BYTE_TOKEN.fullmatch(text)
    return int(match[1], 16) if match else ord(text[:1] or "\0") % 256


def _lines(text: str) -> list[str]:
    return [part for part in _LINE_ENDS.split(text) if part]
