"""The library: `headrace.load` and what it returns. The command line is a loop over it.

with headrace.load("model.gguf", memory="4GiB") as model:
    print(model.generate("Say hello.").text)
    for piece in model.stream("Count to ten.", max_tokens=64):
        print(piece.text, end="")
"""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

from headrace._version import __version__
from headrace.checkpoint import Checkpoint, open_checkpoint
from headrace.engine import Engine, KVCache, PassStats, Rows, Sampling, Trace
from headrace.engine.engine import StreamOptions
from headrace.engine.sampling import Sampler
from headrace.engine.stops import StopScanner
from headrace.errors import ContextError, UsageError
from headrace.kernels import make_kernels
from headrace.model import Tokenizer
from headrace.model.tokenizer import Prompt
from headrace.plan import (
    Budget,
    Plan,
    Profile,
    Request,
    budget_of,
    guessed_profile,
    load_profile,
    make_plan,
)
from headrace.process import keep_freed_memory, peak_bytes, release_unused, resident_bytes
from headrace.stream import WeightFile
from headrace.stream.weights import File


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a prefill is: pass and position in it."""

    pass_number: int
    passes: int
    done: int  # visits of this pass
    visits: int
    read_bytes: int  # since the prefill began
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One step of a stream: the text it completed, and what is known of the run so far."""

    text: str
    token: int | None  # None in the last piece of a stream, which only says why it ended
    prompt_tokens: int
    completion_tokens: int
    ttft_s: float
    pass_stats: PassStats
    finish_reason: str | None = None  # "stop" or "length", in the last piece


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A whole answer with its measurements; `as_json` is what `--json` prints."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    timings: dict[str, float | int | None]
    memory: dict[str, int]
    plan: Plan

    def as_json(self) -> dict[str, Any]:
        """One JSON-ready object; keys carry their units and are only ever added to."""
        return {
            "text": self.text,
            "finish_reason": self.finish_reason,
            "model": self.plan.model,
            "version": __version__,
            "usage": {
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": self.completion_tokens,
                "total_tokens": self.prompt_tokens + self.completion_tokens,
            },
            "timings": self.timings,
            "memory": self.memory,
            "plan": self.plan.as_json(),
        }


@dataclass(kw_only=True)
class _Kept:
    """The tokens whose keys and values are in the cache, so that the next prompt may continue from them."""

    cache: KVCache
    tokens: list[int] = field(default_factory=list)


