"""The tokenizer of a Hugging Face folder, loaded by transformers; no code of the folder runs."""

import math
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from transformers import AutoTokenizer

from headrace.bounded import json_of, read_bounded
from headrace.checkpoint import Checkpoint
from headrace.checkpoint.foreign import SIGNATURE_BYTES, identify_format
from headrace.checkpoint.gguf import MAX_TOKENIZER_BYTES
from headrace.errors import CheckpointError, UnsupportedError
from headrace.model.end_tokens import find_end_tokens
from headrace.model.panics import panics_as_errors
from headrace.model.text_stream import TextStream, WindowStream


class FolderVocabulary:
    """Text to token ids and back, as transformers does it."""

    def __init__(self, checkpoint: Checkpoint):
        """Raises `CheckpointError` where the folder holds no usable tokenizer."""
        self._path = checkpoint.path
        folder = checkpoint.path if os.path.isdir(checkpoint.path) else os.path.dirname(checkpoint.path) or "."
        _check_files(folder)
        try:
            with panics_as_errors(folder):
                found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            self._backend: Any = found.backend_tokenizer
            templates = found.chat_template
        except CheckpointError:
            raise
        except Exception as error:  # whatever untrusted files provoke in two libraries
            raise CheckpointError(
                f"{folder} holds no usable tokenizer: {error}",
                hint="tokenizer.json and tokenizer_config.json belong to the model",
            ) from error
        # `default` is the chat template; the others serve tools or retrieval.
        named = templates if isinstance(templates, dict) else {"default": templates}
        self.template: str | None = named.get("default") or None
        self.template_names = tuple(sorted(map(str, named.keys() - {"default"})))
        self._backend.no_truncation()  # truncation and padding saved from training would alter prompts
        self._backend.no_padding()
        bytes_of = ((f"<0x{byte:02X}>", byte) for byte in range(256))
        self._byte_ids = {i: byte for text, byte in bytes_of if (i := self._backend.token_to_id(text)) is not None}
        if "ByteFallback" not in str(type(self._backend.decoder).__name__) + str(self._backend.decoder):
            self._byte_ids = {}
        self._added = frozenset(self._backend.get_added_tokens_decoder())
        self.special_token_texts: dict[str, Any] = dict(found.special_tokens_map)
        self.bos_id: int | None = found.bos_token_id
        self._eos_id: int | None = found.eos_token_id
        probe = self._ids("a", True)
        self.adds_bos = self.bos_id is not None and probe[:1] == [self.bos_id]
        self._adds_eos = self._eos_id is not None and probe[-1:] == [self._eos_id]
        ends = {self._eos_id, *_numbers(checkpoint.generation.get("eos_token_id"))}
        if checkpoint.config is not None:
            ends |= set(_numbers(checkpoint.config.get("eos_token_id")))
        spelled, _ = find_end_tokens(lambda token: self._added_id(token) is not None)
        ends |= {self._added_id(token) for token in spelled}
        self.end_ids = frozenset(i for i in ends if i is not None)

    def plain(self, text: str) -> list[int]:
        """As `Vocabulary.plain`."""
        return self._ids(text, False)

    def rendered(self, text: str) -> list[int]:
        """As `Vocabulary.rendered`: transformers adds nothing to it."""
        return self._ids(text, False)

    def raw(self, text: str) -> list[int]:
        """As `Vocabulary.raw`, with the prefix that the tokenizer adds."""
        ids = self._ids(text, True)
        if self.adds_bos and ids[:2] == [self.bos_id, self.bos_id]:  # the text itself starts with a BOS token
            ids = ids[1:]
        return ids[:-1] if self._adds_eos else ids

    def complete(self, text: str) -> list[int]:
        """As `Vocabulary.complete`."""
        return self._ids(text, True)

    def special_id(self, token: str) -> int | None:
        """As `Vocabulary.special_id`."""
        number = self._added_id(token)
        return number if number is not None and self._ids(token, False) == [number] else None

    def special_tokens(self, text: str) -> dict[int, str]:
        """As `Vocabulary.special_tokens`."""
        return {i: str(self._backend.id_to_token(i)) for i in self._ids(text, False) if i in self._added}

    def decode(self, ids: Sequence[int]) -> str:
        """As `Vocabulary.decode`."""
        with panics_as_errors(self._path):
            return str(self._backend.decode(list(ids), skip_special_tokens=True))

    def bytes_of(self, token: int) -> bytes:
        """See `Vocabulary.bytes_of`."""
        return self.decode([token]).encode()

    def stream(self, before: Sequence[int] = (), *, strip_space: bool = False) -> TextStream:
        """As `Vocabulary.stream`: decoders strip a space at the very start."""
        return WindowStream(self.decode, () if strip_space else before[-_CONTEXT_TOKENS:], self._byte_ids.get)

    def _added_id(self, token: str) -> int | None:
        number: int | None = self._backend.token_to_id(token)
        return number if number is not None and number in self._added else None

    def _ids(self, text: str, special: bool) -> list[int]:
        with panics_as_errors(self._path):
            return list(self._backend.encode(text, add_special_tokens=special).ids)


