"""Which rows of which tensors are pinned, which are streamed, and in which order a pass visits them.

Every tensor is cut at its own row: the rows before the cut are pinned, those after it stream in units small enough for
a slot of the ring. The same share of every tensor is pinned, so that the product with the pinned rows hides the reads
of the others, tensor by tensor, and a machine that owns a range of rows is no special case.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from headrace.checkpoint import Tensor
from headrace.stream.memory import PAGE_BYTES, aligned


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """A range of rows that is read as one: its place in the file, page-aligned, and where the rows begin in it."""

    tensor: Tensor
    first: int
    rows: int
    start: int  # page-aligned offset in the file
    length: int  # page-aligned bytes to read
    delta: int  # bytes before the first row
    pinned_at: int | None  # offset in the pinned arena; None: a slot of the ring

    @property
    def needed(self) -> int:
        """Bytes from `start` to the end of the last row."""
        return self.delta + self.rows * self.tensor.row_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Visit:
    """Tensors multiplied with the same activations, at one point of the pass."""

    tensors: tuple[Tensor, ...]
    pinned: tuple[tuple[Unit, ...], ...]  # per tensor: reads that fill its pinned rows, once
    pinned_rows: tuple[int, ...]
    pinned_address: tuple[int, ...]  # per tensor: offset of row 0 in the pinned arena
    streamed: tuple[tuple[int, Unit], ...]  # (index of the tensor, unit), in order

    @property
    def in_order(self) -> bool:
        """Whether pieces must be multiplied in the order of the file: sums over slabs depend on it."""
        return any(tensor.slabs for tensor in self.tensors)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The visits of a pass, and the memory they need."""

    visits: tuple[Visit, ...]
    pinned_bytes: int
    slot_bytes: int

    @property
    def streamed_bytes(self) -> int:
        """Bytes read from the disk in every pass, page alignment included."""
        return sum(unit.length for visit in self.visits for _, unit in visit.streamed)

    @property
    def streamed_units(self) -> int:
        """Reads in every pass."""
        return sum(len(visit.streamed) for visit in self.visits)


def make_layout(
    order: Sequence[Sequence[Tensor]], pinned_rows: Mapping[str, int], unit_bytes: int, read_bytes: int = 4 << 20
) -> Layout:
    """Lay out a pass that visits groups of tensors in this order.

    Args:
        order: groups of tensors that share their activations, in execution order.
        pinned_rows: rows to pin, by tensor name, from row 0 on.
        unit_bytes: the most a streamed unit may take, rows permitting.
        read_bytes: the most that one read of pinned rows takes.
    """
    visits: list[Visit] = []
    cursor = 0
    for group in order:
        pinned, addresses, streamed = [], [], []
        for index, tensor in enumerate(group):
            rows = pinned_rows[tensor.name]
            start, length = aligned(tensor.offset, rows * tensor.row_bytes)
            addresses.append(cursor + tensor.offset - start)
            pinned.append(tuple(_units(tensor, 0, rows, read_bytes, cursor)))
            cursor += length if rows else 0
            streamed += [(index, unit) for unit in _units(tensor, rows, tensor.rows, unit_bytes, None)]
        visits.append(
            Visit(
                tensors=tuple(group),
                pinned=tuple(pinned),
                pinned_rows=tuple(pinned_rows[tensor.name] for tensor in group),
                pinned_address=tuple(addresses),
                streamed=tuple(streamed),
            )
        )
    slot = max((unit.length for visit in visits for _, unit in visit.streamed), default=PAGE_BYTES)
    return Layout(visits=tuple(visits), pinned_bytes=cursor, slot_bytes=slot)


def _units(tensor: Tensor, first: int, last: int, unit_bytes: int, pinned_base: int | None) -> Iterator[Unit]:
    multiple = tensor.row_multiple
    step = max(1, (unit_bytes - 2 * PAGE_BYTES) // (multiple * tensor.row_bytes)) * multiple
    base, _ = aligned(tensor.offset, 0)
    for row in range(first, last, step):
        rows = min(step, last - row)
        offset = tensor.offset + row * tensor.row_bytes
        start, length = aligned(offset, rows * tensor.row_bytes)
        yield Unit(
            tensor=tensor,
            first=row,
            rows=rows,
            start=start,
            length=length,
            delta=offset - start,
            pinned_at=None if pinned_base is None else pinned_base + start - base,
        )
