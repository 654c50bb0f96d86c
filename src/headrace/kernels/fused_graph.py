"""One ggml graph for consecutive operations on fixed addresses.

A layer has some twenty small operations between its matmuls: a norm, biases, RoPE, a gate, sums. Torch takes 4 to 70 us for
each on one row, mostly call overhead. The next matmul then starts its threads anew. In one graph the matmuls' threads compute
them. Elementwise sums and multiplications are rounded as torch rounds them. Norms and gates are ggml's outside of graphs
too (`Kernels.rms_norm`, `Kernels.silu`): so results are the same, bit for bit.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from headrace.kernels.attention_graph import AttentionNodes, Heads, scratch_elements
from headrace.kernels.ggml_graph import Graph, MatmulPointers, MatmulShape, Workers
from headrace.kernels.repack import Repacking

_MOST_DIMENSIONS = 4
_LANES = 16  # elements that ggml's SiLU computes at a time; a remainder is rounded differently
_SHARED_ELEMENTS = 2048  # min elements of an operation on one row that threads share


class FusedGraph(Graph):
    """A graph that is built operation by operation, then computed as often as needed.

    Every method adds an operation on its tensors' current addresses, and returns whether ggml can compute it.
    """

    def __init__(self, workers: Workers, most: int, repacking: Repacking):
        super().__init__(workers, most)
        self._threads = workers.threads
        self._repacking = repacking
        self._results: list[Any] = []
        self._scratch = np.empty(0, np.float32)  # shared by all attention nodes
        self._owned: list[torch.Tensor] = []  # operands that nothing else keeps alive

    def finalize(self, dots: bool) -> None:
        """Plan the graph; no operation may be added after it. `dots` as for `MatmulGraph`."""
        self.plan(self._results, dots)

    def matmul(self, parts: Sequence[MatmulShape], operands: Sequence[MatmulPointers]) -> bool:
        """Matmuls of single rows."""
        for part, at in zip(parts, operands, strict=True):
            weight, x, result = self.add_matmul(part, 1, self._repacking)
            weight.contents.data, x.contents.data, result.contents.data = at.weight, at.x, at.result
            self._results.append(result)
        return True

    def rms_norm(self, out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> bool:
        """As `Kernels.rms_norm`."""
        self._add(self._ggml.ggml_rms_norm(self._context, self._tensor(x), eps), out)
        self._add(self._ggml.ggml_mul(self._context, self._tensor(out), self._tensor(weight)), out)
        return True

    def silu(self, out: torch.Tensor, x: torch.Tensor) -> bool:
        """As `Kernels.silu`."""
        out, x = self._shared(out, x) or (out, x)
        self._add(self._ggml.ggml_silu(self._context, self._tensor(x)), out)
        return True

    def combine(self, name: str, out: torch.Tensor, a: torch.Tensor, b: torch.Tensor | float) -> bool:
        """a + b, a - b, a * b or a / b, by torch's name for it; b is broadcast to the shape of a and `out`."""
        if not isinstance(b, torch.Tensor):
            b = torch.tensor([b], dtype=torch.float32)
            self._owned.append(b)
        if a.shape != out.shape and name in ("add", "mul"):
            a, b = b, a
        if a.shape != out.shape or not all(map(_is_plain, (a, b, out))):
            return False
        shared = self._shared(out, a, b) if b.shape == a.shape else None
        out, a, b = shared or _without_ones(out, a, b[(None,) * (out.dim() - b.dim())])
        if not all(map(_has_rows, (out, a))) or (b.shape[-1] > 1 and b.stride(-1) != 1):
            return False
        function = getattr(self._ggml, f"ggml_{name}")
        self._add(function(self._context, self._tensor(a), self._tensor(b)), out)
        return True

    def copy(self, out: torch.Tensor, x: torch.Tensor) -> bool:
        """Copy x to `out`, of the same shape."""
        if not (_is_plain(x) and _is_plain(out)):
            return False
        out, x = _without_ones(out, x)
        if not _has_rows(out) or not _has_rows(x):
            return False
        self._add(self._ggml.ggml_cont(self._context, self._tensor(x)), out)
        return True

    def select(self, out: torch.Tensor, x: torch.Tensor, order: torch.Tensor) -> bool:
        """The elements of x, a single row, in another order."""
        if x.numel() != x.shape[-1] or not (_is_plain(x) and x.is_contiguous() and out.is_contiguous()):
            return False
        order = order.to(torch.int32)
        self._owned.append(order)
        elements, places = self.tensor("F32", 1, x.numel()), self.tensor("I32", order.numel())
        elements.contents.data, places.contents.data = x.data_ptr(), order.data_ptr()
        node = self.add("get_rows", elements, places)
        node.contents.data = out.data_ptr()
        self._results.append(node)
        return True

    def attend(self, heads: Heads, most: int, scale: float) -> AttentionNodes:
        """Attention of a row over at most `most` positions in fp16, to which its own is added."""
        if self._scratch.size < scratch_elements(heads, most):
            self._scratch = np.empty(scratch_elements(heads, most), np.float32)
        attending = AttentionNodes(self, heads, most, scale, True, self._scratch)
        self._results += attending.results
        return attending

    def _shared(self, *tensors: torch.Tensor) -> list[torch.Tensor] | None:
        """Views with one row for each thread, if the tensors are contiguous and large enough."""
        count = tensors[0].numel()
        if (
            count < _SHARED_ELEMENTS
            or count % (_LANES * self._threads)
            or not all(one.is_contiguous() for one in tensors)
        ):
            return None
        return [one.view(self._threads, -1) for one in tensors]

    def _add(self, node: Any, place: torch.Tensor) -> None:
        self._set_address(node.contents, place)
        self._results.append(node)

    def _tensor(self, like: torch.Tensor) -> Any:
        """A leaf at this tensor's address."""
        sizes = [*reversed(like.shape), 1, 1, 1, 1][:_MOST_DIMENSIONS]
        leaf = self._ggml.ggml_new_tensor_4d(self._context, 0, *sizes)
        self._set_address(leaf.contents, like)
        return leaf

    @staticmethod
    def _set_address(tensor: Any, place: torch.Tensor) -> None:
        strides = [4 * stride for stride in reversed(place.stride())]
        beyond = strides[-1] * place.shape[0]
        for i in range(_MOST_DIMENSIONS):
            tensor.nb[i] = strides[i] if i < len(strides) else beyond
        tensor.data = place.data_ptr()


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.numel() > 0


def _has_rows(tensor: torch.Tensor) -> bool:
    return tensor.dim() <= _MOST_DIMENSIONS and tensor.stride(-1) == 1


def _without_ones(out: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
    """The tensors without the dimensions in which `out` has size 1."""
    kept = [i for i, size in enumerate(out.shape) if size > 1] or [0]
    return [
        one.as_strided([one.shape[i] for i in kept], [one.stride(i) for i in kept], one.storage_offset())
        for one in (out, *others)
    ]
