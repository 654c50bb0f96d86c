"""The library: `headrace.load`, and the model that it returns. The command line is a loop over it.

with headrace.load("model.gguf", memory="4GiB") as model:
    print(model.generate("Say hello.").text)
    for output in model.stream("Count to ten.", max_tokens=64):
        print(output.text, end="")
"""

import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from threading import RLock, Thread
from types import TracebackType
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from headrace.checkpoint import Checkpoint, open_checkpoint
from headrace.completion import Completion, logprobs_json, make_completion
from headrace.engine import Engine, PassStats, Rows, Trace
from headrace.engine.drafters import ModelDrafter, PromptLookup
from headrace.engine.engine_thread import EngineThread
from headrace.engine.llm_engine import LLMEngine, RequestLimits
from headrace.engine.model_weights import StreamOptions
from headrace.engine.output_stream import OutputStream
from headrace.engine.request import Event, Progress, Request, RequestOutput
from headrace.engine.runner import ModelRunner
from headrace.engine.scheduler import Scheduler
from headrace.engine.speculation import Speculation, StepTimeModel
from headrace.errors import CheckpointError, UsageError
from headrace.kernels import make_kernels
from headrace.model import ModelSkeleton, Tokenizer
from headrace.model.config import check_model_type
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
from headrace.process import keep_freed_memory, not_after_a_fork, release_unused, resident_bytes
from headrace.sampling_params import FIELDS, SamplingParams, recommended
from headrace.stream import WeightFile
from headrace.stream.expert_cache import ExpertCache
from headrace.stream.files import File