def _check_files(folder: str) -> None:
    """Raise an error that names the broken file, before transformers fails with a vaguer one."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"cannot open {folder}: {error.strerror}", hint="check its permissions") from error
    found = [name for name in names if name in _FILES or name.endswith(".tiktoken")]
    with suppress(OSError):
        found += [os.path.join(_TEMPLATES, name) for name in sorted(os.listdir(os.path.join(folder, _TEMPLATES)))]
    for name in found:
        path = os.path.join(folder, name)
        try:
            content = read_bounded(path, MAX_TOKENIZER_BYTES)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read {path}: {error}", hint="is this the file its name says?") from error
        known = (
            identify_format(content[:SIGNATURE_BYTES], len(content))
            if len(content) >= 4 or name in _NEVER_EMPTY
            else None
        )
        if known is not None and not known[0].startswith(("JSON", "a text")):
            raise CheckpointError(f"{path} is no part of a tokenizer: it is {known[0]}", hint=known[1])
    if "tokenizer.json" in found:
        _check_expansion(os.path.join(folder, "tokenizer.json"))
    if any(name in found for name in ("tokenizer.json", "vocab.json", "vocab.txt")):
        return
    others = {"tokenizer.model": "SentencePiece", "spiece.model": "SentencePiece", "tekken.json": "Mistral's tekken"}
    for name in found:
        kind = others.get(name) or ("tiktoken" if name.endswith(".tiktoken") else None)
        if kind is not None:
            raise UnsupportedError(
                f"{folder} holds its tokenizer only as {name}, in the format of {kind}",
                hint="get tokenizer.json of the model, or write it with transformers: AutoTokenizer, then save_pretrained",
            )
    raise CheckpointError(
        f"{folder} holds no tokenizer",
        hint="get tokenizer.json and tokenizer_config.json from where the weights are from",
    )


_TEMPLATES = "additional_chat_templates"
_NEVER_EMPTY = ("tokenizer.json", "tokenizer.model")
_FILES = frozenset(
    {
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "spiece.model",
        "tekken.json",
        "vocab.json",
        "vocab.txt",
        "special_tokens_map.json",
        "added_tokens.json",
        "merges.txt",
        "chat_template.jinja",
        "chat_template.json",
    }
)
# Max growth of a text in one step, and max copies of it in the post-processor's template.
_MOST_GROWTH, _MOST_COPIES = 64.0, 8


def _check_expansion(path: str) -> None:
    """Refuse a tokenizer.json whose rules expand text many times: the tokenizers library aborts when memory runs out."""
    try:
        described = json_of(read_bounded(path, MAX_TOKENIZER_BYTES))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", hint="download or copy the file again") from error
    if not isinstance(described, dict):
        raise CheckpointError(f"{path} is no JSON object", hint="download or copy the file again")
    steps = [_growth(described.get(name)) for name in ("normalizer", "pre_tokenizer", "decoder")]
    template = described.get("post_processor")
    copies = _copies(template) if isinstance(template, dict) else 1
    if max(steps) > _MOST_GROWTH or copies > _MOST_COPIES:
        raise CheckpointError(
            f"{path} makes a text more than {_MOST_GROWTH:.0f} times as long", hint="get the model from another source"
        )


def _growth(step: Any, depth: int = 0) -> float:
    """Max factor by which a normaliser, pre-tokenizer or decoder makes a text longer."""
    if not isinstance(step, dict) or depth > 16:
        return 1.0 if depth <= 16 else math.inf
    inner: list[Any] = next(
        (step[key] for key in ("normalizers", "pretokenizers", "decoders") if isinstance(step.get(key), list)), []
    )
    found = 1.0
    for one in inner:
        found = min(found * _growth(one, depth + 1), 1e9)
    if step.get("type") == "Replace":
        content, pattern = len(str(step.get("content", ""))), step.get("pattern")
        plain = pattern.get("String") if isinstance(pattern, dict) else None
        found *= max(1.0, content / len(plain)) if isinstance(plain, str) and plain else 1.0 + content
    return found


def _copies(step: dict[str, Any], depth: int = 0) -> int:
    """Number of times a post-processor repeats the text."""
    processors = step.get("processors") if depth < 16 else None
    inner = [one for one in processors if isinstance(one, dict)] if isinstance(processors, list) else []
    single = step.get("single")
    own = sum(isinstance(one, dict) and "Sequence" in one for one in single) if isinstance(single, list) else 1
    return max(own, *(_copies(one, depth + 1) for one in inner)) if inner else own


# Prompt tokens that are decoded as context of the first generated token.
_CONTEXT_TOKENS = 8


def _numbers(value: object) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [one for one in values if isinstance(one, int)]
