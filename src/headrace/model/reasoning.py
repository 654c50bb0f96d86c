"""Splits a model's output into reasoning and answer, by the special tokens that delimit them.

Two formats exist: a pair of delimiter tokens (Qwen 3, DeepSeek R1, Magistral, Seed-OSS, Gemma 4), and messages with
channels (gpt-oss). The `analysis` channel and tool calls are reasoning; all other channels are the answer:

    <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>

No output is lost: text in a header that never becomes a message is shown when the header ends.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from headrace.model.text_stream import TextStream

_PAIRS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|channel>", "<channel|>"),
)
_START, _CHANNEL, _MESSAGE, _END = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"
_THOUGHT_IN, _CONSTRAINT = "analysis", "<|constrain|>"


class Part(Enum):
    """The part of the output to which a text belongs."""

    CONTENT = "answer"
    REASONING = "thought"
    HIDDEN = "hidden"  # text of a token that is not shown but is part of a stop string


Segment: TypeAlias = tuple[Part, str]


@dataclass(frozen=True, kw_only=True)
class Marks:
    """The delimiter tokens of a model's reasoning; empty if it has none."""

    opening: frozenset[int] = frozenset()
    closing: frozenset[int] = frozenset()
    start: int | None = None
    channel: int | None = None
    message: int | None = None
    end: int | None = None

    @classmethod
    def among(cls, token_id: Callable[[str], int | None]) -> "Marks":
        """The delimiters that exist. `token_id` gives the id of a special token, or None."""
        pairs = [(token_id(first), token_id(last)) for first, last in _PAIRS]
        found = [(first, last) for first, last in pairs if first is not None and last is not None]
        start, channel, message = map(token_id, (_START, _CHANNEL, _MESSAGE))
        channels = start is not None and channel is not None and message is not None
        return cls(
            opening=frozenset(first for first, _ in found),
            closing=frozenset(last for _, last in found),
            start=start if channels else None,
            channel=channel if channels else None,
            message=message if channels else None,
            end=token_id(_END) if channels else None,
        )

    def __bool__(self) -> bool:
        """True if the model has delimiters."""
        return bool(self.opening) or self.start is not None

    def __contains__(self, token: int) -> bool:
        """True if this token is a delimiter."""
        return (
            token in self.opening
            or token in self.closing
            or token in (self.start, self.channel, self.message, self.end)
        )


class _Header:
    """The header of a gpt-oss message: role, channel, recipient."""

    def __init__(self) -> None:
        self.role = self.channel = ""
        self.in_channel = False

    def add(self, text: str) -> None:
        """Append text to the channel or the role."""
        if self.in_channel:
            self.channel += text
        else:
            self.role += text

    @property
    def part(self) -> Part:
        """The part to which the header's message belongs."""
        channel = self.channel.split()
        # A recipient may come without `to=`, but not in the user's channel `final`.
        named = channel[1:] if channel[:1] != ["final"] else [word for word in channel[1:] if word.startswith("to=")]
        has_recipient = _RECIPIENT.search(self.role) or any(not word.startswith(_CONSTRAINT) for word in named)
        return Part.REASONING if has_recipient or channel[:1] == [_THOUGHT_IN] else Part.CONTENT

    @property
    def text(self) -> str:
        """Text before the channel that does not belong in a header."""
        found = self.role.strip()
        found = found[len("assistant") :] if found.startswith("assistant") else found
        return _RECIPIENT.sub("", found).lstrip()

    def as_message(self) -> Segment:
        """The segment of a header without a message."""
        name, space, rest = self.channel.lstrip().partition(" ")
        part = Part.REASONING if name == _THOUGHT_IN else Part.CONTENT
        return part, self.text + (rest if name in _CHANNELS else name + space + rest)


_CHANNELS = ("analysis", "commentary", "final")
_RECIPIENT = re.compile(r"\bto=\S*")


class AnswerStream:
    """Splits one output into answer and reasoning, token by token."""

    def __init__(
        self,
        marks: Marks,
        stream: Callable[[], TextStream],
        tail: Iterable[int] = (),
        hidden: Mapping[int, str] | None = None,
    ):
        """Start at the end of a prompt.

        Args:
            marks: the model's delimiters.
            stream: makes a decoder for each part.
            tail: tokens that the chat template wrote after the conversation; they may open a part.
            hidden: texts of tokens that are not shown but are part of stop strings.
        """
        self._marks = marks
        self._new_stream = stream
        self._hidden = hidden or {}
        self._part, self._header, self._begins = Part.CONTENT, None, False
        self._stream = stream()
        for token in tail:
            if token in marks:
                self._go_on(token)
            elif self._header is not None:
                self._header.add(self._stream.step(token))

    _part: Part
    _header: _Header | None  # header in progress

    @property
    def hidden_texts(self) -> Collection[str]:
        """Texts of tokens that are not shown but are part of stop strings."""
        return self._hidden.values()

    def step(self, token: int) -> list[Segment]:
        """Segments that this token completes."""
        if token in self._marks:
            found = self._shown(self._stream.flush())
            if token not in (self._marks.channel, self._marks.message):
                found += self._released()
            elif self._header is not None and token == self._marks.message and self._header.text:
                found.append((Part.CONTENT, self._header.text))
            self._go_on(token)
        elif token in self._hidden:  # a character cannot span it
            found = self._shown(self._stream.flush())
        else:
            found = self._shown(self._stream.step(token))
        return found + self._spelled(token)

    def end(self, token: int) -> list[Segment]:
        """The remaining segments at a token that ends the answer."""
        return [*self.flush(), *self._spelled(token)]

    def flush(self) -> list[Segment]:
        """The remaining segments if the answer ends without an end token."""
        return self._shown(self._stream.flush()) + self._released()

    def _released(self) -> list[Segment]:
        """The text of a header that no message followed."""
        header, self._header = self._header, None
        segment = (Part.CONTENT, "") if header is None else header.as_message()
        return [segment] if segment[1] else []

    def _shown(self, text: str) -> list[Segment]:
        if self._header is not None:
            self._header.add(text)
            return []
        if self._begins:  # white space between a delimiter and its part is dropped
            text = text.lstrip()
            self._begins = not text
        return [(self._part, text)] if text else []

    def _spelled(self, token: int) -> list[Segment]:
        return [(Part.HIDDEN, self._hidden[token])] if token in self._hidden else []

    def _go_on(self, token: int) -> None:
        """Switch to the part that a delimiter opens."""
        marks, header = self._marks, self._header
        if token in (marks.start, marks.channel):
            if header is None or token == marks.start:
                header = _Header()
            header.in_channel = token == marks.channel
            self._header = header
        else:
            if token == marks.message:
                self._part = Part.CONTENT if header is None else header.part
            else:
                self._part = Part.REASONING if token in marks.opening else Part.CONTENT
            self._header = None
        self._begins = True
        self._stream = self._new_stream()


def joined(segments: Sequence[Segment], part: Part) -> str:
    """The text of one part."""
    return "".join(text for kind, text in segments if kind is part)
