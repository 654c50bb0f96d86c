"""Virtual files: their tensors are decoded from stored ones while they are read, in the reader thread.

Quantised layouts without a kernel, matrices stored transposed ([in, out]) and low-bit draft copies are virtual. Their path
exists only by name. Nothing is written, and never more than the requested rows is decoded.
"""

import threading
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from headrace.checkpoint import Tensor
from headrace.checkpoint.encodings import Encoding
from headrace.stream.arena import PAGE_BYTES, Arena, aligned
from headrace.stream.files import File


class VirtualFile(File):
    """A file of virtual tensors, decoded when they are read. For several readers at once; each has its own buffers."""

    def __init__(self, virtual: Sequence[tuple[Tensor, Encoding]], file_of: Callable[[str], File]):
        """`virtual`: the tensors of this path; `file_of` gives the open file of a path that their sources name."""
        ordered = sorted(virtual, key=lambda one: one[0].offset)
        self._virtual = ordered
        self._starts = [tensor.offset for tensor, _ in ordered]
        self._file_of = file_of
        self._local = threading.local()

    def read(self, offset: int, target: memoryview, needed: int) -> int:
        """Fill the first `needed` bytes of `target`; returns the bytes read for it. See `WeightFile.read`."""
        tensor, encoding = self._virtual[bisect_right(self._starts, offset) - 1]
        begin = offset - tensor.offset
        step = encoding.row_multiple
        first = begin // tensor.row_bytes // step * step
        last = min(tensor.rows, -(-(begin + needed) // (tensor.row_bytes * step)) * step)
        rows = self._buffer("rows", (last - first) * tensor.row_bytes)
        read = self._decode(encoding, first, last, rows)
        skipped = begin - first * tensor.row_bytes
        count = min(needed, len(rows) - skipped)
        np.frombuffer(target, np.uint8)[:count] = rows[skipped : skipped + count]
        return read

    def _decode(
        self, encoding: Encoding, first: int, last: int, out: "np.ndarray[tuple[int], np.dtype[np.uint8]]"
    ) -> int:
        raw, read = [], 0
        for number, (source, begin, count) in enumerate(encoding.reads(first, last)):
            start, length = aligned(source.offset + begin, count)
            buffer = self._buffer(f"raw{number}", length)
            delta = source.offset + begin - start
            read += self._file_of(source.path).read(start, buffer.data, delta + count)
            raw.append(buffer[delta : delta + count])
        encoding.decode(raw, first, last, out)
        return read

    def close(self) -> None:
        """Leave the sources' files open: they belong to whoever opened them."""

    def _buffer(self, name: str, nbytes: int) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
        """Aligned memory of this thread under a name, reserved once and enlarged when needed."""
        held: Arena | None = getattr(self._local, name, None)
        if held is None or held.nbytes < nbytes:
            held = Arena(-(-nbytes // PAGE_BYTES) * PAGE_BYTES)
            setattr(self._local, name, held)
        return np.frombuffer(held.view, np.uint8)[:nbytes]


class FileSet:
    """The open files of a checkpoint by path: the stored ones, and virtual ones over them."""

    def __init__(
        self,
        paths: Sequence[str],
        virtual: Mapping[str, Sequence[tuple[Tensor, Encoding]]],
        open_file: Callable[[str], File],
    ):
        """`virtual`: the virtual tensors, by path."""
        self._files: dict[str, File] = {}
        try:
            for path in paths:
                self._files[path] = open_file(path)
        except BaseException:
            self.close()
            raise
        for path, tensors in virtual.items():
            self.add(path, tensors)

    def add(self, path: str, virtual: Sequence[tuple[Tensor, Encoding]]) -> None:
        """Add a path of virtual tensors."""
        self._files[path] = VirtualFile(virtual, self._files.__getitem__)

    @property
    def remarks(self) -> tuple[str, ...]:
        """Remarks on unusual reads of these files, each once."""
        return tuple(dict.fromkeys(remark for file in self._files.values() if (remark := getattr(file, "remark", ""))))

    def __getitem__(self, path: str) -> File:
        return self._files[path]

    def close(self) -> None:
        """Close all of them. Safe to call twice."""
        for file in self._files.values():
            file.close()
        self._files = {}
