"""`headrace batch`: requests in flight share each pass over the weights; results are appended as they come."""

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from headrace import slim_import
from headrace.batch import BadLine, BatchRequest, Results, answer_record, error_record, pending, read_requests
from headrace.checkpoint import Checkpoint, open_checkpoint
from headrace.checkpoint.identity import identity
from headrace.cli import show
from headrace.cli.plan import profile_for
from headrace.errors import CheckpointError, ContextError, HeadraceError, UsageError
from headrace.kernels.thresholds import KV_BLOCK_TOKENS
from headrace.plan import Budget, Profile, RunConfig, budget_of, choose_sequences, drafting_options
from headrace.plan.record import keep_record
from headrace.units import gigabytes, rate, seconds

if TYPE_CHECKING:
    from headrace.api import Model
    from headrace.engine.request import Request, RequestOutput
    from headrace.model import Tokenizer


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """The options of a run. None: the plan chooses."""

    memory: int | None
    ctx_size: int | None
    kv_bits: int
    deterministic: bool
    draft: str
    parallel: int | None
    max_tokens: int
    quiet: bool


def batch_command(source: Path, target: Path, model: str, **options: Any) -> int:
    """Answer the requests without a result; returns the exit code."""
    settings = BatchSettings(**options)
    with suppress(OSError):
        if source.samefile(target):
            raise UsageError("input and output are the same file", hint="give another output file")
    checkpoint = open_checkpoint(model)
    requests = list(read_requests(source))
    with Results(target, identity(checkpoint)) as results:
        results.check(requests)
        work = pending(requests, results)
        if not settings.quiet:
            show.note(f"{results.done} results in {target}, {len(work)} to do")
        for bad in work:
            if isinstance(bad, BadLine):
                results.add(error_record(bad.line, bad.custom_id, bad.code, bad.message), bad.digest)
        to_run = [request for request in work if isinstance(request, BatchRequest)]
        code = _run(checkpoint, to_run, results, settings) if to_run else 0
        failed = results.failed
        if failed or not settings.quiet:
            show.note(f"{results.done - failed} answered" + (f", {failed} failed: see {target}" if failed else ""))
        return code or int(failed > 0)


def _run(checkpoint: Checkpoint, requests: Sequence[BatchRequest], results: Results, settings: BatchSettings) -> int:
    profile = profile_for(checkpoint.path, say=not settings.quiet)
    budget = budget_of(settings.memory)
    load = slim_import.import_api().load  # torch and transformers: seconds

    small = min(settings.ctx_size or 256, checkpoint.context_limit(256))
    with load(
        checkpoint.path,
        memory=budget,
        context_tokens=small,
        prompt_tokens=small,
        kv_bits=settings.kv_bits,
        draft=settings.draft,
        deterministic=settings.deterministic,
        size_for=lambda tokenizer: _size(checkpoint, requests, tokenizer, profile, budget, settings),
        profile=profile,
    ) as loaded:
        if not settings.quiet:
            show.note(f"{loaded.plan.sequences} at a time; {loaded.plan.line()}")
        code = Batch(loaded, requests, results, settings.max_tokens).run(Board(loaded, len(requests), settings.quiet))
        keep_record(loaded.record())
        return code


