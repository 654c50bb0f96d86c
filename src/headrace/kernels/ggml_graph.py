"""ggml called in place: a graph is built once per shape, then only its pointers and its number of rows change.

Building a graph costs about 30 us through ctypes, setting pointers and computing about 5 us. A model has some twenty
shapes, so the graphs are kept. The weights, activations, results and the workspace belong to the caller.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import ggml

from headrace.kernels.interleaved import Interleaving

_GRAPH_NODES = 8
_CONTEXT_BYTES = 24 << 10


def ggml_type(name: str) -> int:
    """ggml's number for a quantisation, by its name in the GGUF file."""
    return int(getattr(ggml, f"GGML_TYPE_{name}"))


class Workspace:
    """Scratch that ggml asks for, shared by all graphs because they run one after another."""

    def __init__(self) -> None:
        self._reserve(1)

    def _reserve(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._pointer = ctypes.cast((ctypes.c_uint8 * nbytes)(), ctypes.POINTER(ctypes.c_uint8))

    def at_least(self, nbytes: int) -> Any:
        """A pointer to so many bytes."""
        if self._nbytes < nbytes:
            self._reserve(nbytes)
        return self._pointer


class Graph:
    """One small ggml graph over memory that the caller owns. Freed with `close`."""

    def __init__(self, workspace: Workspace) -> None:
        parameters = ggml.ggml_init_params(mem_size=_CONTEXT_BYTES, mem_buffer=None, no_alloc=True)
        self._context = ggml.ggml_init(parameters)
        self._graph = ggml.ggml_new_graph_custom(self._context, 4 * _GRAPH_NODES, False)
        self._workspace = workspace

    def leaf(self, type_name: str, columns: int, rows: int) -> Any:
        """A new (rows, columns) tensor whose data pointer is set later."""
        return ggml.ggml_new_tensor_2d(self._context, ggml_type(type_name), columns, rows)

    def plan(self, outputs: Sequence[Any], threads: int) -> None:
        """Fix the outputs and the number of threads."""
        for output in outputs:
            ggml.ggml_build_forward_expand(self._graph, output)
        self._plan = ggml.ggml_graph_plan(self._graph, threads, None)
        self._plan_pointer = ctypes.byref(self._plan)

    def compute(self) -> None:
        """Run the graph on the data its tensors point to now."""
        self._plan.work_data = self._workspace.at_least(self._plan.work_size)
        status = ggml.ggml_graph_compute(self._graph, self._plan_pointer)
        assert status == 0, f"ggml_graph_compute returned {status}"

    def close(self) -> None:
        """Give ggml's context back."""
        if self._context is not None:
            ggml.ggml_free(self._context)
            self._context = None


class Part(NamedTuple):
    """One weight of a product: its format, its rows, the bytes between rows of its result, and whether it is interleaved."""

    type: str
    rows: int
    stride: int
    interleaved: bool


class Products(Graph):
    """x @ w.T for several packed `w` that share the same x: results of shape (rows, rows of w) in fp32."""

    def __init__(
        self,
        parts: Sequence[Part],
        columns: int,
        most_rows: int,
        threads: int,
        workspace: Workspace,
        interleaving: Interleaving,
    ):
        super().__init__(workspace)
        x = self.leaf("F32", columns, most_rows)
        outputs = []
        self._parts: list[tuple[Any, Any]] = []
        for part in parts:
            weight = self.leaf(part.type, columns, part.rows)
            if part.interleaved:
                interleaving.mark(part.type, weight.contents)
            result = ggml.ggml_mul_mat(self._context, weight, x)
            result.contents.nb[1] = part.stride
            result.contents.nb[2] = result.contents.nb[3] = part.stride * most_rows
            outputs.append(result)
            self._parts.append((weight.contents, result.contents))
        self._x = x.contents
        self._rows = most_rows
        self.plan(outputs, threads)

    def __call__(self, x: int, rows: int, addresses: Sequence[tuple[int, int]]) -> None:
        """Multiply what lies at these addresses: `rows` activations, and for each part its (weights, result)."""
        if rows != self._rows:
            self._set_rows(rows)
        self._x.data = x
        for (weight, result), (source, target) in zip(self._parts, addresses, strict=True):
            weight.data = source
            result.data = target
        self.compute()

    def _set_rows(self, rows: int) -> None:
        for tensor in (self._x, *(result for _, result in self._parts)):
            tensor.ne[1] = rows
            tensor.nb[2] = tensor.nb[3] = tensor.nb[1] * rows
        self._rows = rows


class Unpack(Graph):
    """Packed rows to fp32, on several threads."""

    def __init__(self, type_name: str, columns: int, rows: int, threads: int, workspace: Workspace):
        super().__init__(workspace)
        packed = self.leaf(type_name, columns, rows)
        plain = ggml.ggml_cast(self._context, packed, ggml.GGML_TYPE_F32)
        self._packed, self._plain = packed.contents, plain.contents
        self.plan([plain], threads)

    def __call__(self, packed: int, plain: int) -> None:
        """Unpack what lies at `packed` to `plain`."""
        self._packed.data, self._plain.data = packed, plain
        self.compute()
