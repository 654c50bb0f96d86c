"""What tells one model from another: a hash of its files' contents, whatever they are called and wherever they lie.

Headers are not enough: fine-tunes share them. Of large files some blocks spread over the whole are read; weights that were
trained further differ nearly everywhere.
"""

import hashlib
import os
from pathlib import Path

from headrace.checkpoint.gguf import Checkpoint
from headrace.errors import CheckpointError

_WHOLE_BYTES = 64 << 20  # files up to this size are read whole
_BLOCKS, _BLOCK_BYTES = 64, 64 << 10
_BESIDE_WEIGHTS = (".json", ".jinja", ".model", ".txt")  # configuration and tokenizer of a folder


def identity(checkpoint: Checkpoint) -> str:
    """16 hexadecimal digits.

    Raises:
        CheckpointError: a file cannot be read.
    """
    paths = [Path(path) for path in checkpoint.paths]
    folder = Path(checkpoint.path)
    if folder.is_dir():
        paths += sorted(path for path in folder.iterdir() if path.suffix in _BESIDE_WEIGHTS and path.is_file())
    found = hashlib.sha256()
    for path in dict.fromkeys(paths):
        try:
            _add(found, path)
        except OSError as error:
            raise CheckpointError(
                f"cannot read {path}: {error.strerror}", hint="check the file and its disk"
            ) from error
    return found.hexdigest()[:16]


def _add(found: "hashlib._Hash", path: Path) -> None:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        found.update(size.to_bytes(8, "little"))
        if size <= _WHOLE_BYTES:
            found.update(file.read())
            return
        for block in range(_BLOCKS):
            file.seek((size - _BLOCK_BYTES) * block // (_BLOCKS - 1))
            found.update(file.read(_BLOCK_BYTES))
