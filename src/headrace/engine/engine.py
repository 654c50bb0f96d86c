"""The engine runs passes: new rows of several sequences go in, logits come out, and the weights are streamed once.

It builds the model's modules, its streams and its runtimes, and checks every pass before the KV caches grow.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch

from headrace.checkpoint import Checkpoint
from headrace.engine.attention import CacheOverflow, ConcatenatedCache, Entry, KVCache, NotFinite, PackedAttention
from headrace.engine.attention_modes import attention_modes
from headrace.engine.capture import CaptureCache
from headrace.engine.eager_runtime import CapturingRuntime, EagerRuntime, PassState, RuntimeParts, has_non_finite
from headrace.engine.expert_runner import ExpertRunner
from headrace.engine.fuse import Fuser
from headrace.engine.mla import is_mla
from headrace.engine.model_weights import ModelWeights, StreamOptions
from headrace.engine.native_cache import NativeCache, arguments_for, memory_of, parameters_of
from headrace.engine.pooled_allocation import PooledAllocation
from headrace.engine.tensor_parallel import SingleRank, TensorParallelGroup
from headrace.engine.tensor_reader import TensorReader
from headrace.engine.timeline import PassLog, PassStats, Trace
from headrace.errors import CheckpointError, ContextError, UnsupportedError
from headrace.kernels import DECODE_MAX_ROWS
from headrace.kernels.backend import Backend
from headrace.model import ModelSkeleton, build_skeleton
from headrace.model.build import Hooks
from headrace.model.runtime import RuntimeHandle
from headrace.model.trace import TracingRuntime
from headrace.model.transformers_compat import registered
from headrace.process import release_unused, resident_bytes
from headrace.stream import WeightFile, WeightStream
from headrace.stream.files import File
from headrace.stream.virtual import FileSet


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


SINGLE_RANK = SingleRank()
_INSPECTED_TOKENS = 32  # max tokens of the pass that locates values that are not finite


class Engine(AbstractContextManager["Engine"]):
    """One model, ready to step. A context manager; `close` stops the readers and closes files and kernels."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: "StreamOptions | Callable[[ModelSkeleton], StreamOptions]",
        kernels: Backend,
        *,
        trace: Trace | None = None,
        open_file: Callable[[str], File] = WeightFile,
        group: TensorParallelGroup = SINGLE_RANK,
    ):
        """Builds the model and the stream; nothing large is read before the first step.

        `options` may be a function: it is called after the model is built, before memory for weights is taken.
        `group`: the owners of the rows of each tensor, of which this engine is a member.
        """
        self.checkpoint = checkpoint
        self.kernels = kernels
        self.trace = trace
        self._group = group
        self.passes = PassLog()
        self.on_progress: Callable[[int, int], None] | None = None  # callback with (steps done, steps of the pass)
        self._attention = PackedAttention(kernels)
        self._handle = RuntimeHandle(TracingRuntime())
        self._registered = registered(f"headrace_{id(self):x}", self._handle)
        self._weights: ModelWeights | None = None
        self._reuses_prefill_memory: bool | None = None  # decision since the last prompt; None: not yet made
        self._broken_off = False  # True while the streams are in the middle of an aborted pass
        self._closed = False
        self._files = FileSet(checkpoint.paths, checkpoint.virtual, open_file)
        _THREADS.open()
        try:
            self._build(options)
        except BaseException:
            self.close()
            raise

    def _build(self, options: "StreamOptions | Callable[[ModelSkeleton], StreamOptions]") -> None:
        checkpoint, kernels = self.checkpoint, self.kernels
        reader = TensorReader(self._files, kernels)
        skeleton = build_skeleton(
            checkpoint,
            Hooks(
                implementation=self._registered.name,
                runtime=self._handle,
                read=reader.whole,
                attention_modes=lambda model: attention_modes(model, self._handle),
                has_cache=lambda model: memory_of(model) is not None,
            ),
        )
        self._files.add(skeleton.virtual_path, skeleton.virtual)
        self.model = skeleton.model
        self.attention_mode = skeleton.attention_mode
        self.decoder_start_ids = skeleton.decoder_start_ids
        kv_b = [module.kv_b_proj.matrix for module in self.model.modules() if is_mla(module)]
        if self.attention_mode != "packed" and any(matrix.k_b_transposed for matrix in kv_b):
            raise UnsupportedError(
                f"{checkpoint.path}: the model computes attention itself, which needs `attn_kv_b` in one tensor",
                hint="use a file that an older version of llama.cpp converted, or the model's folder",
            )
        unpacked = frozenset(tensor.name for matrix in kv_b for tensor in matrix.tensors)
        self._options = options = options(skeleton) if callable(options) else options
        self._weights = ModelWeights(
            checkpoint, skeleton, options, kernels, self._files, self.trace, self._group, unpacked
        )
        parts = RuntimeParts(
            checkpoint=checkpoint,
            kernels=kernels,
            weights=self._weights,
            attention=self._attention,
            reader=reader,
            trace=self.trace,
            group=self._group,
            # Output embeddings, if the model computes them only for rows that need logits.
            head=self.model.get_output_embeddings() if "logits_to_keep" in parameters_of(self.model) else None,
        )
        self._eager, self._capturing = EagerRuntime(parts), CapturingRuntime(parts)
        self._handle.current = self._eager
        for packed in skeleton.experts:
            if packed.router is not None:
                packed.router.module.forward = _routed(packed.router.module.forward, self._handle)
        # Fused graphs do not exchange results with other members.
        fuse = Fuser(kernels, self._weights, self._attention, self._capturing) if self._group.is_single else list
        self._captures = CaptureCache(fuse)
        kernels.start(spins=not self._weights.reads_always, pad_decode_rows_to_tiles=options.pad_decode_rows_to_tiles)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop the readers, close the files, free the kernels, give torch its threads back. Safe to call twice."""
        if self._weights is not None:
            self._weights.close()
        self._files.close()
        self.kernels.close()
        self._registered.remove()
        if not self._closed:
            self._closed = True
            _THREADS.close()

    @property
    def weights(self) -> ModelWeights:
        """The streams of the model's weights."""
        assert self._weights is not None
        return self._weights

    @property
    def stream(self) -> WeightStream:
        """The stream of dense weights."""
        return self.weights.stream

    @property
    def experts(self) -> ExpertRunner | None:
        """The routed experts of an MoE model."""
        return self.weights.experts

    @property
    def embedding_rows(self) -> int | None:
        """Rows of the embedding table, if there is one."""
        table = self.model.get_input_embeddings()
        return None if table is None else getattr(table, "num_embeddings", None)

    def new_cache(self, capacity: int, bits: int = 16) -> "KVCache | NativeCache":
        """An empty cache for one sequence of at most `capacity` tokens, with keys and values in 16 or 8 bits."""
        if self.attention_mode == "native":
            return NativeCache(self.model, capacity, len(self.decoder_start_ids))
        return KVCache(int(self.model.config.get_text_config().num_hidden_layers), capacity, bits)

    def step(self, batch: Sequence[Rows], *, inspects: bool = False) -> torch.Tensor:
        """Run one pass over the weights for the new rows of all sequences.

        Args:
            batch: the new rows.
            inspects: check each result, to name the tensor that causes values that are not finite.

        Returns:
            Logits in fp32, (sum of `rows.logits`, vocab), sequence after sequence. The caches have grown.

        Raises:
            ContextError: a cache is too small for its rows.
            ReadError: the weights could not be read; no cache has grown, and the next step starts afresh.
            CacheOverflow: a key or value needs the wide type; no cache has grown.
            NotFinite: some sequences have results that are not finite; no cache has grown.
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
        state = PassState(
            order=self.weights.steps,
            rows=sum(len(rows.tokens) for rows in batch),
            invariant_rows=sum(len(rows.tokens) for rows in batch if rows.is_row_invariant),
            chunks=[len(rows.tokens) for rows in batch if not rows.is_row_invariant],
            inspects=inspects,
            on_progress=self.on_progress,
        )
        is_prefill = state.rows - state.invariant_rows > DECODE_MAX_ROWS
        _share_cores(self.kernels.threads if is_prefill else 1)
        self._broken_off = True  # in case an interrupt comes while prefill memory is reassigned
        self._reuse_prefill_memory(state)
        self._broken_off = False
        before, start = self.weights.totals(), time.perf_counter()
        try:
            with PooledAllocation() if is_prefill else nullcontext():
                logits = (
                    self._forward_in_order(batch, starts, state)
                    if self.attention_mode != "native"
                    else self._forward_native(batch, state)
                )
        except BaseException:
            self._broken_off = True
            for rows in batch:
                rows.cache.rollback()
            self._rewind()
            raise
        self._check_values(batch, starts, logits, inspects)
        for rows in batch:
            rows.cache.commit()
            rows.cache.length += len(rows.tokens)
        end, after = time.perf_counter(), self.weights.totals()
        if self.trace is not None:
            self.trace.add("pass", f"{sum(len(r.tokens) for r in batch)} rows", start, end)
        self.passes.append(
            PassStats(
                rows=sum(len(rows.tokens) for rows in batch),
                start_s=start,
                seconds=end - start,
                read_bytes=after.read_bytes - before.read_bytes,
                stall_s=after.stall_s - before.stall_s,
                kernel_s=state.kernel_s + after.expert_kernel_s - before.expert_kernel_s,
                expert_read_bytes=after.experts.read_bytes - before.experts.read_bytes,
                expert_hits=after.experts.hits - before.experts.hits,
                expert_prefetched=after.experts.prefetched - before.experts.prefetched,
                expert_misses=after.experts.misses - before.experts.misses,
                expert_wasted_bytes=after.experts.wasted_bytes - before.experts.wasted_bytes,
            )
        )
        return logits

    def _check_values(
        self, batch: Sequence[Rows], starts: Sequence[int], logits: torch.Tensor, inspected: bool
    ) -> None:
        """Check the results of a pass before the caches grow.

        Raises:
            CacheOverflow: keys or values exceed a cache's type; its wide type can hold them.
            NotFinite: results of some sequences are not finite.
        """
        overflowed = [
            rows.cache
            for rows, start in zip(batch, starts, strict=True)
            if isinstance(rows.cache, KVCache) and rows.cache.has_overflowed(start, len(rows.tokens))
        ]
        if inspected:
            return  # the checks of each result found nothing
        narrow = next((cache for cache in overflowed if not cache.is_wide), None)
        # The largest of logits is not finite if one is NaN or infinity; some models mask tokens with minus infinity.
        if narrow is None and not overflowed and (not len(logits) or bool(logits.amax().isfinite())):
            return
        for rows in batch:
            rows.cache.rollback()
        if narrow is not None:
            raise CacheOverflow(narrow)
        parts = torch.split(logits, [rows.logits for rows in batch])
        culprits = [rows for rows in batch if rows.cache in overflowed] or [
            rows for rows, part in zip(batch, parts, strict=True) if len(part) and not bool(part.amax().isfinite())
        ]
        raise NotFinite([rows.cache for rows in culprits], self._not_finite(culprits[0]))

    def _not_finite(self, rows: Rows) -> CheckpointError:
        """Find the tensor that causes values that are not finite: small tensors first, then a pass that checks each result."""
        hint = "the file is damaged, or was converted with an overflow; get it from another source"
        where = next((name for name, value in self.model.state_dict().items() if has_non_finite(value)), None)
        if where is not None:
            return CheckpointError(f"{self.checkpoint.path}: `{where}` holds values that are not finite", hint=hint)
        first = rows.tokens[:_INSPECTED_TOKENS]
        try:
            self.step([Rows(cache=self.new_cache(_INSPECTED_TOKENS), tokens=first, row_invariant=False)], inspects=True)
        except CheckpointError as error:
            return error
        except NotFinite as found:
            return found.error
        except CacheOverflow:
            pass
        return CheckpointError(f"{self.checkpoint.path}: the model computes values that are not finite", hint=hint)

    def _rewind(self) -> None:
        """Abort the pass in progress."""
        self.weights.rewind()
        self._broken_off = False

    @property
    def remarks(self) -> tuple[str, ...]:
        """Notes on anything unusual in how the weights are read."""
        return self._files.remarks

    def _reuse_prefill_memory(self, state: PassState) -> None:
        """Reuse prefill memory for weights between prompts, if the allocator has really returned it to the system."""
        options, stream = self._options, self.stream
        prefill_rows = state.rows - state.invariant_rows
        reuses = state.rows <= options.decode_pinned_max_rows and prefill_rows <= DECODE_MAX_ROWS
        # Once after a prompt: garbage collection is slow.
        if reuses and self._reuses_prefill_memory is None and stream.reusable_prefill_bytes:
            self.kernels.release()
            release_unused()
            limit = options.memory_limit_bytes
            self._reuses_prefill_memory = limit is None or resident_bytes() + stream.reusable_prefill_bytes <= limit
        if not reuses:
            self._reuses_prefill_memory = None
        stream.reuse_prefill_memory(bool(self._reuses_prefill_memory))

    @torch.inference_mode()
    def _forward_native(self, batch: Sequence[Rows], state: PassState) -> torch.Tensor:
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
                state.order = self.weights.later_steps if cache.length else self.weights.steps
                state.position = state.done = 0
                state.rows = cache.rows(step)
                state.invariant_rows = state.rows if rows.is_row_invariant else 0
                state.chunks = [] if rows.is_row_invariant else [state.rows]
                self._begin(self._eager, state)
                part = replace(rows, tokens=tokens[first : first + step], logits=min(step, rows.logits))
                with cache.state_in_modules():
                    arguments = arguments_for(self.model, cache, torch.tensor([part.tokens]))
                    found.append(self._logits(arguments, torch.arange(-part.logits, 0)))
                cache.length += step
            cache.length = before
            parts.append(torch.cat(found)[-rows.logits :])
        return torch.cat(parts)

    def _begin(self, runtime: EagerRuntime, state: PassState) -> None:
        """Let the model's modules call this runtime."""
        self._handle.current = runtime
        runtime.begin(state)

    def _forward_in_order(self, batch: Sequence[Rows], starts: Sequence[int], state: PassState) -> torch.Tensor:
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
        logits = self._forward([batch[i] for i in order], [entries[i] for i in range(len(batch))], state)
        if order == list(range(len(batch))):
            return logits
        parts = dict(zip(order, torch.split(logits, [batch[i].logits for i in order]), strict=True))
        return torch.cat([parts[i] for i in range(len(batch))])

    @torch.inference_mode()
    def _forward(self, batch: Sequence[Rows], entries: Sequence[Entry], state: PassState) -> torch.Tensor:
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
        self._begin(self._eager, state)
        if self.attention_mode != "packed":
            caches = ConcatenatedCache(entries)
            arguments |= {"past_key_values": caches, "attention_mask": caches.mask(), "use_cache": True}
            return self._logits(arguments, torch.tensor(wanted))
        self._attention.begin(entries)
        if state.invariant_rows < state.rows or state.rows > DECODE_MAX_ROWS:
            return self._logits(arguments, torch.tensor(wanted))
        key = tuple((len(rows.tokens), rows.logits) for rows in batch)
        found = self._captures.find(key)
        if found is not None:
            self._capturing.begin(state)
            return found.replay(tokens, positions)
        with self._captures.capturing(key, at_once=state.rows == 1) as capture:
            if capture is None:
                return self._logits(arguments, torch.tensor(wanted))
            self._begin(self._capturing, state)
            with self._capturing.capturing(capture):
                arguments = {name: capture.input(value) for name, value in arguments.items()}
                return capture.output(self._logits(arguments, torch.tensor(wanted)))

    def _logits(self, arguments: dict[str, Any], keep: torch.Tensor) -> torch.Tensor:
        """Run the model; return the logits of the rows in `keep`."""
        if "logits_to_keep" in parameters_of(self.model):
            return self.model(logits_to_keep=keep, **arguments).logits[0]  # type: ignore[no-any-return]
        return self.model(**arguments).logits[0, keep]  # type: ignore[no-any-return]


def _routed(forward: Callable[..., Any], handle: RuntimeHandle) -> Callable[..., Any]:
    """A router's forward, by way of the runtime."""
    return lambda hidden, *others: handle.route(forward, hidden, *others)


def _share_cores(threads: int) -> None:
    """Keep torch's small operations on one core during decode: ggml's threads may spin on all cores."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


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
