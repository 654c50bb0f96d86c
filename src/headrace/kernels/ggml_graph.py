"""ggml called in place: a graph is built once per shape, then only its pointers and its number of rows change.

Building a graph costs about 30 us through ctypes, setting pointers and computing about 5 us. A model has some twenty
shapes, so the graphs are kept. The weights, activations, results and the workspace belong to the caller.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import ggml

from headrace.kernels.interleaved import Interleaving

# Of ggml's bookkeeping: for a graph, and for each product in it (three tensors, one node, two leaves).
_GRAPH_BYTES = 16 << 10
_PRODUCT_BYTES = 2 << 10


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

    def __init__(self, workspace: Workspace, nodes: int = 1) -> None:
        size = _GRAPH_BYTES + nodes * _PRODUCT_BYTES
        parameters = ggml.ggml_init_params(mem_size=size, mem_buffer=None, no_alloc=True)
        self._context = ggml.ggml_init(parameters)
        self._graph = ggml.ggml_new_graph_custom(self._context, 16 + 3 * nodes, False)
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
    """One product: the weight's format, rows and columns, the bytes between rows of x and of the result, the layout."""

    type: str
    rows: int
    columns: int
    x_stride: int
    stride: int
    interleaved: bool


class Operands(NamedTuple):
    """Where the operands of one product lie now, and how many rows x has."""

    weight: int
    x: int
    result: int
    rows: int


class Products(Graph):
    """x @ w.T for several packed `w`, each with an x of its own: results of shape (rows of x, rows of w) in fp32."""

    def __init__(
        self, parts: Sequence[Part], most_rows: int, threads: int, workspace: Workspace, interleaving: Interleaving
    ):
        super().__init__(workspace, len(parts))
        self._parts: list[tuple[Any, Any, Any]] = []
        outputs = []
        for part in parts:
            x = self.leaf("F32", part.columns, most_rows)
            weight = self.leaf(part.type, part.columns, part.rows)
            if part.interleaved:
                interleaving.mark(part.type, weight.contents)
            result = ggml.ggml_mul_mat(self._context, weight, x)
            outputs.append(result)
            for tensor, stride in ((x.contents, part.x_stride), (result.contents, part.stride)):
                tensor.nb[1] = stride
                tensor.nb[2] = tensor.nb[3] = stride * most_rows
            self._parts.append((weight.contents, x.contents, result.contents))
        self._rows = [most_rows] * len(parts)
        self.plan(outputs, threads)

    def __call__(self, operands: Sequence[Operands]) -> None:
        """Multiply what lies at these addresses."""
        for i, ((weight, x, result), at) in enumerate(zip(self._parts, operands, strict=True)):
            weight.data, x.data, result.data = at.weight, at.x, at.result
            if self._rows[i] != at.rows:
                self._rows[i] = at.rows
                for tensor in (x, result):
                    tensor.ne[1] = at.rows
                    tensor.nb[2] = tensor.nb[3] = tensor.nb[1] * at.rows
        self.compute()


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
