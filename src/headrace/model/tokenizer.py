"""Text to tokens and back, by the tokenizer and chat template in the checkpoint's metadata."""

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, TypeAlias

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers.decoders import DecodeStream
from tokenizers.models import Unigram
from tokenizers.normalizers import Precompiled
from transformers import AutoTokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import (
    GGUF_TOKENIZER_MAPPING,
    convert_gguf_tokenizer,
)

from headrace.checkpoint import Checkpoint
from headrace.errors import CheckpointError, UnsupportedError, UsageError
from headrace.model.config import opening_of
from headrace.model.cuts import BEGIN, LIKE, TAKE_WORDS_WHOLE, cut, is_known
from headrace.model.thinking import AnswerStream, Marks

Message: TypeAlias = dict[str, str]
Prompt: TypeAlias = str | Sequence[Message]

# Tokens that end a turn, by the names that published models give them; metadata often names only one of them.
_TURN_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<turn|>",
    "<|tool_response>",  # what follows is for the caller to say
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
)
# Where a turn consists of several messages, this one only ends a message. Such models have both of the others.
_MESSAGE_END, _TURN_ENDS_BESIDE = "<|end|>", ("<|return|>", "<|call|>")
_WHOLE = (3, 4)  # kinds of tokens that are never cut: control, and user-defined, as files of Gemma 4 have some ends
_BYTE = 6
_UNKNOWN_OF_T5 = 2


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What a checkpoint says of its tokens."""

    backend: Any  # of the tokenizers library
    end_ids: frozenset[int]
    bos_id: int | None
    adds_bos: bool
    bos: str
    eos: str
    template: str | None  # how a conversation is written, in Jinja


class Tokenizer:
    """Encodes and decodes for one model. Memory is that of the tokenizers library, about 350 bytes per token."""

    def __init__(self, checkpoint: Checkpoint):
        """Raises `CheckpointError` where the checkpoint describes no tokenizer."""
        self._path = checkpoint.path
        found = _of_folder(checkpoint) if checkpoint.config is not None else _of_gguf(checkpoint)
        self._backend, self._template_text = found.backend, found.template
        self.end_ids, self.bos_id, self.adds_bos = found.end_ids, found.bos_id, found.adds_bos
        self._bos, self._eos = found.bos, found.eos
        self.opening = opening_of(checkpoint)
        del found
        gc.collect()

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text, with the beginning token where the model wants one and the text has none.

        What an encoder reads is whole: it gets all that its tokenizer puts around a text, its end too.
        """
        whole = special and bool(self.opening)
        ids = self._ids(text, whole)
        if whole:
            return ids
        if special and self.adds_bos and ids[:1] != [self.bos_id]:
            assert self.bos_id is not None
            return [self.bos_id, *ids]
        return ids

    def _ids(self, text: str, whole: bool) -> list[int]:
        try:
            return list(self._backend.encode(text, add_special_tokens=whole).ids)
        except BaseException as error:  # the library panics at damaged tables, beside Exception
            if type(error).__name__ != "PanicException":
                raise
            raise CheckpointError(
                f"{self._path}: the tokenizer breaks at this text: {error}", hint="its tables are damaged"
            ) from error

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without control tokens."""
        return str(self._backend.decode(list(ids), skip_special_tokens=True))

    def stream(self) -> "TextStream":
        """A decoder that is given one token at a time."""
        return TextStream(self._backend)

    def answer(self, prompt: Sequence[int], *, raw: bool = False) -> AnswerStream:
        """A decoder for what follows these tokens, which tells thoughts from the answer unless the text is `raw`."""
        return AnswerStream(Marks() if raw else self._marks, self.stream, prompt)

    @cached_property
    def _marks(self) -> Marks:
        return Marks.among(lambda token: self._whole(token) if self.has_chat_template else None)

    def _whole(self, token: str) -> int | None:
        """The number of a token, if it stands for itself in a text."""
        number: int | None = self._backend.token_to_id(token)
        return number if number is not None and self._ids(token, False) == [number] else None

    def prompt(self, prompt: Prompt, *, raw: bool = False) -> list[int]:
        """Token ids of a prompt. A text is one user message where the model has a chat template, unless `raw`.

        After what an encoder reads come the tokens that its decoder begins with.
        """
        if not isinstance(prompt, str):
            return self.chat(prompt)
        if raw or not self.has_chat_template:
            ids = self.encode(prompt)
            return [*ids, *self.opening] if ids else []
        return self.chat([{"role": "user", "content": prompt}])

    @property
    def has_chat_template(self) -> bool:
        """Whether the file says how a conversation is written. For an encoder there are no conversations, only texts."""
        return self._template_text is not None and not self.opening

    def check_chat(self) -> None:
        """Raise `UsageError` unless there can be a conversation."""
        if self.opening:
            raise UsageError(
                f"{self._path} turns one text into another and holds no conversations: an encoder reads the prompt",
                hint="give the whole task as a text, such as `translate English to German: ...`",
            )
        if not self.has_chat_template:
            raise UsageError(f"{self._path} has no chat template", hint="use --raw with a prompt to complete")

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, up to where the assistant's next answer begins.

        Raises:
            UsageError: the model has no chat template, or it refuses the conversation.
        """
        self.check_chat()
        try:
            text = self._template.render(
                messages=list(messages), add_generation_prompt=True, bos_token=self._bos, eos_token=self._eos
            )
        except (TemplateError, SecurityError, TypeError, ValueError) as error:
            raise UsageError(f"the model's chat template refuses this conversation: {error}") from error
        return self.encode(text)

    @cached_property
    def _template(self) -> Any:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
        try:
            return environment.from_string(str(self._template_text))
        except TemplateError as error:
            raise CheckpointError(f"{self._path}: the chat template is broken: {error}") from error


