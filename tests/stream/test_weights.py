"""The stream by itself: right bytes in the right order at any size, and every way a disk can fail."""

import ctypes
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.checkpoint import Tensor
from headrace.errors import ReadError
from headrace.kernels import WeightSlice
from headrace.stream import Layout, WeightFile, WeightStream
from headrace.stream.arena import PAGE_BYTES
from headrace.stream.layout import make_layout
from headrace.stream.weights import File

Bytes = dict[str, bytes]


def make_file(path: Path, shapes: list[tuple[int, int]]) -> tuple[list[Tensor], Bytes]:
    """Tensors of random F32 rows at odd offsets, and their contents."""
    random = np.random.default_rng(0)
    tensors, contents, offset = [], {}, 96
    with path.open("wb") as file:
        for i, (rows, columns) in enumerate(shapes):
            data = random.integers(0, 256, rows * columns * 4, np.uint8).tobytes()
            file.seek(offset)
            file.write(data)
            name = f"t{i}"
            tensors.append(
                Tensor(name=name, shape=(rows, columns), type="F32", path=str(path), offset=offset, nbytes=len(data))
            )
            contents[name] = data
            offset += len(data) + 32
        file.seek(offset)
        file.write(bytes(PAGE_BYTES))  # reads of whole pages come whole
    return tensors, contents


def read_pass(stream: WeightStream) -> Bytes:
    """One pass: the rows of every tensor as they were delivered."""
    got: Bytes = {}
    for index, group in enumerate(stream.layout.groups):
        rows: dict[str, dict[int, bytes]] = {tensor.name: {} for tensor in group.tensors}
        for batch in stream.weights_of(index):
            for i, weight_slice in batch:
                tensor = group.tensors[i]
                rows[tensor.name][weight_slice.first] = ctypes.string_at(
                    weight_slice.address, weight_slice.rows * tensor.row_bytes
                )
        got |= {name: b"".join(parts[first] for first in sorted(parts)) for name, parts in rows.items()}
    return got


def layout_of(tensors: list[Tensor], share: float, unit_bytes: int, decode_share: float = 0.0) -> Layout:
    groups = [tensors[:2], *[[tensor] for tensor in tensors[2:]]]
    pinned = {t.name: int(share * t.rows) for t in tensors}
    decode_pinned = {t.name: int(decode_share * (t.rows - pinned[t.name])) for t in tensors}
    return make_layout(groups, pinned, unit_bytes, read_bytes=20_000, decode_pinned_rows=decode_pinned)


def stream_of(layout: Layout, **options: Any) -> WeightStream:
    return WeightStream(layout, **{"file_of": WeightFile, **options})


SHAPES = [(7, 33), (64, 256), (1, 5000), (300, 40), (5, 1024)]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    share=st.floats(0, 1),
    unit_bytes=st.integers(1, 60_000),
    slots=st.integers(1, 20),
    readers=st.integers(0, 4),
    maps=st.booleans(),
)
def test_every_pass_delivers_every_byte(
    tmp_path: Path, share: float, unit_bytes: int, slots: int, readers: int, maps: bool
) -> None:
    tensors, contents = make_file(tmp_path / "w", SHAPES)
    layout = layout_of(tensors, share, unit_bytes)
    with stream_of(layout, slots=slots, readers=readers, may_map=lambda _: maps) as stream:
        for _ in range(3):
            assert read_pass(stream) == contents


def test_mapped_rows_are_pages_of_the_file(tmp_path: Path) -> None:
    """One tensor is mapped here, the others are copies."""
    tensors, contents = make_file(tmp_path / "w", SHAPES)
    with stream_of(layout_of(tensors, 1.0, 9000), slots=1, readers=2, may_map=lambda t: t.name == "t1") as stream:
        assert read_pass(stream) == contents
        maps = Path("/proc/self/maps").read_text().splitlines()
        assert any(str(tmp_path / "w") in line for line in maps)
        with (tmp_path / "w").open("r+b") as file:
            for tensor in tensors:
                file.seek(tensor.offset)
                file.write(b"new!")
        changed = {name: b"new!" + contents[name][4:] if name == "t1" else contents[name] for name in contents}
        assert read_pass(stream) == changed