class Model:
    """A loaded model. A context manager; not for several threads at once."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        *,
        load_s: float,
        engine: Engine,
        tokenizer: Tokenizer,
    ):
        """Use `load`."""
        self.checkpoint = checkpoint
        self.plan = plan
        self.tokenizer = tokenizer
        self.load_s = load_s
        self._engine = engine
        self._kept = _Kept(cache=engine.new_cache(plan.context_tokens))
        self._closed = False

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop the readers and give everything back. Safe to call twice."""
        if not self._closed:
            self._closed = True
            self._engine.close()

    @property
    def trace(self) -> Trace | None:
        """The spans of this model's passes, if it was loaded with `trace=True`."""
        return self._engine.trace

    @property
    def passes(self) -> Sequence[PassStats]:
        """One record per pass over the weights, since loading."""
        return self._engine.passes

    def default_sampling(self) -> Sampling:
        """What the file recommends (`general.sampling.*`), else plain sampling at temperature 1."""
        names = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
        found = {name: self.checkpoint.get(f"general.sampling.{key}") for name, key in names.items()}
        return Sampling(**{name: value for name, value in found.items() if value is not None})  # type: ignore[arg-type]

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        raw: bool = False,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Iterator[Piece]:
        """Generate, one piece per token, then a last piece with the finish reason.

        Args:
            prompt: text, or messages of a conversation. What it shares with the last one is not computed again.
            max_tokens: at most so many; None: until the model ends or the context is full.
            sampling: None: the file's recommendation.
            stop: strings that end the answer and are not part of it.
            raw: complete the text as it is, without the chat template.
            on_progress: called during prefill.

        Raises:
            ContextError: the prompt does not fit into the context that was planned.
            ReadError: the weights could not be read.
        """
        tokens = self.tokenizer.prompt(prompt, raw=raw)
        if not tokens:
            raise UsageError("the prompt is empty", hint="give a prompt of at least one token")
        room = self.plan.context_tokens - len(tokens)
        if room < 1:
            raise ContextError(
                f"the prompt has {len(tokens)} tokens, the context holds {self.plan.context_tokens}",
                hint=f"use --ctx-size {len(tokens) + (max_tokens or 256)}",
            )
        limit = room if max_tokens is None else min(room, max_tokens)
        return self._generate(tokens, limit, Sampler(sampling or self.default_sampling()), stop, on_progress)

    def _generate(
        self,
        tokens: list[int],
        limit: int,
        sampler: Sampler,
        stop: Sequence[str],
        on_progress: Callable[[Progress], None] | None,
    ) -> Iterator[Piece]:
        start = time.perf_counter()
        logits = self._prefill(tokens, on_progress)
        ttft = 0.0
        text, scanner = self.tokenizer.stream(), StopScanner(stop)
        for count in range(1, limit + 1):
            token = sampler.draw(logits[-1])
            ttft = ttft or time.perf_counter() - start
            piece = Piece(
                text="",
                token=token,
                prompt_tokens=len(tokens),
                completion_tokens=count,
                ttft_s=ttft,
                pass_stats=self._engine.passes[-1],
            )
            if token in self.tokenizer.end_ids:
                yield replace(piece, text=scanner.rest(), token=None, completion_tokens=count, finish_reason="stop")
                return
            shown, stopped = scanner.push(text.step(token))
            if stopped or count == limit:
                shown += "" if stopped else scanner.rest()
                yield replace(piece, text=shown)
                yield replace(piece, text="", token=None, finish_reason="stop" if stopped else "length")
                return
            yield replace(piece, text=shown)
            logits = self._step([token])

    def _prefill(self, tokens: list[int], on_progress: Callable[[Progress], None] | None) -> Any:
        """Logits after the prompt; computes only what the cache does not hold, at least the last token."""
        kept = self._kept
        shared = 0
        for old, new in zip(kept.tokens, tokens[:-1], strict=False):
            if old != new:
                break
            shared += 1
        kept.cache.truncate(shared)
        kept.tokens = tokens[:shared]
        rows = self.plan.prefill_rows
        parts = [tokens[i : i + rows] for i in range(shared, len(tokens), rows)]
        logits = None
        start, read = time.perf_counter(), self._engine.stream.counters.read_bytes
        for number, part in enumerate(parts):
            if on_progress is not None:
                self._engine.on_visit = lambda done, visits, n=number: on_progress(
                    Progress(
                        pass_number=n + 1,
                        passes=len(parts),
                        done=done,
                        visits=visits,
                        read_bytes=self._engine.stream.counters.read_bytes - read,
                        seconds=time.perf_counter() - start,
                    )
                )
            try:
                logits = self._step(part)
            finally:
                self._engine.on_visit = None
        return logits

    def _step(self, tokens: list[int]) -> Any:
        logits = self._engine.step([Rows(cache=self._kept.cache, tokens=tokens)])
        self._kept.tokens = self._kept.tokens + tokens
        return logits

    def generate(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        raw: bool = False,
        on_piece: Callable[[Piece], None] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Completion:
        """The whole answer at once; arguments as in `stream`. `on_piece` is called with every piece as it comes."""
        before = len(self._engine.passes)
        start = time.perf_counter()
        pieces: list[Piece] = []
        arguments = {"max_tokens": max_tokens, "sampling": sampling, "stop": stop, "raw": raw}
        for piece in self.stream(prompt, on_progress=on_progress, **arguments):  # type: ignore[arg-type]
            pieces.append(piece)
            if on_piece is not None:
                on_piece(piece)
        return self.completion(pieces, before, time.perf_counter() - start)

    def completion(self, pieces: Sequence[Piece], first_pass: int, seconds: float) -> Completion:
        """The measurements of a stream that has ended, or was interrupted after these pieces."""
        last = pieces[-1] if pieces else None
        passes = list(self._engine.passes[first_pass:])
        count = sum(piece.token is not None for piece in pieces)
        steps = last.completion_tokens - 1 if last else 0  # the token that ends a turn costs a pass as well
        ttft = last.ttft_s if last else None
        decode_s = seconds - ttft if ttft is not None and steps > 0 else None
        decode = passes[-steps:] if steps > 0 else []
        read = sum(p.read_bytes for p in passes)
        return Completion(
            text="".join(piece.text for piece in pieces),
            finish_reason=(last.finish_reason if last else None) or "interrupted",
            prompt_tokens=last.prompt_tokens if last else 0,
            completion_tokens=count,
            timings={
                "load_s": self.load_s,
                "ttft_s": ttft,
                "decode_s": decode_s,
                "decode_tok_per_s": steps / decode_s if decode_s else None,
                "passes": len(passes),
                "tokens_per_pass": steps / len(decode) if decode else None,
                "read_bytes": read,
                "read_bytes_per_pass": sum(p.read_bytes for p in decode) // len(decode) if decode else None,
                "read_bytes_per_s": read / sum(p.seconds for p in passes) if passes else None,
                "stall_s": sum(p.stall_s for p in passes),
                "compute_s": sum(p.seconds - p.stall_s for p in passes),
                "draft_s": None,
            },
            memory={
                "budget_bytes": self.plan.budget.nbytes,
                "peak_bytes": peak_bytes(),
                "pinned_bytes": self.plan.pinned_bytes,
                "streamed_bytes_per_pass": self.plan.streamed_bytes_per_pass,
                "ring_bytes": self.plan.ring_bytes,
                "interleaved_bytes": self.plan.interleaved_bytes,
                "kv_bytes": self.plan.kv_bytes,
            },
            plan=self.plan,
        )


def load(
    path: str,
    *,
    memory: str | int | Budget | None = None,
    context_tokens: int | None = None,
    prompt_tokens: int | None = None,
    size_for: Callable[[Tokenizer], Request] | None = None,
    profile: Profile | None = None,
    trace: bool = False,
    open_file: Callable[[str], File] = WeightFile,
) -> Model:
    """Open a model under a memory ceiling.

    Nothing large is read here: the weights come with the first pass.

    Args:
        path: a GGUF file, or the first part of a split.
        memory: ceiling for the whole process, `"4GiB"` or bytes; None: what cgroup and free memory leave.
        context_tokens: prompt and answer together; None: 4096, or the model's own limit if that is less.
        prompt_tokens: the longest prompt to expect, which decides how many rows a prefill pass may carry.
        size_for: decides both once the tokenizer is there, for a prompt that is known already.
        profile: rates to plan with; None: those that `headrace probe` kept, else guesses.
        trace: record every span of time.
        open_file: opens the weights' files, for tests.

    Raises:
        CheckpointError: the file is damaged or cannot run.
        BudgetError: the ceiling is below the model's floor.
    """
    start = time.perf_counter()
    checkpoint = open_checkpoint(path)
    budget = budget_of(memory)
    profile = profile or load_profile() or guessed_profile()
    context = context_tokens or min(4096, checkpoint.number("context_length", 4096))
    request = Request(context_tokens=context, prompt_tokens=min(prompt_tokens or 512, context))
    make_plan(checkpoint, profile, budget, request)  # refuse before anything is built
    keep_freed_memory()
    tokenizer = Tokenizer(checkpoint)
    if size_for is not None:
        request = size_for(tokenizer)
        make_plan(checkpoint, profile, budget, request)
    return _load(checkpoint, tokenizer, profile, budget, request, trace, open_file, start)


def _load(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    profile: Profile,
    budget: Budget,
    request: Request,
    trace: bool,
    open_file: Callable[[str], File],
    start: float,
) -> Model:
    """Build the model first and plan with what the process has really taken by then; only then lay out the memory."""

    def options(runtime_bytes: int | None) -> tuple[Plan, StreamOptions]:
        plan = make_plan(checkpoint, profile, budget, request, runtime_bytes=runtime_bytes)
        return plan, StreamOptions(
            pinned_rows=plan.pinned_rows,
            unit_bytes=plan.unit_bytes,
            slots=plan.ring_slots,
            readers=plan.readers,
            interleaved_types=plan.interleaved_types,
        )

    plan: list[Plan] = []

    def decide() -> StreamOptions:
        release_unused()
        made, chosen = options(resident_bytes() + RUNTIME_GROWTH_BYTES)
        plan.append(made)
        return chosen

    kernels, why = make_kernels(profile.threads, profile.bf16_pays, row_invariant=False)
    if why != "ggml":
        warnings.warn(why, stacklevel=3)
    engine = Engine(checkpoint, decide, kernels, trace=Trace() if trace else None, open_file=open_file)
    return Model(checkpoint, plan[0], load_s=time.perf_counter() - start, engine=engine, tokenizer=tokenizer)


# What the first passes add to the process beside the plan's own items: graphs, threads' stacks, allocator's slack.
RUNTIME_GROWTH_BYTES = 24 << 20
