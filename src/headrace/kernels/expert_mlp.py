"""Several experts for one row in one ggml graph: gate_up_proj, SiLU, down_proj. Only the addresses change between calls."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from headrace.kernels.ggml_graph import Graph, MatmulShape, Workers
from headrace.kernels.repack import Repacking


class ExpertShapes(NamedTuple):
    """(type, rows) of each slice of one expert's matrices: of gate_up_proj, and of down_proj."""

    up: tuple[tuple[str, int], ...]
    down: tuple[tuple[str, int], ...]


class ExpertMlp(Graph):
    """The graph for `count` experts of one shape, on a row of `columns`. gate_up_proj gives all gates, then all ups."""

    def __init__(
        self, form: ExpertShapes, count: int, columns: int, dots: bool, workers: Workers, repacking: Repacking
    ):
        super().__init__(workers, 2 + count * (len(form.up) + len(form.down)))
        gate_up_rows = sum(rows for _, rows in form.up)
        inner = gate_up_rows // 2
        self._scratch = np.empty(count * (gate_up_rows + 2 * inner), np.float32)
        start = self._scratch.ctypes.data
        silu_address = start + 4 * count * gate_up_rows
        gated_address = silu_address + 4 * count * inner
        nodes = []
        self._x, self._weights = [], []
        self._results = []  # (expert, tensor, byte offset in the expert's result)
        for i in range(count):
            column = 0
            for kind, rows in form.up:
                part = MatmulShape(kind, rows, columns, "F32", 4 * columns, 4 * gate_up_rows, repacked=False)
                weight, x, result = self.add_matmul(part, 1, repacking)
                result.contents.data = start + 4 * (i * gate_up_rows + column)
                self._x.append(x.contents)
                self._weights.append(weight.contents)
                nodes.append(result)
                column += rows
        gate, up = (self.tensor("F32", inner, count) for _ in range(2))
        for i, leaf in enumerate((gate, up)):
            leaf.contents.data = start + 4 * i * inner
            leaf.contents.nb[1] = 4 * gate_up_rows
            leaf.contents.nb[2] = leaf.contents.nb[3] = 4 * gate_up_rows * count
        silu = self.add("silu", gate)
        silu.contents.data = silu_address
        gated = self.add("mul", silu, up)
        gated.contents.data = gated_address
        nodes += [silu, gated]
        for i in range(count):
            column = 0
            for kind, rows in form.down:
                part = MatmulShape(kind, rows, inner, "F32", 4 * inner, 4 * columns, repacked=False)
                weight, x, result = self.add_matmul(part, 1, repacking)
                x.contents.data = gated_address + 4 * i * inner
                self._weights.append(weight.contents)
                self._results.append((i, result.contents, 4 * column))
                nodes.append(result)
                column += rows
        self.plan(nodes, dots)

    def __call__(self, x: int, weights: Sequence[int], results: Sequence[int]) -> None:
        """Compute the row at `x`; `weights`: all gate_up_proj slices, expert after expert, then all down_proj slices."""
        for tensor in self._x:
            tensor.data = x
        for tensor, address in zip(self._weights, weights, strict=True):
            tensor.data = address
        for i, tensor, offset in self._results:
            tensor.data = results[i] + offset
        self.compute()