def test_a_file_that_was_cut_before_it_is_mapped_is_an_error(tmp_path: Path) -> None:
    tensors, _ = make_file(tmp_path / "w", SHAPES)
    os.truncate(tmp_path / "w", tensors[3].offset + 100)
    with (
        stream_of(layout_of(tensors, 1.0, 9000), slots=1, readers=2, may_map=lambda _: True) as stream,
        pytest.raises(ReadError, match="ended at") as caught,
    ):
        read_pass(stream)
    assert "cut or replaced" in str(caught.value.hint)


def test_a_last_page_that_is_not_whole_is_mapped(tmp_path: Path) -> None:
    tensors, contents = make_file(tmp_path / "w", SHAPES)
    os.truncate(tmp_path / "w", tensors[-1].offset + tensors[-1].nbytes)
    with stream_of(layout_of(tensors, 1.0, 9000), slots=1, readers=2, may_map=lambda _: True) as stream:
        assert read_pass(stream) == contents


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    share=st.floats(0, 1),
    decode_share=st.floats(0, 1),
    unit_bytes=st.integers(1, 60_000),
    slots=st.integers(1, 20),
    readers=st.integers(0, 4),
    reuses=st.lists(st.booleans(), min_size=2, max_size=6),
)
def test_every_pass_delivers_every_byte_with_prefill_memory_reused_or_not(
    tmp_path: Path, share: float, decode_share: float, unit_bytes: int, slots: int, readers: int, reuses: list[bool]
) -> None:
    tensors, contents = make_file(tmp_path / "w", SHAPES)
    with stream_of(layout_of(tensors, share, unit_bytes, decode_share), slots=slots, readers=readers) as stream:
        for reuse in reuses:
            stream.reuse_prefill_memory(reuse)
            assert read_pass(stream) == contents


def test_decode_pinned_rows_are_read_once_while_they_have_their_memory(tmp_path: Path) -> None:
    tensors, _ = make_file(tmp_path / "w", SHAPES)
    layout = layout_of(tensors, 0.3, 9000, decode_share=0.5)
    rest = sum(unit.length for group in layout.groups for _, unit in group.streamed)
    decode_pinned = sum(unit.length for group in layout.groups for rows in group.decode_pinned for unit in rows.units)
    assert decode_pinned
    everything = rest + decode_pinned
    assert layout.streamed_bytes == everything
    read = []
    with stream_of(layout, slots=4, readers=0) as stream:
        for reuse in (False, False, True, True, False, True):
            before = stream.counters.read_bytes
            stream.reuse_prefill_memory(reuse)
            read_pass(stream)
            read.append(stream.counters.read_bytes - before)
    assert read[1:] == [everything, everything, rest, everything, everything]


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_serial_and_pipelined_streams_read_the_same_bytes(tmp_path: Path, share: float) -> None:
    tensors, contents = make_file(tmp_path / "w", SHAPES)
    layout = layout_of(tensors, share, 9000)
    read = {}
    for readers in (0, 3):
        with stream_of(layout, slots=4, readers=readers) as stream:
            for _ in range(3):
                assert read_pass(stream) == contents
            stream._readers.stop()  # the pipelined one has prefetched the ring; count consumed bytes
            read[readers] = layout.pinned_bytes + stream._released * layout.streamed_bytes // max(
                1, layout.streamed_units
            )
            if readers == 0:
                pinned = sum(unit.length for group in layout.groups for rows in group.pinned for unit in rows.units)
                assert stream.counters.read_bytes == pinned + 3 * layout.streamed_bytes
            else:
                ahead = stream.counters.read_bytes - pinned - 3 * layout.streamed_bytes
                assert 0 <= ahead <= 4 * layout.slot_bytes
    assert read[0] == read[3]


def test_a_pass_in_which_everything_is_pinned_reads_nothing(tmp_path: Path) -> None:
    tensors, contents = make_file(tmp_path / "w", SHAPES)
    with stream_of(layout_of(tensors, 1.0, 9000), slots=1, readers=2) as stream:
        assert read_pass(stream) == contents
        before = stream.counters.read_bytes
        assert read_pass(stream) == contents
        assert stream.counters.read_bytes == before


def test_rewinding_starts_the_pass_again(tmp_path: Path) -> None:
    tensors, contents = make_file(tmp_path / "w", SHAPES)
    with stream_of(layout_of(tensors, 0.3, 9000), slots=3, readers=2) as stream:
        for stop_at in (0, 1, 3):
            for index in range(stop_at):
                for _ in stream.weights_of(index):
                    pass
            stream.rewind()
            assert read_pass(stream) == contents