class Model(AbstractContextManager["Model"]):
    """A loaded model. A context manager. Any thread may ask and close it.

    A separate thread runs the passes. Prompts from any number of threads share them.
    A process that was forked after loading cannot use it: the model's threads do not exist there.
    """

    def __init__(self, checkpoint: Checkpoint, plan: Plan, *, load_s: float, engine: LLMEngine, draft: Engine | None):
        """Use `load`."""
        self.checkpoint = checkpoint
        self.plan = plan
        self.tokenizer = engine.tokenizer
        self.load_s = load_s
        self._llm_engine = engine
        self._engine = engine.runner.engine
        self._draft_engine = draft
        self._thread = EngineThread(engine)
        self._torn_down = False
        self._lock = RLock()  # held during teardown
        self._process = os.getpid()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop the readers and free all memory. Safe to call twice, from any thread: it waits for a pass in progress."""
        if os.getpid() != self._process:
            return  # threads and memory are the parent's
        self._thread.close()
        if self._thread.is_current:  # called by a sink, in the middle of a pass
            Thread(target=self.close, name="headrace-close").start()
            return
        with self._lock:
            if self._torn_down:
                return
            self._torn_down = True
            self.tokenizer.close()
            if self._draft_engine is not None:
                self._draft_engine.close()
            if self._engine.experts is not None and self._engine.passes:
                _keep_routing(self.checkpoint, self.plan, self.passes, self._engine.experts.stream.cache)
            self._engine.close()

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
        passes, engine = self._engine.passes, self._llm_engine
        later, tokens = passes[engine.passes_until_first_token :], engine.tokens - engine.first_pass_tokens
        s_per_token = sum(p.seconds + p.draft_s for p in later) / tokens if later and tokens else None
        return make_record(self.plan, passes, engine.tokens, engine.first_ttft_s, s_per_token)

    def default_sampling(self) -> SamplingParams:
        """The file's recommendation (`general.sampling.*`), else plain sampling at temperature 1."""
        return recommended(
            {one.name: self.checkpoint.get(f"general.sampling.{one.gguf_key}") for one in FIELDS if one.gguf_key}
        )

    def encode(self, prompt: Prompt, *, raw: bool = False) -> list[int]:
        """The tokens of a prompt.

        Raises:
            UsageError: there are none.
            ContextError: they leave no position for an answer in the planned context.
        """
        token_ids = self.tokenizer.prompt(prompt, raw=raw)
        self._llm_engine.check_prompt(token_ids)
        return token_ids

    def check(self, request: Request) -> None:
        """Raise `UsageError` or `ContextError` for a request that cannot be answered."""
        self._llm_engine.check_prompt(request.token_ids)
        self._llm_engine.check_sampling(request)

    def request(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        sampling: SamplingParams | None = None,
        stop: str | Sequence[str] = (),
        raw: bool = False,
    ) -> Request:
        """The request for one prompt; arguments and errors as in `stream`."""
        return Request(
            token_ids=self.encode(prompt, raw=raw),
            tail=self.tokenizer.tail(prompt, raw=raw),
            max_tokens=max_tokens,
            sampling=self.default_sampling() if sampling is None else sampling,
            stop=(stop,) if isinstance(stop, str) else stop,
            raw=raw,
        )

    def add_request(self, request: Request, sink: Callable[[Event], None], *, wants_progress: bool = False) -> int:
        """Queue a request and return its id.

        `sink` gets its events on the thread that runs the passes, so it must not wait: a `RequestOutput` for each token,
        the last with the finish reason, or a `RequestError`; before the first token a `Progress` for each step of a pass,
        if `wants_progress`.

        Raises:
            UsageError: the model is closed, the process was forked, or the request is not for this model.
            ContextError: the prompt leaves no position for an answer.
        """
        number = self._thread.new_id()
        self._thread.add_request(number, request, sink, wants_progress=wants_progress)
        return number

    def abort(self, request_id: int) -> None:
        """End a request before the next pass; its `sink` gets no more events. Safe for requests that have ended."""
        self._thread.abort(request_id)

    def stream(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        max_tokens: int | None = None,
        sampling: SamplingParams | None = None,
        stop: str | Sequence[str] = (),
        raw: bool = False,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Iterator[RequestOutput]:
        """Generate, one output per token, then for each prompt a last output with the finish reason.

        Passes run on while outputs wait to be read. A stream that is closed or dropped ends its requests.

        Args:
            prompt: text, or messages of a conversation; or several of these, which share the passes over the weights.
                Their outputs come as they are computed; `RequestOutput.index` is the prompt's number. A prefix shared
                with an earlier prompt is not computed again.
            max_tokens: limit for each prompt; None: until the model ends or the context is full.
            sampling: None: the file's recommendation.
            stop: a string that ends the answer and is not part of it, or several.
            raw: complete the text as it is, without the chat template, and without separating reasoning from the answer.
            on_progress: called during the passes before the first token, in the thread that reads the stream.

        Raises:
            ContextError: a prompt does not fit into the planned context.
            ReadError: the weights could not be read.
            UsageError: the model is closed.
        """
        requests = [
            self.request(one, max_tokens=max_tokens, sampling=sampling, stop=stop, raw=raw) for one in _prompts(prompt)
        ]
        return self.stream_requests(requests, on_progress)

    def stream_requests(
        self,
        requests: Iterable[Request],
        on_progress: Callable[[Progress], None] | None = None,
        on_error: Callable[[int, BaseException], bool] = lambda *_: False,
    ) -> Iterator[RequestOutput]:
        """Stream requests, each with its settings. Up to twice the number of concurrent sequences are in flight.

        `on_error` is called with the number of a request that failed, and its error; False: the stream raises it.
        """
        return OutputStream(self._thread, iter(requests), 2 * self.plan.sequences, on_progress, on_error)

    @overload
    def generate(self, prompt: Prompt, **options: Any) -> Completion: ...

    @overload
    def generate(self, prompt: Sequence[Sequence[Message]], **options: Any) -> list[Completion]: ...

    @overload
    def generate(self, prompt: list[str], **options: Any) -> list[Completion]: ...

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        on_output: Callable[[RequestOutput], None] | None = None,
        **options: Any,
    ) -> Completion | list[Completion]:
        """The whole answer at once; for several prompts a list, whose sequences share the passes over the weights.

        Arguments as in `stream`. `on_output` is called with every output as it comes.
        """
        outputs: dict[int, list[RequestOutput]] = {}
        for output in self.stream(prompt, **options):
            outputs.setdefault(output.index, []).append(output)
            if on_output is not None:
                on_output(output)
        answers = [self.completion(outputs[index]) for index in sorted(outputs)]
        return answers if _is_many(prompt) else answers[0]

    def completion(self, outputs: Sequence[RequestOutput]) -> Completion:
        """The text and measurements of a request that has ended, or was interrupted after these outputs."""
        speculation = self._llm_engine.scheduler.speculation
        positions = speculation.acceptance.positions if speculation is not None else []
        return make_completion(outputs, self.plan, self.load_s, positions, logprobs_json(outputs, self.tokenizer))


