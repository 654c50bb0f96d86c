"""Operations that follow one another on fixed places, done by ggml in one graph.

Between the products of a layer lie some twenty small operations: a norm, biases, the turning of queries and keys, a gate,
sums. Each takes torch 4 to 70 us for one row, most of it to be called, and the next product starts its threads anew. In one
graph they are done by the threads of the products. Sums and products of two numbers are rounded as torch rounds them; norms
and gates are ggml's everywhere (`Kernels.rms_norm`, `Kernels.silu`): so results are the same, bit for bit.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from headrace.kernels.attention_graph import AttentionNodes, Heads, scratch_numbers
from headrace.kernels.ggml_graph import Graph, MatmulPointers, MatmulShape, Workers
from headrace.kernels.repack import Repacking

_MOST_DIMENSIONS = 4
_LANES = 16  # numbers that ggml's gates take at a time; what is left over is rounded in another way
_SHARED_NUMBERS = 2048  # from so many on, threads share an operation on one row


class FusedGraph(Graph):
    """A graph that is put together operation by operation, then computed as often as needed.

    Every method adds an operation whose operands and result lie where these tensors lie now, and says whether ggml can do it.
    """

    def __init__(self, workers: Workers, most: int, repacking: Repacking):
        super().__init__(workers, most)
        self._threads = workers.threads
        self._repacking = repacking
        self._results: list[Any] = []
        self._scratch = np.empty(0, np.float32)  # of all attentions
        self._kept: list[torch.Tensor] = []  # what lies nowhere else

    def finalize(self, dots: bool) -> None:
        """Nothing more is added. `dots` as for `MatmulGraph`."""
        self.plan(self._results, dots)

    def matmul(self, parts: Sequence[MatmulShape], operands: Sequence[MatmulPointers]) -> bool:
        """MatmulGraph of single rows."""
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
        """a + b, a - b, a * b or a / b, by torch's name for it; b as broadcast to the shape of a and `out`."""
        if not isinstance(b, torch.Tensor):
            b = torch.tensor([b], dtype=torch.float32)
            self._kept.append(b)
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
        """x to `out`, of one shape."""
        if not (_is_plain(x) and _is_plain(out)):
            return False
        out, x = _without_ones(out, x)
        if not _has_rows(out) or not _has_rows(x):
            return False
        self._add(self._ggml.ggml_cont(self._context, self._tensor(x)), out)
        return True

    def select(self, out: torch.Tensor, x: torch.Tensor, order: torch.Tensor) -> bool:
        """The numbers of x, a single row, in another order."""
        if x.numel() != x.shape[-1] or not (_is_plain(x) and x.is_contiguous() and out.is_contiguous()):
            return False
        order = order.to(torch.int32)
        self._kept.append(order)
        numbers, places = self.tensor("F32", 1, x.numel()), self.tensor("I32", order.numel())
        numbers.contents.data, places.contents.data = x.data_ptr(), order.data_ptr()
        node = self.add("get_rows", numbers, places)
        node.contents.data = out.data_ptr()
        self._results.append(node)
        return True

    def attend(self, heads: Heads, most: int, scale: float) -> AttentionNodes:
        """Attention of a row over at most so many positions that lie in fp16, to which its own is added."""
        if self._scratch.size < scratch_numbers(heads, most):
            self._scratch = np.empty(scratch_numbers(heads, most), np.float32)
        attending = AttentionNodes(self, heads, most, scale, True, self._scratch)
        self._results += attending.results
        return attending

    def _shared(self, *tensors: torch.Tensor) -> list[torch.Tensor] | None:
        """All of them with a row for each thread, where there are many numbers without a gap."""
        count = tensors[0].numel()
        if (
            count < _SHARED_NUMBERS
            or count % (_LANES * self._threads)
            or not all(one.is_contiguous() for one in tensors)
        ):
            return None
        return [one.view(self._threads, -1) for one in tensors]

    def _add(self, node: Any, place: torch.Tensor) -> None:
        self._put(node.contents, place)
        self._results.append(node)

    def _tensor(self, like: torch.Tensor) -> Any:
        """A leaf that lies where this tensor lies."""
        sizes = [*reversed(like.shape), 1, 1, 1, 1][:_MOST_DIMENSIONS]
        leaf = self._ggml.ggml_new_tensor_4d(self._context, 0, *sizes)
        self._put(leaf.contents, like)
        return leaf

    @staticmethod
    def _put(tensor: Any, place: torch.Tensor) -> None:
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
    """All of them without the dimensions in which `out` has a single number."""
    kept = [i for i, size in enumerate(out.shape) if size > 1] or [0]
    return [
        one.as_strided([one.shape[i] for i in kept], [one.stride(i) for i in kept], one.storage_offset())
        for one in (out, *others)
    ]
