"""`headrace run`: plan, load, generate. Chat does the same with the conversation so far as the prompt."""

import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from headrace import slim_import
from headrace.checkpoint import Checkpoint, open_checkpoint
from headrace.cli import show
from headrace.cli.plan import profile_for
from headrace.errors import HeadraceError, UsageError
from headrace.plan import Budget, RunConfig, budget_of, choose_drafting, drafting_options, make_plan
from headrace.plan.record import keep_record
from headrace.text import is_utf8

if TYPE_CHECKING:
    from headrace.api import Model
    from headrace.completion import Completion
    from headrace.engine.request import RequestOutput
    from headrace.model import Tokenizer
    from headrace.model.tokenizer import Message, Prompt
    from headrace.sampling_params import SamplingParams

CHAT_CONTEXT = 4096
CHAT_PROMPT = 256
# Estimates for the plan line, before there is a tokenizer: tokens of a chat template, and bytes per token.
TEMPLATE_TOKENS = 40
BYTES_PER_TOKEN = 4


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The options that chat and single runs share."""

    max_tokens: int
    stop: Sequence[str]
    system: str | None
    raw: bool
    quiet: bool
    as_json: bool
    sampling: dict[str, Any]


def run_command(
    model: str,
    prompt: str | None,
    prompt_file: Path | None,
    memory: int | Budget | None,
    ctx_size: int | None,
    kv_bits: int,
    draft: str,
    deterministic: bool,
    trace: Path | None,
    max_tokens: int,
    stop: Sequence[str],
    system: str | None,
    raw: bool,
    as_json: bool,
    quiet: bool,
    **sampling: Any,
) -> int:
    """Run or chat; returns the exit code."""
    text = _read_prompt(prompt, prompt_file)
    if text is None and as_json:
        raise UsageError("--json needs a prompt", hint="give one as an argument, with --file or on stdin")
    if raw and text is None:
        raise UsageError("--raw completes a text, and there is none", hint="give one, or chat without --raw")
    if raw and system:
        raise UsageError("--raw and --system contradict each other", hint="write the system text into the prompt")
    settings = RunSettings(
        max_tokens=max_tokens, stop=stop, system=system, raw=raw, quiet=quiet, as_json=as_json, sampling=sampling
    )
    if trace is not None:
        show.check_writable(trace)
    checkpoint = open_checkpoint(model)
    run_config = replace(_run_config(checkpoint, text, None, max_tokens, ctx_size), kv_bits=kv_bits)
    profile = profile_for(model, say=not quiet)
    budget = budget_of(memory)
    drafting, _ = choose_drafting(checkpoint, profile, budget, run_config, drafting_options(checkpoint, draft, profile))
    plan = make_plan(checkpoint, profile, budget, replace(run_config, drafting=drafting))
    if not quiet:
        show.note(plan.line())
    load = slim_import.import_api().load  # torch and transformers: seconds, so only after the plan line

    def exact_run_config(tokenizer: "Tokenizer") -> RunConfig:
        if text is None:
            return run_config
        prompt_tokens = len(tokenizer.prompt(_prompt_of(text, settings), raw=raw))
        return replace(_run_config(checkpoint, text, prompt_tokens, max_tokens, ctx_size), kv_bits=kv_bits)

    with load(
        model,
        memory=budget,
        context_tokens=run_config.context_tokens,
        prompt_tokens=run_config.prompt_tokens,
        kv_bits=kv_bits,
        draft=draft,
        deterministic=deterministic,
        size_for=exact_run_config,
        profile=profile,
        trace=trace is not None,
    ) as loaded:
        if not (raw or quiet or loaded.tokenizer.has_chat_template or loaded.tokenizer.decoder_start_ids):
            show.note("the model has no chat template: the prompt is completed as it is, as with --raw")
        for remark in loaded.remarks if not quiet else ():
            show.note(remark)
        code = _chat(loaded, settings) if text is None else _once(loaded, text, settings)
        keep_record(loaded.record())
        if trace is not None and loaded.trace is not None:
            loaded.trace.write(trace)
    return code


def _read_prompt(prompt: str | None, prompt_file: Path | None) -> str | None:
    """Read the prompt from its argument, file or stdin; None means chat."""
    if prompt is not None and prompt_file is not None:
        raise UsageError("a prompt and --file were both given", hint="use one of them")
    if prompt_file is not None and str(prompt_file) != "-":
        try:
            return prompt_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read {prompt_file}: {error}", hint="give a text file in UTF-8") from error
    if prompt == "-" or prompt_file is not None or (prompt is None and not sys.stdin.isatty()):
        try:
            prompt = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            raise UsageError(
                f"what came on stdin is no text in UTF-8: {error}", hint="convert it with iconv"
            ) from error
    if prompt is not None and not is_utf8(prompt):
        raise UsageError("the prompt is no text in UTF-8", hint="convert it, or give it with --file")
    if prompt is not None and not prompt.strip():
        raise UsageError("the prompt is empty", hint="give a prompt, or none on a terminal to chat")
    return prompt


def _prompt_of(text: str, settings: RunSettings) -> "Prompt":
    if not settings.system:
        return text
    return [{"role": "system", "content": settings.system}, {"role": "user", "content": text}]


def _run_config(
    checkpoint: Checkpoint, text: str | None, prompt_tokens: int | None, max_tokens: int, ctx: int | None
) -> RunConfig:
    """The run to plan for. `prompt_tokens=None`: estimated from the text's bytes."""
    limit = checkpoint.context_limit(CHAT_CONTEXT)
    if text is None:
        return RunConfig(context_tokens=ctx or min(CHAT_CONTEXT, limit), prompt_tokens=CHAT_PROMPT)
    if prompt_tokens is None:
        prompt_tokens = len(text.encode()) // BYTES_PER_TOKEN + TEMPLATE_TOKENS
    context = ctx or min(prompt_tokens + max_tokens, limit)
    return RunConfig(context_tokens=context, prompt_tokens=max(1, min(prompt_tokens, context)))


