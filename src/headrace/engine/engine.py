"""A step: the new rows of some sequences go in, logits come out, and the weights pass by once.

The engine holds the model's modules, the stream of weights and the kernels, and ties them together: when a module asks
for a product, the weights of its place in the pass are taken from the stream as they come.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface

from headrace.checkpoint import Checkpoint, Tensor
from headrace.engine.attention import Entry, JoinedCache, KVCache, PackedAttention
from headrace.engine.trace import PassStats, Trace
from headrace.errors import ContextError
from headrace.kernels import FEW_ROWS, Kernels, Piece, ReferenceKernels
from headrace.model import PackedLinear, build_shell
from headrace.model.shell import EMBEDDING
from headrace.stream import Arena, WeightFile, WeightStream
from headrace.stream.layout import make_layout
from headrace.stream.memory import PAGE_BYTES, aligned
from headrace.stream.weights import File


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """New tokens of one sequence, and how many of their last rows need logits.

    Exact rows are computed one by one: their results do not depend on the rows beside them. The others may share faster
    products. None: exact if they are few, as decoded and drafted tokens are, and prompts are not.
    """

    cache: KVCache
    tokens: Sequence[int]
    logits: int = 1
    exact: bool | None = None

    @property
    def is_exact(self) -> bool:
        """Whether these rows are computed one by one."""
        return len(self.tokens) <= FEW_ROWS if self.exact is None else self.exact


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamOptions:
    """What the plan decided about the stream."""

    pinned_rows: Mapping[str, int]
    unit_bytes: int
    slots: int
    readers: int
    interleaved_types: frozenset[str] = frozenset()  # brought into ggml's interleaved layout where pinned
    interleaved_in_place: bool = False  # rather than copied: no memory, but prompts take longer
    pinned_read_bytes: int = 4 << 20


class Engine:
    """One model, ready to step. A context manager; `close` stops the readers."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: "StreamOptions | Callable[[], StreamOptions]",
        kernels: Kernels | ReferenceKernels,
        *,
        trace: Trace | None = None,
        open_file: Callable[[str], File] = WeightFile,
    ):
        """Builds the model and the stream; nothing large is read before the first step.

        `options` may be a function: it is called when the model is built and the memory for weights is not yet taken.
        """
        self.checkpoint = checkpoint
        self.kernels = kernels
        self.trace = trace
        self.passes: list[PassStats] = []
        self.on_visit: Callable[[int, int], None] | None = None  # called with (visits done, visits of the pass)
        self._attention = PackedAttention()
        self._attention_name = f"headrace_{id(self):x}"
        AttentionInterface.register(self._attention_name, self._attention)
        self._files = {path: open_file(path) for path in checkpoint.paths}
        self._scratch = Arena(1 << 20)
        shell = build_shell(
            checkpoint,
            attention=self._attention_name,
            product=self._product,
            unpack=self._unpack,
            gather=self._gather,
        )
        self.model = shell.model
        self._own_attention = self._attention.used
        self._place = {linear: (v, i) for v, group in enumerate(shell.groups) for i, linear in enumerate(group)}
        self._pending: dict[PackedLinear, tuple[torch.Tensor, torch.Tensor]] = {}
        self._groups = shell.groups
        if callable(options):
            options = options()
        order = [[linear.tensor for linear in group] for group in shell.groups]
        self.layout = make_layout(order, options.pinned_rows, options.unit_bytes, options.pinned_read_bytes)
        self.stream = WeightStream(
            self.layout,
            slots=options.slots,
            readers=options.readers,
            open_file=open_file,
            spans=trace,
            settle=partial(self._interleave, options) if options.interleaved_types else None,
        )
        self._kernel_s = 0.0
        self._rows = self._exact_rows = 0  # of the step in progress

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop the readers, close the files, free the kernels. Safe to call twice."""
        self.stream.close()
        for file in self._files.values():
            file.close()
        self._files = {}
        self.kernels.close()
        AttentionInterface._global_mapping.pop(self._attention_name, None)

    @property
    def layers(self) -> int:
        """Decoder layers, each with keys and values of its own."""
        return int(self.model.config.num_hidden_layers)

    def new_cache(self, capacity: int, bits: int = 16) -> KVCache:
        """An empty cache for one sequence of at most `capacity` tokens, with keys and values in 16 or 8 bits."""
        return KVCache(self.layers, capacity, bits)

    def step(self, batch: Sequence[Rows]) -> torch.Tensor:
        """One pass over the weights for the new rows of all sequences.

        Returns:
            Logits in fp32, (sum of `rows.logits`, vocab), sequence after sequence. The caches have grown.

        Raises:
            ContextError: a cache has no room for its rows.
            ReadError: the weights could not be read; no cache has grown, and the next step starts afresh.
        """
        for rows in batch:
            if rows.cache.length + len(rows.tokens) > rows.cache.capacity:
                raise ContextError(
                    f"{rows.cache.length + len(rows.tokens)} tokens do not fit into a context of {rows.cache.capacity}",
                    hint=f"use --ctx-size {rows.cache.length + len(rows.tokens)} or more",
                )
        self._rows = sum(len(rows.tokens) for rows in batch)
        self._exact_rows = sum(len(rows.tokens) for rows in batch if rows.is_exact)
        self._share_cores(self._rows - self._exact_rows)
        before, kernel_before, start = replace(self.stream.counters), self._kernel_s, time.perf_counter()
        try:
            logits = self._forward_in_order(batch)
        except BaseException:
            self._pending.clear()
            self.stream.rewind()
            for rows in batch:
                rows.cache.abandon()
            raise
        for rows in batch:
            rows.cache.settle()
            rows.cache.length += len(rows.tokens)
        end, after = time.perf_counter(), self.stream.counters
        if self.trace is not None:
            self.trace.add("pass", f"{sum(len(r.tokens) for r in batch)} rows", start, end)
        self.passes.append(
            PassStats(
                rows=sum(len(rows.tokens) for rows in batch),
                start_s=start,
                seconds=end - start,
                read_bytes=after.read_bytes - before.read_bytes,
                stall_s=after.stall_s - before.stall_s,
                kernel_s=self._kernel_s - kernel_before,
            )
        )
        return logits

    def _share_cores(self, shared_rows: int) -> None:
        """torch's small operations stay on one core while ggml works, whose threads wait by spinning on all of them."""
        threads = self.kernels.threads if shared_rows > FEW_ROWS else 1
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)

    def _forward_in_order(self, batch: Sequence[Rows]) -> torch.Tensor:
        """Exact rows first, as the kernels want them; the logits in the order of the batch."""
        order = sorted(range(len(batch)), key=lambda i: not batch[i].is_exact)
        entries: dict[int, Entry] = {}
        first = 0
        for i in order:
            last = first + len(batch[i].tokens)
            entries[i] = Entry(batch[i].cache, slice(first, last), batch[i].is_exact)
            first = last
        logits = self._forward([batch[i] for i in order], [entries[i] for i in range(len(batch))])
        if order == list(range(len(batch))):
            return logits
        parts = dict(zip(order, torch.split(logits, [batch[i].logits for i in order]), strict=True))
        return torch.cat([parts[i] for i in range(len(batch))])

    @torch.inference_mode()
    def _forward(self, batch: Sequence[Rows], entries: Sequence[Entry]) -> torch.Tensor:
        """`batch` in the order of the rows, `entries` in the order of the step."""
        tokens = torch.tensor([[token for rows in batch for token in rows.tokens]])
        positions = torch.cat([torch.arange(r.cache.length, r.cache.length + len(r.tokens)) for r in batch])[None]
        wanted: list[int] = []
        first = 0
        for rows in batch:
            first += len(rows.tokens)
            wanted += range(first - rows.logits, first)
        arguments: dict[str, Any] = {}
        if self._own_attention:
            self._attention.begin(entries)
        else:
            joined = JoinedCache(entries)
            arguments = {"past_key_values": joined, "attention_mask": joined.mask(), "use_cache": True}
        keep: Any = torch.tensor(wanted)
        result = self.model(input_ids=tokens, position_ids=positions, logits_to_keep=keep, **arguments)
        logits: torch.Tensor = result.logits[0]
        return logits

    def _product(self, linear: PackedLinear, x: torch.Tensor) -> torch.Tensor:
        """The product of a linear; with the first of a group come those of the others, on the same activations."""
        ready = self._pending.pop(linear, None)
        if ready is None:
            self._compute_group(linear, x)
            ready = self._pending.pop(linear)
        source, out = ready
        assert source is x, "linears of a group were called with different activations"
        return out

    def _compute_group(self, linear: PackedLinear, x: torch.Tensor) -> None:
        visit, place = self._place[linear]
        assert place == 0, "linears were called in another order than they were traced"
        group = self._groups[visit]
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        # The head is given only the rows that need logits: few, so all of them are exact.
        exact = self._exact_rows if rows.shape[0] == self._rows else rows.shape[0]
        outputs = [rows.new_empty((rows.shape[0], member.tensor.rows)) for member in group]
        for pieces in self.stream.visit(visit):
            start = time.perf_counter()
            self.kernels.multiply(rows, pieces, outputs, exact)
            end = time.perf_counter()
            self._kernel_s += end - start
            if self.trace is not None:
                self.trace.add("compute", linear.tensor.name, start, end)
        shape = x.shape[:-1]
        for member, out in zip(group, outputs, strict=True):
            self._pending[member] = (x, out.view(*shape, -1))
        if self.on_visit is not None:
            self.on_visit(visit + 1, len(self._groups))

    def _interleave(self, options: StreamOptions, piece: Piece, columns: int) -> Piece:
        if piece.type not in options.interleaved_types:
            return piece
        return self.kernels.interleave(piece, columns, options.interleaved_in_place)

    def _unpack(self, tensor: Tensor) -> torch.Tensor:
        """A small tensor read whole: fp32, in its shape."""
        data = self._read(tensor.path, tensor.offset, tensor.nbytes)
        return self._to_floats(tensor, data).view(tensor.shape)

    def _gather(self, tokens: torch.Tensor) -> torch.Tensor:
        """Rows of the token embedding, (tokens, hidden): one short read each."""
        tensor = self.checkpoint.tensors[EMBEDDING]
        size = tensor.row_bytes
        packed = np.concatenate([self._read(tensor.path, tensor.offset + t * size, size) for t in tokens.tolist()])
        return self._to_floats(tensor, packed).view(-1, tensor.columns)

    def _to_floats(self, tensor: Tensor, data: np.ndarray[Any, np.dtype[np.uint8]]) -> torch.Tensor:
        rows = len(data) // tensor.row_bytes
        return self.kernels.unpack(tensor.type, data.ctypes.data, rows, tensor.columns).clone()

    def _read(self, path: str, offset: int, nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        if self._scratch.nbytes < nbytes + 2 * PAGE_BYTES:
            self._scratch = Arena(nbytes + 2 * PAGE_BYTES)
        start, length = aligned(offset, nbytes)
        self._files[path].read(start, self._scratch.view[:length], offset + nbytes - start)
        return np.frombuffer(self._scratch.view[offset - start : offset - start + nbytes], np.uint8).copy()
