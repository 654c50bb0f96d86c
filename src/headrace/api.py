"""The library: `headrace.load`, and the model that it returns. The command line is a loop over it.

with headrace.load("model.gguf", memory="4GiB") as model:
    print(model.generate("Say hello.").text)
    for piece in model.stream("Count to ten.", max_tokens=64):
        print(piece.text, end="")
"""

import os
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from headrace._version import __version__
from headrace.checkpoint import Checkpoint, open_checkpoint
from headrace.engine import Engine, PassStats, Rows, Trace
from headrace.engine.drafters import ModelDrafter, PromptLookup
from headrace.engine.engine import StreamOptions
from headrace.engine.sampler import Sampler, TokenLogprobs
from headrace.engine.scheduler import Scheduler, SequenceState, Slot
from headrace.engine.speculation import Speculation, StepTimeModel
from headrace.engine.stops import StopScanner
from headrace.errors import CheckpointError, ContextError, UsageError
from headrace.kernels import make_kernels
from headrace.model import ModelSkeleton, Tokenizer
from headrace.model.config import check_model_type
from headrace.model.reasoning import AnswerStream, Part, Segment, joined
from headrace.model.tokenizer import Message, Prompt
from headrace.plan import (
    NO_DRAFT,
    Budget,
    Drafting,
    Plan,
    Profile,
    RunConfig,
    budget_of,
    choose_drafting,
    drafting_options,
    guessed_profile,
    load_profile,
    make_plan,
)
from headrace.plan.record import RunRecord, make_record
from headrace.plan.routing import Routing, load_routing, save_routing
from headrace.plan.shape import Built
from headrace.process import keep_freed_memory, not_after_a_fork, peak_bytes, release_unused, resident_bytes
from headrace.sampling_params import FIELDS, SamplingParams, recommended
from headrace.stream import WeightFile
from headrace.stream.expert_cache import ExpertCache
from headrace.stream.files import File


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Progress of a prefill: the pass, and the position in it."""

    pass_number: int
    passes: int
    done: int  # steps of this pass that are done: weight groups, MoE layers
    steps: int  # steps of a pass
    read_bytes: int  # bytes read since the prefill began, without experts
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One step of a stream: the text it completed, and the counts and times so far."""

    text: str
    token: int | None  # token id; None in the last piece of a prompt, which says why it ended
    prompt_tokens: int
    completion_tokens: int
    ttft_s: float
    pass_stats: PassStats
    passes: int  # passes over the weights since loading
    index: int = 0  # number of the prompt, where several were given
    finish_reason: str | None = None  # "stop" or "length", in the last piece of its prompt
    reasoning: str = ""  # reasoning before the answer, where the model marks it
    kv_cache_type: str = "F16"  # type of the KV cache; a wider one after an overflow
    logprobs: TokenLogprobs | None = None  # of `token`, if the sampling parameters ask for them


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A whole answer with its measurements; `--json` prints its `as_json`."""

    text: str
    reasoning: str  # reasoning before the answer, where the model marks it; not part of `text`
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    timings: dict[str, float | int | None]
    memory: dict[str, int]
    speculation: dict[str, Any]
    experts: dict[str, Any] | None  # expert cache statistics of an MoE model
    plan: Plan = field(repr=False)
    kv_cache_type: str = "F16"
    logprobs: list[dict[str, Any]] | None = None  # of each token, in the format of OpenAI's chat completions

    def as_json(self) -> dict[str, Any]:
        """One JSON-ready object; keys carry their units and are only ever added to."""
        return {
            "text": self.text,
            "reasoning": self.reasoning,
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
            "kv_cache_type": self.kv_cache_type,
            "speculation": self.speculation,
            "experts": self.experts,
            "plan": self.plan.as_json(),
        } | ({} if self.logprobs is None else {"logprobs": {"content": self.logprobs}})


@dataclass(eq=False, kw_only=True)
class _Live:
    """A running sequence, with its detokeniser and stop scanner."""

    index: int
    sequence: SequenceState
    job: "Job"
    text: AnswerStream
    scanner: StopScanner
    start: float
    ttft_s: float = 0.0
    count: int = 0

    def take(self, token: int, end_ids: Collection[int]) -> tuple[list[Segment], str | None]:
        """The text that a token adds, and the finish reason if the answer ends with it."""
        self.count += 1
        ends = token in end_ids
        shown, stopped = self.scanner.push(self.text.end(token) if ends else self.text.step(token))
        if (
            token in self.job.stop_token_ids and not stopped
        ):  # a stop token is shown unless it is a control token, as in vLLM
            more, stopped = self.scanner.push(self.text.flush())
            shown, ends = shown + more, True
        if ends or stopped:
            return shown if stopped else shown + self.scanner.rest(), "stop"
        if self.count < self.sequence.max_tokens:
            return shown, None
        more, stopped = self.scanner.push(self.text.flush())
        return shown + more + ([] if stopped else self.scanner.rest()), "stop" if stopped else "length"


class Model:
    """A loaded model. A context manager.

    One stream at a time: a thread that starts one while another is open gets a `UsageError`. Any thread may close the model.
    A process that was forked after loading cannot use it: the model's threads do not exist there.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        *,
        load_s: float,
        engine: Engine,
        draft_engine: Engine | None,
        tokenizer: Tokenizer,
        deterministic: bool = True,
    ):
        """Use `load`."""
        self.checkpoint = checkpoint
        self.plan = plan
        self.tokenizer = tokenizer
        self.load_s = load_s
        self._engine = engine
        self._draft_engine = draft_engine
        slots = [Slot(engine.new_cache(plan.context_tokens, plan.kv_bits)) for _ in range(plan.sequences)]
        self._scheduler = Scheduler(engine, slots, plan.prefill_rows, plan.max_draft_tokens, deterministic)
        if plan.max_draft_tokens:
            self._scheduler.speculation = _speculation(plan, draft_engine)
        # Encoder and decoder positions are counted separately; without an encoder the context is the limit.
        self._max_positions = checkpoint.positions_limit(1 << 30) if engine.decoder_start_ids else 1 << 30
        self._closed = self._torn_down = self._in_step = False
        self._lock = RLock()  # held during a step and during teardown
        self._stream: weakref.ref[Iterator[Piece]] | None = None  # the open stream, or the last one
        self._process = os.getpid()
        self._ttft_s: float | None = None
        self._prefilled = 0  # passes until the first token since loading
        self._tokens = 0
        self._first_tokens = 0

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop the readers and free all memory. Safe to call twice, from any thread: it waits for a pass in progress."""
        self._closed = True
        if os.getpid() != self._process:
            return  # threads and memory are the parent's
        with self._lock:
            if not self._in_step:  # else called during a step of this very thread, which then tears down
                self._tear_down()

    def _tear_down(self) -> None:
        if self._torn_down:
            return
        self._torn_down = True
        self.tokenizer.close()
        if self._draft_engine is not None:
            self._draft_engine.close()
        if self._engine.experts is not None and self._engine.passes:
            self._keep_routing(self._engine.experts.stream.cache)
        self._engine.close()

    def _keep_routing(self, cache: ExpertCache) -> None:
        """Save router scores and the hit rate of the expert cache for the next run."""
        single = [one for one in self._engine.passes[len(self._engine.passes) // 3 :] if one.rows == 1]
        hits = sum(one.expert_hits for one in single)
        requested = sum(one.expert_hits + one.expert_prefetched + one.expert_misses for one in single)
        if requested:
            cached = self.plan.expert_slots
            save_routing(self.checkpoint, Routing(scores=cache.scores, cached=cached, hit_rate=hits / requested))

    @property
    def remarks(self) -> tuple[str, ...]:
        """Notes on unusual ways in which the weights are read."""
        return self._engine.remarks

    @property
    def trace(self) -> Trace | None:
        """Spans of this model's passes, if it was loaded with `trace=True`."""
        return self._engine.trace

    @property
    def passes(self) -> Sequence[PassStats]:
        """One record per pass over the weights, since loading."""
        return self._engine.passes

    def record(self) -> RunRecord:
        """Measurements since loading beside the predictions, for `plan.fit`."""
        passes = self._engine.passes
        later, tokens = passes[self._prefilled :], self._tokens - self._first_tokens
        s_per_token = sum(p.seconds + p.draft_s for p in later) / tokens if later and tokens else None
        return make_record(self.plan, passes, self._tokens, self._ttft_s, s_per_token)

    def default_sampling(self) -> SamplingParams:
        """The file's recommendation (`general.sampling.*`), else plain sampling at temperature 1."""
        return recommended(
            {one.name: self.checkpoint.get(f"general.sampling.{one.gguf_key}") for one in FIELDS if one.gguf_key}
        )

    def stream(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        max_tokens: int | None = None,
        sampling: SamplingParams | None = None,
        stop: str | Sequence[str] = (),
        raw: bool = False,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Iterator[Piece]:
        """Generate, one piece per token, then for each prompt a last piece with the finish reason.

        Args:
            prompt: text, or messages of a conversation; or several of these, which share the passes over the weights.
                Their pieces come as they are computed; `Piece.index` is the prompt's number. A prefix shared with an
                earlier prompt is not computed again.
            max_tokens: limit for each prompt; None: until the model ends or the context is full.
            sampling: None: the file's recommendation.
            stop: a string that ends the answer and is not part of it, or several.
            raw: complete the text as it is, without the chat template, and without separating reasoning from the answer.
            on_progress: called during the passes before the first piece.

        Raises:
            ContextError: a prompt does not fit into the planned context.
            ReadError: the weights could not be read.
            UsageError: the model is closed, or another stream of it has not been read to its end or closed.
        """
        sampling = self.default_sampling() if sampling is None else sampling
        jobs = [
            Job(
                tokens=self.encode(one, raw=raw),
                tail=self.tokenizer.tail(one, raw=raw),
                max_tokens=max_tokens,
                sampling=sampling,
                stop=(stop,) if isinstance(stop, str) else stop,
                raw=raw,
            )
            for one in _prompts(prompt)
        ]
        return self.stream_jobs(iter(jobs), on_progress)

    def encode(self, prompt: Prompt, *, raw: bool = False) -> list[int]:
        """The tokens of a prompt.

        Raises:
            UsageError: there are none.
            ContextError: they leave no position for an answer in the planned context.
        """
        tokens = self.tokenizer.prompt(prompt, raw=raw)
        self.check_prompt(tokens)
        return tokens

    def check_prompt(self, tokens: Sequence[int]) -> None:
        """Raise the errors of `encode` for these tokens of a prompt."""
        if not tokens:
            raise UsageError("the prompt is empty", hint="give a prompt of at least one token")
        self._check_tokens(tokens)
        if len(tokens) - len(self._engine.decoder_start_ids) > self._max_positions:
            raise ContextError(
                f"the prompt has {len(tokens) - len(self._engine.decoder_start_ids)} tokens, the model's encoder reads at most"
                f" {self._max_positions}",
                hint="give it a shorter text",
            )
        if len(tokens) >= self.plan.context_tokens:
            limit = self.checkpoint.context_limit(1 << 30)
            wider = min(len(tokens) + 256, limit)
            raise ContextError(
                f"the prompt has {len(tokens)} tokens, the context holds {self.plan.context_tokens}",
                hint=f"use --ctx-size {wider}"
                if len(tokens) < limit
                else f"the model was made for texts of {limit} tokens, the answer included: give it a shorter prompt",
            )

    def check_sampling(self, sampling: SamplingParams) -> None:
        """Raise `UsageError` if the parameters name tokens that the model does not have."""
        unknown = self._unknown_token(sampling.logit_bias)
        if unknown is not None:
            raise UsageError(
                f"logit_bias names token {unknown}", hint=f"the model has {self._engine.embedding_rows} tokens"
            )

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        """Raise `UsageError` for tokens without an embedding."""
        unknown = self._unknown_token(tokens)
        if unknown is not None:
            spelled = self.tokenizer.decode([unknown]) if unknown >= 0 else ""
            raise UsageError(
                f"the prompt holds token {unknown}{f' ({spelled!r})' if spelled else ''}, the model has"
                f" {self._engine.embedding_rows} embeddings",
                hint="the tokenizer is of another model; leave this text out",
            )

    def _unknown_token(self, tokens: Iterable[int]) -> int | None:
        rows = self._engine.embedding_rows
        return next((token for token in tokens if token < 0 or (rows is not None and token >= rows)), None)

    def stream_jobs(
        self, jobs: Iterator["Job"], on_progress: Callable[[Progress], None] | None = None
    ) -> Iterator[Piece]:
        """Stream jobs, each with its settings. A job is taken whenever a slot is free."""
        mine: list[weakref.ref[Iterator[Piece]]] = []
        pieces = self._stream_jobs(jobs, on_progress, mine)
        mine.append(weakref.ref(pieces))
        return _Stream(pieces)

    def _claim(self, mine: "weakref.ref[Iterator[Piece]]") -> None:
        """Make this stream the open one. Clean up after the last, which may have been interrupted at any point."""
        if os.getpid() != self._process:
            raise UsageError(
                "this model was loaded before the process forked", hint="load it in the child, started with `spawn`"
            )
        with self._lock:
            if self._closed:
                raise UsageError("the model is closed", hint="load it again")
            other = None if self._stream is None else self._stream()
            if other is not None and getattr(other, "gi_frame", None) is not None:
                raise UsageError(
                    "another stream of this model is open",
                    hint="read it to its end or close it; prompts given together share their passes",
                )
            self._stream = mine
            self._engine.on_progress = None
            self._scheduler.reset()

    def _stream_jobs(
        self,
        jobs: Iterator["Job"],
        on_progress: Callable[[Progress], None] | None,
        mine: "list[weakref.ref[Iterator[Piece]]]",
    ) -> Generator[Piece]:
        self._claim(mine[0])
        scheduler, live = self._scheduler, dict[SequenceState, _Live]()
        waiting: Iterator[tuple[int, Job]] = enumerate(jobs)
        exhausted = False
        try:
            self._watch(on_progress, time.perf_counter())
            while True:
                while scheduler.has_free_slot and not exhausted:
                    index, job = next(waiting, (-1, None))
                    if job is None:
                        exhausted = True
                        break
                    one = self._begin(index, job)
                    live[one.sequence] = one
                if not live:
                    return
                new_tokens = self._step()
                if new_tokens:
                    self._engine.on_progress = None
                for sequence, tokens in new_tokens:
                    yield from self._pieces(live, sequence, tokens)
        finally:
            if os.getpid() == self._process:
                with self._lock:
                    self._engine.on_progress = None
                    for sequence in live:
                        scheduler.remove(sequence)

    def _begin(self, index: int, job: "Job") -> _Live:
        """Add a job to the scheduler. Everything that can fail comes first."""
        self._check_tokens(job.tokens)
        self.check_sampling(job.sampling)
        available = min(self.plan.context_tokens - len(job.tokens), self._max_positions)
        max_tokens = available if job.max_tokens is None else min(available, job.max_tokens)
        text = self.tokenizer.answer(job.tokens, raw=job.raw, tail=job.tail, stops=job.stop)
        scanner, sampler = StopScanner(job.stop, text.hidden_texts), Sampler(job.sampling, len(job.tokens))
        with self._lock:
            sequence = self._scheduler.add(job.tokens, max_tokens, sampler)
            return _Live(index=index, sequence=sequence, job=job, text=text, scanner=scanner, start=time.perf_counter())

    def _step(self) -> list[tuple[SequenceState, list[int]]]:
        if os.getpid() != self._process:
            raise UsageError("a stream does not go on in a forked process", hint="load the model in the child")
        with self._lock:
            try:
                if not self._closed:
                    self._in_step = True
                    new_tokens = self._scheduler.step()
            finally:
                self._in_step = False
                if self._closed:
                    self._tear_down()
            if self._closed:
                raise UsageError("the model was closed while it answered", hint="close it when the stream has ended")
            return new_tokens

    def _pieces(
        self, live: dict[SequenceState, _Live], sequence: SequenceState, tokens: Sequence[int]
    ) -> Iterator[Piece]:
        """The pieces of a sequence's new tokens; a sequence that ends with them is removed."""
        one = live[sequence]
        one.ttft_s = one.ttft_s or time.perf_counter() - one.start
        if self._ttft_s is None:
            self._ttft_s, self._prefilled = one.ttft_s, len(self._engine.passes)
        self._tokens += len(tokens)
        if len(self._engine.passes) == self._prefilled:
            self._first_tokens += len(tokens)
        for token in tokens:
            segments, reason = one.take(token, self.tokenizer.end_ids)
            text, reasoning = joined(segments, Part.CONTENT), joined(segments, Part.REASONING)
            piece = Piece(
                text=text,
                reasoning=reasoning,
                token=token,
                prompt_tokens=sequence.prompt_tokens,
                completion_tokens=one.count,
                ttft_s=one.ttft_s,
                pass_stats=self._engine.passes[-1],
                passes=len(self._engine.passes),
                index=one.index,
                kv_cache_type=sequence.slot.cache.type,
                logprobs=sequence.logprobs[one.count - 1],
            )
            if reason is None:
                yield piece
                continue
            with self._lock:
                self._scheduler.remove(sequence)
                del live[sequence]
            if token not in self.tokenizer.end_ids:
                yield piece
                piece = replace(piece, text="", reasoning="")
            yield replace(piece, token=None, logprobs=None, finish_reason=reason)
            return

    def _watch(self, on_progress: Callable[[Progress], None] | None, start: float) -> None:
        """Call `on_progress` after every step of a pass, until `engine.on_progress` is cleared."""
        if on_progress is None:
            return
        first, read = len(self._engine.passes), self._engine.read_bytes

        def report(done: int, steps: int) -> None:
            uncomputed = sum(len(sequence.uncomputed) for sequence in self._scheduler.sequences)
            number = len(self._engine.passes) - first + 1
            on_progress(
                Progress(
                    pass_number=number,
                    passes=number - 1 + max(1, -(-uncomputed // self.plan.prefill_rows)),
                    done=done,
                    steps=steps,
                    read_bytes=self._engine.read_bytes - read,
                    seconds=time.perf_counter() - start,
                )
            )

        self._engine.on_progress = report

    @overload
    def generate(self, prompt: Prompt, **options: Any) -> Completion: ...

    @overload
    def generate(self, prompt: Sequence[Sequence[Message]], **options: Any) -> list[Completion]: ...

    @overload
    def generate(self, prompt: list[str], **options: Any) -> list[Completion]: ...

    def generate(
        self, prompt: Prompt | Sequence[Prompt], *, on_piece: Callable[[Piece], None] | None = None, **options: Any
    ) -> Completion | list[Completion]:
        """The whole answer at once; for several prompts a list, whose sequences share the passes over the weights.

        Arguments as in `stream`. `on_piece` is called with every piece as it comes.
        """
        before, start = len(self._engine.passes), time.perf_counter()
        pieces: dict[int, list[Piece]] = {}
        ends: dict[int, float] = {}
        for piece in self.stream(prompt, **options):
            pieces.setdefault(piece.index, []).append(piece)
            ends[piece.index] = time.perf_counter() - start
            if on_piece is not None:
                on_piece(piece)
        answers = [self.completion(pieces[index], before, ends[index]) for index in sorted(pieces)]
        return answers if _is_many(prompt) else answers[0]

    def completion(self, pieces: Sequence[Piece], first_pass: int, seconds: float) -> Completion:
        """The text and measurements of a stream that has ended, or was interrupted after these pieces.

        Args:
            pieces: pieces of one prompt.
            first_pass: passes since loading when the stream began.
            seconds: duration of the stream.
        """
        last = pieces[-1] if pieces else None
        passes = list(self._engine.passes[first_pass : last.passes if last else None])
        prefilled = pieces[0].passes if pieces else 0
        decode = self._engine.passes[prefilled : last.passes] if last else []
        # The token that ends a turn costs a pass as well.
        steps = (
            last.completion_tokens - sum(p.token is not None and p.passes == prefilled for p in pieces) if last else 0
        )
        ttft = last.ttft_s if last else None
        decode_s = seconds - ttft if ttft is not None and decode else None
        read = sum(p.read_bytes for p in passes)
        return Completion(
            text="".join(piece.text for piece in pieces),
            reasoning="".join(piece.reasoning for piece in pieces).rstrip(),
            finish_reason=(last.finish_reason if last else None) or "interrupted",
            prompt_tokens=last.prompt_tokens if last else 0,
            completion_tokens=sum(piece.token is not None for piece in pieces),
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
                "decode_stall_s": sum(p.stall_s for p in decode),
                "compute_s": sum(p.seconds - p.stall_s for p in passes),
                "draft_s": sum(p.draft_s for p in passes),
            },
            memory={
                "budget_bytes": self.plan.budget.nbytes,
                "peak_bytes": peak_bytes(),
                "pinned_bytes": self.plan.pinned_bytes,
                "decode_pinned_bytes": self.plan.decode_pinned_bytes,
                "streamed_bytes_per_pass": self.plan.streamed_bytes_per_pass,
                "ring_bytes": self.plan.ring_bytes,
                "repacked_bytes": self.plan.repacked_bytes,
                "kv_bytes": self.plan.kv_bytes,
                "draft_bytes": self.plan.draft_bytes,
            },
            speculation=self._report(decode),
            experts=self._expert_report(decode, steps),
            plan=self.plan,
            kv_cache_type=last.kv_cache_type if last else "F16",
            logprobs=self.logprobs_json(pieces),
        )

    def logprobs_json(self, pieces: Sequence[Piece]) -> list[dict[str, Any]] | None:
        """Log-probabilities of each token of a prompt's pieces, as in OpenAI's chat completions; None: not asked for."""

        def entry(token: int, logprob: float) -> dict[str, Any]:
            data = self.tokenizer.bytes_of(token)
            text = data.decode(errors="replace")  # a token may end within a character
            return {"token": text, "logprob": max(logprob, _LEAST_LOGPROB), "bytes": list(data), "id": token}

        found = [piece.logprobs for piece in pieces if piece.logprobs is not None]
        if not found:
            return None
        return [
            entry(one.token, one.logprob) | {"top_logprobs": [entry(token, value) for token, value in one.top]}
            for one in found
        ]

    def _expert_report(self, decode: Sequence[PassStats], tokens: int) -> dict[str, Any] | None:
        """Expert cache hits and bytes read during decode; None for a dense model."""
        if self._engine.experts is None:
            return None
        hits, prefetched, misses = (
            sum(getattr(one, f"expert_{kind}") for one in decode) for kind in ("hits", "prefetched", "misses")
        )
        requested = hits + prefetched + misses
        read = sum(p.expert_read_bytes for p in decode)
        return {
            "hit_rate": hits / requested if requested else None,
            "prefetched_rate": prefetched / requested if requested else None,
            "bytes_per_token": read / tokens if tokens > 0 else None,
            "wasted_bytes": sum(p.expert_wasted_bytes for p in decode),
            "slots": self.plan.expert_slots,
        }

    def _report(self, decode: Sequence[PassStats]) -> dict[str, Any]:
        """Draft tokens proposed and accepted, and the limit that bound each decode pass."""
        speculation = self._scheduler.speculation
        positions = speculation.acceptance.positions if speculation is not None else []
        return {
            "draft": self.plan.drafting.name,
            "drafted": sum(p.drafted for p in decode),
            "accepted": sum(p.accepted for p in decode),
            "accepted_by_position": [{"tested": tested, "accepted": accepted} for tested, accepted in positions],
            "passes_bound_by": dict(Counter(p.bound_by for p in decode)),
        }


@dataclass(frozen=True, kw_only=True)
class Job:
    """One prompt with its settings, for `Model.stream_jobs`."""

    tokens: list[int]
    max_tokens: int | None
    sampling: SamplingParams
    stop: Sequence[str] = ()
    stop_token_ids: frozenset[int] = frozenset()  # tokens that end the answer beside the model's own
    tail: Sequence[int] = ()  # tokens that the chat template wrote after the conversation
    raw: bool = False  # no separation of reasoning and answer

    def __post_init__(self) -> None:
        """Refuse values that would fail later, or never end.

        Raises:
            UsageError: a field is invalid.
        """
        if not self.tokens or not all(isinstance(token, int) for token in self.tokens):
            raise UsageError("the prompt is empty or holds something else than tokens", hint="at least one token")
        most = self.max_tokens
        if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
            raise UsageError(f"max_tokens is {most!r}", hint="1 or more, or None")
        if not isinstance(self.sampling, SamplingParams):
            raise UsageError(f"sampling is {self.sampling!r}", hint="give a headrace.SamplingParams, or None")
        stops = self.stop
        if (
            isinstance(stops, str | bytes)
            or not isinstance(stops, Sequence)
            or not all(isinstance(s, str) for s in stops)
        ):
            raise UsageError(f"stop is {stops!r}", hint="give a text or a list of texts")


_LEAST_LOGPROB = -9999.0  # for impossible tokens, as in OpenAI's API: JSON has no infinity


class _Stream(Generator[Piece]):
    """The pieces of a stream; a second thread that reads them gets a `UsageError`."""

    def __init__(self, pieces: Generator[Piece]):
        self._pieces = pieces

    def send(self, value: None) -> Piece:
        """The next piece."""
        try:
            return self._pieces.send(value)
        except ValueError as error:
            if "already executing" not in str(error):
                raise
            raise UsageError(
                "another thread is reading this stream", hint="read a stream in one thread at a time"
            ) from error

    def throw(self, *given: Any) -> Piece:
        """Throw into the generator."""
        return self._pieces.throw(*given)

    def close(self) -> None:
        """End the stream."""
        self._pieces.close()


def _is_many(prompt: Prompt | Sequence[Prompt]) -> bool:
    """True for several prompts, False for one text or the messages of one conversation."""
    return not isinstance(prompt, str) and (not prompt or not isinstance(prompt[0], Mapping))


def _prompts(prompt: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompt, bytes | Mapping) or not isinstance(prompt, Sequence):
        raise UsageError(f"the prompt is {prompt!r:.40}", hint="give a text, a list of messages, or several of these")
    return list(prompt) if _is_many(prompt) else [prompt]  # type: ignore[arg-type, list-item]


def _speculation(plan: Plan, draft_engine: Engine | None) -> Speculation:
    model = None if draft_engine is None else ModelDrafter(draft_engine, plan.context_tokens, plan.drafting.name)
    step_times = StepTimeModel(plan.cost, plan.decode_prediction.draft_token_s)
    return Speculation(step_times, PromptLookup() if plan.drafting.lookup else None, model)


def load(
    path: str | Path,
    *,
    memory: str | int | Budget | None = None,
    context_tokens: int | None = None,
    prompt_tokens: int | None = None,
    sequences: int = 1,
    kv_bits: int = 16,
    draft: str | Path | None = "auto",
    deterministic: bool = True,
    size_for: Callable[[Tokenizer], RunConfig] | None = None,
    profile: Profile | None = None,
    trace: bool = False,
    open_file: Callable[[str], File] = WeightFile,
) -> Model:
    """Open a model under a memory ceiling.

    The first pass reads the model's weights; a draft model is read here.

    Args:
        path: a GGUF file or the first part of a split, or a Hugging Face folder with safetensors.
        memory: ceiling for the whole process, `"4GiB"` or bytes; None: limited by cgroup and free memory.
        context_tokens: prompt and answer together; None: 4096, or the model's own limit if that is less.
        prompt_tokens: the longest prompt to expect, which decides the maximum rows of a prefill pass.
        sequences: prompts that are computed together; each has its own KV cache.
        kv_bits: 16 or 8 bits for each element of the KV cache.
        draft: source of draft tokens, which a pass then verifies. `none` or None; `prompt`: prompt lookup; the path of a
            draft model. `self`: a low-bit copy quantised on load. `auto`: the plan's choice.
        deterministic: the same prompt, seed and settings give the same tokens, whatever ran before or shares the passes.
            False also reuses the KV cache of answers that became part of a prompt, and of chunks shared in part.
        size_for: decides the run's sizes once the tokenizer is there, for prompts that are known already. The sizes given
            above then only refuse a model that cannot fit.
        profile: rates to plan with; None: the profile kept by `headrace probe`, else assumed rates of a modest machine.
        trace: record every span of time.
        open_file: opens the weights' files, for tests.

    Raises:
        CheckpointError: a file is damaged or cannot run.
        BudgetError: the ceiling is below the model's floor.
        UsageError: the draft model does not exist or does not fit, or the model's cache cannot be rolled back.
    """
    start = time.perf_counter()
    not_after_a_fork()
    for name, value in (("context_tokens", context_tokens), ("prompt_tokens", prompt_tokens), ("sequences", sequences)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UsageError(f"{name} is {value!r}", hint="a whole number, 1 or more")
    if isinstance(memory, bool) or not isinstance(memory, str | int | Budget | None):
        raise UsageError(f"memory is {memory!r}", hint='a size such as "4GiB", or bytes')
    if kv_bits not in (8, 16) or sequences < 1:
        raise UsageError(f"kv_bits is {kv_bits!r}", hint="use 8 or 16")
    draft = "none" if draft is None else str(draft)
    checkpoint = open_checkpoint(str(path))
    budget = budget_of(memory)
    profile = profile or load_profile() or guessed_profile()
    context = context_tokens or min(4096, checkpoint.context_limit(4096))
    run_config = RunConfig(
        context_tokens=context,
        prompt_tokens=min(prompt_tokens or 512, context),
        sequences=sequences,
        kv_bits=kv_bits,
    )
    options = drafting_options(checkpoint, draft)
    drafting, why = choose_drafting(checkpoint, profile, budget, run_config, options)  # refuse before anything is built
    keep_freed_memory()
    check_model_type(checkpoint)
    tokenizer = Tokenizer(checkpoint)
    if size_for is not None:
        run_config = size_for(tokenizer)
        drafting, why = choose_drafting(checkpoint, profile, budget, run_config, options)
    run_config = replace(run_config, drafting=drafting)
    plans: list[Plan] = []

    def decide(skeleton: ModelSkeleton) -> StreamOptions:
        """Plan with the process's resident memory: everything is built, and no weights are in memory yet."""
        nonlocal run_config, why
        if skeleton.attention_mode == "native" or (skeleton.attention_mode == "concatenated" and deterministic):
            reason, hint = _why_alone(skeleton)
            if draft not in ("auto", "none"):
                raise UsageError(f"{checkpoint.name} runs without drafts: {reason}", hint=hint)
            run_config = replace(run_config, sequences=1, drafting=NO_DRAFT)
            why = f"draft none: {reason}"
        release_unused()
        taken = resident_bytes() + RUNTIME_GROWTH_BYTES
        plan = make_plan(checkpoint, profile, budget, run_config, runtime_bytes=taken, built=_built(skeleton))
        plans.append(replace(plan, reasons=(*plan.reasons, why)))
        return StreamOptions(
            pinned_rows=plan.pinned_rows,
            decode_pinned_rows=plan.decode_pinned_rows,
            decode_pinned_max_rows=run_config.verify_rows,
            memory_limit_bytes=budget.nbytes,
            unit_bytes=plan.unit_bytes,
            slots=plan.ring_slots,
            decode_only_slots=plan.decode_only_slots,
            prefill_only_slots=plan.prefill_only_slots,
            readers=plan.readers,
            pad_decode_rows_to_tiles=plan.pad_decode_rows_to_tiles,
            repacked_types=plan.repacked_types,
            repack_in_place=plan.repack_in_place,
            expert_slots=plan.expert_slots,
            expert_scores=_scores(checkpoint, skeleton),
        )

    with ExitStack() as undo:
        kernels, reason = make_kernels(profile.threads, profile.bf16_pays, run_config.row_invariant, profile.tiled)
        undo.callback(kernels.close)
        if reason != "ggml":
            warnings.warn(reason, stacklevel=2)
        try:
            draft_engine = _load_draft(checkpoint, drafting, profile)
        except CheckpointError as error:  # not every layout can be quantised on load
            if draft != "auto":
                raise
            run_config, draft_engine = replace(run_config, drafting=NO_DRAFT), None
            why = f"draft none: {error}"
        if draft_engine is not None:
            undo.callback(draft_engine.close)
        engine = Engine(checkpoint, decide, kernels, trace=Trace() if trace else None, open_file=open_file)
        undo.callback(engine.close)
        if draft_engine is not None and run_config.drafting == NO_DRAFT:
            draft_engine.close()
            draft_engine = None
        if draft_engine is not None:
            draft_engine.step(
                [Rows(cache=draft_engine.new_cache(1), tokens=[0], row_invariant=True)]
            )  # reads the draft weights
        plan = replace(plans[0], reasons=(*plans[0].reasons, *engine.remarks))
        model = Model(
            checkpoint,
            plan,
            load_s=time.perf_counter() - start,
            engine=engine,
            draft_engine=draft_engine,
            tokenizer=tokenizer,
            deterministic=deterministic,
        )
        undo.pop_all()
    return model


def _why_alone(skeleton: ModelSkeleton) -> tuple[str, str]:
    """The reason why a model runs one sequence at a time and without drafts, and a hint."""
    if skeleton.attention_mode == "concatenated":
        reason = "it computes attention itself, so that rows of a pass change each other's last bits"
        return reason, "use --draft none, or --no-deterministic"
    return (
        "an encoder reads the prompt" if skeleton.decoder_start_ids else "the model uses its native cache",
        "use --draft none",
    )


def _scores(checkpoint: Checkpoint, skeleton: ModelSkeleton) -> npt.NDArray[np.float32] | None:
    """Router scores from earlier runs, if their shape fits this model."""
    routing = load_routing(checkpoint)
    shape = len(skeleton.expert_slices), max(map(len, skeleton.expert_slices), default=0)
    return routing.scores if routing is not None and routing.scores.shape == shape else None


def _built(skeleton: ModelSkeleton) -> Built:
    """Facts of a built model that the plan needs."""
    return Built(
        linears=skeleton.linears,
        prefill_only=skeleton.prefill_only_linears,
        experts=skeleton.expert_slices,
        single_sequence=skeleton.attention_mode == "native",
        cached=skeleton.cached,
        has_cache=skeleton.has_cache,
    )


def _load_draft(original: Checkpoint, drafting: Drafting, profile: Profile) -> Engine | None:
    """A draft engine with everything pinned. The tensors of a low-bit copy are quantised as they are read."""
    draft = drafting.checkpoint
    if draft is None:
        return None
    if drafting.name == "self":
        from headrace.stream.quantising import with_encodings  # needs ggml

        draft = with_encodings(draft, original)
    pinned = {tensor.name: tensor.rows for tensor in draft.tensors.values()}
    options = StreamOptions(
        pinned_rows=pinned,
        unit_bytes=1 << 20,
        slots=1,
        readers=profile.threads,
        repacked_types=profile.types_to_repack,
        repack_in_place=True,
        pinned_read_bytes=1 << 20,
    )
    kernels, _ = make_kernels(profile.threads, profile.bf16_pays, row_invariant=False, tiled=profile.tiled)
    return Engine(draft, options, kernels)


# Memory that the first passes add beside the plan's own items: graphs, threads' stacks, allocator slack.
RUNTIME_GROWTH_BYTES = 24 << 20
