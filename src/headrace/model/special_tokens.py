"""Splits a text at special tokens: control, user-defined and unknown tokens are matched before the rest is tokenised.

As in llama.cpp, the longest token is matched first, each from left to right, by its text in the file. Some strip the white
space beside them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_WHITE_SPACE = " \t\n\v\f\r"


@dataclass(frozen=True, kw_only=True, slots=True)
class SpecialToken:
    """A token that is matched as a whole."""

    token_id: int
    text: str
    strips_left: bool = False  # white space before the token is part of it
    strips_right: bool = False  # white space after the token is part of it


class SpecialTokens:
    """The special tokens of one vocabulary."""

    def __init__(self, tokens: Sequence[SpecialToken]):
        self._tokens = sorted((one for one in tokens if one.text), key=lambda one: -len(one.text.encode()))

    def split(self, text: str) -> list[int | str]:
        """The ids of special tokens and the non-empty texts between them."""
        parts: list[int | str] = [text] if text else []
        for token in self._tokens:
            if token.text in text:
                parts = [one for part in parts for one in ([part] if isinstance(part, int) else _split(part, token))]
        return parts


def _split(text: str, token: SpecialToken) -> Iterator[int | str]:
    start = 0
    while (at := text.find(token.text, start)) >= 0:
        before = text[start:at]
        if token.strips_left:
            before = before.rstrip(_WHITE_SPACE)
        if before:
            yield before
        yield token.token_id
        start = at + len(token.text)
        if token.strips_right:
            start = len(text) - len(text[start:].lstrip(_WHITE_SPACE))
    if start < len(text):
        yield text[start:]
