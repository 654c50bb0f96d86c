"""ggml called in place: a graph is built once per shape, then only its data pointers change from call to call.

Building a graph costs about 30 us through ctypes, setting pointers and computing about 5 us. A model has some twenty
shapes, so the graphs are kept. The weights, activations and results belong to the caller.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import ggml

_GRAPH_NODES = 8
_CONTEXT_BYTES = 64 << 10


def ggml_type(name: str) -> int:
    """ggml's number for a quantisation, by its name in the GGUF file."""
    return int(getattr(ggml, f"GGML_TYPE_{name}"))


class Graph:
    """One small ggml graph over memory that the caller owns. Freed with `close`."""

    def __init__(self) -> None:
        parameters = ggml.ggml_init_params(mem_size=_CONTEXT_BYTES, mem_buffer=None, no_alloc=True)
        self._context = ggml.ggml_init(parameters)
        self._graph = ggml.ggml_new_graph_custom(self._context, 4 * _GRAPH_NODES, False)
        self._leaves: list[Any] = []

    def leaf(self, type_name: str, columns: int, rows: int) -> Any:
        """A new (rows, columns) tensor whose data pointer is set later."""
        return ggml.ggml_new_tensor_2d(self._context, ggml_type(type_name), columns, rows)

    def plan(self, outputs: Sequence[Any], threads: int) -> None:
        """Fix the outputs and the number of threads, and make the workspace they need."""
        for output in outputs:
            ggml.ggml_build_forward_expand(self._graph, output)
        self._plan = ggml.ggml_graph_plan(self._graph, threads, None)
        self._work = (ctypes.c_uint8 * max(1, self._plan.work_size))()
        self._plan.work_data = ctypes.cast(self._work, ctypes.POINTER(ctypes.c_uint8))
        self._plan_pointer = ctypes.byref(self._plan)

    def compute(self) -> None:
        """Run the graph on the data its tensors point to now."""
        status = ggml.ggml_graph_compute(self._graph, self._plan_pointer)
        assert status == 0, f"ggml_graph_compute returned {status}"

    def close(self) -> None:
        """Give ggml's context back."""
        if self._context is not None:
            ggml.ggml_free(self._context)
            self._context = None


class Products(Graph):
    """x @ w.T for several packed `w` that share the same x: results of shape (rows, len(w)) in fp32."""

    def __init__(self, parts: Sequence[tuple[str, int, int]], columns: int, rows: int, threads: int):
        """Each part is (type, rows of weights, stride in bytes between rows of its result)."""
        super().__init__()
        x = self.leaf("F32", columns, rows)
        outputs = []
        self._parts: list[tuple[Any, Any]] = []
        for type_name, weight_rows, stride in parts:
            weight = self.leaf(type_name, columns, weight_rows)
            result = ggml.ggml_mul_mat(self._context, weight, x)
            result.contents.nb[1] = stride
            result.contents.nb[2] = result.contents.nb[3] = stride * rows
            outputs.append(result)
            self._parts.append((weight.contents, result.contents))
        self._x = x.contents
        self.plan(outputs, threads)

    def __call__(self, x: int, addresses: Sequence[tuple[int, int]]) -> None:
        """Multiply what lies at these addresses: activations, and for each part its (weights, result)."""
        self._x.data = x
        for (weight, result), (source, target) in zip(self._parts, addresses, strict=True):
            weight.data = source
            result.data = target
        self.compute()


class Unpack(Graph):
    """Packed rows to fp32, on several threads."""

    def __init__(self, type_name: str, columns: int, rows: int, threads: int):
        super().__init__()
        packed = self.leaf(type_name, columns, rows)
        plain = ggml.ggml_cast(self._context, packed, ggml.GGML_TYPE_F32)
        self._packed, self._plain = packed.contents, plain.contents
        self.plan([plain], threads)

    def __call__(self, packed: int, plain: int) -> None:
        """Unpack what lies at `packed` to `plain`."""
        self._packed.data, self._plain.data = packed, plain
        self.compute()
