"""Encodes and decodes text with the tokenizer and chat template of the checkpoint."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol, TypeAlias

from headrace.checkpoint import Checkpoint
from headrace.errors import UsageError
from headrace.model.chat_template import ChatTemplate, checked_text
from headrace.model.config import decoder_start_ids
from headrace.model.folder_vocabulary import FolderVocabulary
from headrace.model.gguf_vocabulary import GgufVocabulary
from headrace.model.reasoning import AnswerStream, Marks
from headrace.model.text_stream import TextStream

Message: TypeAlias = Mapping[str, Any]
Prompt: TypeAlias = str | Sequence[Message]


class Vocabulary(Protocol):
    """Interface of the two tokenizer implementations: GGUF metadata and Hugging Face folder."""

    end_ids: frozenset[int]
    bos_id: int | None
    adds_bos: bool
    template: str | None  # chat template, in Jinja
    template_names: tuple[str, ...]  # names of templates for other purposes

    @property
    def special_token_texts(self) -> Mapping[str, Any]:
        """The texts of special tokens, by their names in templates: `bos_token` and others."""

    def plain(self, text: str) -> list[int]:
        """Token ids of a text, with nothing before or after it."""

    def rendered(self, text: str) -> list[int]:
        """Token ids of a text that a chat template rendered."""

    def raw(self, text: str) -> list[int]:
        """Token ids of a text that is to be continued."""

    def complete(self, text: str) -> list[int]:
        """Token ids of a text that is complete, as encoders read it."""

    def special_id(self, token: str) -> int | None:
        """The id of a special token that is matched whole in a text; None for other tokens."""

    def special_tokens(self, text: str) -> dict[int, str]:
        """The special tokens in a text, with their texts."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without control tokens."""

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token, none of a control token. Folders: of its decoded text, where a part of a character is U+FFFD."""

    def stream(self, before: Sequence[int] = (), *, strip_space: bool = False) -> TextStream:
        """A decoder of one token after another.

        Args:
            before: the tokens that the text continues.
            strip_space: a new text begins, so leave out the space that SentencePiece puts before its first word.
        """


class Tokenizer:
    """Encodes and decodes for one model. Most memory is the tokenizers library's, about 350 bytes per token."""

    def __init__(self, checkpoint: Checkpoint):
        """Raises `CheckpointError` where the checkpoint describes no tokenizer."""
        self._path = checkpoint.path
        self._vocabulary: Vocabulary = (
            GgufVocabulary(checkpoint) if checkpoint.config is None else FolderVocabulary(checkpoint)
        )
        self.end_ids, self.bos_id = self._vocabulary.end_ids, self._vocabulary.bos_id
        self.adds_bos = self._vocabulary.adds_bos
        self._bos = self._vocabulary.special_token_texts.get("bos_token", "")
        self.decoder_start_ids = decoder_start_ids(checkpoint)
        if self.has_chat_template:
            self.chat_template.start()

    def close(self) -> None:
        """End the chat template's process. Safe to call twice."""
        if "chat_template" in vars(self):
            self.chat_template.close()

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text to be continued, with the tokenizer's prefix if `special`.

        An encoder's input is a complete text: it also gets the end token.
        """
        text = checked_text(text)
        if not special:
            return self._vocabulary.plain(text)
        return self._vocabulary.complete(text) if self.decoder_start_ids else self._vocabulary.raw(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without control tokens."""
        return self._vocabulary.decode(ids)

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token; see `Vocabulary.bytes_of`."""
        return self._vocabulary.bytes_of(token)

    def stream(self, before: Sequence[int] = (), *, strip_space: bool = False) -> TextStream:
        """A decoder of one token after another.

        Args:
            before: the tokens that the text continues.
            strip_space: a new text begins, so leave out the space that SentencePiece puts before its first word.
        """
        return self._vocabulary.stream(before, strip_space=strip_space)

    def detokenizer(
        self, prompt: Sequence[int], *, raw: bool = False, tail: Sequence[int] = (), stops: Sequence[str] = ()
    ) -> AnswerStream:
        """A decoder for the output after a prompt.

        Args:
            prompt: the prompt's tokens.
            raw: do not split reasoning from the answer.
            tail: the tokens that the chat template wrote after the conversation.
            stops: stop strings, which may contain tokens that are not shown.
        """
        marks = Marks() if raw else self._marks
        hidden = self._hidden(stops, marks)
        if raw:
            return AnswerStream(marks, lambda: self.stream(prompt), hidden=hidden)
        return AnswerStream(marks, lambda: self.stream(strip_space=True), tail, hidden)

    def _hidden(self, stops: Sequence[str], marks: Marks) -> dict[int, str]:
        """The tokens of stop strings that are not shown, with their texts."""
        found: dict[int, str] = {}
        for stop in stops:
            found |= self._vocabulary.special_tokens(stop)
        return {token: text for token, text in found.items() if token in marks or not self.decode([token])}

    @cached_property
    def _marks(self) -> Marks:
        return Marks.among(lambda token: self._vocabulary.special_id(token) if self.has_chat_template else None)

    def prompt(self, prompt: Prompt, *, raw: bool = False) -> list[int]:
        """Token ids of a prompt. A text is one user message where the model has a chat template, unless `raw`.

        With an encoder, the decoder start tokens follow its input.
        """
        if not isinstance(prompt, str):
            return self.chat(prompt)
        if raw or not self.has_chat_template:
            ids = self.encode(prompt)
            return [*ids, *self.decoder_start_ids] if ids else []
        return self.chat([{"role": "user", "content": prompt}])

    @property
    def has_chat_template(self) -> bool:
        """True if the checkpoint has a chat template. Models with an encoder take texts, not conversations."""
        return self._vocabulary.template is not None and not self.decoder_start_ids

    def check_chat(self) -> None:
        """Raise `UsageError` unless there can be a conversation."""
        if self.decoder_start_ids:
            raise UsageError(
                f"{self._path} turns one text into another and holds no conversations: an encoder reads the prompt",
                hint="give the whole task as a text, such as `translate English to German: ...`",
            )
        if not self.has_chat_template:
            names = self._vocabulary.template_names
            which = f" but for {', '.join(names)}, which are not for conversations" if names else ""
            raise UsageError(f"{self._path} has no chat template{which}", hint="use --raw with a prompt to complete")

    def chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, up to where the assistant's next answer begins. Arguments as of `ChatTemplate.render`.

        Raises:
            UsageError: the model has no chat template, or it refuses the conversation.
        """
        self.check_chat()
        text = self.chat_template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables,
        )
        return self._vocabulary.rendered(text)

    def tail(self, prompt: Prompt, *, raw: bool = False, variables: Mapping[str, Any] | None = None) -> list[int]:
        """The prompt's tokens that the chat template wrote after the conversation; they may open the reasoning."""
        if raw or not self.has_chat_template or not self._marks:
            return []
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self._vocabulary.plain(self.chat_template.tail(messages, variables))

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The chat template; valid only if `has_chat_template`."""
        return ChatTemplate(str(self._vocabulary.template), self._vocabulary.special_token_texts, self._path)
