"""Attention over several sequences, each with its own KV cache, behind transformers' attention interface.

A step packs the new rows of all sequences one after another into a batch of one. In each layer, a sequence
appends its rows' keys and values to its cache, and attends to that cache alone. So prefill, decode, verification
and batches differ only in their number of rows, and a rollback only sets a length.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from headrace.engine import mla
from headrace.engine.mla import MAX_SCORES, KvBSplit
from headrace.errors import CheckpointError
from headrace.kernels.thresholds import DECODE_MAX_ROWS
from headrace.process import return_pages

if TYPE_CHECKING:
    from headrace.kernels.backend import Backend

KV_DTYPE = torch.float16


class CacheOverflow(Exception):
    """A key or value exceeds the range of its cache's type. No cache has grown."""

    def __init__(self, cache: "KVCache"):
        super().__init__("a key or value does not fit into the KV cache")
        self.cache = cache


class NotFinite(Exception):
    """Sequences whose results are NaN or infinity, by their caches, and the error to report. No cache has grown."""

    def __init__(self, caches: Sequence[Any], error: CheckpointError):
        super().__init__(str(error))
        self.caches = caches
        self.error = error


class KVCache:
    """Keys and values of one sequence for all layers, allocated once.

    16 bits take 2 * layers * kv_heads * head_dim * 2 bytes a token. 8 bits take half of that and a two-byte scale for each
    head and position. Their values are integers from -127 to 127 times the scale. 32 bits round nothing, for comparisons.

    FP16 holds values up to 65,504. A sequence with a larger key or value is computed again in the wide type. That is
    BF16, or 8 bits with scales in fp32.
    """

    accepts_multiple_rows = True  # True if any number of rows may follow the cached ones

    def __init__(self, layers: int, capacity: int, bits: int = 16):
        """`capacity` is in tokens. Memory is taken from the system as it is written."""
        assert bits in _KINDS
        self.capacity = capacity
        self.length = 0
        self._bits = bits
        self._layers = layers
        self._clear(_KINDS[bits][0])

    def _clear(self, kind: "type[_Rows]") -> None:
        self.length = 0
        self._kind = kind
        self._held: list[tuple[_Rows, _Rows] | None] = [None] * self._layers  # keys and values
        self._pools: dict[tuple[int, ...], _Pool] = {}
        self._overflowed = False  # True if the pass in progress wrote a value out of range
        self._prefix_source: KVCache | None = None
        self._layers_to_copy: set[int] = set()  # layers whose shared positions have not been copied from the source yet
        self._before = 0  # length before `copy_prefix`

    @property
    def type(self) -> str:
        """Storage type of keys and values, by ggml's names."""
        return self._kind.type

    @property
    def is_wide(self) -> bool:
        """True if the sequence did not fit into the usual type."""
        return self._kind is not _KINDS[self._bits][0]

    def widen(self) -> None:
        """Clear the cache and switch to the wide type."""
        self._clear(_KINDS[self._bits][1])

    def restore(self) -> None:
        """Clear the cache and switch back to the usual type."""
        self._clear(_KINDS[self._bits][0])

    def has_overflowed(self, start: int, rows: int) -> bool:
        """True if this pass wrote a key or value out of range at or after `start`."""
        if not self._overflowed and rows <= DECODE_MAX_ROWS:
            self._overflowed = any(pool.overflows(start, start + rows) for pool in self._pools.values())
        return self._overflowed

    def put(self, layer: int, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write the rows from position `start` on: keys and values of shape (kv_heads, rows, head_dim)."""
        held = self._held[layer]
        if held is None:
            held = self._held[layer] = (self._rows(keys), self._rows(values))
        assert start + keys.shape[1] <= self.capacity, "the engine checks the context before a pass"
        if layer in self._layers_to_copy:
            assert self._prefix_source is not None
            source = self._prefix_source._held[layer]
            assert source is not None
            for mine, theirs in zip(held, source, strict=True):
                mine.copy(theirs, self.length)
            self._layers_to_copy.discard(layer)
        for rows, new in zip(held, (keys, values), strict=True):
            rows.put(start, new)
            # Decode rows are checked once for all layers, after the pass.
            if not self._kind.pooled or new.shape[1] > DECODE_MAX_ROWS:
                least, most = torch.aminmax(new)
                self._overflowed |= not bool(torch.maximum(most, -least) <= self._kind.largest)  # NaN is not

    def _rows(self, like: torch.Tensor) -> "_Rows":
        shape = (like.shape[0], self.capacity, like.shape[2])
        if not self._kind.pooled:
            return self._kind(torch.empty(shape, dtype=self._kind.dtype))
        pool = self._pools.get(shape)
        if pool is None:
            pool = self._pools[shape] = _Pool(2 * self._layers, shape, self._kind)
        return self._kind(pool.next())

    def copy_prefix(self, source: "KVCache", count: int) -> None:
        """Start with the first `count` positions of another cache of the same model.

        Each layer is copied when the first rows after the prefix are put. By then the source must have put its own rows,
        which may be in the same pass. So prompts with a common prefix are computed together, and the prefix once.
        """
        assert count <= min(source.capacity, self.capacity)
        self._prefix_source, self._layers_to_copy = source, set(range(len(self._held)))
        self._before, self.length = self.length, count

    def commit(self) -> None:
        """Confirm a successful pass with rows of this cache."""
        assert not self._layers_to_copy, "a pass puts rows in every layer"
        self._prefix_source = None

    def rollback(self) -> None:
        """Undo a failed pass with rows of this cache, a prefix to be copied included."""
        self._overflowed = False
        if self._prefix_source is not None:
            self._prefix_source, self._layers_to_copy, self.length = None, set(), self._before

    def get(self, layer: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of positions [0, last), as stored (8 bits: in fp16): each (kv_heads, last, head_dim)."""
        held = self._held[layer]
        assert held is not None
        return held[0].get(last), held[1].get(last)

    def halves(self, layer: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Storage of keys and values in fp16, each (kv_heads, capacity, head_dim); None: other type, or prefix not yet copied."""
        held = self._held[layer]
        fits = held is not None and self._kind is _Rows and layer not in self._layers_to_copy
        return (held[0].data, held[1].data) if held is not None and fits else None

    def floats(
        self, layer: int, first: int, last: int, buffers: "FloatBuffers", filled: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values in fp32, each (kv_heads, last, head_dim); positions before `first` are not filled.

        `filled`: number of positions of this layer that the buffers hold already, from the last call.
        """
        held = self._held[layer]
        assert held is not None
        keys, values = buffers.take(
            (held[0].heads, self.capacity, held[0].width), (held[1].heads, self.capacity, held[1].width)
        )
        keys, values = keys.narrow(1, 0, last), values.narrow(1, 0, last)
        first = max(first, filled)
        held[0].fill(first, last, keys.narrow(1, first, last - first) if first else keys)
        held[1].fill(first, last, values.narrow(1, first, last - first) if first else values)
        return keys, values

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on."""
        assert 0 <= length <= self.length
        self.length = length

    def return_memory(self) -> None:
        """Return the memory of all positions from `length` on to the system."""
        for held in self._held:
            for rows in held or ():
                rows.return_memory(self.length)


class _Rows:
    """Keys or values of one layer: (heads, capacity, width) in fp16."""

    type = "F16"
    dtype = KV_DTYPE
    largest = 65504.0
    pooled = True  # True if all layers share one block of memory
    infinite = 0x7C00  # bits of infinity, the first value out of range

    def __init__(self, data: torch.Tensor):
        self._data = data

    @property
    def data(self) -> torch.Tensor:
        return self._data

    @property
    def heads(self) -> int:
        return self._data.shape[0]

    @property
    def width(self) -> int:
        return self._data.shape[2]

    def put(self, first: int, rows: torch.Tensor) -> None:
        self._data.narrow(1, first, rows.shape[1]).copy_(rows)

    def get(self, last: int) -> torch.Tensor:
        return self._data[:, :last]

    def fill(self, first: int, last: int, out: torch.Tensor) -> None:
        out.copy_(self._data.narrow(1, first, last - first))

    def copy(self, other: "_Rows", count: int) -> None:
        self._data[:, :count] = other._data[:, :count]

    def return_memory(self, first: int) -> None:
        """Return the memory of positions from `first` on."""
        _return_positions(self._data, first)


class _Int8Rows(_Rows):
    """Rows in 8 bits, with a scale for each head and position."""

    type = "Q8"
    dtype = torch.int8
    largest = 127 * _Rows.largest
    pooled = False
    scale_dtype = KV_DTYPE

    def __init__(self, data: torch.Tensor):
        super().__init__(data)
        self._scales = torch.empty((*data.shape[:2], 1), dtype=self.scale_dtype)

    def put(self, first: int, rows: torch.Tensor) -> None:
        part = slice(first, first + rows.shape[1])
        scales = (rows.abs().amax(2, keepdim=True) / 127).to(self.scale_dtype)
        self._scales[:, part] = scales
        self._data[:, part] = (rows / scales.float().clamp_min(1e-7)).round().clamp(-127, 127).to(torch.int8)

    def get(self, last: int) -> torch.Tensor:
        return self._data[:, :last].to(self.scale_dtype) * self._scales[:, :last]

    def fill(self, first: int, last: int, out: torch.Tensor) -> None:
        torch.mul(self._data[:, first:last], self._scales[:, first:last].float(), out=out)

    def copy(self, other: _Rows, count: int) -> None:
        assert isinstance(other, _Int8Rows)
        super().copy(other, count)
        self._scales[:, :count] = other._scales[:, :count]

    def return_memory(self, first: int) -> None:
        super().return_memory(first)
        _return_positions(self._scales, first)


def _return_positions(data: torch.Tensor, first: int) -> None:
    """Return the memory of the positions from `first` on: data is contiguous, (heads, capacity, width)."""
    for head in data:
        return_pages(head.data_ptr() + head[:first].nbytes, head[first:].nbytes)


class _Int8RowsWithFp32Scales(_Int8Rows):
    """8-bit rows for larger values."""

    type = "Q8 with scales in F32"
    largest = float(torch.finfo(torch.float32).max)
    scale_dtype = torch.float32


class _Bf16Rows(_Rows):
    """Rows in BF16: the range of fp32, with fewer digits than fp16."""

    type = "BF16"
    dtype = torch.bfloat16
    largest = float(torch.finfo(torch.bfloat16).max)
    infinite = 0x7F80


class _Fp32Rows(_Rows):
    """Rows in fp32, which rounds nothing: for comparisons."""

    type = "F32"
    dtype = torch.float32
    largest = float(torch.finfo(torch.float32).max)
    pooled = False


# The usual and the wide type, by bits.
_KINDS: dict[int, tuple[type[_Rows], type[_Rows]]] = {
    8: (_Int8Rows, _Int8RowsWithFp32Scales),
    16: (_Rows, _Bf16Rows),
    32: (_Fp32Rows, _Fp32Rows),
}


class _Pool:
    """One block for the rows of all layers, in 16 bits, so that one scan finds an overflow."""

    def __init__(self, count: int, shape: tuple[int, ...], kind: type[_Rows]):
        self._data = torch.empty((count, *shape), dtype=kind.dtype)  # taken from the system as it is written
        self._bits = self._data.view(torch.int16)
        self._infinite = kind.infinite
        self._used = 0

    def next(self) -> torch.Tensor:
        """Memory for one more layer's keys or values."""
        self._used += 1
        return self._data[self._used - 1]

    def overflows(self, first: int, last: int) -> bool:
        """True if a value at these positions is infinite or NaN."""
        return bool((self._bits[: self._used, :, first:last] & 0x7FFF).amax() >= self._infinite)


class FloatBuffers:
    """Memory for keys and values in fp32, of one layer after another.

    fp16 matmuls take four times as long as fp32 if the processor has no fp16 units. A row over 100 positions takes 94 us
    in fp16 and 19 in fp32. Over 600 positions it takes 492 and 98. The conversion to fp32 takes 7 and 30 us.
    """

    def __init__(self) -> None:
        self._data = torch.empty(0)
        self._parts: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    def take(self, first: tuple[int, int, int], second: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Two tensors of these shapes, valid until the next call."""
        parts = self._parts.get(first + second)
        if parts is None:
            sizes = [math.prod(first), math.prod(second)]
            if self._data.numel() < sum(sizes):
                self._data, self._parts = torch.empty(sum(sizes)), {}
            flat = torch.split(self._data[: sum(sizes)], sizes)
            parts = self._parts[first + second] = flat[0].view(first), flat[1].view(second)
        return parts


class Entry(NamedTuple):
    """New rows of one sequence: cache, slice of the pass, row invariance, and position of the first row.

    A sequence may have several entries, one after another.
    """

    cache: KVCache
    part: slice
    row_invariant: bool
    start: int

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self.part.stop - self.part.start)


class PackedAttention:
    """Attention over the KV caches of one engine. `begin` sets the sequences of the next forward."""

    def __init__(self, kernels: "Backend") -> None:
        """`kernels` attend for row-invariant rows, where they can."""
        self.batch: Sequence[Entry] = ()
        self.buffers = FloatBuffers()
        self._kernels = kernels
        self._masks: dict[tuple[int, int, int], torch.Tensor] = {}
        self._filled = 0  # positions of this layer that the buffers hold already

    def begin(self, batch: Sequence[Entry]) -> None:
        """Set the sequences of the next forward; one that copies a prefix comes after its source."""
        self.batch = batch
        self._masks = {}

    def cache_of_one_row(self, layer: int) -> KVCache | None:
        """The cache, if the next forward is one row-invariant row and the layer's keys and values are in fp16."""
        if len(self.batch) != 1 or self.batch[0].rows != 1 or not self.batch[0].row_invariant:
            return None
        cache = self.batch[0].cache
        return None if cache.halves(layer) is None else cache

    def attend(
        self,
        out: torch.Tensor,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> None:
        """Compute attention for the sequences of this pass into `out`: (1, rows, heads, head_dim)."""
        query, key, value = query[0], key[0], value[0]
        before: KVCache | None = None
        for cache, part, row_invariant, start in self.batch:
            own = [one if len(self.batch) == 1 else one[:, part] for one in (query, key, value)]
            cache.put(layer, start, own[1], own[2])
            attend = self._row_by_row if row_invariant else self._all_rows
            self._filled = start if cache is before and not window else 0  # positions of the chunk before
            attend(own[0], cache, start, layer, out[0, part], scaling, window, softcap, sinks)
            before = cache
        self._filled = 0

    def attend_mla(
        self,
        layer: int,
        kv_b: KvBSplit,
        query: torch.Tensor,
        rotated: torch.Tensor,
        vectors: torch.Tensor,
        scaling: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """Query (heads, rows, width) over cached latents: (1, rows, heads, value width)."""
        out = query.new_empty((1, query.shape[1], query.shape[0], kv_b.values.shape[1]))
        for cache, part, row_invariant, start in self.batch:
            cache.put(layer, start, rotated[0, :, part], vectors[0, :, part])
            rows = part.stop - part.start
            first = max(0, start + 1 - window) if window else 0
            rope_keys, latents = (held[0] for held in cache.floats(layer, first, start + rows, self.buffers))
            if not row_invariant:
                mask = self._mask(start, rows, window or 0)[:, first:]
                mla.attend(query[:, part], latents[first:], rope_keys[first:], kv_b, mask, scaling, out[0, part])
                continue
            for row in range(rows):  # each alone, so that its result does not depend on the rows beside it
                at = part.start + row
                visible = slice(max(0, start + row + 1 - window) if window else 0, start + row + 1)
                mla.attend(
                    query[:, at : at + 1],
                    latents[visible],
                    rope_keys[visible],
                    kv_b,
                    None,
                    scaling,
                    out[0, at : at + 1],
                )
        return out

    def _row_by_row(
        self,
        query: torch.Tensor,
        cache: KVCache,
        start: int,
        layer: int,
        out: torch.Tensor,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> None:
        """Attend row by row, so that no result depends on the rows beside it. Query heads of one KV head are the matrix rows."""
        heads, rows, width = query.shape
        first = max(0, start + 1 - window) if window else 0
        all_keys, all_values = cache.floats(layer, first, start + rows, self.buffers, self._filled)
        for row in range(rows):
            last = start + row + 1
            visible = max(0, last - window) if window else 0
            keys, values = (one.narrow(1, visible, last - visible) for one in (all_keys, all_values))
            own, place = query.select(1, row), out.select(0, row)
            if self._kernels.attends and softcap is None and sinks is None:
                own = own if own.stride(1) == 1 else own.contiguous()
                self._kernels.attend(own, keys, values, width**-0.5 if scaling is None else scaling, place)
                continue
            found = _attend(own.reshape(keys.shape[0], -1, width), keys, values, None, scaling, softcap, sinks)
            place.copy_(found.view(heads, -1))

    def _all_rows(
        self,
        query: torch.Tensor,
        cache: KVCache,
        start: int,
        layer: int,
        out: torch.Tensor,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> None:
        rows = query.shape[1]
        first = max(0, start + 1 - window) if window else 0
        keys, values = (
            wide[:, first:] for wide in cache.floats(layer, first, start + rows, self.buffers, self._filled)
        )
        mask = self._mask(start, rows, window or 0)[:, first:]
        result = _attend(query, keys, values, mask, scaling, softcap, sinks)
        out.copy_(result.transpose(0, 1))

    def _mask(self, start: int, rows: int, window: int) -> torch.Tensor:
        """True where row i, at position start + i, may attend: not to later positions, nor beyond the window."""
        mask = self._masks.get((start, rows, window))
        if mask is None:
            own = torch.arange(start, start + rows)[:, None]
            other = torch.arange(start + rows)[None, :]
            mask = other <= own
            if window:
                mask &= other > own - window
            self._masks[start, rows, window] = mask
        return mask


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Query (heads, rows, width) over keys and values (kv_heads, positions, width): (heads, rows, value width)."""
    heads, rows, width = query.shape
    groups = heads // len(keys)
    if softcap is None and sinks is None:
        if groups == 1 and mask is None:
            return scaled_dot_product_attention(query[None], keys[None], values[None], scale=scaling)[0]
        keys, values = (one.unsqueeze(1).expand(-1, groups, -1, -1) for one in (keys, values))
        own = query.reshape(len(keys), groups, rows, width)
        return scaled_dot_product_attention(own, keys, values, attn_mask=mask, scale=scaling).view(heads, rows, -1)
    out = query.new_empty((heads, rows, values.shape[2]))
    together = max(1, MAX_SCORES // (4 * groups * rows * keys.shape[1]))
    for first in range(0, len(keys), together):
        part = slice(first, min(len(keys), first + together))
        mine = slice(groups * part.start, groups * part.stop)
        given = None if sinks is None else sinks.view(len(keys), -1)[part].flatten()
        out[mine] = _by_scores(query[mine], keys[part], values[part], mask, scaling, softcap, given)
    return out


def _by_scores(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention with soft-capping or sinks, for which torch has no function."""
    heads, rows, width = query.shape
    groups = heads // len(keys)
    scores = query.reshape(len(keys), groups * rows, width) @ keys.transpose(1, 2)
    scores = scores.view(heads, rows, -1).mul_(scaling or width**-0.5)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    if sinks is not None:
        # One sink for each head, the same for all its rows.
        column = sinks.float().view(heads, -1, 1).expand(heads, rows, 1)
        scores = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    else:
        scores = scores.softmax(-1)
    return (scores.reshape(len(keys), groups * rows, -1) @ values).view(heads, rows, -1)


class ConcatenatedCache:
    """The caches of all sequences as one, told apart by a mask, for models that compute attention themselves.

    It implements the part of transformers' cache protocol that their forward uses.
    """

    is_compileable = False

    def __init__(self, batch: Sequence[Entry]):
        """Each cache has one entry; one that copies a prefix comes after its source."""
        self._batch = batch
        self._by_row = sorted(batch, key=lambda entry: entry.part.start)

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the new rows, return all of every sequence: (1, kv_heads, all positions, head_dim)."""
        for cache, part, _row_invariant, start in self._batch:
            cache.put(layer_idx, start, key[0, :, part], value[0, :, part])
        held = [entry.cache.get(layer_idx, entry.start + entry.rows) for entry in self._by_row]
        keys = torch.cat([keys for keys, _ in held], 1)
        values = torch.cat([values for _, values in held], 1)
        return keys[None].to(key.dtype), values[None].to(value.dtype)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions before the new rows; the position ids say the rest."""
        return sum(entry.start for entry in self._batch)

    def mask(self) -> torch.Tensor:
        """(1, 1, new rows, all positions), zero where a row may attend: its own sequence, no later positions."""
        blocks = []
        for entry in self._by_row:
            length = entry.start
            own = torch.arange(length, length + entry.rows)[:, None]
            blocks.append(torch.arange(length + entry.rows)[None, :] <= own)
        allowed = torch.block_diag(*blocks).bool()  # type: ignore[no-untyped-call]
        return torch.zeros(allowed.shape).masked_fill_(~allowed, torch.finfo(torch.float32).min)[None, None]
