"""Layout of a pass: pinned rows and streamed rows of every tensor, and the order of the weight groups.

Every tensor is cut at its own row. The rows before are pinned; the others stream in units that fit a slot of the ring. Every
tensor pins the same share, so its matmul with the pinned rows hides the reads of its other rows. A machine that owns a range
of each tensor's rows pins and streams within that range.

Some rows behind the pinned ones may be *decode-pinned*, in memory that prefill needs. While decode reuses that memory they
are pinned; otherwise they stream with the rest.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import lcm

from headrace.checkpoint import Tensor
from headrace.stream.arena import PAGE_BYTES, aligned

# Weight rows that kernels take together, best first. Q4_K with 14336 columns, 512 rows of activations: 256 weight rows ran at
# 518 GFLOP/s, 260 at 422.
TILES = (128, 16)


@dataclass(frozen=True, slots=True)
class RowRange:
    """Rows of a tensor, from `first` on."""

    first: int
    rows: int


def whole(tensor: Tensor) -> RowRange:
    """All rows of a tensor."""
    return RowRange(0, tensor.rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """A range of rows that is one read: its page-aligned place in the file, and the rows' offset in it."""

    tensor: Tensor
    first: int
    rows: int
    start: int  # page-aligned offset in the file
    length: int  # page-aligned bytes to read
    row_offset: int  # bytes before the first row
    arena_offset: int | None  # in the arena of pinned or decode-pinned rows; None: only ever in a slot of the ring

    @property
    def needed(self) -> int:
        """Bytes from `start` to the end of the last row."""
        return self.row_offset + self.rows * self.tensor.row_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Resident:
    """Rows of a tensor that stay in an arena, and the reads that fill it."""

    first: int
    rows: int
    arena_offset: int  # of row `first`
    units: tuple[Unit, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightGroup:
    """Tensors multiplied with the same activations, at one point of the pass."""

    tensors: tuple[Tensor, ...]
    pinned: tuple[Resident, ...]  # per tensor
    decode_pinned: tuple[Resident, ...]  # per tensor
    streamed: tuple[tuple[int, Unit], ...]  # (index of the tensor, unit), in order: the other rows
    streamed_in_prefill: tuple[tuple[int, Unit], ...]  # decode-pinned rows too: their memory is prefill's

    @property
    def in_order(self) -> bool:
        """True if slices must be multiplied in the order of the file: sums over K-splits depend on it."""
        return any(tensor.k_splits for tensor in self.tensors)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The weight groups of a pass, and the memory they need."""

    groups: tuple[WeightGroup, ...]
    pinned_bytes: int
    decode_pinned_bytes: int
    slot_bytes: int

    @property
    def streamed_bytes(self) -> int:
        """Bytes read in every pass that does not reuse prefill memory, page alignment included."""
        return sum(unit.length for group in self.groups for _, unit in group.streamed_in_prefill)

    @property
    def reads_always(self) -> bool:
        """True if a pass reads even while decode reuses prefill memory."""
        return any(group.streamed for group in self.groups)

    @property
    def streamed_units(self) -> int:
        """Reads of a pass that does not reuse prefill memory."""
        return sum(len(group.streamed_in_prefill) for group in self.groups)


class _Arena:
    """Offsets of rows in an arena, one tensor after another."""

    def __init__(self) -> None:
        self.nbytes = 0

    def place(self, tensor: Tensor, first: int, rows: int, read_bytes: int) -> Resident:
        offset = tensor.offset + first * tensor.row_bytes
        start, length = aligned(offset, rows * tensor.row_bytes)
        base, self.nbytes = self.nbytes, self.nbytes + (length if rows else 0)
        units = tuple(_units(tensor, first, first + rows, read_bytes, base - start))
        return Resident(first=first, rows=rows, arena_offset=base + offset - start, units=units)


def make_layout(
    order: Sequence[Sequence[Tensor]],
    pinned_rows: Mapping[str, int],
    unit_bytes: int,
    read_bytes: int = 4 << 20,
    decode_pinned_rows: Mapping[str, int] | None = None,
    owned: Callable[[Tensor], RowRange] = whole,
) -> Layout:
    """Lay out a pass over groups of tensors in this order.

    Args:
        order: groups of tensors that share their activations, in execution order.
        pinned_rows: rows to pin, by tensor name, from the first owned row on.
        unit_bytes: max bytes of a streamed unit, rows permitting.
        read_bytes: max bytes of one read of pinned rows.
        decode_pinned_rows: rows behind the pinned ones that are pinned while decode reuses prefill memory.
        owned: the rows of each tensor that are read and multiplied here.
    """
    groups: list[WeightGroup] = []
    fixed, decode_pinned = _Arena(), _Arena()
    decode_pinned_rows = decode_pinned_rows or {}
    for group in order:
        decode_residents, rest = [], []
        ranges = [owned(tensor) for tensor in group]
        pinned = tuple(
            fixed.place(tensor, own.first, min(own.rows, pinned_rows[tensor.name]), read_bytes)
            for tensor, own in zip(group, ranges, strict=True)
        )
        for index, (tensor, own) in enumerate(zip(group, ranges, strict=True)):
            first, last = own.first + pinned[index].rows, own.first + own.rows
            count = min(last - first, decode_pinned_rows.get(tensor.name, 0))
            decode_residents.append(decode_pinned.place(tensor, first, count, unit_bytes))
            rest += [(index, unit) for unit in _units(tensor, first + count, last, unit_bytes, None)]
        decode_units = [(index, unit) for index, rows in enumerate(decode_residents) for unit in rows.units]
        groups.append(
            WeightGroup(
                tensors=tuple(group),
                pinned=pinned,
                decode_pinned=tuple(decode_residents),
                streamed=tuple(rest),
                streamed_in_prefill=tuple(sorted(decode_units + rest, key=lambda one: one[0])),
            )
        )
    slot = max((unit.length for group in groups for _, unit in group.streamed_in_prefill), default=PAGE_BYTES)
    return Layout(
        groups=tuple(groups), pinned_bytes=fixed.nbytes, decode_pinned_bytes=decode_pinned.nbytes, slot_bytes=slot
    )


def rows_that_fit(tensor: Tensor, nbytes: int) -> int:
    """The most rows that fit, rounded down to whole tiles unless that loses over an eighth."""
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
            row_offset=offset - start,
            arena_offset=None if base is None else base + start,
        )
