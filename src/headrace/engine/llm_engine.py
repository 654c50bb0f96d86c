"""The engine that callers ask: requests join and leave between passes, each pass gives outputs.

`add_request` and `abort` may be called from any thread. `step` is called by one thread, which owns everything else: the
scheduler, the runner and the sequences (`engine_thread.py`).
"""

import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from headrace.engine.request import Event, PassTotals, Progress, Request, RequestError, RequestOutput, RequestStats
from headrace.engine.runner import ModelRunner
from headrace.engine.sampler import Sampler
from headrace.engine.scheduler import ScheduledStep, Scheduler, SequenceResult, SequenceState
from headrace.engine.stops import StopScanner
from headrace.engine.timeline import PassStats
from headrace.errors import ContextError, UsageError
from headrace.model import Tokenizer
from headrace.model.reasoning import AnswerStream, Part, Segment, joined


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestLimits:
    """Limits of every request."""

    context_tokens: int  # prompt and output
    model_context: int  # context that the model was made for
    encoder_positions: int  # max tokens of an encoder; also max output tokens of its decoder


@dataclass(eq=False, kw_only=True)
class _ActiveRequest:
    """A queued or running request, with its detokenizer and stop scanner."""

    request_id: int
    request: Request
    max_tokens: int
    sampler: Sampler
    text: AnswerStream
    scanner: StopScanner
    wants_progress: bool
    added_s: float
    passes_before: int = 0  # passes of the engine before the first of this request
    read_bytes_before: int = 0
    sequence: SequenceState | None = None
    count: int = 0  # tokens generated
    queue_s: float | None = None
    ttft_s: float = 0.0
    last_token_s: float = 0.0
    prefill: PassTotals = field(default_factory=PassTotals)
    decode: PassTotals = field(default_factory=PassTotals)

    def take(self, token: int, end_ids: frozenset[int]) -> tuple[list[Segment], str | None]:
        """The text that a token adds, and the finish reason if the output ends with it."""
        self.count += 1
        ends = token in end_ids
        shown, stopped = self.scanner.push(self.text.end(token) if ends else self.text.step(token))
        if (
            token in self.request.stop_token_ids and not stopped
        ):  # a stop token is shown unless it is a control token, as in vLLM
            more, stopped = self.scanner.push(self.text.flush())
            shown, ends = shown + more, True
        if ends or stopped:
            return shown if stopped else shown + self.scanner.rest(), "stop"
        if self.count < self.max_tokens:
            return shown, None
        more, stopped = self.scanner.push(self.text.flush())
        return shown + more + ([] if stopped else self.scanner.rest()), "stop" if stopped else "length"

    def record(self, stats: PassStats, tokens: int, drafted: int, had_tokens: bool) -> None:
        """Count a pass with rows of this request; `had_tokens`: it came after the first token."""
        accepted = max(0, tokens - 1)
        now = time.perf_counter() - self.added_s
        if had_tokens:
            self.decode = self.decode.plus(stats, tokens, drafted, accepted)
        else:
            self.prefill = self.prefill.plus(stats, tokens, drafted, accepted)
        if tokens:
            self.ttft_s = self.ttft_s or now
            self.last_token_s = now

    @property
    def stats(self) -> RequestStats:
        return RequestStats(
            queue_s=self.queue_s or 0.0,
            ttft_s=self.ttft_s,
            last_token_s=self.last_token_s,
            cached_tokens=(self.sequence.cached_tokens if self.sequence is not None else None) or 0,
            prefill=self.prefill,
            decode=self.decode,
        )