def _sampling(model: "Model", settings: RunSettings) -> "SamplingParams":
    given = {name: value for name, value in settings.sampling.items() if value is not None}
    return replace(model.default_sampling(), **given | {"logit_bias": dict(given.get("logit_bias", ()))})


def _answer(model: "Model", prompt: "Prompt", settings: RunSettings) -> tuple["Completion", bool]:
    """Generate, and print tokens as they come; returns (completion, True if Ctrl-C ended it)."""
    outputs: list[RequestOutput] = []
    progress = show.ProgressLine(settings.quiet)
    interrupted, reasoning = False, False
    try:
        for output in model.stream(
            prompt,
            max_tokens=settings.max_tokens,
            sampling=_sampling(model, settings),
            stop=settings.stop,
            raw=settings.raw,
            on_progress=progress.update,
        ):
            progress.clear()
            outputs.append(output)
            if output.reasoning and not (settings.as_json or settings.quiet):
                show.reasoning(output.reasoning)
                reasoning = True
            if reasoning and output.text:
                show.reasoning("\n\n")
                reasoning = False
            if not settings.as_json and output.text:
                click.echo(output.text, nl=False)
                sys.stdout.flush()
    except KeyboardInterrupt:
        interrupted = True
    finally:
        progress.clear()
    if not settings.as_json:
        click.echo()
    return model.completion(outputs), interrupted


def _once(model: "Model", text: str, settings: RunSettings) -> int:
    completion, interrupted = _answer(model, _prompt_of(text, settings), settings)
    if settings.as_json:
        show.json_line(completion.as_json())
    if not settings.quiet:
        show.say(show.stats(completion))
    return show.INTERRUPTED if interrupted else 0


CHAT_HELP = (
    "/reset forgets the conversation, /stats shows the last answer's cost, /exit or Ctrl-D ends, Ctrl-C stops an answer"
)


def _chat(model: "Model", settings: RunSettings) -> int:
    model.tokenizer.check_chat()
    with suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input())
    show.note(CHAT_HELP)
    chat = Conversation(model, settings)
    while True:
        try:
            line = input(">>> ").strip()
            if not is_utf8(line):
                show.note("that was no text in UTF-8")
            elif not chat.turn(line):
                return 0
        except UnicodeDecodeError:
            show.note("that was no text in UTF-8")
        except EOFError:
            click.echo()
            return 0
        except KeyboardInterrupt:
            show.say("\nCtrl-D or /exit to leave")


class Conversation:
    """The messages so far. Their common prefix with the last prompt stays in the model's KV cache."""

    def __init__(self, model: "Model", settings: RunSettings):
        self._model = model
        self._settings = settings
        self._stats = "no answer yet"
        self._forget()

    def _forget(self) -> None:
        system = self._settings.system
        self._messages: list[Message] = [{"role": "system", "content": system}] if system else []

    def turn(self, line: str) -> bool:
        """Answer a line, or execute a command; False ends the chat."""
        if line == "/exit":
            return False
        if line == "/reset":
            self._forget()
            show.note("the conversation is forgotten")
        elif line == "/stats":
            show.note(self._stats)
        elif line == "/help" or re.fullmatch(r"/[a-z]+", line):  # an unknown command, not part of the conversation
            show.note(CHAT_HELP if line == "/help" else f"there is no {line}; {CHAT_HELP}")
        elif line:
            self._answer(line)
        return True

    def _answer(self, line: str) -> None:
        messages = [*self._messages, {"role": "user", "content": line}]
        try:
            completion, _ = _answer(self._model, messages, self._settings)
        except HeadraceError as error:
            show.error(error)  # the conversation goes on without this line
            return
        self._messages = [*messages, {"role": "assistant", "content": completion.text}]
        self._stats = show.stats(completion)
        if not self._settings.quiet:
            show.say(self._stats)
