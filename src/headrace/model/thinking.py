"""What a model thinks before it answers, told from the answer by the tokens that it marks both with.

Two ways are published: a pair of tokens around what is thought (Qwen 3, DeepSeek R1, Magistral, Seed-OSS, Gemma 4), and
messages with a channel each (gpt-oss), of which one is the answer:

    <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

_PAIRS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|channel>", "<channel|>"),
)
_START, _CHANNEL, _MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
_THOUGHT_IN = ("analysis", "commentary")  # channels
# Of a prompt, the tokens that can say how the answer begins: templates may open what is thought, or close it at once.
_LAST = 4


class Stream(Protocol):
    """Text from tokens that come one by one."""

    def step(self, token: int) -> str:
        """The text that this token completes."""


class _Part(Enum):
    ANSWER = "answer"
    THOUGHT = "thought"
    HEADER = "header"  # of a message


@dataclass(frozen=True, kw_only=True)
class Marks:
    """The tokens with which a model marks what it thinks; none where it does not."""

    opening: frozenset[int] = frozenset()
    closing: frozenset[int] = frozenset()
    headers: frozenset[int] = frozenset()
    messages: frozenset[int] = frozenset()

    @classmethod
    def among(cls, token_id: Callable[[str], int | None]) -> "Marks":
        """Those that exist, given the number of a token that is never cut, or None."""
        pairs = [(token_id(first), token_id(last)) for first, last in _PAIRS]
        found = [(first, last) for first, last in pairs if first is not None and last is not None]
        start, channel, message = map(token_id, (_START, _CHANNEL, _MESSAGE))
        channels = start is not None and channel is not None and message is not None
        return cls(
            opening=frozenset(first for first, _ in found),
            closing=frozenset(last for _, last in found),
            headers=frozenset({start, channel} if channels else ()),  # type: ignore[arg-type]
            messages=frozenset({message} if channels else ()),  # type: ignore[arg-type]
        )


class AnswerStream:
    """Answer and thoughts from tokens that come one by one."""

    def __init__(self, marks: Marks, stream: Callable[[], Stream], prompt: Sequence[int] = ()):
        """`stream` makes a decoder for each part; the last tokens of the `prompt` say with which part the model goes on."""
        self._marks = marks
        self._new_stream = stream
        self._part, self._header, self._begins = _Part.ANSWER, "", False
        self._stream = stream()
        for token in prompt[-_LAST:]:
            self._is_mark(token)

    def step(self, token: int) -> tuple[str, str]:
        """(answer, thought) that this token completes, one of them or both empty."""
        if self._is_mark(token):
            return "", ""
        text = self._stream.step(token)
        if self._part is _Part.HEADER:
            self._header += text
            return "", ""
        if self._begins:  # a part after a mark does not begin with the lines that set it off
            text = text.lstrip()
            self._begins = not text
        return (text, "") if self._part is _Part.ANSWER else ("", text)

    def _is_mark(self, token: int) -> bool:
        marks = self._marks
        if token in marks.opening:
            self._go_on(_Part.THOUGHT)
        elif token in marks.closing:
            self._go_on(_Part.ANSWER)
        elif token in marks.headers:
            self._go_on(_Part.HEADER)
        elif token in marks.messages:
            self._go_on(_Part.THOUGHT if self._header.strip().startswith(_THOUGHT_IN) else _Part.ANSWER)
        else:
            return False
        return True

    def _go_on(self, part: _Part) -> None:
        self._part, self._header, self._begins = part, "", True
        self._stream = self._new_stream()
