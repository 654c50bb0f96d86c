"""Text to tokens and back, by the tokenizer and chat template in the checkpoint's metadata."""

import gc
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, Protocol, TypeAlias

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from headrace.checkpoint import Checkpoint
from headrace.errors import CheckpointError, UsageError
from headrace.model.config import opening_of
from headrace.model.folder_vocabulary import FolderVocabulary
from headrace.model.gguf_vocabulary import GgufVocabulary
from headrace.model.text_stream import TextStream
from headrace.model.thinking import AnswerStream, Marks

Message: TypeAlias = dict[str, str]
Prompt: TypeAlias = str | Sequence[Message]


class Vocabulary(Protocol):
    """How a checkpoint writes text as tokens."""

    end_ids: frozenset[int]
    bos_id: int | None
    adds_bos: bool
    template: str | None  # how a conversation is written, in Jinja

    @property
    def bos(self) -> str:
        """The beginning token's spelling, for templates."""

    @property
    def eos(self) -> str:
        """The end token's spelling."""

    def plain(self, text: str) -> list[int]:
        """Token ids of a text, with nothing before or after it."""

    def rendered(self, text: str) -> list[int]:
        """Token ids of what a chat template wrote."""

    def raw(self, text: str) -> list[int]:
        """Token ids of a text that is to be continued."""

    def complete(self, text: str) -> list[int]:
        """Token ids of a text that is complete, as encoders read it."""

    def special_id(self, token: str) -> int | None:
        """The id of a token that is matched whole in a text; None: it is not."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without control tokens."""

    def stream(self, before: Sequence[int] = (), *, strip_space: bool = False) -> TextStream:
        """A decoder of one token after another.

        Args:
            before: the tokens that the text goes on after.
            strip_space: a new text begins, so leave out the space that SentencePiece puts before its first word.
        """


class Tokenizer:
    """Encodes and decodes for one model. Memory is that of the tokenizers library, about 350 bytes per token."""

    def __init__(self, checkpoint: Checkpoint):
        """Raises `CheckpointError` where the checkpoint describes no tokenizer."""
        self._path = checkpoint.path
        self._vocabulary: Vocabulary = (
            GgufVocabulary(checkpoint) if checkpoint.config is None else FolderVocabulary(checkpoint)
        )
        self.end_ids, self.bos_id = self._vocabulary.end_ids, self._vocabulary.bos_id
        self.adds_bos = self._vocabulary.adds_bos
        self._bos, self._eos = self._vocabulary.bos, self._vocabulary.eos
        self.opening = opening_of(checkpoint)
        gc.collect()

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text to be continued, with what the model wants before it unless not `special`.

        What an encoder reads is complete: it gets all that its tokenizer puts around a text, its end too.
        """
        if not special:
            return self._vocabulary.plain(text)
        return self._vocabulary.complete(text) if self.opening else self._vocabulary.raw(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without control tokens."""
        return self._vocabulary.decode(ids)

    def stream(self, before: Sequence[int] = (), *, strip_space: bool = False) -> TextStream:
        """A decoder of one token after another.

        Args:
            before: the tokens that the text goes on after.
            strip_space: a new text begins, so leave out the space that SentencePiece puts before its first word.
        """
        return self._vocabulary.stream(before, strip_space=strip_space)

    def answer(self, prompt: Sequence[int], *, raw: bool = False) -> AnswerStream:
        """A decoder for what follows these tokens, which tells thoughts from the answer unless the text is `raw`."""
        if raw:
            return AnswerStream(Marks(), lambda: self.stream(prompt))
        return AnswerStream(self._marks, lambda: self.stream(strip_space=True), prompt)

    @cached_property
    def _marks(self) -> Marks:
        return Marks.among(lambda token: self._vocabulary.special_id(token) if self.has_chat_template else None)

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
        return self._vocabulary.template is not None and not self.opening

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
        return self._vocabulary.rendered(text)

    @cached_property
    def _template(self) -> Any:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
        try:
            return environment.from_string(str(self._vocabulary.template))
        except TemplateError as error:
            raise CheckpointError(f"{self._path}: the chat template is broken: {error}") from error


class _Generation(Extension):
    """Templates may mark what the assistant says, for those who train on it. Here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own way)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """What the mark encloses."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> None:
    raise TemplateError(message)
