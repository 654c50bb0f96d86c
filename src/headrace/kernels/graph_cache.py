"""ggml graphs by their shapes, and the threads that compute them.

Building a graph takes longer than a small matmul, so each is kept.
"""

from collections.abc import Sequence
from typing import TypeAlias

import torch

from headrace.checkpoint.tensor import row_bytes
from headrace.kernels.attention_graph import AttentionGraph, Heads
from headrace.kernels.dot_bits import has_dot_bits
from headrace.kernels.expert_mlp import ExpertMlp, ExpertShapes
from headrace.kernels.fused_graph import FusedGraph
from headrace.kernels.ggml_graph import Cast, MatmulGraph, MatmulPointers, MatmulShape, RowFunction, Workers
from headrace.kernels.repack import Repacking
from headrace.kernels.thresholds import DECODE_MAX_ROWS
from headrace.kernels.weight_slice import WeightSlice

MatmulJob: TypeAlias = tuple[MatmulShape, MatmulPointers]
Slices: TypeAlias = Sequence[tuple[int, WeightSlice]]  # (index of the output, slice)

_SINGLE_THREAD_BYTES = 640 << 10  # max bytes of weights times rows for one thread: it ends before another wakes


class GraphCache:
    """Graphs of one set of kernels. Their workers are shared."""

    def __init__(self, threads: int, row_invariant: bool):
        self.row_invariant = row_invariant
        self.repacking = Repacking()
        self._threads = threads
        self._prefill_workers = self._decode_workers = Workers(threads, spin=False)
        self._one_worker = Workers(1, spin=False)
        self.matmuls: dict[tuple[object, ...], MatmulGraph] = {}
        self._casts: dict[tuple[str, str, int, bool], Cast] = {}
        self._row_functions: dict[tuple[str, int, float, bool], RowFunction] = {}
        self._expert_mlps: dict[tuple[int, ExpertShapes, int], ExpertMlp] = {}
        self._attentions: dict[tuple[Heads, int, float], AttentionGraph] = {}
        self._fused: list[FusedGraph] = []

    def spin(self) -> None:
        """From now on threads start at once on decode rows."""
        if self._decode_workers is self._prefill_workers:
            self._decode_workers = Workers(self._threads, spin=True)

    def run(self, jobs: Sequence[MatmulJob], dots: bool) -> tuple[MatmulGraph, list[MatmulPointers]]:
        """Compute matmuls in one graph; `dots`: with the bits of one dot product per row. Returns graph and operands."""
        parts = tuple([part for part, _ in jobs])
        most_rows = 1 << (max([operands.rows for _, operands in jobs]) - 1).bit_length()
        key = (most_rows, dots, parts)
        graph = self.matmuls.get(key)
        if graph is None:
            workers = self._prefill_workers if most_rows > DECODE_MAX_ROWS else self._decode_workers
            nbytes = sum([part.rows * row_bytes(part.type, part.columns) for part in parts])
            no_thread_spins = self._decode_workers is self._prefill_workers
            if nbytes * most_rows <= _SINGLE_THREAD_BYTES and no_thread_spins:
                workers = self._one_worker
            if most_rows > 1 and all(not part.repacked and has_dot_bits(part.type) for part in parts):
                dots = False
            graph = self.matmuls[key] = MatmulGraph(parts, most_rows, dots, workers, self.repacking)
        operands = [operands for _, operands in jobs]
        graph(operands)
        return graph, operands

    def cast(self, source_type: str, target_type: str, columns: int, many: bool) -> Cast:
        """The conversion of rows to another format; `many`: by the workers of prefill."""
        key = (source_type, target_type, columns, many)
        cast = self._casts.get(key)
        if cast is None:
            workers = self._prefill_workers if many else self._decode_workers
            cast = self._casts[key] = Cast(source_type, target_type, columns, 1, workers)
        return cast

    def row_function(self, name: str, x: torch.Tensor, eps: float = 0.0) -> RowFunction:
        """`silu` or `rms_norm` for rows like x."""
        many = x.shape[0] > DECODE_MAX_ROWS
        key = name, x.shape[1], eps, many
        function = self._row_functions.get(key)
        if function is None:
            workers = self._prefill_workers if many else self._one_worker
            function = self._row_functions[key] = RowFunction(name, x.shape[1], workers, eps)
        return function

    def expert_mlp(self, columns: int, form: ExpertShapes, count: int) -> ExpertMlp:
        """The graph of `count` experts of these shapes, for one row."""
        key = columns, form, count
        graph = self._expert_mlps.get(key)
        if graph is None:
            graph = self._expert_mlps[key] = ExpertMlp(
                form, count, columns, self.row_invariant, self._decode_workers, self.repacking
            )
        return graph

    def attention(self, heads: Heads, positions: int, scale: float) -> AttentionGraph:
        """Attention of one row over at most `positions` positions."""
        graph = self._attentions.get((heads, positions, scale))
        if graph is None:
            graph = AttentionGraph(self._decode_workers, heads, positions, scale, self.row_invariant)
            self._attentions[heads, positions, scale] = graph
        return graph

    def fused(self, operations: int) -> FusedGraph:
        """An empty graph for at most `operations` operations."""
        graph = FusedGraph(self._decode_workers, operations, self.repacking)
        self._fused.append(graph)
        return graph

    def close(self) -> None:
        """Free all graphs and end the threads."""
        tables = (self.matmuls, self._casts, self._row_functions, self._expert_mlps, self._attentions)
        for graph in (*(graph for table in tables for graph in table.values()), *self._fused):
            graph.close()
        for table in tables:
            table.clear()
        self._fused.clear()
        self.repacking.close()
        for workers in {self._one_worker, self._decode_workers, self._prefill_workers}:
            workers.close()


def matmul_job(x: torch.Tensor, weight_slice: WeightSlice, output: torch.Tensor, to: int = 0) -> MatmulJob:
    """The matmul of x and a slice, to the address of `output` plus `to` bytes."""
    rows = weight_slice.k_split_rows or weight_slice.rows
    part = MatmulShape(
        weight_slice.type,
        rows,
        x.shape[1],
        "F32",
        4 * x.stride(0),
        4 * output.stride(0),
        weight_slice.repacked is not None,
    )
    return part, MatmulPointers(
        weight_slice.repacked or weight_slice.address, x.data_ptr(), output.data_ptr() + to, x.shape[0]
    )
