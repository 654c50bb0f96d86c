"""The tokenizer of a Hugging Face folder, by way of transformers; no code of the folder runs."""

import os
from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer

from headrace.checkpoint import Checkpoint
from headrace.errors import CheckpointError
from headrace.model.end_tokens import ends_among
from headrace.model.panics import tables_trusted
from headrace.model.text_stream import TextStream, WindowStream


class FolderVocabulary:
    """Text to token ids and back, as transformers does it."""

    def __init__(self, checkpoint: Checkpoint):
        """Raises `CheckpointError` where the folder holds no usable tokenizer."""
        self._path = checkpoint.path
        folder = checkpoint.path if os.path.isdir(checkpoint.path) else os.path.dirname(checkpoint.path) or "."
        try:
            found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            self._backend: Any = found.backend_tokenizer
            self.template: str | None = found.get_chat_template() if found.chat_template else None
        except Exception as error:  # whatever untrusted files provoke in two libraries
            raise CheckpointError(
                f"{folder} holds no usable tokenizer: {error}",
                hint="tokenizer.json and tokenizer_config.json belong to the model",
            ) from error
        self._backend.no_truncation()  # what was right for training cuts prompts, and fills them up
        self._backend.no_padding()
        self._added = frozenset(self._backend.get_added_tokens_decoder())
        self.special_texts: dict[str, Any] = dict(found.special_tokens_map)
        self.bos_id: int | None = found.bos_token_id
        self._eos_id: int | None = found.eos_token_id
        probe = self._ids("a", True)
        self.adds_bos = self.bos_id is not None and probe[:1] == [self.bos_id]
        self._adds_eos = self._eos_id is not None and probe[-1:] == [self._eos_id]
        ends = {self._eos_id, *_numbers(checkpoint.generation.get("eos_token_id"))}
        if checkpoint.config is not None:
            ends |= set(_numbers(checkpoint.config.get("eos_token_id")))
        spelled, _ = ends_among(lambda token: self._added_id(token) is not None)
        ends |= {self._added_id(token) for token in spelled}
        self.end_ids = frozenset(i for i in ends if i is not None)

    def plain(self, text: str) -> list[int]:
        """As `Vocabulary.plain`."""
        return self._ids(text, False)

    def rendered(self, text: str) -> list[int]:
        """As `Vocabulary.rendered`: transformers adds nothing to it."""
        return self._ids(text, False)

    def raw(self, text: str) -> list[int]:
        """As `Vocabulary.raw`: with all that the tokenizer puts before a text."""
        ids = self._ids(text, True)
        if self.adds_bos and ids[:2] == [self.bos_id, self.bos_id]:  # the text has one of its own
            ids = ids[1:]
        return ids[:-1] if self._adds_eos else ids

    def complete(self, text: str) -> list[int]:
        """As `Vocabulary.complete`."""
        return self._ids(text, True)

    def special_id(self, token: str) -> int | None:
        """As `Vocabulary.special_id`."""
        number = self._added_id(token)
        return number if number is not None and self._ids(token, False) == [number] else None

    def special_tokens(self, text: str) -> dict[int, str]:
        """As `Vocabulary.special_tokens`."""
        return {i: str(self._backend.id_to_token(i)) for i in self._ids(text, False) if i in self._added}

    def decode(self, ids: Sequence[int]) -> str:
        """As `Vocabulary.decode`."""
        return str(self._backend.decode(list(ids), skip_special_tokens=True))

    def stream(self, before: Sequence[int] = (), *, strip_space: bool = False) -> TextStream:
        """As `Vocabulary.stream`: decoders strip the space where nothing is before it."""
        return WindowStream(self._backend, () if strip_space else before[-_CONTEXT_TOKENS:])

    def _added_id(self, token: str) -> int | None:
        number: int | None = self._backend.token_to_id(token)
        return number if number is not None and number in self._added else None

    def _ids(self, text: str, special: bool) -> list[int]:
        with tables_trusted(self._path):
            return list(self._backend.encode(text, add_special_tokens=special).ids)


# Of what a text goes on after, so many tokens are decoded with it.
_CONTEXT_TOKENS = 8


def _numbers(value: object) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [one for one in values if isinstance(one, int)]