def _size(
    checkpoint: Checkpoint,
    requests: Sequence[BatchRequest],
    tokenizer: "Tokenizer",
    profile: Profile,
    budget: Budget,
    settings: BatchSettings,
) -> RunConfig:
    """The context of the longest request, and the number of sequences that the plan finds best."""
    limit = checkpoint.context_limit(1 << 20)
    lengths = [(_length(request, tokenizer), request.max_tokens or settings.max_tokens) for request in requests]
    longest = max(length for length, _ in lengths)
    context = settings.ctx_size or min(limit, max(length + max_tokens for length, max_tokens in lengths))
    run_config = RunConfig(context_tokens=context, prompt_tokens=min(longest, context), kv_bits=settings.kv_bits)
    needs = sorted((min(context, length + max_tokens) for length, max_tokens in lengths), reverse=True)

    def kv_tokens_of(sequences: int) -> int:
        """Tokens of the longest requests, which may run together, in whole blocks."""
        return sum(-(-need // KV_BLOCK_TOKENS) * KV_BLOCK_TOKENS for need in needs[:sequences])

    if settings.parallel:
        return replace(run_config, sequences=settings.parallel, kv_tokens=kv_tokens_of(settings.parallel))
    options = drafting_options(checkpoint, settings.draft, profile)
    return choose_sequences(checkpoint, profile, budget, run_config, options, len(requests), kv_tokens_of)


def _length(request: BatchRequest, tokenizer: "Tokenizer") -> int:
    """Tokens of a prompt; 1 for one that is refused, whose error becomes its result when it would run."""
    try:
        return max(1, len(_prompt(request, tokenizer)[0]))
    except HeadraceError:
        return 1


def _prompt(request: BatchRequest, tokenizer: "Tokenizer") -> tuple[list[int], list[int]]:
    """The tokens of a prompt, and the last of them, which the chat template wrote after the conversation."""
    if isinstance(request.prompt, str):
        return tokenizer.prompt(request.prompt, raw=True), []
    from headrace.model.conversation import checked_messages, template_variables

    tokenizer.check_chat()
    template = tokenizer.chat_template
    variables = template_variables(template, request.template_variables, request.reasoning_effort, request.documents)
    messages = checked_messages(template, request.prompt, variables)
    tokens = tokenizer.chat(
        messages,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        variables=variables,
    )
    goes_on = request.continue_final_message or not request.add_generation_prompt
    return tokens, [] if goes_on else tokenizer.tail(messages, variables=variables)


class Batch:
    """The requests of a run, and their text so far."""

    def __init__(self, model: "Model", requests: Sequence[BatchRequest], results: Results, max_tokens: int):
        self._model = model
        self._requests = requests
        self._results = results
        self._max_tokens = max_tokens
        self._running: list[BatchRequest] = []  # requests by their index in the stream
        self._outputs: dict[int, list[RequestOutput]] = {}

    def run(self, board: "Board") -> int:
        """Answer all requests; returns the exit code."""
        with board:
            try:
                outputs = self._model.stream_requests(
                    self._stream(board), on_error=lambda index, error: self._failed(index, error, board)
                )
                for output in outputs:
                    self._take(output, board)
            except KeyboardInterrupt:
                show.note("stopped; the same command goes on from here")
                return show.INTERRUPTED
        return 0

    def _stream(self, board: "Board") -> Iterator["Request"]:
        from headrace.engine.request import Request

        for request in self._requests:
            try:
                token_ids, tail = _prompt(request, self._model.tokenizer)
                if not token_ids:
                    raise UsageError("the prompt is empty", hint="give a prompt of at least one token")
                found = Request(
                    token_ids=token_ids,
                    max_tokens=request.max_tokens or self._max_tokens,
                    sampling=replace(self._model.default_sampling(), **request.sampling),
                    stop=request.stop,
                    stop_token_ids=request.stop_token_ids,
                    tail=tail,
                    raw=not request.chat,
                )
                self._model.check(found)
            except (CheckpointError, ContextError, UsageError) as error:
                code = "context_length_exceeded" if isinstance(error, ContextError) else "invalid_request"
                self._results.add(error_record(request.line, request.custom_id, code, str(error)), request.digest)
                board.finished()
                continue
            self._running.append(request)
            yield found

    def _failed(self, index: int, error: BaseException, board: "Board") -> bool:
        """Record a request whose results are not finite; other errors end the batch."""
        if not isinstance(error, CheckpointError):
            return False
        request = self._running[index]
        self._results.add(error_record(request.line, request.custom_id, "model_error", str(error)), request.digest)
        self._outputs.pop(index, None)
        board.finished()
        return True

    def _take(self, output: "RequestOutput", board: "Board") -> None:
        outputs = self._outputs.setdefault(output.index, [])
        outputs.append(output)
        board.token(output)
        if output.finish_reason is None:
            return
        from headrace.completion import logprobs_json

        self._results.add(
            answer_record(
                self._running[output.index],
                text="".join(one.text for one in outputs),
                reasoning="".join(one.reasoning for one in outputs),
                finish_reason=output.finish_reason,
                prompt_tokens=output.prompt_tokens,
                completion_tokens=output.completion_tokens,
                model=self._model.plan.model,
                logprobs=logprobs_json(outputs, self._model.tokenizer),
            ),
            self._running[output.index].digest,
        )
        del self._outputs[output.index]
        board.finished()


class Board:
    """Requests done, tokens per second, bytes per second, time left: a bar on a terminal, a last line everywhere."""

    def __init__(self, model: "Model", total: int, quiet: bool):
        self._model = model
        self._total = total
        self._quiet = quiet
        self._done = self._tokens = 0
        self._passes = self._read_bytes = 0  # passes counted so far, and their bytes
        self._start = time.perf_counter()
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.completed}/{task.total}"), BarColumn(), TextColumn("{task.fields[rates]}"),
            console=console, disable=quiet or not console.is_terminal, transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=total, rates="")

    def __enter__(self) -> "Board":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if not self._quiet:
            show.note(f"{self._done} of {self._total} done, {self._tokens} tokens in {self._rates()}")

    def token(self, output: "RequestOutput") -> None:
        """Count a token."""
        self._tokens += output.token is not None
        self._show()

    def finished(self) -> None:
        """Count a finished request."""
        self._done += 1
        self._show()

    def _show(self) -> None:
        if not self._bar.disable:
            self._bar.update(self._task, completed=self._done, rates=self._rates())

    def _rates(self) -> str:
        spent = time.perf_counter() - self._start
        passes = len(self._model.passes)
        self._read_bytes += sum(one.read_bytes for one in self._model.passes[self._passes : passes])
        self._passes = passes
        left = ""
        if 0 < self._done < self._total:
            left = f", {seconds(spent / self._done * (self._total - self._done))} left"
        return f"{seconds(spent)}, {rate(self._tokens / spent)}, {gigabytes(self._read_bytes / spent)}/s{left}"
