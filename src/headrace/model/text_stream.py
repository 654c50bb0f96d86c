"""Decodes tokens one by one: a character split over tokens is held back until it is complete."""

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol


class TextStream(Protocol):
    """Incremental decoder: `step` takes a token, `flush` ends the text."""

    def step(self, token: int) -> str:
        """The text that this token completes, possibly empty."""

    def flush(self) -> str:
        """The text that was held back; bytes of an incomplete character become U+FFFD."""


class ByteStream:
    """Decoder for vocabularies that give the bytes of each token."""

    def __init__(self, bytes_of: Callable[[int], bytes], strip_space: bool = False):
        """`strip_space`: leave out the space that SentencePiece puts before the first word of a text."""
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_space = strip_space

    def step(self, token: int) -> str:
        """As `TextStream.step`."""
        return self._shown(self._decoder.decode(self._bytes_of(token)))

    def flush(self) -> str:
        """As `TextStream.flush`."""
        return self._shown(self._decoder.decode(b"", final=True))

    def _shown(self, text: str) -> str:
        if not text or not self._strip_space:
            return text
        self._strip_space = False
        return text.removeprefix(" ")


class WindowStream:
    """Decoder for tokenizers that only decode lists of tokens: it decodes a short window again with each new token.

    Text that ends with U+FFFD is held back, since the next token may complete a character. Byte tokens are decoded
    separately: decoders turn all bytes of a run into U+FFFD if one of them is wrong.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        before: Sequence[int] = (),
        byte_of: Callable[[int], int | None] = lambda _: None,
    ):
        """`decode` gives the text of tokens, `byte_of` the byte of a token that is one; the text continues after `before`."""
        self._decode = decode
        self._byte_of = byte_of
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._tokens = list(before)
        self._shown = len(self._tokens)  # number of these that are shown

    def step(self, token: int) -> str:
        """As `TextStream.step`."""
        byte = self._byte_of(token)
        if byte is not None:
            return self._new(final=True) + self._bytes.decode(bytes([byte]))
        self._tokens.append(token)
        return self._bytes.decode(b"", final=True) + self._new(final=False)

    def flush(self) -> str:
        """As `TextStream.flush`."""
        return self._new(final=True) + self._bytes.decode(b"", final=True)

    def _new(self, final: bool) -> str:
        before, after = self._decode(self._tokens[: self._shown]), self._decode(self._tokens)
        if after == before:  # tokens that are not shown
            del self._tokens[self._shown :]
            return ""
        if len(after) <= len(before) or (after.endswith("\ufffd") and not final):
            return ""
        # The tokens shown last stay as context: decoders treat the first token of a text specially.
        self._tokens = self._tokens[self._shown if self._shown < len(self._tokens) else 0 :]
        self._shown = len(self._tokens)
        return after[len(before) :]
