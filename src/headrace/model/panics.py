"""Handles panics of Rust libraries, which are not an `Exception` in Python."""

from collections.abc import Iterator
from contextlib import contextmanager

from headrace.errors import CheckpointError


@contextmanager
def panics_as_errors(path: str) -> Iterator[None]:
    """Turn a panic of the tokenizers library at damaged tables into `CheckpointError`."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(
            f"{path}: the tokenizer breaks at this text: {error}", hint="its tables are damaged"
        ) from error