def _keep_routing(checkpoint: Checkpoint, plan: Plan, passes: Sequence[PassStats], cache: ExpertCache) -> None:
    """Save the frequencies of experts and the hit rate of the expert cache for the next run."""
    single = [one for one in passes[len(passes) // 3 :] if one.rows == 1]
    hits = sum(one.expert_hits for one in single)
    requested = sum(one.expert_hits + one.expert_prefetched + one.expert_misses for one in single)
    if requested:
        save_routing(checkpoint, Routing(scores=cache.scores, cached=plan.expert_slots, hit_rate=hits / requested))


def _is_many(prompt: Prompt | Sequence[Prompt]) -> bool:
    """True for several prompts, False for one text or the messages of one conversation."""
    return not isinstance(prompt, str) and (not prompt or not isinstance(prompt[0], Mapping))


def _prompts(prompt: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompt, bytes | Mapping) or not isinstance(prompt, Sequence):
        raise UsageError(f"the prompt is {prompt!r:.40}", hint="give a text, a list of messages, or several of these")
    return list(prompt) if _is_many(prompt) else [prompt]  # type: ignore[arg-type, list-item]


def _llm_engine(
    checkpoint: Checkpoint,
    plan: Plan,
    engine: Engine,
    draft_engine: Engine | None,
    tokenizer: Tokenizer,
    deterministic: bool,
) -> LLMEngine:
    """The engine that answers requests as the plan says."""
    holds_all = plan.kv_tokens >= plan.sequences * plan.context_tokens
    runner = ModelRunner(engine, plan.sequences, plan.context_tokens, plan.kv_bits, returns_memory=not holds_all)
    kv_tokens = None if holds_all else plan.kv_tokens
    scheduler = Scheduler(runner.info, plan.prefill_rows, plan.max_draft_tokens, deterministic, kv_tokens)
    if plan.max_draft_tokens:
        model = None
        if draft_engine is not None:
            model = ModelDrafter(ModelRunner(draft_engine, plan.sequences, plan.context_tokens), plan.drafting.name)
        step_times = StepTimeModel(plan.cost, plan.decode_prediction.draft_token_s)
        scheduler.speculation = Speculation(step_times, PromptLookup() if plan.drafting.lookup else None, model)
    limits = RequestLimits(
        context_tokens=plan.context_tokens,
        model_context=checkpoint.context_limit(1 << 30),
        # Encoder and decoder positions are counted separately; without an encoder the context is the limit.
        encoder_positions=checkpoint.positions_limit(1 << 30) if engine.decoder_start_ids else 1 << 30,
    )
    return LLMEngine(runner, scheduler, tokenizer, limits)


def load(
    path: str | Path,
    *,
    memory: str | int | Budget | None = None,
    context_tokens: int | None = None,
    prompt_tokens: int | None = None,
    sequences: int = 1,
    kv_tokens: int | None = None,
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
        kv_tokens: tokens that all KV caches hold together, at least `context_tokens`; None: every cache may be full. With
            less, requests wait for memory; where answers outgrow it, the latest is preempted and computed again later.
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
    for name, value in {
        "context_tokens": context_tokens,
        "prompt_tokens": prompt_tokens,
        "sequences": sequences,
        "kv_tokens": kv_tokens,
    }.items():
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
        kv_tokens=kv_tokens,
        kv_bits=kv_bits,
    )
    options = drafting_options(checkpoint, draft, profile)
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
            map_pinned=plan.map_pinned,
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
            engine=_llm_engine(checkpoint, plan, engine, draft_engine, tokenizer, deterministic),
            draft=draft_engine,
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
    """Frequencies of experts in earlier runs, if their shape fits this model."""
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
