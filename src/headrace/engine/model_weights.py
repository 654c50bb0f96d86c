"""The streams of a model's weights: dense weights, those of prefill alone, and experts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from headrace.checkpoint import Checkpoint, Tensor
from headrace.engine.expert_prefetch import ExpertPredictor
from headrace.engine.expert_runner import ExpertRunner
from headrace.engine.tensor_parallel import TensorParallelGroup
from headrace.engine.timeline import Trace
from headrace.kernels import DECODE_MAX_ROWS, WeightSlice
from headrace.kernels.backend import Backend
from headrace.model import ModelSkeleton
from headrace.model.trace import LinearStep, Step
from headrace.stream import WeightStream
from headrace.stream.expert_cache import ExpertCache
from headrace.stream.expert_stream import ExpertCounters, ExpertStream
from headrace.stream.layout import make_layout
from headrace.stream.virtual import FileSet


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamOptions:
    """The plan's decisions about the weight stream."""

    pinned_rows: Mapping[str, int]
    unit_bytes: int
    slots: int
    decode_only_slots: int = 0  # ring slots among `slots` that exist only while prefill memory is reused
    readers: int
    pad_decode_rows_to_tiles: bool = False  # kernel of row-invariant rows (`Kernels`)
    repacked_types: frozenset[str] = frozenset()  # types whose pinned rows get ggml's repacked layout
    repack_in_place: bool = False  # repacking without a copy: no memory, but longer prompts
    map_pinned: bool = False  # pinned rows are pages of the file where nothing writes to them, not a copy
    pinned_read_bytes: int = 4 << 20
    # Rows behind the pinned ones, pinned while no prompt needs the memory.
    decode_pinned_rows: Mapping[str, int] = field(default_factory=dict)
    decode_pinned_max_rows: int = DECODE_MAX_ROWS  # max rows of a pass that reuses prefill memory
    memory_limit_bytes: int | None = None  # max bytes of the process while prefill memory is reused
    expert_slots: int = 0  # number of experts that fit into memory; 0: all
    expert_readers: int = 4
    expert_scores: npt.NDArray[np.float32] | None = None  # frequency of each expert in earlier runs
    prefill_only_slots: int = 0  # ring slots for sequence-start weights; 0: as many as `slots`


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamTotals:
    """Counters of all streams at one moment."""

    read_bytes: int
    stall_s: float
    expert_kernel_s: float
    experts: ExpertCounters


