"""Decode rows: ggml's dot products on packed blocks. A row's result does not depend on the rows beside it."""

from collections.abc import Sequence

import torch

from headrace.kernels.ggml_graph import MatmulGraph, MatmulPointers
from headrace.kernels.graph_cache import GraphCache, matmul_job
from headrace.kernels.thresholds import ACTIVATION_ROWS
from headrace.kernels.weight_slice import WeightSlice


class DotMatmul:
    """Matmuls with one dot product per row and weight row, if the kernels are row-invariant."""

    def __init__(self, graphs: GraphCache):
        self._graphs = graphs
        # Graph and operands of the last matmul, if it may be repeated with the same operands.
        self.last: tuple[MatmulGraph, list[MatmulPointers]] | None = None

    def multiply(
        self, x: torch.Tensor, slices: Sequence[tuple[int, WeightSlice]], outputs: Sequence[torch.Tensor]
    ) -> None:
        """Fill the columns of each slice in its output."""
        for i, weight_slice in slices:
            if weight_slice.k_split_rows:
                self._k_splits(x, weight_slice, outputs[i])
        whole = [(i, weight_slice) for i, weight_slice in slices if not weight_slice.k_split_rows]
        missing = -x.shape[0] % ACTIVATION_ROWS
        if missing and (self._graphs.row_invariant or x.shape[0] > 1) and any(p.repacked for _, p in whole):
            self._padded(x, missing, whole, outputs)
            self.last = None
        elif whole:
            self.last = self._graphs.run(
                [matmul_job(x, p, outputs[i], 4 * p.first) for i, p in whole], self._graphs.row_invariant
            )

    def _k_splits(self, x: torch.Tensor, weight_slice: WeightSlice, output: torch.Tensor) -> None:
        """Multiply with a slice's K-splits and add them up in order: the sum does not depend on where slices end."""
        width = weight_slice.k_split_columns
        for index, split in enumerate(weight_slice.k_splits()):
            number = weight_slice.first // weight_slice.k_split_rows + index
            part = output if number == 0 else torch.empty_like(output)
            self._graphs.run(
                [matmul_job(x[:, number * width : (number + 1) * width], split, part)], self._graphs.row_invariant
            )
            if number:
                output += part

    def _padded(
        self, x: torch.Tensor, missing: int, slices: Sequence[tuple[int, WeightSlice]], outputs: Sequence[torch.Tensor]
    ) -> None:
        """Pad the rows to a multiple of `ACTIVATION_ROWS`: repacked weights have another kernel for a remainder."""
        rows = x.shape[0]
        padded = [output.new_empty((rows + missing, output.shape[1])) for output in outputs]
        self.multiply(torch.cat([x, x.new_zeros((missing, x.shape[1]))]), slices, padded)
        for i, weight_slice in slices:
            part = slice(weight_slice.first, weight_slice.first + weight_slice.rows)
            outputs[i][:, part] = padded[i][:rows, part]
