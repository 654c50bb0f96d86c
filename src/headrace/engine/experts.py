"""A layer's routed experts, as one function that transformers calls in place of each model's own.

The router has chosen; nothing of any expert has been touched yet. Rows are grouped by expert, so an expert is read once
however many rows chose it, and products run in the order in which experts arrive. What a row gets does not depend on that
order, nor on the rows beside it: every (row, expert) pair has its place, and a row's pairs are added up in the order of its
choices.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch

from headrace.errors import CheckpointError
from headrace.kernels import Kernels, Piece, ReferenceKernels
from headrace.model.packed import PackedExperts
from headrace.stream.experts import ExpertStream
from headrace.stream.weights import Spans


class ExpertProducts:
    """Multiplies the experts of one engine."""

    def __init__(self, stream: ExpertStream, kernels: Kernels | ReferenceKernels, spans: Spans | None):
        self.stream = stream
        self.kernel_s = 0.0
        self._kernels = kernels
        self._spans = spans

    def __call__(
        self, packed: PackedExperts, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, exact: bool
    ) -> torch.Tensor:
        """The weighted sum of the chosen experts' results.

        Args:
            packed: the layer's experts.
            hidden: activations (rows, hidden), fp32.
            ids: which experts each row chose, (rows, chosen).
            weights: of the choices, (rows, chosen).
            exact: whether each row is computed as if it were alone.

        Returns:
            (rows, hidden).
        """
        rows, chosen = ids.shape
        hidden = hidden.contiguous()
        order = ids.reshape(-1).argsort(stable=True)
        sizes = torch.bincount(ids.reshape(-1), minlength=packed.count).numpy()
        if len(sizes) > packed.count:
            raise CheckpointError(
                f"the router of layer {packed.index} chose expert {len(sizes) - 1} of {packed.count}",
                hint="router and experts are of different models",
            )
        firsts = [0, *sizes.cumsum().tolist()]
        pairs = hidden.new_empty((rows * chosen, hidden.shape[1]))
        for ready in self.stream.fetch(packed.index, sizes, rows):
            start = time.perf_counter()
            places = [order[firsts[expert] : firsts[expert + 1]] for expert, _ in ready]
            self._group(packed, ready, hidden, places, chosen, pairs, exact)
            end = time.perf_counter()
            self.kernel_s += end - start
            if self._spans is not None:
                self._spans.add("compute", f"{len(ready)} experts", start, end)
        if getattr(packed.module, "has_post_expert_norm", False):
            pairs = packed.module.post_expert_norm(pairs)
        return (pairs.view(rows, chosen, -1) * weights.unsqueeze(-1)).sum(1)

    def _group(
        self,
        packed: PackedExperts,
        ready: Sequence[tuple[int, tuple[Piece, ...]]],
        hidden: torch.Tensor,
        places: Sequence[torch.Tensor],
        chosen: int,
        pairs: torch.Tensor,
        exact: bool,
    ) -> None:
        """Some experts together: up, gate, down. `places` are the pairs of each, by their numbers."""
        module: Any = packed.module
        every = torch.cat(list(places)) if len(places) > 1 else places[0]
        owners = torch.repeat_interleave(
            torch.tensor([expert for expert, _ in ready]), torch.tensor([len(place) for place in places])
        )
        x = hidden[every // chosen]  # (pairs of the group, hidden)
        up, down = packed.matrices(ready[0][0])
        raised = self._products(ready, slice(0, len(up.slices)), x, places, up.outputs, exact)
        if up.order is not None:
            raised = raised.index_select(1, up.order)
        if module.has_bias:
            raised = raised + (module.gate_up_proj_bias if module.has_gate else module.up_proj_bias)[owners]
        gated = module._apply_gate(raised) if module.has_gate else module.act_fn(raised)
        result = self._products(ready, slice(len(up.slices), None), gated.contiguous(), places, down.outputs, exact)
        if down.order is not None:
            result = result.index_select(1, down.order)
        if module.has_bias:
            result = result + module.down_proj_bias[owners]
        pairs[every] = result

    def _products(
        self,
        ready: Sequence[tuple[int, tuple[Piece, ...]]],
        which: slice,
        x: torch.Tensor,
        places: Sequence[torch.Tensor],
        outputs: int,
        exact: bool,
    ) -> torch.Tensor:
        """Each expert's rows of x times one of its matrices, whose slices lie one under another."""
        result = x.new_empty((x.shape[0], outputs))
        jobs, at = [], 0
        for (_, pieces), place in zip(ready, places, strict=True):
            part = slice(at, at + len(place))
            at += len(place)
            column = 0
            for piece in pieces[which]:
                height = piece.slab_rows or piece.rows
                jobs.append((x[part], piece, result[part, column : column + height]))
                column += height
        self._kernels.multiply_each(jobs, exact)
        return result
