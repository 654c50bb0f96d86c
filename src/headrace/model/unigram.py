"""SentencePiece's unigram model, from the pieces and scores in a GGUF file, run by the sentencepiece library itself."""

import struct
from collections.abc import Sequence

from sentencepiece import SentencePieceProcessor

_UNIGRAM = 1  # model type
_UNKNOWN, _CONTROL = 2, 3  # piece types


class UnigramModel:
    """Text to token ids: the segmentation into pieces with the highest sum of scores."""

    def __init__(
        self,
        pieces: Sequence[str],
        scores: Sequence[float],
        types: Sequence[int],
        *,
        unknown_id: int | None,
        charsmap: bytes,
        space_first: bool,
        merges_spaces: bool,
    ):
        """Build the model from a vocabulary; `types` have the same numbers in GGUF and sentencepiece.

        Args:
            pieces: token texts, in the order of their ids.
            scores: logarithms of the pieces' probabilities.
            types: normal, unknown, control, user-defined, unused, byte.
            unknown_id: the token for characters that are in no piece.
            charsmap: normalisation table of characters.
            space_first: put a space before the text.
            merges_spaces: merge several spaces into one, and strip those around the text.
        """
        kinds = list(types)
        if unknown_id is not None:  # sentencepiece takes exactly one; other unknown tokens occur in no text
            kinds = [_CONTROL if kind == _UNKNOWN else kind for kind in types]
            kinds[unknown_id] = _UNKNOWN
        model = b"".join(
            _message(1, _message(1, piece.encode()) + _float(2, score) + _number(3, kind))
            for piece, score, kind in zip(pieces, scores, kinds, strict=True)
        )
        model += _message(2, _number(3, _UNIGRAM) + (b"" if unknown_id is None else _number(40, unknown_id)))
        normaliser = (
            _message(1, b"custom") + _message(2, charsmap) + _number(3, space_first) + _number(4, merges_spaces)
        )
        self._processor = SentencePieceProcessor(model_proto=model + _message(3, normaliser))

    def encode(self, text: str) -> list[int]:
        """Token ids."""
        return [int(i) for i in self._processor.encode(text)]


# The three wire types of protocol buffers that `sentencepiece_model.proto` needs.


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _message(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value
