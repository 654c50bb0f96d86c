"""Some experts for one row in one graph of ggml: up, SiLU of the gate, down. Only the addresses change from call to call."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from headrace.kernels.ggml_graph import Graph, MatmulShape, Workers
from headrace.kernels.repack import Repacking


class ExpertShapes(NamedTuple):
    """Of one expert's matrices: the slices that lead up to gate and up, and those that lead down, by type and rows."""

    up: tuple[tuple[str, int], ...]
    down: tuple[tuple[str, int], ...]


class ExpertMlp(Graph):
    """So many experts of this form, on a row of so many columns. Gates and ups lie one after another in what leads up."""

    def __init__(
        self, form: ExpertShapes, count: int, columns: int, dots: bool, workers: Workers, repacking: Repacking
    ):
        super().__init__(workers, 2 + count * (len(form.up) + len(form.down)))
        raised = sum(rows for _, rows in form.up)
        inner = raised // 2
        self._scratch = np.empty(count * (raised + 2 * inner), np.float32)
        start = self._scratch.ctypes.data
        activated = start + 4 * count * raised
        product = activated + 4 * count * inner
        nodes = []
        self._x, self._weights, self._results = (
            [],
            [],
            [],
        )  # the last with the bytes from where the expert's result begins
        for i in range(count):
            column = 0
            for kind, rows in form.up:
                part = MatmulShape(kind, rows, columns, "F32", 4 * columns, 4 * raised, repacked=False)
                weight, x, result = self.add_matmul(part, 1, repacking)
                result.contents.data = start + 4 * (i * raised + column)
                self._x.append(x.contents)
                self._weights.append(weight.contents)
                nodes.append(result)
                column += rows
        gate, up = (self.tensor("F32", inner, count) for _ in range(2))
        for i, leaf in enumerate((gate, up)):
            leaf.contents.data = start + 4 * i * inner
            leaf.contents.nb[1] = 4 * raised
            leaf.contents.nb[2] = leaf.contents.nb[3] = 4 * raised * count
        silu = self.add("silu", gate)
        silu.contents.data = activated
        gated = self.add("mul", silu, up)
        gated.contents.data = product
        nodes += [silu, gated]
        for i in range(count):
            column = 0
            for kind, rows in form.down:
                part = MatmulShape(kind, rows, inner, "F32", 4 * inner, 4 * columns, repacked=False)
                weight, x, result = self.add_matmul(part, 1, repacking)
                x.contents.data = product + 4 * i * inner
                self._weights.append(weight.contents)
                self._results.append((i, result.contents, 4 * column))
                nodes.append(result)
                column += rows
        self.plan(nodes, dots)

    def __call__(self, x: int, weights: Sequence[int], results: Sequence[int]) -> None:
        """For the row at `x`, weights first of all that leads up, expert after expert, then of what leads down."""
        for tensor in self._x:
            tensor.data = x
        for tensor, address in zip(self._weights, weights, strict=True):
            tensor.data = address
        for i, tensor, offset in self._results:
            tensor.data = results[i] + offset
        self.compute()
