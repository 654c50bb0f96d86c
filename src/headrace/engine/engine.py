"""The engine runs passes: new rows of several sequences go in, logits come out, and the weights are streamed once.

It ties together the model's modules, the weight stream and the kernels. When a module calls a linear, the engine multiplies
with the weights of its step as the stream delivers them.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from headrace.checkpoint import Checkpoint, Tensor
from headrace.engine.attention import CacheOverflow, ConcatenatedCache, Entry, KVCache, PackedAttention
from headrace.engine.capture import CaptureCache, CapturedStep
from headrace.engine.expert_prefetch import ExpertPredictor
from headrace.engine.expert_runner import ExpertRunner
from headrace.engine.fuse import Fuser
from headrace.engine.mla import is_mla, split_kv_b
from headrace.engine.native_cache import (
    NativeCache,
    arguments_for,
    has_recurrent_state,
    memory_of,
    parameters_of,
    sees_a_window,
    sees_chunks,
    trial_of,
)
from headrace.engine.plain_dtypes import plain_values
from headrace.engine.pooled_allocation import PooledAllocation
from headrace.engine.timeline import PassLog, PassStats, Trace
from headrace.errors import CheckpointError, ContextError, UnsupportedError
from headrace.kernels import DECODE_MAX_ROWS, Kernels, ReferenceKernels, WeightSlice
from headrace.model import ModelSkeleton, PackedLinear, build_skeleton
from headrace.model.build import AttentionMode, Hooks
from headrace.model.matrix import Matrix
from headrace.model.packed import PackedExperts
from headrace.model.trace import ExpertStep, LinearStep, Step, Tracer
from headrace.process import release_unused, resident_bytes
from headrace.stream import Arena, WeightFile, WeightStream
from headrace.stream.arena import aligned
from headrace.stream.expert_cache import ExpertCache
from headrace.stream.expert_stream import ExpertCounters, ExpertStream
from headrace.stream.files import File
from headrace.stream.layout import make_layout
from headrace.stream.virtual import FileSet
from headrace.stream.weights import Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """New tokens of one sequence, and the number of last rows that need logits.

    The results of row-invariant rows do not depend on the rows beside them. Other rows are one prompt chunk, for the
    faster prefill kernels. Their results depend on that chunk, not on the rest of the pass.
    `row_invariant=None`: True up to `DECODE_MAX_ROWS` rows, as for decoded and draft tokens.

    A sequence may have several chunks in a pass, in their order.
    """

    cache: KVCache | NativeCache
    tokens: Sequence[int]
    logits: int = 1
    row_invariant: bool | None = None

    @property
    def is_row_invariant(self) -> bool:
        """True if these rows are computed one by one."""
        return len(self.tokens) <= DECODE_MAX_ROWS if self.row_invariant is None else self.row_invariant


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
    pinned_read_bytes: int = 4 << 20
    # Rows behind the pinned ones, pinned while no prompt needs the memory.
    decode_pinned_rows: Mapping[str, int] = field(default_factory=dict)
    decode_pinned_max_rows: int = DECODE_MAX_ROWS  # max rows, all row-invariant, of a pass that reuses prefill memory
    memory_limit_bytes: int | None = None  # max bytes of the process while prefill memory is reused
    expert_slots: int = 0  # number of experts that fit into memory; 0: all
    expert_readers: int = 4
    expert_scores: npt.NDArray[np.float32] | None = None  # frequency of each expert in earlier runs
    prefill_only_slots: int = 0  # ring slots for sequence-start weights; 0: as many as `slots`


MAX_CACHED_ROW_BYTES = 4 << 20  # max bytes of cached embedding rows
_INSPECTED_TOKENS = 32  # max tokens of the pass that locates values that are not finite


class Engine:
    """One model, ready to step. A context manager; `close` stops the readers and closes files and kernels."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: "StreamOptions | Callable[[ModelSkeleton], StreamOptions]",
        kernels: Kernels | ReferenceKernels,
        *,
        trace: Trace | None = None,
        open_file: Callable[[str], File] = WeightFile,
    ):
        """Builds the model and the stream; nothing large is read before the first step.

        `options` may be a function: it is called after the model is built, before memory for weights is taken.
        """
        self.checkpoint = checkpoint
        self.kernels = kernels
        self.trace = trace
        self.passes = PassLog()
        self.on_progress: Callable[[int, int], None] | None = None  # callback with (steps done, steps of the pass)
        self.experts: ExpertRunner | None = None
        self._capture: CapturedStep | None = None  # capture in progress
        own = kernels if isinstance(kernels, Kernels) else None
        self._attention = PackedAttention(own)
        self._captures = CaptureCache(list if own is None else Fuser(own, self._attention, self, self._multiply))
        self._tracer: Tracer | None = None
        self._name = f"headrace_{id(self):x}"
        self._streams: list[WeightStream] = []
        self._places: dict[Step, tuple[WeightStream, int]] = {}
        self._pending: dict[PackedLinear, tuple[torch.Tensor, torch.Tensor]] = {}
        # Cached embedding rows, the latest last.
        self._rows_read: dict[tuple[str, int], np.ndarray[Any, np.dtype[np.uint8]]] = {}
        self._rows_read_bytes = 0
        self._scratch = Arena(1 << 20)
        self._plain = torch.empty(0)  # dequantised `kv_b_proj` of the current MLA layer
        self._kernel_s = 0.0
        self._reuses_prefill_memory: bool | None = None  # decision since the last prompt; None: not yet made
        self._broken_off = False  # True while the streams are in the middle of an aborted pass
        self._step = self._steps_done = 0
        self._rows = self._invariant_rows = 0
        self._chunks: list[int] = []  # rows of each prompt chunk, behind the row-invariant rows
        self._closed = False
        self._inspects = False  # True while each result is checked for NaN and infinity
        self._files = FileSet(checkpoint.paths, checkpoint.virtual, open_file)
        _THREADS.open()
        try:
            self._build(options)
        except BaseException:
            self.close()
            raise

    def _build(self, options: "StreamOptions | Callable[[ModelSkeleton], StreamOptions]") -> None:
        checkpoint = self.checkpoint
        AttentionInterface.register(self._name, self._attention)
        ALL_EXPERTS_FUNCTIONS.register(self._name, self._experts)
        skeleton = build_skeleton(
            checkpoint,
            Hooks(
                implementation=self._name,
                linear=self._linear,
                read=self._unpack,
                gather=self._gather,
                norm=self._norm,
                silu=self._silu,
                record=self._record,
                attention_modes=self._attention_modes,
                cached=lambda: tuple(self._attention.layers.values()),
                has_cache=lambda model: memory_of(model) is not None,
            ),
        )
        self._files.add(skeleton.virtual_path, skeleton.virtual)
        self.model = skeleton.model
        # Output embeddings, if the model computes them only for rows that need logits.
        self._head = self.model.get_output_embeddings() if "logits_to_keep" in parameters_of(self.model) else None
        self.steps = skeleton.steps
        self.attention_mode = skeleton.attention_mode
        self.decoder_start_ids = skeleton.decoder_start_ids
        expert_predictor = ExpertPredictor(skeleton.experts, checkpoint.number("expert_used_count", 1), self.kernels)
        if callable(options):
            options = options(skeleton)
        self._options = options
        self.kernels.pad_decode_rows_to_tiles = options.pad_decode_rows_to_tiles
        kv_b = [module.kv_b_proj.matrix for module in self.model.modules() if is_mla(module)]
        if self.attention_mode != "packed" and any(matrix.k_b_transposed for matrix in kv_b):
            raise UnsupportedError(
                f"{checkpoint.path}: the model computes attention itself, which needs `attn_kv_b` in one tensor",
                hint="use a file that an older version of llama.cpp converted, or the model's folder",
            )
        unpacked = {tensor.name for matrix in kv_b for tensor in matrix.tensors}
        on_pinned = partial(self._repack, options, unpacked) if options.repacked_types else None
        # Steps of a pass that continues a sequence.
        self._later_steps = [step for step in skeleton.steps if not step.prefill_only]
        self.stream = self._make_stream(self._later_steps, options, options.slots, options.decode_only_slots, on_pinned)
        if len(self._later_steps) < len(skeleton.steps):
            prefill_only = [step for step in skeleton.steps if step.prefill_only]
            self._make_stream(prefill_only, options, options.prefill_only_slots or options.slots, 0, None)
        self.experts = self._make_experts(skeleton, options, expert_predictor)
        if not (self.stream.layout.reads_always or (self.experts is not None and self.experts.stream.reads_always)):
            self.kernels.spin()
        self._order: Sequence[Step] = self.steps  # steps of the pass in progress

    def _make_stream(
        self,
        steps: Sequence[Step],
        options: StreamOptions,
        slots: int,
        decode_only_slots: int,
        on_pinned: Callable[[WeightSlice, Tensor], WeightSlice] | None,
    ) -> WeightStream:
        """A stream of these steps' weights, in order, for every pass."""
        linears = [step for step in steps if isinstance(step, LinearStep)]
        layout = make_layout(
            [step.tensors for step in linears],
            options.pinned_rows,
            options.unit_bytes,
            options.pinned_read_bytes,
            options.decode_pinned_rows,
        )
        stream = WeightStream(
            layout,
            slots=slots,
            decode_only_slots=decode_only_slots,
            readers=options.readers,
            file_of=self._files.__getitem__,
            spans=self.trace,
            on_pinned=on_pinned,
        )
        self._streams.append(stream)
        self._places |= {step: (stream, group) for group, step in enumerate(linears)}
        return stream

    def _make_experts(
        self, skeleton: ModelSkeleton, options: StreamOptions, expert_predictor: ExpertPredictor
    ) -> ExpertRunner | None:
        if not skeleton.experts:
            return None
        for packed in skeleton.experts:
            if packed.router is not None:
                packed.router.module.forward = partial(self._route, packed.router.module.forward)
        layers = skeleton.expert_slices
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
            spans=self.trace,
        )
        return ExpertRunner(stream, self.kernels, self.trace, expert_predictor)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop the readers, close the files, free the kernels, give torch its threads back. Safe to call twice."""
        for stream in self._streams:
            stream.close()
        if self.experts is not None:
            self.experts.stream.close()
        self._files.close()
        self.kernels.close()
        AttentionInterface._global_mapping.pop(self._name, None)
        ALL_EXPERTS_FUNCTIONS._global_mapping.pop(self._name, None)
        if not self._closed:
            self._closed = True
            _THREADS.close()

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
        kernels = self.kernels
        return isinstance(kernels, Kernels) and all(
            kernels.has_tiles(tensor.type, tensor.columns) and not tensor.k_splits for tensor in (*linears, *experts)
        )

    @property
    def embedding_rows(self) -> int | None:
        """Rows of the embedding table, if there is one."""
        table = self.model.get_input_embeddings()
        return None if table is None else getattr(table, "num_embeddings", None)

    @property
    def layers(self) -> int:
        """Number of decoder layers, each with its own keys and values."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    def new_cache(self, capacity: int, bits: int = 16) -> "KVCache | NativeCache":
        """An empty cache for one sequence of at most `capacity` tokens, with keys and values in 16 or 8 bits."""
        if self.attention_mode == "native":
            return NativeCache(self.model, capacity, len(self.decoder_start_ids))
        return KVCache(self.layers, capacity, bits)

    @property
    def single_sequence(self) -> bool:
        """True if the model needs its native cache: sequences cannot share a pass and drafts cannot be rolled back."""
        return self.attention_mode == "native"

    def step(self, batch: Sequence[Rows]) -> torch.Tensor:
        """Run one pass over the weights for the new rows of all sequences.

        Returns:
            Logits in fp32, (sum of `rows.logits`, vocab), sequence after sequence. The caches have grown.

        Raises:
            ContextError: a cache is too small for its rows.
            ReadError: the weights could not be read; no cache has grown, and the next step starts afresh.
        """
        starts = _starts(batch)
        for rows, first in zip(batch, starts, strict=True):
            if first + len(rows.tokens) > rows.cache.capacity:
                raise ContextError(
                    f"{first + len(rows.tokens)} tokens do not fit into a context of {rows.cache.capacity}",
                    hint=f"use --ctx-size {first + len(rows.tokens)} or more",
                )
        if self._broken_off:  # an interrupt came while an aborted pass was cleaned up
            self._rewind()
        self._rows = sum(len(rows.tokens) for rows in batch)
        self._invariant_rows = sum(len(rows.tokens) for rows in batch if rows.is_row_invariant)
        self._chunks = [len(rows.tokens) for rows in batch if not rows.is_row_invariant]
        self._share_cores(self._rows - self._invariant_rows)
        self._broken_off = True  # in case an interrupt comes while prefill memory is reassigned
        self._reuse_prefill_memory()
        self._broken_off = False
        before, start = self._counted(), time.perf_counter()
        self._begin(self.steps)
        is_prefill = self._rows - self._invariant_rows > DECODE_MAX_ROWS
        try:
            with PooledAllocation() if is_prefill else nullcontext():
                logits = (
                    self._forward_in_order(batch, starts)
                    if self.attention_mode != "native"
                    else self._forward_native(batch)
                )
        except BaseException:
            self._broken_off = True
            for rows in batch:
                rows.cache.rollback()
            self._rewind()
            raise
        self._check_values(batch, starts, logits)
        for rows in batch:
            rows.cache.commit()
            rows.cache.length += len(rows.tokens)
        end, after = time.perf_counter(), self._counted()
        if self.trace is not None:
            self.trace.add("pass", f"{sum(len(r.tokens) for r in batch)} rows", start, end)
        self.passes.append(
            PassStats(
                rows=sum(len(rows.tokens) for rows in batch),
                start_s=start,
                seconds=end - start,
                read_bytes=after.read_bytes - before.read_bytes,
                stall_s=after.stall_s - before.stall_s,
                kernel_s=after.kernel_s - before.kernel_s,
                expert_read_bytes=after.experts.read_bytes - before.experts.read_bytes,
                expert_hits=after.experts.hits - before.experts.hits,
                expert_prefetched=after.experts.prefetched - before.experts.prefetched,
                expert_misses=after.experts.misses - before.experts.misses,
                expert_wasted_bytes=after.experts.wasted_bytes - before.experts.wasted_bytes,
            )
        )
        return logits

    def _check_values(self, batch: Sequence[Rows], starts: Sequence[int], logits: torch.Tensor) -> None:
        """Check the results of a pass before the caches grow.

        Raises:
            CacheOverflow: keys or values exceed a cache's type; its wide type can hold them.
            CheckpointError: results are not finite, and no cache is to blame.
        """
        overflowed = [
            rows.cache
            for rows, start in zip(batch, starts, strict=True)
            if isinstance(rows.cache, KVCache) and rows.cache.has_overflowed(start, len(rows.tokens))
        ]
        if self._inspects:
            return  # the checks of each result found nothing
        narrow = next((cache for cache in overflowed if not cache.is_wide), None)
        # The largest of logits is not finite if one is NaN or infinity; some models mask tokens with minus infinity.
        if narrow is None and not overflowed and (not len(logits) or bool(logits.amax().isfinite())):
            return
        for rows in batch:
            rows.cache.rollback()
        if narrow is not None:
            raise CacheOverflow(narrow)
        raise self._not_finite(next((rows for rows in batch if rows.tokens), batch[0]))

    def _not_finite(self, rows: Rows) -> CheckpointError:
        """Find the tensor that causes values that are not finite: small tensors first, then a pass that checks each result."""
        hint = "the file is damaged, or was converted with an overflow; get it from another source"
        where = next((name for name, value in self.model.state_dict().items() if _has_non_finite(value)), None)
        if where is not None:
            return CheckpointError(f"{self.checkpoint.path}: `{where}` holds values that are not finite", hint=hint)
        self._inspects = True
        try:
            self.step(
                [
                    Rows(
                        cache=self.new_cache(_INSPECTED_TOKENS),
                        tokens=rows.tokens[:_INSPECTED_TOKENS],
                        row_invariant=False,
                    )
                ]
            )
        except CheckpointError as error:
            return error
        except CacheOverflow:
            pass
        finally:
            self._inspects = False
        return CheckpointError(f"{self.checkpoint.path}: the model computes values that are not finite", hint=hint)

    def _inspect(self, what: str, before: torch.Tensor, after: Sequence[torch.Tensor]) -> None:
        """Raise if results are not finite, in the pass that looks for the cause."""
        if not any(map(_has_non_finite, (before, *after))):
            return
        found = f"the input of `{what}` is" if _has_non_finite(before) else f"the output of `{what}` is"
        raise CheckpointError(
            f"{self.checkpoint.path}: {found} not finite",
            hint="it holds NaN, infinity or huge values: the file is damaged, or was converted with an overflow",
        )

    def _rewind(self) -> None:
        """Abort the pass in progress."""
        self._pending.clear()
        for stream in self._streams:
            stream.rewind()
        if self.experts is not None:
            self.experts.stream.rewind()
        self._broken_off = False

    @property
    def remarks(self) -> tuple[str, ...]:
        """Notes on anything unusual in how the weights are read."""
        return self._files.remarks

    @property
    def read_bytes(self) -> int:
        """Bytes read so far, without those of experts."""
        return sum(stream.counters.read_bytes for stream in self._streams)

    def _counted(self) -> "_Counted":
        experts = ExpertCounters() if self.experts is None else replace(self.experts.stream.counters)
        return _Counted(
            self.read_bytes + experts.read_bytes,
            sum(stream.counters.stall_s for stream in self._streams) + experts.stall_s,
            self._kernel_s + (self.experts.kernel_s if self.experts is not None else 0.0),
            experts,
        )

    def _reuse_prefill_memory(self) -> None:
        """Reuse prefill memory for weights between prompts, if the allocator has really returned it to the system."""
        options, stream = self._options, self.stream
        reuses = self._rows <= options.decode_pinned_max_rows and self._rows - self._invariant_rows <= DECODE_MAX_ROWS
        # Once after a prompt: garbage collection is slow.
        if reuses and self._reuses_prefill_memory is None and stream.reusable_prefill_bytes:
            self.kernels.release()
            release_unused()
            limit = options.memory_limit_bytes
            self._reuses_prefill_memory = limit is None or resident_bytes() + stream.reusable_prefill_bytes <= limit
        if not reuses:
            self._reuses_prefill_memory = None
        stream.reuse_prefill_memory(bool(self._reuses_prefill_memory))

    def _share_cores(self, shared_rows: int) -> None:
        """Keep torch's small operations on one core during decode: ggml's threads may spin on all cores."""
        threads = self.kernels.threads if shared_rows > DECODE_MAX_ROWS else 1
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)

    @torch.inference_mode()
    def _forward_native(self, batch: Sequence[Rows]) -> torch.Tensor:
        """Run the native attention mode: one sequence after another, each in separate forwards.

        With recurrent state, later rows go one by one: few models can resume a state with several rows. An encoder's prompt
        has too few decoder rows for prefill kernels, so those are row-invariant in any case.
        """
        parts = []
        for rows in batch:
            cache, tokens = rows.cache, list(rows.tokens)
            assert isinstance(cache, NativeCache)
            step = len(tokens) if cache.accepts_multiple_rows or not cache.length else 1
            before, found = cache.length, []
            for first in range(0, len(tokens), step):
                self._begin(self._later_steps if cache.length else self.steps)
                self._rows = cache.rows(step)
                self._invariant_rows = self._rows if rows.is_row_invariant else 0
                self._chunks = [] if rows.is_row_invariant else [self._rows]
                part = replace(rows, tokens=tokens[first : first + step], logits=min(step, rows.logits))
                with cache.state_in_modules():
                    arguments = arguments_for(self.model, cache, torch.tensor([part.tokens]))
                    found.append(self._logits(arguments, torch.arange(-part.logits, 0)))
                cache.length += step
            cache.length = before
            parts.append(torch.cat(found)[-rows.logits :])
        return torch.cat(parts)

    def _begin(self, order: Sequence[Step]) -> None:
        self._order, self._step, self._steps_done = order, 0, 0

    def _forward_in_order(self, batch: Sequence[Rows], starts: Sequence[int]) -> torch.Tensor:
        """Put row-invariant rows first, as the kernels need them; return logits in the order of the batch."""
        order = sorted(range(len(batch)), key=lambda i: not batch[i].is_row_invariant)
        entries: dict[int, Entry] = {}
        first = 0
        for i in order:
            last = first + len(batch[i].tokens)
            cache = batch[i].cache
            assert isinstance(cache, KVCache)
            entries[i] = Entry(cache, slice(first, last), batch[i].is_row_invariant, starts[i])
            first = last
        logits = self._forward([batch[i] for i in order], [entries[i] for i in range(len(batch))])
        if order == list(range(len(batch))):
            return logits
        parts = dict(zip(order, torch.split(logits, [batch[i].logits for i in order]), strict=True))
        return torch.cat([parts[i] for i in range(len(batch))])

    @torch.inference_mode()
    def _forward(self, batch: Sequence[Rows], entries: Sequence[Entry]) -> torch.Tensor:
        """Run one forward: `batch` is in the order of the rows, `entries` in that of the call of `step`."""
        tokens = torch.tensor([[token for rows in batch for token in rows.tokens]])
        by_row = sorted(entries, key=lambda entry: entry.part.start)
        positions = torch.cat([torch.arange(entry.start, entry.start + entry.rows) for entry in by_row])[None]
        wanted: list[int] = []
        first = 0
        for rows in batch:
            first += len(rows.tokens)
            wanted += range(first - rows.logits, first)
        arguments: dict[str, Any] = {"input_ids": tokens, "position_ids": positions}
        if self.attention_mode != "packed":
            caches = ConcatenatedCache(entries)
            arguments |= {"past_key_values": caches, "attention_mask": caches.mask(), "use_cache": True}
            return self._logits(arguments, torch.tensor(wanted))
        self._attention.begin(entries)
        if self._invariant_rows < self._rows or self._rows > DECODE_MAX_ROWS:
            return self._logits(arguments, torch.tensor(wanted))
        key = tuple((len(rows.tokens), rows.logits) for rows in batch)
        found = self._captures.find(key)
        if found is not None:
            return found.replay(tokens, positions)
        with self._captures.capturing(key, at_once=self._rows == 1) as capture:
            if capture is None:
                return self._logits(arguments, torch.tensor(wanted))
            self._capture = self._attention.capture = capture
            try:
                arguments = {name: capture.input(value) for name, value in arguments.items()}
                return capture.output(self._logits(arguments, torch.tensor(wanted)))
            finally:
                self._capture = self._attention.capture = None

    def _logits(self, arguments: dict[str, Any], keep: torch.Tensor) -> torch.Tensor:
        """Run the model; return the logits of the rows in `keep`."""
        if "logits_to_keep" in parameters_of(self.model):
            return self.model(logits_to_keep=keep, **arguments).logits[0]  # type: ignore[no-any-return]
        return self.model(**arguments).logits[0, keep]  # type: ignore[no-any-return]

    # -- called by the model's modules ----------------------------------------------------------------------------

    def _linear(self, linear: PackedLinear, x: torch.Tensor) -> torch.Tensor:
        """A linear's output. The first linear of a step computes those of all its linears, on the same activations."""
        ready = self._pending.pop(linear, None)
        if ready is None:
            self._compute(linear, x)
            ready = self._pending.pop(linear)
        source, out = ready
        assert source is x, "linears of a step were called with different activations"
        return out

    def _compute(self, linear: PackedLinear, x: torch.Tensor) -> None:
        step = self._next_step(linear)
        assert isinstance(step, LinearStep)
        tensors = step.tensors
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        # The head gets only rows that need logits. They are few: all are row-invariant, even if they are the whole pass.
        invariant = self._invariant_rows if rows.shape[0] == self._rows and linear is not self._head else rows.shape[0]
        empty = rows.new_empty if self._capture is None else self._capture.empty
        outputs = [empty((rows.shape[0], tensor.outputs)) for tensor in tensors]
        if self._capture is None:
            self._multiply(step, rows, outputs, invariant)
        else:
            self._capture.do(self._multiply, step, rows, outputs, invariant)
        found = dict(zip((tensor.name for tensor in tensors), outputs, strict=True))
        for member in step.linears:
            self._pending[member] = (x, _assembled(member.matrix, found).reshape(*x.shape[:-1], -1))

    def _multiply(self, step: LinearStep, rows: torch.Tensor, outputs: Sequence[torch.Tensor], invariant: int) -> None:
        """Run a step's matmuls with its pinned and its streamed weights."""
        rows = rows.view(rows.shape)  # the kernels cache converted activations as long as this tensor lives
        chunks = self._chunks if invariant < rows.shape[0] else ()
        self._use_weights(step, lambda slices: self.kernels.matmul(rows, slices, outputs, invariant, chunks))
        if self._inspects:
            for tensor, output in zip(step.tensors, outputs, strict=True):
                self._inspect(tensor.name, rows, [output])

    def place(self, step: LinearStep) -> tuple[WeightStream, int]:
        """The stream of a step's weights, and the index of its weight group there."""
        return self._places[step]

    def record_fused(self, steps: Sequence[LinearStep], start: float, end: float) -> None:
        """Record steps that were computed in one fused call."""
        self._kernel_s += end - start
        if self.trace is not None:
            self.trace.add("compute", steps[0].tensors[0].name, start, end)
        for _ in steps:
            self._report_progress()

    def _norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self._of_rows(self.kernels.rms_norm, x, weight, eps)

    def _silu(self, x: torch.Tensor) -> torch.Tensor:
        return self._of_rows(self.kernels.silu, x)

    def _of_rows(self, function: Callable[..., None], x: torch.Tensor, *others: Any) -> torch.Tensor:
        """Apply a kernel to every row of x: (..., columns), fp32."""
        rows = x.float().reshape(-1, x.shape[-1])
        if rows.stride(-1) != 1:
            rows = rows.contiguous()
        if self._capture is not None and self._capture.is_recording:
            out = self._capture.empty(rows.shape)
            self._capture.do(function, out, rows, *others)
        else:
            out = rows.new_empty(rows.shape)
            if rows.numel():
                function(out, rows, *others)
        return out.view(x.shape)

    def _use_weights(self, step: LinearStep, use: Callable[[Batch], None]) -> None:
        """Call `use` with each batch of a step's weights as it arrives."""
        stream, group = self._places[step]
        for slices in stream.weights_of(group):
            start = time.perf_counter()
            use(slices)
            end = time.perf_counter()
            self._kernel_s += end - start
            if self.trace is not None:
                self.trace.add("compute", step.tensors[0].name, start, end)
        self._report_progress()

    def _report_progress(self) -> None:
        """Report another finished step of the pass."""
        self._steps_done += 1
        if self.on_progress is not None:
            self.on_progress(self._steps_done, len(self._order))

    def _unexpanded(
        self, layer: Any, vectors: torch.Tensor, rotated: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Replacement of an MLA layer's `expand_kv`: attention gets the cached latents and the dequantised `kv_b_proj`."""
        linear: PackedLinear = layer.kv_b_proj
        if self._tracer is not None:
            linear(vectors)
            return self._attention.take(layer, None, vectors, rotated)
        if self._capture is not None:
            self._capture.mark_uncapturable("a matrix is unpacked")
        step = self._next_step(linear)
        assert isinstance(step, LinearStep)
        sizes = [tensor.rows * tensor.columns for tensor in step.tensors]
        if self._plain.numel() < sum(sizes):
            self._plain = torch.empty(sum(sizes))
        flat = torch.split(self._plain[: sum(sizes)], sizes)
        outputs = [one.view(tensor.outputs, -1) for one, tensor in zip(flat, step.tensors, strict=True)]
        self._use_weights(step, lambda slices: self.kernels.unpack_all(slices, outputs))
        found = dict(zip((tensor.name for tensor in step.tensors), outputs, strict=True))
        return self._attention.take(layer, split_kv_b(layer, linear.matrix, found), vectors, rotated)

    def _experts(
        self, module: Any, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, *_: Any, **__: Any
    ) -> torch.Tensor:
        """Experts of a layer, called by transformers."""
        packed: PackedExperts = module.packed
        if self._tracer is not None:
            return self._tracer.experts(packed, hidden)
        self._next_step(packed)
        shape = hidden.shape
        rows = hidden.reshape(-1, shape[-1]), ids.reshape(-1, ids.shape[-1]), weights.reshape(-1, weights.shape[-1])
        invariant, chunks = self._invariant_rows, self._chunks
        if invariant + sum(chunks) != len(rows[0]):
            invariant, chunks = len(rows[0]), []
        arguments = (packed, *rows, invariant, chunks)
        out = self._sum_up(*arguments) if self._capture is None else self._capture.call(self._sum_up, *arguments)
        return out.view(shape)

    def _sum_up(self, *arguments: Any) -> torch.Tensor:
        assert self.experts is not None
        out = self.experts(*arguments)
        if self._inspects:
            self._inspect(f"experts of layer {arguments[0].index}", arguments[1], [out])
        self._report_progress()
        return out

    def _route(self, forward: Callable[..., Any], hidden: torch.Tensor, *others: Any) -> Any:
        """A router's forward, row by row for row-invariant rows and chunk by chunk for the others.

        torch sums one row in another order than several. `others` are further arguments of some routers: token ids, one for
        each row, or corrections for all.
        """
        rows = hidden.shape[-2]
        invariant = min(self._invariant_rows, rows)
        chunks = self._chunks if invariant + sum(self._chunks) == rows else [rows - invariant] * (invariant < rows)
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

    def _next_step(self, called: PackedLinear | PackedExperts) -> LinearStep | ExpertStep:
        """The next step, which must start with this linear or be of these experts."""
        step = self._order[self._step] if self._step < len(self._order) else None
        self._step += 1
        if step is None or called is not (step.linears[0] if isinstance(step, LinearStep) else step.experts):
            raise UnsupportedError(
                f"{self.checkpoint.path}: the model asks for its weights in an order that depends on what it computes",
                hint="use a GGUF file of the model with llama.cpp",
            )
        return step

    def _record(self, tracer: Tracer | None) -> None:
        self._tracer, self._attention.records = tracer, tracer is not None
        if tracer is not None:
            self._attention.layers, self._attention.unknown_arguments = {}, set()

    def _attention_modes(self, model: PreTrainedModel) -> Iterator[AttentionMode]:
        """Attention modes, best first: packed (on each KV cache), concatenated (on all of them as one), native."""
        if not has_recurrent_state(model) and not sees_chunks(model):
            layers = [module for module in model.modules() if is_mla(module)]
            for layer in layers:
                layer.expand_kv = partial(self._unexpanded, layer)
            yield "packed", _positions, lambda: bool(self._attention.layers) and not self._attention.unknown_arguments
            for layer in layers:
                del layer.expand_kv
            if not sees_a_window(model):
                yield "concatenated", _positions_and_mask, lambda: not self._attention.layers
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config._attn_implementation = "eager"
        yield "native", partial(trial_of, model), lambda: True

    def _repack(
        self, options: StreamOptions, unpacked: set[str], weight_slice: WeightSlice, tensor: Tensor
    ) -> WeightSlice:
        if weight_slice.type not in options.repacked_types or tensor.name in unpacked:
            return weight_slice
        return self.kernels.repack(weight_slice, tensor.columns, options.repack_in_place)

    def _unpack(self, tensor: Tensor) -> torch.Tensor:
        """A small tensor, read completely, in its shape: fp32, or integers as stored."""
        data = self._read(tensor.path, tensor.offset, tensor.nbytes)
        if tensor.k_splits:
            plain = self._to_plain(tensor, data).view(tensor.k_splits, tensor.outputs, tensor.columns)
            return plain.transpose(0, 1).reshape(tensor.outputs, tensor.inputs)
        return self._to_plain(tensor, data).view(tensor.shape)

    def _gather(self, tensor: Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Rows of an embedding table, (tokens, columns): one short read each."""
        return self._fetch(tensor, tokens) if self._capture is None else self._capture.call(self._fetch, tensor, tokens)

    def _fetch(self, tensor: Tensor, tokens: torch.Tensor) -> torch.Tensor:
        unknown = [token for token in tokens.tolist() if not 0 <= token < tensor.rows]
        if unknown:
            raise UnsupportedError(
                f"token {unknown[0]} is beyond the {tensor.rows} rows of `{tensor.name}`",
                hint="the tokenizer is of another model",
            )
        packed = np.concatenate([self._row(tensor, token) for token in tokens.tolist()])
        found = self._to_plain(tensor, packed).view(-1, tensor.columns).float()
        if self._inspects:
            self._inspect(tensor.name, tokens, [found])
        return found

    def _row(self, tensor: Tensor, index: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """One packed row of an embedding table. The latest rows stay cached: most words of a text recur."""
        row = self._rows_read.pop((tensor.name, index), None)
        if row is None:
            row = self._read(tensor.path, tensor.offset + index * tensor.row_bytes, tensor.row_bytes)
            self._rows_read_bytes += row.nbytes
        self._rows_read[tensor.name, index] = row
        while self._rows_read_bytes > MAX_CACHED_ROW_BYTES:
            self._rows_read_bytes -= self._rows_read.pop(next(iter(self._rows_read))).nbytes
        return row

    def _to_plain(self, tensor: Tensor, data: np.ndarray[Any, np.dtype[np.uint8]]) -> torch.Tensor:
        plain = plain_values(tensor.type, data)
        if plain is not None:
            return plain
        rows = len(data) // tensor.row_bytes
        return self.kernels.unpack(tensor.type, data.ctypes.data, rows, tensor.columns).clone()

    def _read(self, path: str, offset: int, nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        start, length = aligned(offset, nbytes)
        scratch = self._scratch if length <= self._scratch.nbytes else Arena(length)
        self._files[path].read(start, scratch.view[:length], offset + nbytes - start)
        return np.frombuffer(scratch.view[offset - start : offset - start + nbytes], np.uint8).copy()


def _has_non_finite(value: torch.Tensor) -> bool:
    return value.is_floating_point() and not bool(value.isfinite().all())


def _starts(batch: Sequence[Rows]) -> list[int]:
    """The position of each entry's first row; entries of one sequence follow one another."""
    taken = Counter[int]()
    starts = []
    for rows in batch:
        starts.append(rows.cache.length + taken[id(rows.cache)])
        taken[id(rows.cache)] += len(rows.tokens)
    return starts


class _Threads:
    """Number of threads that torch had before the first open engine; restored after the last."""

    def __init__(self) -> None:
        self._engines = self._usual = 0

    def open(self) -> None:
        if not self._engines:
            self._usual = torch.get_num_threads()
        self._engines += 1

    def close(self) -> None:
        self._engines -= 1
        if not self._engines:
            torch.set_num_threads(self._usual)


_THREADS = _Threads()


def _positions() -> Iterator[dict[str, Any]]:
    """Arguments of the traced forward."""
    ids = torch.zeros((1, 2), dtype=torch.long)
    yield {"input_ids": ids, "position_ids": ids}


def _positions_and_mask() -> Iterator[dict[str, Any]]:
    for given in _positions():
        yield given | {"attention_mask": torch.zeros((1, 1, 2, 2))}


def _is_of_rows(value: Any, rows: int) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_floating_point() and value.shape[-1:] == (rows,)


class _Counted(NamedTuple):
    """Counters of all streams at one moment."""

    read_bytes: int
    stall_s: float
    kernel_s: float
    experts: ExpertCounters


def _assembled(matrix: Matrix, found: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Matmul results of a matrix from those of its tensors: (rows, outputs)."""
    parts = [
        found[part.tensor.name] if part.whole else found[part.tensor.name][:, part.first : part.first + part.rows]
        for part in matrix.slices
    ]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return out if matrix.order is None else out.index_select(1, matrix.order)