def test_reads_go_on_over_the_end_of_a_pass(tmp_path: Path) -> None:
    tensors, _ = make_file(tmp_path / "w", SHAPES)
    layout = layout_of(tensors, 0.0, 9000)
    with stream_of(layout, slots=3, readers=2) as stream:
        read_pass(stream)
        deadline = time.monotonic() + 10
        while stream.counters.reads < layout.streamed_units + 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stream.counters.reads == layout.streamed_units + 3


class Faulty:
    """A file whose reads fail from the n-th on."""

    def __init__(self, path: str, fault: Callable[[], None], after: int):
        self._file, self._fault, self._left = WeightFile(path), fault, after

    def read(self, offset: int, target: memoryview, needed: int) -> int:
        self._left -= 1
        if self._left < 0:
            self._fault()
        return self._file.read(offset, target, needed)

    def close(self) -> None:
        self._file.close()


def faulty(fault: Callable[[], None], after: int = 5) -> Callable[[str], File]:
    return lambda path: Faulty(path, fault, after)


def io_error() -> None:
    raise ReadError("reading w at 8192 failed: Input/output error", hint="check the disk")


@pytest.mark.parametrize("readers", [0, 1, 3])
def test_a_read_error_reaches_the_consumer_and_leaves_no_thread(tmp_path: Path, readers: int) -> None:
    tensors, contents = make_file(tmp_path / "w", SHAPES)
    threads = threading.active_count()
    with (
        stream_of(layout_of(tensors, 0.3, 9000), slots=3, readers=readers, file_of=faulty(io_error)) as stream,
        pytest.raises(ReadError, match="8192"),
    ):
        for _ in range(3):
            assert read_pass(stream) == contents
    assert threading.active_count() == threads


def test_a_silent_disk_is_an_error_and_not_a_hang(tmp_path: Path) -> None:
    tensors, _ = make_file(tmp_path / "w", SHAPES)
    silence = threading.Event()
    with stream_of(
        layout_of(tensors, 0.3, 9000),
        slots=3,
        readers=2,
        file_of=faulty(lambda: void(silence.wait(20))),
        stall_limit_s=0.3,
    ) as stream:
        with pytest.raises(ReadError, match="delivered nothing"):
            for _ in range(3):
                read_pass(stream)
        silence.set()


def test_a_read_that_never_came_back_cannot_write_into_later_passes(tmp_path: Path) -> None:
    """It may still end, into memory that others have by then; so the stream stays unusable."""
    tensors, _ = make_file(tmp_path / "w", SHAPES)
    silence = threading.Event()
    ended: list[bool] = []  # reads that came back
    options = {"file_of": faulty(lambda: ended.append(silence.wait(20))), "stall_limit_s": 0.2}
    stream = stream_of(layout_of(tensors, 0.3, 9000), slots=3, readers=2, **options)  # type: ignore[arg-type]
    with pytest.raises(ReadError, match="delivered nothing"):
        for _ in range(3):
            read_pass(stream)
    stream.rewind()
    assert not ended  # it did not wait for the read
    for _ in range(2):
        with pytest.raises(ReadError, match="not come back"):
            read_pass(stream)
    silence.set()
    stream.close()
    with pytest.raises(ReadError, match="not come back"):
        read_pass(stream)


@pytest.mark.parametrize("readers", [0, 2])
def test_a_closed_stream_raises_a_read_error(tmp_path: Path, readers: int) -> None:
    tensors, contents = make_file(tmp_path / "w", SHAPES)
    stream = stream_of(layout_of(tensors, 0.3, 9000), slots=3, readers=readers)
    assert read_pass(stream) == contents
    stream.close()
    with pytest.raises(ReadError, match="closed"):
        read_pass(stream)


@pytest.mark.parametrize("readers", [0, 2])
def test_a_stream_closed_in_a_pass_raises_a_read_error(tmp_path: Path, readers: int) -> None:
    tensors, _ = make_file(tmp_path / "w", SHAPES)
    stream = stream_of(layout_of(tensors, 0.0, 9000), slots=1, readers=readers)
    batches = stream.weights_of(0)
    next(batches)
    stream.close()
    with pytest.raises(ReadError, match="closed"):
        list(batches)
        read_pass(stream)


