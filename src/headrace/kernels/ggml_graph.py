"""ggml graphs over the caller's memory: built once per shape, then only pointers and the number of rows change.

Building a graph costs about 30 us through ctypes, setting pointers and computing about 5 us. A model has some twenty
shapes, so the graphs are kept. The weights, activations, results and the workspace belong to the caller.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

from headrace.kernels.ggml import GgmlTensor, InitParams, library, type_number
from headrace.kernels.repack import Repacking

# Bytes of ggml's bookkeeping: for a graph, and for each matmul in it (three tensors, one node, two leaves).
_GRAPH_BYTES = 16 << 10
_MATMUL_BYTES = 2 << 10
# Time that idle threads spin before they sleep, in ggml's unit of some 2 ms.
_SPIN = 1


class Workers:
    """Compute threads and their scratch, shared by graphs that run one after another.

    With `spin`, threads start at once; waking them takes some 30 us. But they compete with torch's threads, and with disk
    reads that a virtual machine's host makes on the same cores.
    """

    def __init__(self, threads: int, spin: bool) -> None:
        self.threads = threads
        parameters = library().ggml_threadpool_params_default(threads)
        parameters.poll = _SPIN if spin else 0
        self.pool = library().ggml_threadpool_new(ctypes.byref(parameters))
        self._reserve(1)

    def _reserve(self, nbytes: int) -> None:
        self._scratch = (ctypes.c_uint8 * nbytes)()
        self._address = ctypes.addressof(self._scratch)

    def scratch(self, nbytes: int) -> int:
        """The address of at least `nbytes` of scratch."""
        if len(self._scratch) < nbytes:
            self._reserve(nbytes)
        return self._address

    def close(self) -> None:
        """End the threads."""
        if self.pool is not None:
            library().ggml_threadpool_free(self.pool)
            self.pool = None


class Graph:
    """One small ggml graph over memory that the caller owns. Freed with `close`."""

    def __init__(self, workers: Workers, nodes: int = 1) -> None:
        size = _GRAPH_BYTES + nodes * _MATMUL_BYTES
        self._ggml = library()
        self._context = self._ggml.ggml_init(InitParams(size, None, True))
        self._graph = self._ggml.ggml_new_graph_custom(self._context, 16 + 3 * nodes, False)
        self._workers = workers

    def leaf(self, type_name: str, columns: int, rows: int) -> Any:
        """A new (rows, columns) tensor whose data pointer is set later."""
        return self._ggml.ggml_new_tensor_2d(self._context, type_number(type_name), columns, rows)

    def tensor(self, type_name: str, *sizes: int) -> Any:
        """A new tensor with up to four sizes, innermost first, whose data pointer is set later."""
        padded = [*sizes, 1, 1, 1][:4]
        return self._ggml.ggml_new_tensor_4d(self._context, type_number(type_name), *padded)

    def add(self, name: str, *operands: Any) -> Any:
        """The result of one of ggml's operations."""
        return getattr(self._ggml, f"ggml_{name}")(self._context, *operands)

    def add_matmul(self, part: "MatmulShape", rows: int, repacking: Repacking) -> tuple[Any, Any, Any]:
        """Add a matmul; returns the tensors of its weight, of `rows` rows of x and of its result."""
        x = self.leaf(part.x_type, part.columns, rows)
        weight = self.leaf(part.type, part.columns, part.rows)
        if part.repacked:
            repacking.mark(part.type, weight.contents)
        result = self._ggml.ggml_mul_mat(self._context, weight, x)
        for tensor, stride in ((x.contents, part.x_stride), (result.contents, part.stride)):
            tensor.nb[1] = stride
            tensor.nb[2] = tensor.nb[3] = stride * rows
        return weight, x, result

    def plan(self, outputs: Sequence[Any], dots: bool = False) -> None:
        """Fix the outputs; `dots`: every matmul uses the dot-product kernel, whatever the number of rows."""
        for output in outputs:
            self._ggml.ggml_build_forward_expand(self._graph, output)
        self._plan = self._ggml.ggml_graph_plan(self._graph, self._workers.threads, self._workers.pool)
        self._plan.use_ref = dots
        self._plan_pointer = ctypes.byref(self._plan)

    def compute(self) -> None:
        """Run the graph on the data its tensors point to now."""
        self._plan.work_data = self._workers.scratch(self._plan.work_size)
        status = self._ggml.ggml_graph_compute(self._graph, self._plan_pointer)
        assert status == 0, f"ggml_graph_compute returned {status}"

    def close(self) -> None:
        """Free ggml's context."""
        if self._context is not None:
            self._ggml.ggml_free(self._context)
            self._context = None