class LLMEngine:
    """Runs requests. `step` runs one pass over the weights for all of them."""

    def __init__(self, runner: ModelRunner, scheduler: Scheduler, tokenizer: Tokenizer, limits: RequestLimits):
        """Take parts that nothing else uses."""
        self.runner = runner
        self.scheduler = scheduler
        self.tokenizer = tokenizer
        self.limits = limits
        self.on_progress: Callable[[int, Progress], None] | None = None  # called in `step` with a request's id
        # Measurements since loading, for the run record.
        self.tokens = 0
        self.first_ttft_s: float | None = None
        self.passes_until_first_token = 0
        self.first_pass_tokens = 0  # tokens of the last of these passes
        self._end_ids = frozenset(tokenizer.end_ids)
        self._inbox: deque[_ActiveRequest | int] = deque()  # new requests, and ids of those to abort
        self._live: dict[int, _ActiveRequest] = {}
        self._numbers = itertools.count()

    # -- from any thread --------------------------------------------------------------------------------------------

    def new_id(self) -> int:
        """An id for a request."""
        return next(self._numbers)

    def add_request(self, request: Request, request_id: int | None = None, *, wants_progress: bool = False) -> int:
        """Queue a request; it joins the next pass with a free slot and memory. Returns its id.

        Raises:
            UsageError: a token or a parameter is not of this model.
            ContextError: the prompt fills the context.
        """
        self.check_prompt(request.token_ids)
        self.check_sampling(request)
        available = min(self.limits.context_tokens - len(request.token_ids), self.limits.encoder_positions)
        text = self.tokenizer.detokenizer(request.token_ids, raw=request.raw, tail=request.tail, stops=request.stop)
        live = _ActiveRequest(
            request_id=self.new_id() if request_id is None else request_id,
            request=request,
            max_tokens=available if request.max_tokens is None else min(available, request.max_tokens),
            sampler=Sampler(request.sampling, len(request.token_ids)),
            text=text,
            scanner=StopScanner(request.stop, text.hidden_texts),
            wants_progress=wants_progress,
            added_s=time.perf_counter(),
        )
        self._inbox.append(live)
        return live.request_id

    def abort(self, request_id: int) -> None:
        """End a request before the next pass. Safe for requests that have ended."""
        self._inbox.append(request_id)

    @property
    def has_work(self) -> bool:
        """True if `step` has something to do."""
        return bool(self._inbox) or self.scheduler.has_work

    def check_prompt(self, token_ids: Sequence[int]) -> None:
        """Raise `UsageError` or `ContextError` for a prompt that cannot be answered."""
        if not token_ids:
            raise UsageError("the prompt is empty", hint="give a prompt of at least one token")
        engine = self.runner.engine
        unknown = self._unknown_token(token_ids)
        if unknown is not None:
            spelled = self.tokenizer.decode([unknown]) if unknown >= 0 else ""
            raise UsageError(
                f"the prompt holds token {unknown}{f' ({spelled!r})' if spelled else ''}, the model has"
                f" {engine.embedding_rows} embeddings",
                hint="the tokenizer is of another model; leave this text out",
            )
        encoded = len(token_ids) - len(engine.decoder_start_ids)
        if encoded > self.limits.encoder_positions:
            raise ContextError(
                f"the prompt has {encoded} tokens, the model's encoder reads at most {self.limits.encoder_positions}",
                hint="give it a shorter text",
            )
        if len(token_ids) >= self.limits.context_tokens:
            limit = self.limits.model_context
            raise ContextError(
                f"the prompt has {len(token_ids)} tokens, the context holds {self.limits.context_tokens}",
                hint=f"use --ctx-size {min(len(token_ids) + 256, limit)}"
                if len(token_ids) < limit
                else f"the model was made for texts of {limit} tokens, prompt and output together: give it a shorter prompt",
            )

    def check_sampling(self, request: Request) -> None:
        """Raise `UsageError` if the sampling parameters name tokens that the model does not have."""
        unknown = self._unknown_token(list(request.sampling.logit_bias))
        if unknown is not None:
            raise UsageError(
                f"logit_bias names token {unknown}", hint=f"the model has {self.runner.engine.embedding_rows} tokens"
            )

    def _unknown_token(self, token_ids: Sequence[int]) -> int | None:
        rows = self.runner.engine.embedding_rows
        return next((token for token in token_ids if token < 0 or (rows is not None and token >= rows)), None)

    # -- from the owner's thread ------------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """Let requests join and leave, then run one pass. A failure ends the requests of this pass."""
        self._read_inbox()
        scheduled = None
        try:
            scheduled = self.scheduler.schedule()
            if scheduled is None:
                return []
            return self._run(scheduled)
        except Exception as error:
            failed = self.scheduler.reset() if scheduled is None else self.scheduler.fail(scheduled)
            return self._fail(failed, error)
        except BaseException:  # Ctrl-C, where the owner is the main thread
            for live in self._of(self.scheduler.reset()):
                del self._live[live.request_id]
            raise

    def fail_all(self, error: BaseException) -> list[Event]:
        """End every request with an error."""
        self._read_inbox()
        self.scheduler.reset()
        events: list[Event] = [RequestError(request_id=number, error=error) for number in self._live]
        for live in self._live.values():
            if live.sequence is not None:
                self.scheduler.remove(live.sequence)
        self._live.clear()
        return events

    def _read_inbox(self) -> None:
        while self._inbox:
            entry = self._inbox.popleft()
            if isinstance(entry, _ActiveRequest):
                entry.sequence = self.scheduler.add(entry.request.token_ids, entry.max_tokens, entry.sampler)
                self._live[entry.request_id] = entry
            else:
                live = self._live.pop(entry, None)
                if live is not None and live.sequence is not None:
                    self.scheduler.remove(live.sequence)

    def _run(self, scheduled: ScheduledStep) -> list[Event]:
        engine, lives = self.runner.engine, self._of([one.sequence for one in scheduled.sequences])
        loads = not engine.passes  # the first pass reads the pinned weights
        for live in lives:
            if live.queue_s is None:
                live.queue_s = scheduled.start_s - live.added_s
                live.passes_before, live.read_bytes_before = len(engine.passes), engine.weights.read_bytes
        watched = [live for live in lives if live.wants_progress and not live.count]
        engine.on_progress = (lambda done, steps: self._report(watched, done, steps)) if watched else None
        output = self.runner.execute(scheduled.step)
        results = self.scheduler.update(scheduled, output)
        if output.stats is None:  # a cache overflowed, and its sequence is computed again; or some sequences failed
            events: list[Event] = []
            for result in results:
                self.scheduler.remove(result.sequence)
                assert result.error is not None
                events += self._fail([result.sequence], result.error)
            return events
        stats = replace(
            output.stats,
            draft_s=scheduled.draft_s,
            drafted=sum(result.drafted for result in results),
            accepted=sum(max(0, len(result.tokens) - 1) for result in results),
        )
        engine.passes.replace_last(stats)
        if not loads:
            self.scheduler.record(scheduled, stats, sum(len(result.tokens) for result in results))
        if engine.trace is not None:
            start, draft_s = scheduled.start_s, scheduled.draft_s
            engine.trace.add("draft", f"{stats.drafted} draft tokens", start, start + draft_s)
            engine.trace.add("step", f"bound by {stats.bound_by}", start, time.perf_counter())
        events = []
        for result in results:
            events += self._outputs(result, stats)
        return events

    def _outputs(self, result: SequenceResult, stats: PassStats) -> list[Event]:
        """The events of a sequence's new tokens; a sequence that ends with them is removed."""
        lives = self._of([result.sequence])
        if not lives:
            return []
        live = lives[0]
        taken: list[tuple[int, list[Segment], str | None]] = []  # tokens up to the end of the output
        error = result.error
        had_tokens = live.count > 0
        try:
            for token in result.tokens:
                taken.append((token, *live.take(token, self._end_ids)))
                if taken[-1][2] is not None:
                    break
        except Exception as caught:
            error = caught
        live.record(stats, len(taken), result.drafted, had_tokens)
        self._count(live, len(taken))
        events: list[Event] = []
        for number, (token, segments, reason) in enumerate(taken, live.count - len(taken) + 1):
            output = self._output(live, token, segments, number)
            if reason is None or token not in self._end_ids:
                events.append(output)
            if reason is not None:
                last = output if token in self._end_ids else replace(output, text="", reasoning="")
                events.append(replace(last, token=None, logprobs=None, finish_reason=reason))
        if error is not None or (taken and taken[-1][2] is not None):
            self.scheduler.remove(result.sequence)
            if error is not None:
                return events + self._fail([result.sequence], error)
            del self._live[live.request_id]
        return events

    def _output(self, live: _ActiveRequest, token: int, segments: list[Segment], number: int) -> RequestOutput:
        assert live.sequence is not None
        return RequestOutput(
            request_id=live.request_id,
            text=joined(segments, Part.CONTENT),
            reasoning=joined(segments, Part.REASONING),
            token=token,
            prompt_tokens=live.sequence.prompt_tokens,
            completion_tokens=number,
            stats=live.stats,
            kv_cache_type=self.runner.cache_type(live.sequence.slot.number),
            logprobs=live.sequence.logprobs[number - 1],
        )

    def _count(self, live: _ActiveRequest, tokens: int) -> None:
        """Count tokens since loading."""
        passes = len(self.runner.engine.passes)
        if tokens and self.first_ttft_s is None:
            self.first_ttft_s, self.passes_until_first_token = live.ttft_s, passes
        self.tokens += tokens
        if passes == self.passes_until_first_token:
            self.first_pass_tokens += tokens

    def _of(self, sequences: Sequence[SequenceState]) -> list[_ActiveRequest]:
        wanted = set(sequences)
        return [live for live in self._live.values() if live.sequence in wanted]

    def _fail(self, sequences: Sequence[SequenceState], error: Exception) -> list[Event]:
        failed = self._of(sequences)
        for live in failed:
            del self._live[live.request_id]
        return [RequestError(request_id=live.request_id, error=error) for live in failed]

    def _report(self, watched: Sequence[_ActiveRequest], done: int, steps: int) -> None:
        """Report the progress of prompts in the pass in progress."""
        if self.on_progress is None:
            return
        engine, now = self.runner.engine, time.perf_counter()
        for live in watched:
            assert live.sequence is not None
            number = len(engine.passes) - live.passes_before + 1
            left = max(1, -(-live.sequence.num_uncomputed // self.scheduler.prefill_rows))
            progress = Progress(
                pass_number=number,
                passes=number - 1 + left,
                done=done,
                steps=steps,
                read_bytes=engine.weights.read_bytes - live.read_bytes_before,
                seconds=now - live.added_s,
            )
            self.on_progress(live.request_id, progress)
