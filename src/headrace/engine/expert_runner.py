"""A layer's routed experts, as one function that transformers calls in place of each model's own.

The router has chosen; no expert has been touched yet. Rows are grouped by expert, so an expert is read once for all
its rows. Matmuls run in the order in which experts arrive. A row's result depends neither on that order nor on the rows
beside it. Every (row, expert) pair has its place, and a row's pairs are added up in the order of its choices.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from headrace.engine.expert_prefetch import ExpertPredictor
from headrace.engine.tensor_parallel import Shard, TensorParallelGroup
from headrace.errors import CheckpointError
from headrace.kernels import Backend, WeightSlice
from headrace.kernels.expert_mlp import ExpertShapes
from headrace.kernels.matmul import ExpertMatmul
from headrace.kernels.thresholds import EXPERTS_PER_CALL
from headrace.model.packed import PackedExperts
from headrace.stream.expert_stream import ExpertStream
from headrace.stream.readers import Spans


class ExpertRunner:
    """Runs the routed experts of one engine."""

    def __init__(
        self,
        stream: ExpertStream,
        kernels: Backend,
        spans: Spans | None,
        expert_predictor: ExpertPredictor,
        group: TensorParallelGroup,
    ):
        """`group`: the owners of the experts; each member computes its own, and they exchange results."""
        self.stream = stream
        self.expert_predictor = expert_predictor
        self.kernel_s = 0.0
        self._kernels = kernels
        self._spans = spans
        self._group = group
        self._plain: dict[int, ExpertShapes | None] = {}  # shapes for `_of_one_row`, by layer; None: unsupported

    def __call__(
        self,
        packed: PackedExperts,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        invariant_rows: int,
        chunks: Sequence[int] = (),
    ) -> torch.Tensor:
        """The weighted sum of the chosen experts' results.

        Args:
            packed: the layer's experts.
            hidden: activations (rows, hidden), fp32.
            ids: experts that each row chose, (rows, chosen).
            weights: router weights of the choices, (rows, chosen).
            invariant_rows: number of row-invariant rows, which come first.
            chunks: rows of each prompt chunk behind them, whose results depend on the chunk alone.

        Returns:
            (rows, hidden).
        """
        rows, chosen = ids.shape
        hidden = hidden.contiguous()
        if rows == invariant_rows == 1 and self._group.is_single and (shapes := self._plain_shapes(packed)) is not None:
            return self._of_one_row(packed, shapes, hidden, ids[0].numpy(), weights)
        order = ids.reshape(-1).argsort(stable=True)  # pairs of a row and an expert, expert after expert
        sizes = _counted(packed, ids.reshape(-1).numpy())
        owners = order // chosen  # the row of each pair
        firsts = [0, *sizes.cumsum().tolist()]
        pairs = hidden.new_empty((rows * chosen, hidden.shape[1]))
        idle = slice(firsts[packed.count], None)
        pairs[idle] = hidden[owners[idle]]
        self.expert_predictor.judge(packed.index, sizes)
        bundles = self.stream.bundles[packed.index]

        owners_of = self._group.expert_owners(packed.count)
        own_sizes = sizes[: packed.count] * (owners_of == self._group.rank)
        for ready in self.stream.fetch(packed.index, own_sizes, rows, partial(self._prefetch, packed, hidden)):
            start = time.perf_counter()
            for first in range(0, len(ready), EXPERTS_PER_CALL):
                members = []
                for expert, address in ready[first : first + EXPERTS_PER_CALL]:
                    mine = slice(firsts[expert], firsts[expert + 1])
                    slices = bundles[expert].slices(address)
                    own = hidden if rows == 1 else hidden[owners[mine]]
                    groups = _groups(owners[mine], invariant_rows, chunks)
                    members.append(_Member(expert, slices, own, pairs[mine], *groups))
                self._compute(packed, members)
            end = time.perf_counter()
            self.kernel_s += end - start
            if self._spans is not None:
                self._spans.add("compute", f"{len(ready)} experts", start, end)
        parts = [Shard(int(rank), firsts[e], firsts[e + 1]) for e, rank in enumerate(owners_of) if sizes[e]]
        self._group.all_gather(pairs, 0, parts)
        if packed.module.has_post_expert_norm:
            pairs = packed.module.post_expert_norm(pairs)
        placed = torch.empty_like(pairs)
        placed[order] = pairs
        return placed.view(rows, chosen, -1).mul_(weights.unsqueeze(-1)).sum(1)

    def _prefetch(self, packed: PackedExperts, hidden: torch.Tensor) -> None:
        if not self.stream.reads_always:
            return
        for layer, predicted in self.expert_predictor.predict(packed.index, hidden):
            owners = self._group.expert_owners(len(self.stream.bundles[layer]))
            self.stream.prefetch(layer, [expert for expert in predicted if owners[expert] == self._group.rank])

    def _plain_shapes(self, packed: PackedExperts) -> ExpertShapes | None:
        if packed.index not in self._plain:
            self._plain[packed.index] = packed.plain_shapes if self._kernels.has_expert_mlp else None
        return self._plain[packed.index]

    def _of_one_row(
        self,
        packed: PackedExperts,
        shapes: ExpertShapes,
        hidden: torch.Tensor,
        chosen: npt.NDArray[np.int64],
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """The same for a single row, which chooses no expert twice: one call for each group."""
        sizes = _counted(packed, chosen)
        pairs = hidden.new_empty((len(chosen), hidden.shape[1]))
        first_result, row_bytes = pairs.data_ptr(), 4 * hidden.shape[1]
        results = {expert: first_result + place * row_bytes for place, expert in enumerate(chosen.tolist())}
        if packed.identities:
            pairs[torch.from_numpy(chosen) >= packed.count] = hidden
        self.expert_predictor.judge(packed.index, sizes)
        bundles = self.stream.bundles[packed.index]

        for ready in self.stream.fetch(packed.index, sizes[: packed.count], 1, partial(self._prefetch, packed, hidden)):
            start = time.perf_counter()
            for first in range(0, len(ready), EXPERTS_PER_CALL):
                some = ready[first : first + EXPERTS_PER_CALL]
                addresses = [[address + offset for offset in bundles[expert].offsets] for expert, address in some]
                self._kernels.expert_mlp(hidden, shapes, addresses, [results[expert] for expert, _ in some])
            end = time.perf_counter()
            self.kernel_s += end - start
            if self._spans is not None:
                self._spans.add("compute", f"{len(ready)} experts", start, end)
        if packed.module.has_post_expert_norm:
            pairs = packed.module.post_expert_norm(pairs)
        return pairs.view(1, len(chosen), -1).mul_(weights.unsqueeze(-1)).sum(1)

    def _compute(self, packed: PackedExperts, members: Sequence["_Member"]) -> None:
        """Run some experts together: gate_up_proj, activation, down_proj."""
        module = packed.module
        up, down = packed.matrices(members[0].expert)
        split = len(up.slices)
        raised = members[0].x.new_empty((sum(len(member.x) for member in members), up.outputs))
        parts = torch.split(raised, [len(member.x) for member in members])
        self._multiply([(m, m.x, m.slices[:split], part) for m, part in zip(members, parts, strict=True)])
        if up.order is not None:
            raised = raised.index_select(1, up.order)
        if module.has_bias:
            raised = raised + _repeated(module.gate_up_proj_bias if module.has_gate else module.up_proj_bias, members)
        gated = module._apply_gate(raised) if module.has_gate else module.act_fn(raised)
        inner = torch.split(gated.contiguous(), [len(member.x) for member in members])
        self._multiply([(m, x, m.slices[split:], m.result) for m, x in zip(members, inner, strict=True)])
        if down.order is None and not module.has_bias:
            return
        for member in members:
            result = member.result if down.order is None else member.result.index_select(1, down.order)
            member.result.copy_(result + module.down_proj_bias[member.expert] if module.has_bias else result)

    def _multiply(self, matmuls: Sequence[tuple["_Member", torch.Tensor, Sequence[WeightSlice], torch.Tensor]]) -> None:
        """Multiply each x with the slices of a matrix, which are stacked by rows; put their results side by side."""
        jobs = []
        for member, x, slices, result in matmuls:
            column = 0
            for weight_slice in slices:
                height = weight_slice.k_split_rows or weight_slice.rows
                output = result[:, column : column + height]
                jobs.append(ExpertMatmul(x, weight_slice, output, member.invariant_rows, member.chunks))
                column += height
        self._kernels.matmul_each(jobs)


def _counted(packed: PackedExperts, chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Number of rows that chose each expert, zero-computation experts included."""
    choices = packed.count + packed.identities
    sizes = np.bincount(chosen, minlength=choices)
    if len(sizes) > choices:
        raise CheckpointError(
            f"the router of layer {packed.index} chose expert {len(sizes) - 1} of {choices}",
            hint="router and experts are of different models",
        )
    return sizes


class _Member(NamedTuple):
    """An expert of a group: its weights in memory, the rows that chose it, and where their results go."""

    expert: int
    slices: tuple[WeightSlice, ...]
    x: torch.Tensor
    result: torch.Tensor
    invariant_rows: int
    chunks: Sequence[int]


def _groups(owners: torch.Tensor, invariant_rows: int, chunks: Sequence[int]) -> tuple[int, Sequence[int]]:
    """(row-invariant rows, rows of each chunk) among the rows that chose an expert, in order."""
    if not chunks:
        return len(owners), ()
    bounds = np.cumsum([invariant_rows, *chunks])
    counts = np.diff(np.searchsorted(owners.numpy(), bounds), prepend=0)
    return int(counts[0]), counts[1:][counts[1:] > 0].tolist()


def _repeated(bias: torch.Tensor, members: Sequence[_Member]) -> torch.Tensor:
    """The bias of each member for each of its rows."""
    counts = torch.tensor([len(member.x) for member in members])
    return torch.repeat_interleave(bias[[member.expert for member in members]], counts, 0)
