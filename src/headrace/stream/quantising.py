"""A file that is not there: reads of a low-bit copy are reads of the original, quantised on the way by the reader."""

import ctypes
import threading
from bisect import bisect_right

from headrace.checkpoint import Checkpoint
from headrace.kernels.convert import convert
from headrace.stream.files import WeightFile
from headrace.stream.memory import Arena, aligned


class QuantisingFile:
    """Answers reads of the copy's tensors. For several readers at once; each has buffers of its own."""

    def __init__(self, original: Checkpoint, copy: Checkpoint, path: str):
        """`path` is the one that the copy's tensors name."""
        made = sorted((t for t in copy.tensors.values() if t.path == path), key=lambda t: t.offset)
        self._tensors = [(tensor, original.tensors[tensor.name]) for tensor in made]
        self._starts = [tensor.offset for tensor in made]
        self._files = {name: WeightFile(name) for name in original.paths}
        self._local = threading.local()

    def read(self, offset: int, target: memoryview, needed: int) -> int:
        """Fill the first `needed` bytes of `target`. See `WeightFile.read`."""
        made, source = self._tensors[bisect_right(self._starts, offset) - 1]
        first = (offset - made.offset) // made.row_bytes
        last = min(made.rows, -(-(offset + needed - made.offset) // made.row_bytes))
        start, length = aligned(source.offset + first * source.row_bytes, (last - first) * source.row_bytes)
        raw = self._buffer("raw", length)
        delta = source.offset + first * source.row_bytes - start
        self._files[source.path].read(start, raw.view[:length], delta + (last - first) * source.row_bytes)
        rows = self._buffer("rows", (last - first) * made.row_bytes)
        convert(source.type, raw.address + delta, made.type, rows.address, last - first, made.columns)
        skipped = offset - made.offset - first * made.row_bytes
        count = min(needed, (last - first) * made.row_bytes - skipped)
        ctypes.memmove(ctypes.addressof(ctypes.c_char.from_buffer(target)), rows.address + skipped, count)
        return len(target)

    def close(self) -> None:
        """Close the original's files."""
        for file in self._files.values():
            file.close()
        self._files = {}

    def _buffer(self, name: str, nbytes: int) -> Arena:
        held: Arena | None = getattr(self._local, name, None)
        if held is None or held.nbytes < nbytes:
            held = Arena(nbytes)
            setattr(self._local, name, held)
        return held
