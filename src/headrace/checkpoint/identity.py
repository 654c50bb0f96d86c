"""Identity of a model: a hash of its files' contents, independent of their names and folders.

Headers are not enough: fine-tunes share them. Large files are sampled at 64 evenly spaced blocks. Fine-tuned weights differ
nearly everywhere.
"""

import hashlib
import os
from pathlib import Path

from headrace.checkpoint.gguf import Checkpoint
from headrace.errors import CheckpointError

_WHOLE_BYTES = 64 << 20  # max size of a file that is hashed whole
_BLOCKS, _BLOCK_BYTES = 64, 64 << 10
# Configuration and tokenizer of a folder.
_BESIDE_WEIGHTS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def identity(checkpoint: Checkpoint) -> str:
    """Hash of the model's contents, 16 hexadecimal digits.

    Raises:
        CheckpointError: a file cannot be read.
    """
    paths = [Path(path) for path in checkpoint.paths]
    path = Path(checkpoint.path)
    if checkpoint.config is not None:
        folder = path if path.is_dir() else path.parent
        paths += [folder / name for name in _BESIDE_WEIGHTS if (folder / name).is_file()]
    digest = hashlib.sha256()
    for path in dict.fromkeys(paths):
        try:
            _add(digest, path)
        except OSError as error:
            raise CheckpointError(
                f"cannot read {path}: {error.strerror}", hint="check the file and its disk"
            ) from error
    return digest.hexdigest()[:16]


def _add(digest: "hashlib._Hash", path: Path) -> None:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(size.to_bytes(8, "little"))
        if size <= _WHOLE_BYTES:
            digest.update(file.read())
            return
        for block in range(_BLOCKS):
            file.seek((size - _BLOCK_BYTES) * block // (_BLOCKS - 1))
            digest.update(file.read(_BLOCK_BYTES))
