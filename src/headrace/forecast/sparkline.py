"""A timeline as lines of text: each column shows the share of time that a resource is busy."""

from collections.abc import Iterable, Mapping, Sequence

LEVELS = " ▁▂▃▄▅▆▇█"


def busy(spans: Iterable[tuple[float, float]], start_s: float, end_s: float, columns: int) -> list[float]:
    """Share of each of `columns` equal intervals that the spans cover; spans must not overlap each other."""
    width = (end_s - start_s) / columns
    covered = [0.0] * columns
    for begin, end in spans:
        begin, end = max(begin, start_s), min(end, end_s)
        at = int((begin - start_s) / width) if width > 0 else columns
        while at < columns and begin < end:
            edge = min(end, start_s + (at + 1) * width)
            covered[at] += max(0.0, edge - begin)
            begin, at = max(edge, begin), at + 1
    return [min(1.0, share / width) if width > 0 else 0.0 for share in covered]


def sparkline(shares: Sequence[float]) -> str:
    """One line of block characters."""
    return "".join(LEVELS[round(share * (len(LEVELS) - 1))] for share in shares)


def sparklines(
    rows: Mapping[str, Iterable[tuple[float, float]]], start_s: float, end_s: float, columns: int = 60
) -> list[str]:
    """A line for each row: its name, the blocks, and the share of the whole time."""
    width = max(len(name) for name in rows)
    lines = []
    for name, spans in rows.items():
        shares = busy(spans, start_s, end_s, columns)
        lines.append(f"{name:{width}}  |{sparkline(shares)}|  {sum(shares) / columns:.0%}")
    return lines