class TextStream:
    """Text from tokens that come one by one: a character split over tokens is held back until it is whole."""

    def __init__(self, backend: Any):
        self._backend = backend
        self._stream = DecodeStream(skip_special_tokens=True)

    def step(self, token: int) -> str:
        """The text that this token completes, possibly none. Bytes that no character begins with are dropped."""
        try:
            return self._stream.step(self._backend, token) or ""
        except Exception as error:  # the library has no other name for it
            if "decoding stream" not in str(error):
                raise
            self._stream = DecodeStream(skip_special_tokens=True)
            return self._stream.step(self._backend, token) or ""


class _Generation(Extension):
    """Templates may mark what the assistant says, for those who train on it. Here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own way)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """What the mark encloses."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _of_gguf(checkpoint: Checkpoint) -> Vocabulary:
    """From the metadata of a GGUF file."""
    description = _description(checkpoint)
    tokens: list[str] = description["tokens"]
    try:
        backend, _ = convert_gguf_tokenizer(checkpoint.architecture, description)
    except Exception as error:  # whatever the untrusted vocabulary provokes in two libraries
        raise CheckpointError(f"{checkpoint.path}: the tokenizer in its metadata is unusable: {error}") from error
    way = str(checkpoint.get("tokenizer.ggml.pre") or "default")
    if description["tokenizer_type"] == "gpt2":
        _cut_as_learned(checkpoint, backend, way)
    kinds = checkpoint.array("tokenizer.ggml.token_type")
    if description["tokenizer_type"] == "t5":
        _complete_unigram(checkpoint, backend, description["scores"], kinds)
    bos_id = _token_id(checkpoint, "bos_token_id", len(tokens))
    flag = checkpoint.get("tokenizer.ggml.add_bos_token")
    template = checkpoint.get("tokenizer.chat_template")
    return Vocabulary(
        backend=backend,
        end_ids=_end_ids(checkpoint, tokens, kinds),
        bos_id=bos_id,
        adds_bos=bos_id is not None
        and bool(description["tokenizer_type"] == "llama" or way in BEGIN if flag is None else flag),
        bos=_spelled(backend, bos_id),
        eos=_spelled(backend, _token_id(checkpoint, "eos_token_id", 1 << 31)),
        template=template if isinstance(template, str) else None,
    )


def _cut_as_learned(checkpoint: Checkpoint, backend: Any, way: str) -> None:
    if not is_known(way):
        raise UnsupportedError(
            f"{checkpoint.path}: its text is cut into words in a way that is not known here, `{way}`",
            hint="use the model's folder from the hub, whose tokenizer.json says how",
        )
    own = cut(way)
    if own is not None:
        backend.pre_tokenizer = own
    if way in TAKE_WORDS_WHOLE:
        backend.model.ignore_merges = True


