"""Panics of libraries written in Rust, which are no `Exception` in Python."""

from collections.abc import Iterator
from contextlib import contextmanager

from headrace.errors import CheckpointError


@contextmanager
def tables_trusted(path: str) -> Iterator[None]:
    """Raise `CheckpointError` where the tokenizers library panics at damaged tables."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(
            f"{path}: the tokenizer breaks at this text: {error}", hint="its tables are damaged"
        ) from error
