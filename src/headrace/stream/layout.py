"""Which rows of which tensors are pinned, which are streamed, and in which order a pass groups them.

Every tensor is cut at its own row: the rows before the cut are pinned, those after it stream in units small enough for
a slot of the ring. The same share of every tensor is pinned, so that the product with the pinned rows hides the reads
of the others, tensor by tensor, and a machine that owns a range of rows is no special case.

Behind the pinned rows some may be *decode_pinned* memory that others need at times: they are pinned while it is decode_pinned, and stream
with the rest while it is not.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import lcm

from headrace.checkpoint import Tensor
from headrace.stream.arena import PAGE_BYTES, aligned

# Rows of a weight that kernels take together, best first: 512 rows times 256 of 14336 columns of Q4_K ran at 518 GFLOP/s,
# times 260 at 422.
TILES = (128, 16)


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """A range of rows that is read as one: its place in the file, page-aligned, and where the rows begin in it."""

    tensor: Tensor
    first: int
    rows: int
    start: int  # page-aligned offset in the file
    length: int  # page-aligned bytes to read
    delta: int  # bytes before the first row
    at: int | None  # offset in the arena of pinned or of decode_pinned rows; None: only ever in a slot of the ring

    @property
    def needed(self) -> int:
        """Bytes from `start` to the end of the last row."""
        return self.delta + self.rows * self.tensor.row_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Resident:
    """Rows of a tensor that stay in an arena, and the reads that fill it."""

    first: int
    rows: int
    address: int  # offset of row `first` in the arena
    units: tuple[Unit, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightGroup:
    """Tensors multiplied with the same activations, at one point of the pass."""

    tensors: tuple[Tensor, ...]
    pinned: tuple[Resident, ...]  # per tensor
    decode_pinned: tuple[Resident, ...]  # per tensor
    streamed: tuple[tuple[int, Unit], ...]  # (index of the tensor, unit), in order: what is neither
    streamed_in_prefill: tuple[
        tuple[int, Unit], ...
    ]  # and the units of decode_pinned rows, while no memory is decode_pinned

    @property
    def in_order(self) -> bool:
        """Whether slices must be multiplied in the order of the file: sums over slabs depend on it."""
        return any(tensor.k_splits for tensor in self.tensors)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The groups of a pass, and the memory they need."""

    groups: tuple[WeightGroup, ...]
    pinned_bytes: int
    decode_pinned_bytes: int
    slot_bytes: int

    @property
    def streamed_bytes(self) -> int:
        """Bytes read from the disk in every pass while no memory is decode_pinned, page alignment included."""
        return sum(unit.length for group in self.groups for _, unit in group.streamed_in_prefill)

    @property
    def reads_always(self) -> bool:
        """Whether a pass reads even while memory is decode_pinned."""
        return any(group.streamed for group in self.groups)

    @property
    def streamed_units(self) -> int:
        """Reads in such a pass."""
        return sum(len(group.streamed_in_prefill) for group in self.groups)


class _Arena:
    """Where rows are laid out one tensor after another."""

    def __init__(self) -> None:
        self.nbytes = 0

    def place(self, tensor: Tensor, first: int, rows: int, read_bytes: int) -> Resident:
        offset = tensor.offset + first * tensor.row_bytes
        start, length = aligned(offset, rows * tensor.row_bytes)
        base, self.nbytes = self.nbytes, self.nbytes + (length if rows else 0)
        units = tuple(_units(tensor, first, first + rows, read_bytes, base - start))
        return Resident(first=first, rows=rows, address=base + offset - start, units=units)


def make_layout(
    order: Sequence[Sequence[Tensor]],
    pinned_rows: Mapping[str, int],
    unit_bytes: int,
    read_bytes: int = 4 << 20,
    decode_pinned_rows: Mapping[str, int] | None = None,
) -> Layout:
    """Lay out a pass that groups groups of tensors in this order.

    Args:
        order: groups of tensors that share their activations, in execution order.
        pinned_rows: rows to pin, by tensor name, from row 0 on.
        unit_bytes: the most a streamed unit may take, rows permitting.
        read_bytes: the most that one read of pinned rows takes.
        decode_pinned_rows: rows behind the pinned ones that are pinned while memory for them is decode_pinned.
    """
    groups: list[WeightGroup] = []
    fixed, decode_pinned = _Arena(), _Arena()
    decode_pinned_rows = decode_pinned_rows or {}
    for group in order:
        at_times, rest = [], []
        pinned = tuple(fixed.place(tensor, 0, pinned_rows[tensor.name], read_bytes) for tensor in group)
        for index, tensor in enumerate(group):
            first = pinned[index].rows
            at_times.append(decode_pinned.place(tensor, first, decode_pinned_rows.get(tensor.name, 0), unit_bytes))
            first += at_times[index].rows
            rest += [(index, unit) for unit in _units(tensor, first, tensor.rows, unit_bytes, None)]
        lent_units = [(index, unit) for index, rows in enumerate(at_times) for unit in rows.units]
        groups.append(
            WeightGroup(
                tensors=tuple(group),
                pinned=pinned,
                decode_pinned=tuple(at_times),
                streamed=tuple(rest),
                streamed_in_prefill=tuple(sorted(lent_units + rest, key=lambda one: one[0])),
            )
        )
    slot = max((unit.length for group in groups for _, unit in group.streamed_in_prefill), default=PAGE_BYTES)
    return Layout(
        groups=tuple(groups), pinned_bytes=fixed.nbytes, decode_pinned_bytes=decode_pinned.nbytes, slot_bytes=slot
    )


def rows_that_fit(tensor: Tensor, nbytes: int) -> int:
    """As many rows as fit, but none that would be left over from whole tiles, unless that made the part much smaller."""
    most = max(tensor.row_multiple, nbytes // tensor.row_bytes)
    for multiple in (lcm(tensor.row_multiple, rows) for rows in TILES):
        if most // multiple * multiple >= 7 / 8 * most:
            return most // multiple * multiple
    return most // tensor.row_multiple * tensor.row_multiple


def _units(tensor: Tensor, first: int, last: int, unit_bytes: int, base: int | None) -> Iterator[Unit]:
    """Reads of rows; `base` is where the file's first byte would lie in the arena."""
    step = rows_that_fit(tensor, unit_bytes - 2 * PAGE_BYTES)
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
            at=None if base is None else base + start,
        )