def _complete_unigram(checkpoint: Checkpoint, backend: Any, scores: Sequence[float], kinds: Sequence[object]) -> None:
    """What transformers leaves out: normalisation, the unknown token where it is not T5's, tokens that are single bytes."""
    unknown = _token_id(checkpoint, "unknown_token_id", len(scores))
    charsmap = [one for one in checkpoint.array("tokenizer.ggml.precompiled_charsmap") if isinstance(one, int)]
    try:
        if unknown not in (None, _UNKNOWN_OF_T5) or _BYTE in kinds:
            vocabulary = [(backend.id_to_token(i), score) for i, score in enumerate(scores)]
            backend.model = Unigram(vocabulary, unk_id=unknown, byte_fallback=_BYTE in kinds)
        if charsmap:
            backend.normalizer = Precompiled(bytes(byte % 256 for byte in charsmap))
    except Exception as error:  # whatever the untrusted vocabulary provokes in the library
        raise CheckpointError(f"{checkpoint.path}: the tokenizer in its metadata is unusable: {error}") from error


def _of_folder(checkpoint: Checkpoint) -> Vocabulary:
    """From the tokenizer files of a Hugging Face folder, by way of transformers; no code of the folder runs."""
    folder = checkpoint.path if os.path.isdir(checkpoint.path) else os.path.dirname(checkpoint.path) or "."
    try:
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        backend = found.backend_tokenizer
        template = found.get_chat_template() if found.chat_template else None
    except Exception as error:  # whatever untrusted files provoke in two libraries
        raise CheckpointError(
            f"{folder} holds no usable tokenizer: {error}",
            hint="tokenizer.json and tokenizer_config.json belong to the model",
        ) from error
    ends = {found.eos_token_id, *_numbers(checkpoint.generation.get("eos_token_id"))}
    if checkpoint.config is not None:
        ends |= set(_numbers(checkpoint.config.get("eos_token_id")))
    ends |= {backend.token_to_id(token) for token in _turn_ends(lambda token: _is_special(backend, token))}
    backend.no_truncation()  # what was right for training cuts prompts, and fills them up
    backend.no_padding()
    bos_id = found.bos_token_id
    return Vocabulary(
        backend=backend,
        end_ids=frozenset(i for i in ends if i is not None),
        bos_id=bos_id,
        adds_bos=bos_id is not None and backend.encode("a").ids[:1] == [bos_id],
        bos=found.bos_token or "",
        eos=found.eos_token or "",
        template=template,
    )


def _numbers(value: object) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [one for one in values if isinstance(one, int)]


def _is_special(backend: Any, token: str) -> bool:
    number = backend.token_to_id(token)
    return number is not None and backend.get_added_tokens_decoder().get(number) is not None


def _spelled(backend: Any, token: int | None) -> str:
    return "" if token is None else (backend.id_to_token(token) or "")


def _description(checkpoint: Checkpoint) -> dict[str, Any]:
    arrays = ("ggml.tokens", "ggml.scores", "ggml.token_type", "ggml.merges")
    description: dict[str, Any] = {}
    for key, name in GGUF_TOKENIZER_MAPPING["tokenizer"].items():
        value = checkpoint.array(f"tokenizer.{key}") if key in arrays else checkpoint.get(f"tokenizer.{key}")
        if value is not None and value != []:
            description[name] = value
    way = description.get("pre_tokenizer_type")
    if isinstance(way, str):
        description["pre_tokenizer_type"] = LIKE.get(way, way)
    if "tokens" not in description or "tokenizer_type" not in description:
        raise CheckpointError(f"{checkpoint.path} holds no tokenizer", hint="get a file that was converted with one")
    return description


def _token_id(checkpoint: Checkpoint, name: str, vocab_size: int) -> int | None:
    token = checkpoint.get(f"tokenizer.ggml.{name}")
    return token if isinstance(token, int) and 0 <= token < vocab_size else None


def _end_ids(checkpoint: Checkpoint, tokens: Sequence[str], kinds: Sequence[object]) -> frozenset[int]:
    ends = {_token_id(checkpoint, name, len(tokens)) for name in ("eos_token_id", "eot_token_id", "eom_token_id")}
    whole = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=False)) if kind in _WHOLE}
    ends |= {whole[token] for token in _turn_ends(whole.__contains__)}
    return frozenset(i for i in ends if i is not None)


def _turn_ends(exists: Callable[[str], bool]) -> list[str]:
    """Those among a model's tokens."""
    of_messages = all(map(exists, _TURN_ENDS_BESIDE))
    return [token for token in _TURN_ENDS if exists(token) and not (of_messages and token == _MESSAGE_END)]