class MatmulShape(NamedTuple):
    """One matmul: the weight's format, rows and columns, x's format, the bytes between rows of x and of the result."""

    type: str
    rows: int
    columns: int
    x_type: str
    x_stride: int
    stride: int
    repacked: bool


class MatmulPointers(NamedTuple):
    """Current addresses of one matmul's operands, and the number of rows of x."""

    weight: int
    x: int
    result: int
    rows: int


class MatmulGraph(Graph):
    """x @ w.T for several packed `w`, each with its own x: (rows of x, rows of w) in fp32.

    With `dots` it is row-invariant: a row's result does not depend on the number of rows.
    """

    def __init__(
        self, parts: Sequence[MatmulShape], most_rows: int, dots: bool, workers: Workers, repacking: Repacking
    ):
        super().__init__(workers, len(parts))
        self.parts = tuple(parts)
        matmuls = [self.add_matmul(part, most_rows, repacking) for part in parts]
        self._tensors = [tuple(tensor.contents for tensor in tensors) for tensors in matmuls]
        self._rows = [most_rows] * len(parts)
        self.plan([result for _, _, result in matmuls], dots)

    def __call__(self, operands: Sequence[MatmulPointers]) -> None:
        """Run the matmuls on these addresses."""
        for i, ((weight, x, result), at) in enumerate(zip(self._tensors, operands, strict=True)):
            weight.data, x.data, result.data = at.weight, at.x, at.result
            if self._rows[i] != at.rows:
                self._rows[i] = at.rows
                for tensor in (x, result):
                    tensor.ne[1] = at.rows
                    tensor.nb[2] = tensor.nb[3] = tensor.nb[1] * at.rows
        self.compute()


class RowFunction(Graph):
    """A function of each fp32 row by itself: `silu`, or `rms_norm` times a weight."""

    def __init__(self, name: str, columns: int, workers: Workers, eps: float = 0.0):
        super().__init__(workers, 2)
        self._x = self.leaf("F32", columns, 1)
        self._rows, self._weight = 1, None
        if name == "silu":
            self._results = [self._ggml.ggml_silu(self._context, self._x)]
        else:
            self._weight = self.leaf("F32", columns, 1)
            norm = self._ggml.ggml_rms_norm(self._context, self._x, eps)
            self._results = [norm, self._ggml.ggml_mul(self._context, norm, self._weight)]
        self.plan(self._results[-1:])
        self._tensors: list[GgmlTensor] = [tensor.contents for tensor in (self._x, *self._results)]

    def __call__(self, x: int, x_stride: int, rows: int, result: int, weight: int = 0) -> None:
        """Apply it to the rows at `x`, `x_stride` bytes apart, and write them contiguously to `result`."""
        strides = [x_stride] + [4 * self._tensors[0].ne[0]] * len(self._results)
        for tensor, at, stride in zip(self._tensors, [x] + [result] * len(self._results), strides, strict=True):
            tensor.data = at
            tensor.ne[1] = rows
            tensor.nb[1] = stride
            tensor.nb[2] = tensor.nb[3] = stride * rows
        if self._weight is not None:
            self._weight.contents.data = weight
        self.compute()


class Cast(Graph):
    """Conversion of rows to another format, on several threads."""

    def __init__(self, source_type: str, target_type: str, columns: int, rows: int, workers: Workers):
        super().__init__(workers)
        source = self.leaf(source_type, columns, rows)
        target = self._ggml.ggml_cast(self._context, source, type_number(target_type))
        self._tensors: tuple[GgmlTensor, GgmlTensor] = source.contents, target.contents
        self._rows = rows
        self.plan([target])

    def __call__(self, source: int, target: int, rows: int) -> None:
        """Write the rows at `source` to `target`."""
        for tensor, address in zip(self._tensors, (source, target), strict=True):
            tensor.data = address
            if self._rows != rows:
                tensor.ne[1] = rows
                tensor.nb[2] = tensor.nb[3] = tensor.nb[1] * rows
        self._rows = rows
        self.compute()
