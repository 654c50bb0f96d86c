"""The texts of a vocabulary in little memory: 150,000 strings of Python take 11 MB, their bytes 1 MB."""

from array import array
from collections.abc import Sequence
from itertools import accumulate
from typing import overload


class TokenTexts(Sequence[str]):
    """The text of each token id, stored as one UTF-8 string and the end of each text in it."""

    def __init__(self, texts: Sequence[str]):
        """`texts` must be valid Unicode: no surrogates."""
        encoded = [text.encode() for text in texts]
        self._bytes = b"".join(encoded)
        self._ends = array("Q", accumulate(map(len, encoded), initial=0))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._bytes[self._ends[index] : self._ends[index + 1]].decode()
