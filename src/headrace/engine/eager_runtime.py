"""The runtimes that compute: eagerly, or while the calls are captured for replay.

The first linear of a step computes those of all its linears, on the same activations. Streamed weights are multiplied as
they arrive. The order of the weights was traced; a model that asks in another order is refused.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch

from headrace.checkpoint import Checkpoint, Tensor
from headrace.engine.attention import PackedAttention
from headrace.engine.capture import CapturedStep
from headrace.engine.mla import KvBSplit, split_kv_b
from headrace.engine.model_weights import ModelWeights
from headrace.engine.tensor_parallel import TensorParallelGroup
from headrace.engine.tensor_reader import TensorReader
from headrace.engine.timeline import Trace
from headrace.errors import CheckpointError, UnsupportedError
from headrace.kernels.backend import Backend
from headrace.model.matrix import Matrix
from headrace.model.packed import PackedExperts, PackedLinear
from headrace.model.runtime import AttentionCall
from headrace.model.trace import LinearStep, Step
from headrace.stream.weights import Batch


@dataclass(eq=False)
class PassState:
    """State of one pass. A step makes it."""

    order: Sequence[Step]  # steps of the pass
    rows: int
    invariant_rows: int  # number of row-invariant rows, which come first
    chunks: Sequence[int]  # rows of each prompt chunk behind them
    inspects: bool = False  # each result is checked for NaN and infinity
    position: int = 0  # steps begun
    done: int = 0  # steps computed
    kernel_s: float = 0.0
    pending: dict[PackedLinear, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    on_progress: Callable[[int, int], None] | None = None  # callback with (steps done, steps of the pass)

    def next_step(self, called: PackedLinear | PackedExperts, path: str) -> Step:
        """The next traced step. Raises `UnsupportedError` if it does not start with this linear, or is of other experts."""
        step = self.order[self.position] if self.position < len(self.order) else None
        self.position += 1
        if step is None or called is not (step.linears[0] if isinstance(step, LinearStep) else step.experts):
            raise UnsupportedError(
                f"{path}: the model asks for its weights in an order that depends on what it computes",
                hint="use a GGUF file of the model with llama.cpp",
            )
        return step

    def finish_step(self) -> None:
        """Count another computed step."""
        self.done += 1
        if self.on_progress is not None:
            self.on_progress(self.done, len(self.order))


@dataclass(frozen=True, kw_only=True)
class RuntimeParts:
    """Parts of an engine that its runtimes share."""

    checkpoint: Checkpoint
    kernels: Backend
    weights: ModelWeights
    attention: PackedAttention
    reader: TensorReader
    trace: Trace | None
    group: TensorParallelGroup
    head: Any  # output embeddings, if the model computes them only for rows that need logits


class EagerRuntime:
    """Computes each call at once. `begin` sets the pass."""

    def __init__(self, parts: RuntimeParts):
        self.parts = parts
        self._kernels = parts.kernels
        self._weights = parts.weights
        self._state = PassState((), 0, 0, ())
        self._kv_b: dict[Any, KvBSplit] = {}  # matrices of MLA layers that are about to attend
        self._plain = torch.empty(0)  # dequantised `kv_b_proj` of the current MLA layer

    def begin(self, state: PassState) -> None:
        """Start a pass, or a further forward of one."""
        self._state = state

    # -- how calls are made -----------------------------------------------------------------------------------------

    def _empty(self, shape: Sequence[int]) -> torch.Tensor:
        """An fp32 tensor for a result."""
        return torch.empty(tuple(shape))

    def _do(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function that writes to tensors among its arguments."""
        function(*arguments)

    def _call(self, function: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
        """Call a function that returns a tensor."""
        return function(*arguments)

    # -- called by the model's modules ------------------------------------------------------------------------------

    def linear(self, linear: PackedLinear, x: torch.Tensor) -> torch.Tensor:
        """As `Runtime.linear`."""
        pending = self._state.pending
        ready = pending.pop(linear, None)
        if ready is None:
            self._compute(linear, x)
            ready = pending.pop(linear)
        source, out = ready
        assert source is x, "linears of a step were called with different activations"
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """As `Runtime.rms_norm`."""
        return self._of_rows(self._kernels.rms_norm, x, weight, eps)

    def silu(self, x: torch.Tensor) -> torch.Tensor:
        """As `Runtime.silu`."""
        return self._of_rows(self._kernels.silu, x)

    def gather(self, tensor: Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """As `Runtime.gather`."""
        return self._call(self._rows_of, tensor, token_ids)

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """As `Runtime.attend`."""
        attention, layer = self.parts.attention, int(call.module.layer_idx)  # type: ignore[arg-type]
        kv_b = self._kv_b.pop(call.module, None)
        if kv_b is not None:
            return attention.attend_mla(layer, kv_b, call.query[0], call.key, call.value, call.scaling, call.window)
        query, key, value = call.query, call.key, call.value
        out = self._empty((1, query.shape[2], query.shape[1], value.shape[3]))
        self._do(attention.attend, out, layer, query, key, value, call.scaling, call.window, call.softcap, call.sinks)
        return out

    def expand_kv(self, layer: Any, vectors: torch.Tensor, rotated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Runtime.expand_kv`: attention gets the cached latents and the dequantised `kv_b_proj`."""
        linear: PackedLinear = layer.kv_b_proj
        step = self._state.next_step(linear, self.parts.checkpoint.path)
        assert isinstance(step, LinearStep)
        sizes = [tensor.rows * tensor.columns for tensor in step.tensors]
        if self._plain.numel() < sum(sizes):
            self._plain = torch.empty(sum(sizes))
        flat = torch.split(self._plain[: sum(sizes)], sizes)
        outputs = [one.view(tensor.outputs, -1) for one, tensor in zip(flat, step.tensors, strict=True)]
        self._use_weights(step, lambda slices: self._kernels.unpack_all(slices, outputs))
        gather_outputs(self.parts.group, step, outputs, dim=0)
        found = dict(zip((tensor.name for tensor in step.tensors), outputs, strict=True))
        self._kv_b[layer] = split_kv_b(layer, linear.matrix, found)
        return rotated, vectors

    def experts(
        self, packed: PackedExperts, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """As `Runtime.experts`."""
        self._state.next_step(packed, self.parts.checkpoint.path)
        shape, state = hidden.shape, self._state
        rows = hidden.reshape(-1, shape[-1]), ids.reshape(-1, ids.shape[-1]), weights.reshape(-1, weights.shape[-1])
        invariant, chunks = state.invariant_rows, state.chunks
        if invariant + sum(chunks) != len(rows[0]):
            invariant, chunks = len(rows[0]), []
        return self._call(self._sum_experts, packed, *rows, invariant, chunks).view(shape)

    def route(self, forward: Callable[..., Any], hidden: torch.Tensor, *others: Any) -> Any:
        """As `Runtime.route`: row by row for row-invariant rows, and chunk by chunk for the others.

        torch sums one row in another order than several.
        """
        rows, state = hidden.shape[-2], self._state
        invariant = min(state.invariant_rows, rows)
        chunks = state.chunks if invariant + sum(state.chunks) == rows else [rows - invariant] * (invariant < rows)
        if invariant + len(chunks) < 2:
            return forward(hidden, *others)

        def part(first: int, last: int) -> Any:
            own = [one[..., first:last] if _is_of_rows(one, rows) else one for one in others]
            return forward(hidden[..., first:last, :], *own)

        parts = [part(row, row + 1) for row in range(invariant)]
        for last in accumulate(chunks, initial=invariant):
            if last > invariant:
                parts.append(part(invariant, last))
                invariant = last
        if isinstance(parts[0], torch.Tensor):
            return torch.cat(parts, -2)
        return tuple(torch.cat(one, -2) for one in zip(*parts, strict=True))

    # -- computing --------------------------------------------------------------------------------------------------

    def _compute(self, linear: PackedLinear, x: torch.Tensor) -> None:
        state = self._state
        step = state.next_step(linear, self.parts.checkpoint.path)
        assert isinstance(step, LinearStep)
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        # The head gets only rows that need logits. They are few: all are row-invariant, even if they are the whole pass.
        whole = rows.shape[0] == state.rows and linear is not self.parts.head
        invariant = state.invariant_rows if whole else rows.shape[0]
        outputs = [self._empty((rows.shape[0], tensor.outputs)) for tensor in step.tensors]
        self._do(self.multiply, step, rows, outputs, invariant)
        found = dict(zip((tensor.name for tensor in step.tensors), outputs, strict=True))
        for member in step.linears:
            state.pending[member] = (x, _assembled(member.matrix, found).reshape(*x.shape[:-1], -1))

    def multiply(self, step: LinearStep, rows: torch.Tensor, outputs: Sequence[torch.Tensor], invariant: int) -> None:
        """Run a step's matmuls with its pinned and its streamed weights."""
        rows = rows.view(rows.shape)  # the kernels cache converted activations as long as this tensor lives
        state = self._state
        chunks = state.chunks if invariant < rows.shape[0] else ()
        self._use_weights(step, lambda slices: self._kernels.matmul(rows, slices, outputs, invariant, chunks))
        gather_outputs(self.parts.group, step, outputs, dim=1)
        if state.inspects:
            for tensor, output in zip(step.tensors, outputs, strict=True):
                check_finite(self.parts.checkpoint.path, tensor.name, rows, output)

    def _use_weights(self, step: LinearStep, use: Callable[[Batch], None]) -> None:
        """Call `use` with each batch of a step's weights as it arrives."""
        stream, group = self._weights.place(step)
        for slices in stream.weights_of(group):
            start = time.perf_counter()
            use(slices)
            end = time.perf_counter()
            self._state.kernel_s += end - start
            if self.parts.trace is not None:
                self.parts.trace.add("compute", step.tensors[0].name, start, end)
        self._state.finish_step()

    def record_fused(self, steps: Sequence[LinearStep], start: float, end: float) -> None:
        """Record steps that were computed in one fused call."""
        self._state.kernel_s += end - start
        if self.parts.trace is not None:
            self.parts.trace.add("compute", steps[0].tensors[0].name, start, end)
        for _ in steps:
            self._state.finish_step()

    def _of_rows(self, function: Callable[..., None], x: torch.Tensor, *others: Any) -> torch.Tensor:
        """Apply a kernel to every row of x: (..., columns), fp32."""
        rows = x.float().reshape(-1, x.shape[-1])
        if rows.stride(-1) != 1:
            rows = rows.contiguous()
        out = self._empty(rows.shape)
        if rows.numel():
            self._do(function, out, rows, *others)
        return out.view(x.shape)

    def _rows_of(self, tensor: Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        found = self.parts.reader.rows(tensor, token_ids)
        if self._state.inspects:
            check_finite(self.parts.checkpoint.path, tensor.name, token_ids, found)
        return found

    def _sum_experts(self, packed: PackedExperts, hidden: torch.Tensor, *arguments: Any) -> torch.Tensor:
        experts = self._weights.experts
        assert experts is not None
        out = experts(packed, hidden, *arguments)
        if self._state.inspects:
            check_finite(self.parts.checkpoint.path, f"experts of layer {packed.index}", hidden, out)
        self._state.finish_step()
        return out


class CapturingRuntime(EagerRuntime):
    """Computes each call, and records it in a captured step. Replayed calls are those of this runtime."""

    def __init__(self, parts: RuntimeParts):
        super().__init__(parts)
        self._capture: CapturedStep | None = None

    @contextmanager
    def capturing(self, capture: CapturedStep) -> Iterator[None]:
        """Record calls in this capture within."""
        self._capture = capture
        try:
            yield
        finally:
            self._capture = None

    @property
    def _recording(self) -> CapturedStep:
        assert self._capture is not None
        return self._capture

    def _empty(self, shape: Sequence[int]) -> torch.Tensor:
        return self._recording.empty(shape)

    def _do(self, function: Callable[..., None], *arguments: Any) -> None:
        self._recording.do(function, *arguments)

    def _call(self, function: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
        return self._recording.call(function, *arguments)

    def _of_rows(self, function: Callable[..., None], x: torch.Tensor, *others: Any) -> torch.Tensor:
        if self._recording.is_recording:
            return super()._of_rows(function, x, *others)
        out = torch.empty(x.shape)  # within a recorded call: only that call is recorded
        rows = x.float().reshape(-1, x.shape[-1]).contiguous()
        if rows.numel():
            function(out.view(rows.shape), rows, *others)
        return out

    def expand_kv(self, layer: Any, vectors: torch.Tensor, rotated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Runtime.expand_kv`; the step cannot be captured."""
        self._recording.mark_uncapturable("a matrix is unpacked")
        return super().expand_kv(layer, vectors, rotated)


def gather_outputs(group: TensorParallelGroup, step: LinearStep, outputs: Sequence[torch.Tensor], dim: int) -> None:
    """Get the outputs of the rows that other members of the group own."""
    for tensor, output in zip(step.tensors, outputs, strict=True):
        group.all_gather(output, dim, group.shards(tensor))


def check_finite(path: str, what: str, before: torch.Tensor, after: torch.Tensor) -> None:
    """Raise `CheckpointError` if the input or the output of tensor `what` holds NaN or infinity."""
    if not (has_non_finite(before) or has_non_finite(after)):
        return
    found = f"the input of `{what}` is" if has_non_finite(before) else f"the output of `{what}` is"
    raise CheckpointError(
        f"{path}: {found} not finite",
        hint="it holds NaN, infinity or huge values: the file is damaged, or was converted with an overflow",
    )


def has_non_finite(value: torch.Tensor) -> bool:
    """True if a tensor holds NaN or infinity."""
    return value.is_floating_point() and not bool(value.isfinite().all())


def _is_of_rows(value: Any, rows: int) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_floating_point() and value.shape[-1:] == (rows,)


def _assembled(matrix: Matrix, found: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Matmul results of a matrix from those of its tensors: (rows, outputs)."""
    parts = [
        found[part.tensor.name] if part.whole else found[part.tensor.name][:, part.first : part.first + part.rows]
        for part in matrix.slices
    ]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return out if matrix.order is None else out.index_select(1, matrix.order)
