"""Small files read within bounds on their size, and on the memory that their JSON takes."""

import json
import os
import stat
from typing import Any

# A JSON value takes about 100 bytes in Python, so the maximum is half a GiB. Typical files take a tenth of it.
MOST_VALUES = 4_000_000


def read_bounded(path: str | os.PathLike[str], limit: int) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is longer than `limit` bytes, or no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no regular file")
        if status.st_size > limit:
            raise ValueError(f"it has {status.st_size} bytes, the limit is {limit}")
        return file.read(limit)


def json_of(data: bytes | str, most: int = MOST_VALUES, **options: Any) -> Any:
    """Parse JSON. `options` are those of `json.loads`.

    Raises:
        ValueError: it is not JSON, is nested too deep, or holds too many values.
    """
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    if sum(map(raw.count, (b"[", b"{", b","))) > most:
        raise ValueError(f"it holds more than {most} values")
    try:
        return json.loads(data, **options)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