class ModelWeights:
    """All weights of a model that a pass multiplies, in their streams."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        skeleton: ModelSkeleton,
        options: StreamOptions,
        kernels: Backend,
        files: FileSet,
        trace: Trace | None,
        group: TensorParallelGroup,
        unpacked: frozenset[str] = frozenset(),
    ):
        """Lay the streams out; nothing is read before the first pass.

        Args:
            checkpoint: the header of the model.
            skeleton: the order of its weights.
            options: the plan's decisions.
            kernels: multiply them.
            files: the open files.
            trace: gets spans of reading and waiting.
            group: the owners of the rows.
            unpacked: names of tensors that are dequantised, so never repacked.
        """
        self._kernels = kernels
        self._files = files
        self._trace = trace
        self._group = group
        self._options = options
        self._unpacked = unpacked
        self._streams: list[WeightStream] = []
        self._places: dict[Step, tuple[WeightStream, int]] = {}
        self.steps = skeleton.steps
        # Steps of a pass that continues a sequence.
        self.later_steps = [step for step in skeleton.steps if not step.prefill_only]
        self.stream = self._make_stream(self.later_steps, options.slots, options.decode_only_slots, repacks=True)
        if len(self.later_steps) < len(skeleton.steps):
            prefill_only = [step for step in skeleton.steps if step.prefill_only]
            self._make_stream(prefill_only, options.prefill_only_slots or options.slots, 0, repacks=False)
        predictor = ExpertPredictor(skeleton.experts, checkpoint.number("expert_used_count", 1), kernels)
        self.experts = self._make_experts(skeleton, predictor)

    def _make_stream(self, steps: Sequence[Step], slots: int, decode_only_slots: int, repacks: bool) -> WeightStream:
        """A stream of these steps' weights, in order, for every pass."""
        options = self._options
        linears = [step for step in steps if isinstance(step, LinearStep)]
        layout = make_layout(
            [step.tensors for step in linears],
            options.pinned_rows,
            options.unit_bytes,
            options.pinned_read_bytes,
            options.decode_pinned_rows,
            self._group.owned,
        )
        stream = WeightStream(
            layout,
            slots=slots,
            decode_only_slots=decode_only_slots,
            readers=options.readers,
            file_of=self._files.__getitem__,
            spans=self._trace,
            on_pinned=self._repack if repacks and options.repacked_types else None,
            may_map=lambda tensor: options.map_pinned and not (options.repack_in_place and self._is_repacked(tensor)),
        )
        self._streams.append(stream)
        self._places |= {step: (stream, group) for group, step in enumerate(linears)}
        return stream

    def _make_experts(self, skeleton: ModelSkeleton, predictor: ExpertPredictor) -> ExpertRunner | None:
        if not skeleton.experts:
            return None
        options, layers = self._options, skeleton.expert_slices
        slots = options.expert_slots or sum(map(len, layers))
        cache = ExpertCache(
            layers=len(layers), experts=max(map(len, layers)), slots=slots, scores=options.expert_scores
        )
        stream = ExpertStream(
            layers,
            cache=cache,
            slots=slots,
            readers=options.expert_readers if options.readers else 0,
            file_of=self._files.__getitem__,
            spans=self._trace,
        )
        return ExpertRunner(stream, self._kernels, self._trace, predictor, self._group)

    def _repack(self, weight_slice: WeightSlice, tensor: Tensor) -> WeightSlice:
        if not self._is_repacked(tensor):
            return weight_slice
        return self._kernels.repack(weight_slice, tensor.columns, self._options.repack_in_place)

    def _is_repacked(self, tensor: Tensor) -> bool:
        return tensor.type in self._options.repacked_types and tensor.name not in self._unpacked

    def place(self, step: Step) -> tuple[WeightStream, int]:
        """The stream of a step's weights, and the index of its weight group there."""
        return self._places[step]

    @property
    def reads_always(self) -> bool:
        """True if a decode pass reads."""
        experts = self.experts is not None and self.experts.stream.reads_always
        return self.stream.layout.reads_always or experts

    @property
    def prefill_is_row_invariant(self) -> bool:
        """True if no matmul of a prompt row depends on the rows beside it, as with ggml's tile kernel."""
        linears = [tensor for step in self.steps if isinstance(step, LinearStep) for tensor in step.tensors]
        experts = [
            read.part.tensor
            for layer in ([] if self.experts is None else self.experts.stream.bundles)
            for bundle in layer
            for read in bundle.reads
        ]
        return all(
            self._kernels.has_tiles(tensor.type, tensor.columns) and not tensor.k_splits
            for tensor in (*linears, *experts)
        )

    @property
    def read_bytes(self) -> int:
        """Bytes read so far, without those of experts."""
        return sum(stream.counters.read_bytes for stream in self._streams)

    def totals(self) -> StreamTotals:
        """Counters of all streams now."""
        experts = ExpertCounters() if self.experts is None else replace(self.experts.stream.counters)
        return StreamTotals(
            read_bytes=self.read_bytes + experts.read_bytes,
            stall_s=sum(stream.counters.stall_s for stream in self._streams) + experts.stall_s,
            expert_kernel_s=self.experts.kernel_s if self.experts is not None else 0.0,
            experts=experts,
        )

    def rewind(self) -> None:
        """Abort the pass in progress: the next one starts afresh."""
        for stream in self._streams:
            stream.rewind()
        if self.experts is not None:
            self.experts.stream.rewind()

    def close(self) -> None:
        """Stop the readers. Safe to call twice."""
        for stream in self._streams:
            stream.close()
        if self.experts is not None:
            self.experts.stream.close()
