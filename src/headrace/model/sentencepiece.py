"""SentencePiece's BPE, from the pieces and scores in a GGUF file.

Neighbours are merged as long as the result is a piece of the vocabulary. The highest score goes first; among equal
scores, the leftmost. sentencepiece and llama.cpp use this algorithm. Merges by rank, as in the tokenizers library, differ
for equal scores. They would also have to be derived first, which takes seconds for a large vocabulary.
"""

import heapq
import re
from collections.abc import Mapping, Sequence

SPACE = "\u2581"  # form of a space in pieces
_MAX_CACHED_WORDS = 1 << 16
_WORDS = re.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+")


class SentencePieceBpe:
    """SentencePiece's BPE encoder."""

    def __init__(
        self,
        ids: Mapping[str, int],
        scores: Sequence[float],
        byte_ids: Mapping[int, int],
        unknown_id: int | None,
    ):
        """Build the encoder from a vocabulary.

        Args:
            ids: id of every piece.
            scores: scores by id.
            byte_ids: tokens of single bytes, for characters that are no piece.
            unknown_id: token for characters that have neither a piece nor byte tokens.
        """
        self._ids = ids
        self._scores = scores
        self._byte_ids = byte_ids
        self._unknown_id = unknown_id
        # If no piece crosses a word boundary, words are encoded separately and cached.
        self._encodes_words = not any(SPACE in piece.lstrip(SPACE) for piece in ids)
        self._cached_words: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text whose spaces are written as `SPACE`."""
        if not self._encodes_words:
            return self._merged(text)
        found: list[int] = []
        for word in _WORDS.findall(text):
            ids = self._cached_words.get(word)
            if ids is None:
                ids = self._merged(word)
                if len(self._cached_words) < _MAX_CACHED_WORDS:
                    self._cached_words[word] = ids
            found += ids
        return found

    def _merged(self, text: str) -> list[int]:
        ids, scores = self._ids, self._scores
        pieces: list[str] = list(text)
        after = list(range(1, len(pieces) + 1))  # index of the next piece
        before = list(range(-1, len(pieces) - 1))
        heap: list[tuple[float, int, int, str]] = []

        def consider(left: int, right: int) -> None:
            piece = pieces[left] + pieces[right]
            token = ids.get(piece)
            if token is not None:
                heapq.heappush(heap, (-scores[token], left, right, piece))

        for left in range(len(pieces) - 1):
            consider(left, left + 1)
        while heap:
            _, left, right, piece = heapq.heappop(heap)
            if after[left] != right or pieces[left] + pieces[right] != piece:
                continue  # one of the two has been merged since
            pieces[left], pieces[right] = piece, ""
            after[left] = after[right]
            if after[left] < len(pieces):
                before[after[left]] = left
                consider(left, after[left])
            if before[left] >= 0:
                consider(before[left], left)
        return [token for piece in pieces if piece for token in self._tokens(piece)]

    def _tokens(self, piece: str) -> list[int]:
        token = self._ids.get(piece)
        if token is not None:
            return [token]
        spelled = [self._byte_ids.get(byte) for byte in piece.encode("utf-8", "replace")]
        if None not in spelled:
            return [token for token in spelled if token is not None]
        return [] if self._unknown_id is None else [self._unknown_id]
