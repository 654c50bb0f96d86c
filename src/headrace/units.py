"""Bytes, seconds and rates as people write and read them. Only this module formats a number with a unit.

Memory is shown in GiB (2**30), disk and bandwidth in GB (10**9), always with the unit.
"""

import re

from headrace.errors import UsageError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
GB = 10**9

_FACTOR = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": KIB, "MI": MIB, "GI": GIB, "TI": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]I?)?(B)?", re.IGNORECASE)


def parse_bytes(text: str | int) -> int:
    """Parse a size: `4GiB`, `4GB`, `512 MiB` or a plain number of bytes.

    Raises:
        UsageError: not a size, or a bare number so small that a unit was surely forgotten.
    """
    if isinstance(text, int):
        return text
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"`{text}` is not a size", hint="write it like 4GiB, 4000MB or 2147483648")
    number, prefix, byte = match.groups()
    try:
        size = int(float(number) * _FACTOR[(prefix or "").upper()])
    except OverflowError as error:
        raise UsageError(f"`{text[:20]}...` is too large for a size", hint="write it like 4GiB") from error
    if prefix is None and byte is None and size < MIB:
        raise UsageError(f"`{text}` is {size} bytes; a unit is missing", hint=f"did you mean {number}GiB?")
    return size


def gib(size: float) -> str:
    """Format memory: `3.91 GiB`, or MiB below one tenth of a GiB."""
    return f"{size / GIB:.2f} GiB" if abs(size) >= GIB / 10 else f"{size / MIB:.0f} MiB"


def option(size: float) -> str:
    """Format a size as one word for a command line, rounded up to whole MiB: `4000MiB`."""
    return f"{-(-int(size) // MIB)}MiB"


def gigabytes(size: float) -> str:
    """Format disk and bandwidth: `5.07 GB`, or MB below one tenth of a GB."""
    return f"{size / GB:.2f} GB" if abs(size) >= GB / 10 else f"{size / 1e6:.0f} MB"


def seconds(duration: float) -> str:
    """Format a duration with three significant digits: `76 ms`, `1.46 s`, `6m45s`, `2h05m`."""
    if duration < 0.9995:
        return f"{duration * 1e3:.3g} ms"
    if duration < 100:
        return f"{duration:.3g} s"
    minutes, rest = divmod(round(duration), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"


def rate(tok_per_s: float) -> str:
    """Format tokens per second with three significant digits."""
    return f"{tok_per_s:.0f} tok/s" if tok_per_s >= 99.95 else f"{tok_per_s:.3g} tok/s"