def void(_: object) -> None:
    pass


def test_a_slow_disk_is_waited_for(tmp_path: Path) -> None:
    tensors, contents = make_file(tmp_path / "w", SHAPES)
    with stream_of(
        layout_of(tensors, 0.0, 9000),
        slots=3,
        readers=2,
        file_of=faulty(lambda: time.sleep(0.02), 0),
        stall_limit_s=5,
    ) as stream:
        assert read_pass(stream) == contents
        assert stream.counters.stall_s > 0


def test_a_file_that_shrinks_while_in_use_is_an_error(tmp_path: Path) -> None:
    tensors, contents = make_file(tmp_path / "w", SHAPES)
    with stream_of(layout_of(tensors, 0.0, 9000), slots=2, readers=1) as stream:
        assert read_pass(stream) == contents
        os.truncate(tmp_path / "w", tensors[1].offset + 100)
        with pytest.raises(ReadError, match="ended at"):
            for _ in range(3):
                read_pass(stream)


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, contents = make_file(tmp_path / "w", SHAPES)
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: whole(fd, [buffers[0][:4096]], offset))
    with stream_of(layout_of(tensors, 0.5, 30_000), slots=2, readers=2) as stream:
        assert read_pass(stream) == contents


def test_a_file_system_without_direct_reads_is_read_buffered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, contents = make_file(tmp_path / "w", SHAPES)
    real = os.open

    def refuse(path: str, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    file = WeightFile(str(tmp_path / "w"))
    assert not file.direct
    assert "O_DIRECT" in file.remark
    file.close()
    with stream_of(layout_of(tensors, 0.5, 9000), slots=2, readers=2) as stream:
        assert read_pass(stream) == contents


@pytest.mark.parametrize(("slots", "together"), [(3, 1), (8, 2), (16, 4), (64, 4)])
@pytest.mark.parametrize("readers", [0, 2])
def test_units_come_several_at_a_time_where_a_quarter_of_the_ring_holds_them(
    tmp_path: Path, slots: int, together: int, readers: int
) -> None:
    tensors, _ = make_file(tmp_path / "w", SHAPES)
    with stream_of(layout_of(tensors, 0.0, 4096), slots=slots, readers=readers) as stream:
        for _ in range(2):
            sizes = [len(batch) for index in range(len(stream.layout.groups)) for batch in stream.weights_of(index)]
            assert max(sizes) == together


@pytest.mark.stress
def test_many_readers_and_rewinds_never_mix_up_slots(tmp_path: Path) -> None:
    tensors, contents = make_file(tmp_path / "w", SHAPES)
    for round_ in range(60):
        with stream_of(layout_of(tensors, 0.2, 5000), slots=1 + round_ % 5, readers=1 + round_ % 6) as stream:
            for _ in range(round_ % 3):
                for _ in stream.weights_of(0):
                    pass
                stream.rewind()
            for _ in range(4):
                assert read_pass(stream) == contents


def test_repacked_slices_are_delivered_and_read_again_after_an_interrupt(tmp_path: Path) -> None:
    tensors, contents = make_file(tmp_path / "w", SHAPES)
    calls = 0

    def flip(weight_slice: WeightSlice, tensor: Tensor) -> WeightSlice:
        nonlocal calls
        calls += 1
        nbytes = weight_slice.rows * tensor.columns * 4
        flipped = bytes(255 - byte for byte in ctypes.string_at(weight_slice.address, nbytes))
        ctypes.memmove(weight_slice.address, flipped[: nbytes // 2], nbytes // 2)
        if calls == 3:
            raise KeyboardInterrupt  # in the middle of a slice
        ctypes.memmove(weight_slice.address, flipped, nbytes)
        return weight_slice

    with stream_of(layout_of(tensors, 1.0, 8192), slots=2, readers=2, on_pinned=flip) as stream:
        with pytest.raises(KeyboardInterrupt):
            read_pass(stream)
        stream.rewind()
        expected = {name: bytes(255 - byte for byte in data) for name, data in contents.items()}
        assert read_pass(stream) == expected
        assert read_pass(stream) == expected
        assert calls == 3 + len(SHAPES) - 2  # once each, and again the interrupted group
