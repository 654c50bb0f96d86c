"""Attention of one row over the positions of one sequence, as operations of a ggml graph: all in fp32.

K and V are given in fp32, or in fp16 as caches hold them. In fp16 the row's own K and V are written first, then all are
converted to fp32. That is exact, so both give the same bits. Torch takes some twenty calls: 100 us with warm
caches, 200 to 300 us within a pass, after matmuls have evicted them.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from headrace.kernels.ggml_graph import Graph, Workers


class Heads(NamedTuple):
    """Shape of a layer's attention: query heads, KV heads, elements of a key and of a value."""

    queries: int
    kv: int
    key_width: int
    value_width: int

    @property
    def groups(self) -> int:
        """Query heads per KV head."""
        return self.queries // self.kv


class Positions(NamedTuple):
    """Address of a layer's first visible key or value, and the bytes from one head to the next."""

    address: int
    head_bytes: int


class AttentionNodes:
    """The nodes of one attention in a graph. `set` gives the addresses before the graph is computed."""

    OPERATIONS = 7

    def __init__(
        self,
        graph: Graph,
        heads: Heads,
        most: int,
        scale: float,
        packed: bool,
        scratch: np.ndarray[Any, np.dtype[np.float32]],
    ):
        """Add the nodes to a graph.

        Args:
            graph: the graph they are part of.
            heads: shape of the attention.
            most: max positions.
            scale: scale of the scores.
            packed: K and V are given in fp16.
            scratch: at least `scratch_elements` elements, which others may use before and after.
        """
        self.heads, self.most = heads, most
        self.results: list[Any] = []
        self._graph = graph
        self._indices = _position_indices(most)
        self._sources: list[Any] = []
        self._own: list[tuple[Any, Any, Any]] = []  # (new row, its place in the cache, the copy)
        self._rows = graph.tensor("I32", most, heads.kv)  # all positions in order, the same for each head
        self._rows.contents.data = self._indices.ctypes.data
        _strides(self._rows.contents, 4, 0, 0, 0)
        keys, values = (self._positions(width, packed) for width in (heads.key_width, heads.value_width))
        query = graph.tensor("F32", heads.key_width, heads.groups, heads.kv)
        scores = graph.add("mul_mat", keys, query)
        probabilities = graph.add("soft_max_ext", scores, None, scale, 0.0)
        transposed = graph.tensor("F32", heads.groups, most, heads.kv)
        out = graph.add("out_prod", values, transposed)
        self.results += [scores, probabilities, out]
        self._scratch = scratch
        named = (keys, values, query, scores, probabilities, transposed, out)
        self._keys, self._values, self._query, self._scores, self._probabilities, self._transposed, self._out = (
            one.contents for one in named
        )
        self._scores.data = self._scratch.ctypes.data
        self._probabilities.data = self._transposed.data = self._scratch.ctypes.data + 2 * scratch_elements(heads, most)

    def _positions(self, width: int, packed: bool) -> Any:
        """The tensor of keys or values in fp32."""
        graph, heads = self._graph, self.heads
        if not packed:
            return graph.tensor("F32", width, self.most, heads.kv)
        new, place = graph.tensor("F32", width, heads.kv), graph.tensor("F16", width, heads.kv)
        copying = graph.add("cpy", new, place)
        held = graph.tensor("F16", width, self.most, heads.kv)
        wide = graph.add("get_rows", held, self._rows)
        self.results += [copying, wide]
        self._own.append((new.contents, place.contents, copying.contents))
        self._sources.append(held.contents)
        return wide

    def set(self, count: int, query: tuple[int, int], out: int, keys: Positions, values: Positions) -> None:
        """Attend to `count` positions in fp32. `query` and `out` are addresses, the former with the bytes between heads."""
        heads = self.heads
        for tensor, where, width in (
            (self._keys, keys, heads.key_width),
            (self._values, values, heads.value_width),
        ):
            tensor.data = where.address
            tensor.ne[1] = count
            _strides(tensor, 4, 4 * width, where.head_bytes, where.head_bytes * heads.kv)
        address, stride = query
        self._query.data, self._out.data = address, out
        _strides(self._query, 4, stride, stride * heads.groups, stride * heads.queries)
        row, group = 4 * count, 4 * count * heads.groups
        for tensor in (self._scores, self._probabilities):
            tensor.ne[0] = count
            _strides(tensor, 4, row, group, group * heads.kv)
        self._transposed.ne[1] = count
        _strides(self._transposed, row, 4, group, group * heads.kv)

    def set_packed(
        self, count: int, new: tuple[tuple[int, int], tuple[int, int]], keys: Positions, values: Positions
    ) -> None:
        """Attend to `count` positions in fp16, the last of which is the row's own place.

        `new`: the row's own key and value in fp32 (addresses, and the bytes between heads).
        """
        self._rows.contents.ne[0] = count
        widths = self.heads.key_width, self.heads.value_width
        for own, held, (address, stride), where, width in zip(
            self._own, self._sources, new, (keys, values), widths, strict=True
        ):
            source, place, copying = own
            source.data = address
            _strides(source, 4, stride, stride * self.heads.kv, stride * self.heads.kv)
            for tensor in (place, copying):
                tensor.data = where.address + 2 * width * (count - 1)
                _strides(
                    tensor, 2, where.head_bytes, where.head_bytes * self.heads.kv, where.head_bytes * self.heads.kv
                )
            held.data = where.address
            held.ne[1] = count
            _strides(held, 2, 2 * width, where.head_bytes, where.head_bytes * self.heads.kv)


class AttentionGraph(Graph):
    """A graph with attention alone, over K and V in fp32."""

    def __init__(self, workers: Workers, heads: Heads, most: int, scale: float, dots: bool):
        super().__init__(workers, AttentionNodes.OPERATIONS)
        scratch = np.empty(scratch_elements(heads, most), np.float32)
        self.attending = AttentionNodes(self, heads, most, scale, False, scratch)
        self.plan(self.attending.results, dots)

    def __call__(self, count: int, query: tuple[int, int], out: int, keys: Positions, values: Positions) -> None:
        """Set the addresses as `AttentionNodes.set` does, then compute."""
        self.attending.set(count, query, out, keys, values)
        self.compute()


def scratch_elements(heads: Heads, most: int) -> int:
    """Elements of scratch for the scores and their softmax."""
    return 2 * heads.queries * most


@cache
def _position_indices(most: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.arange(most, dtype=np.int32)


def _strides(tensor: Any, *nbytes: int) -> None:
    tensor.nb[:] = nbytes
