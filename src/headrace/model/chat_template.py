"""Renders a conversation to text with the checkpoint's Jinja chat template, as transformers does.

A template is a program from an untrusted file. It runs in a separate process (`template_worker.py`), limited to 5 s of
CPU time and 256 MiB. A process that has ended is started again for the next conversation.
"""

import json
import os
import selectors
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

from headrace.errors import CheckpointError, HeadraceError, UsageError

_WORKER = Path(__file__).with_name("template_worker.py")
_WAIT_S = 60.0  # timeout of a reply
_MAX_BYTES = 256 << 20  # size limit of a reply
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")  # names of the same field
_END_OF_CONTENT = "END-OF-THE-LAST-CONTENT"
_RESERVED_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


class ChatTemplate:
    """One template; its process starts with `start`, or with the first conversation."""

    def __init__(self, source: str, special_tokens: Mapping[str, Any], path: str):
        """`special_tokens` are variables of the template, such as `bos_token`; `path` is the checkpoint's, for messages."""
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._path = path
        self._lock = Lock()
        self._process: _Process | None = None

    def start(self) -> None:
        """Start the process, which parses the template in the background. Errors are raised by the first conversation."""
        with self._lock, suppress(HeadraceError):
            self._process = _Process()
            self._process.send({"template": self.source})

    def close(self) -> None:
        """End the process. Safe to call twice; another conversation starts one again."""
        with self._lock:
            if self._process is not None:
                self._process.close()
                self._process = None

    @cached_property
    def variables(self) -> frozenset[str]:
        """Template variables that a caller may set (`chat_template_kwargs`).

        Raises:
            CheckpointError: the template is broken.
        """
        with self._lock:
            return frozenset(self._started().variables or ()) - _RESERVED_VARIABLES - self._special_tokens.keys()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation.

        Args:
            messages: with `role`, `content` and whatever else the template knows.
            add_generation_prompt: append the header of the assistant's turn.
            continue_final_message: end with the last message's content, which the answer continues.
            variables: further variables of the template.

        Raises:
            CheckpointError: the template is broken.
            UsageError: the template raises an error, or exceeds its limit of time or memory.
        """
        if not messages:
            raise UsageError("the conversation is empty", hint="give it a message")
        conversation = [_with_reasoning_aliases(message) for message in messages]
        content, tag = conversation[-1].get("content"), "CONTINUE-THE-LAST-MESSAGE "
        if continue_final_message:
            if not isinstance(content, str) or not content:
                raise UsageError("the last message has no text to continue", hint="give it a content")
            conversation[-1]["content"] = content + tag
        text = self._rendered(conversation, add_generation_prompt, variables)
        if continue_final_message and isinstance(content, str):
            at = text.rfind(tag.strip())
            if at < 0 or content.strip() not in text:
                raise UsageError(
                    "the model's chat template does not show the last message as it is, so it cannot be continued",
                    hint="leave out continue_final_message",
                )
            text = text[:at] if text[at : at + len(tag)] == tag else text[:at].rstrip()
        return text

    def tail(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None = None) -> str:
        """The text that the template writes between the last message's content and the answer."""
        content = messages[-1].get("content") if messages else None
        if isinstance(content, str):
            marked = [*messages[:-1], {**messages[-1], "content": content + _END_OF_CONTENT}]
            _, found, tail = self.render(marked, variables=variables).rpartition(_END_OF_CONTENT)
            if found:
                return tail
        text = self.render(messages, variables=variables)
        return text.removeprefix(self.render(messages, add_generation_prompt=False, variables=variables))

    def _rendered(
        self, messages: Sequence[Mapping[str, Any]], generation: bool, variables: Mapping[str, Any] | None
    ) -> str:
        given = {"tools": None, "documents": None, **self._special_tokens, **(variables or {})}
        given |= {"messages": messages, "add_generation_prompt": generation}
        with self._lock:
            answer = self._started().ask({"variables": given})
        if "text" not in answer:
            raise UsageError(
                f"the model's chat template refuses this conversation: {answer['refused']}",
                hint="use another conversation, or --raw with a prompt to complete",
            )
        return checked_text(str(answer["text"]), "what the model's chat template writes")

    def _started(self) -> "_Process":
        """The process, after it has parsed the template."""
        process = self._process
        if process is None or not process.is_usable:
            self._process = process = _Process()
            process.send({"template": self.source})
        if process.variables is None:
            answer = process.answer()
            if "variables" not in answer:
                self._process = None
                raise CheckpointError(
                    f"{self._path}: the chat template is broken: {answer.get('broken', answer.get('refused'))}",
                    hint="use --raw with a prompt to complete",
                )
            process.variables = tuple(answer["variables"])
        return process


def checked_text(text: str, what: str = "the prompt") -> str:
    """The text, with surrogate pairs combined into characters.

    Raises:
        UsageError: the text has an unpaired surrogate.
    """
    if not any("\ud800" <= char <= "\udfff" for char in text):
        return text
    try:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{what} holds half a character (U+{ord(text[error.start // 2]):04X})",
            hint="a text was cut inside a character; cut it elsewhere",
        ) from error


def _with_reasoning_aliases(message: Mapping[str, Any]) -> dict[str, Any]:
    """Drop nulls (except `content` beside tool calls), and copy the reasoning to every key that templates read."""
    told = {
        name: value
        for name, value in message.items()
        if value is not None or (name == "content" and message.get("tool_calls"))
    }
    thought = next((told[name] for name in REASONING_FIELDS if name in told), None)
    return told if thought is None else {"thinking": thought, **told, "reasoning_content": thought}


class _Process:
    """The template's subprocess. A reply over the time or size limit ends it."""

    variables: Sequence[str] | None = None  # names of the template's variables; None: not received yet

    def __init__(self) -> None:
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_WORKER)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C reaches only this process
            )  # fmt: skip
        except OSError as error:
            raise HeadraceError(
                f"no process can be started for the chat template: {error.strerror}",
                hint="raise the limit of processes (`ulimit -u`), or use --raw with a prompt to complete",
            ) from error
        self._owner = os.getpid()
        weakref.finalize(self, _stop, self._process, self._owner)

    @property
    def is_usable(self) -> bool:
        """True if the subprocess runs and belongs to this process."""
        return os.getpid() == self._owner and self._process.poll() is None

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The reply; `refused` if there is none. An interrupt ends the subprocess, so a late reply is never read."""
        refused = self.send(question)
        return self.answer() if refused is None else {"refused": refused}

    def send(self, question: Mapping[str, Any]) -> str | None:
        """Send a request. Returns the reason if it cannot be sent."""
        assert self._process.stdin is not None
        try:
            line = json.dumps(question, default=lambda value: f"<{type(value).__name__}>").encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            return f"it cannot be written as JSON: {error}"
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except (OSError, ValueError):
            self.close()  # `answer` reports it
        except BaseException:
            self.close()
            raise
        return None

    def answer(self) -> dict[str, Any]:
        """The reply to the last request."""
        try:
            found = self._line()
        except (OSError, ValueError):
            found = b""
        except BaseException:
            self.close()
            raise
        if found:
            return dict(json.loads(found))
        self.close()
        return {"refused": "it takes too much time or memory"}

    def close(self) -> None:
        """End the process. Safe to call twice."""
        _stop(self._process, self._owner)

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        until, parts, size = time.monotonic() + _WAIT_S, list[bytes](), 0
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while size < _MAX_BYTES and (left := until - time.monotonic()) > 0:
                if not selector.select(left):
                    continue
                part = os.read(self._process.stdout.fileno(), 1 << 20)
                if not part:
                    return b""
                parts.append(part)
                size += len(part)
                if part.endswith(b"\n"):
                    return b"".join(parts)
        return b""


def _stop(process: "subprocess.Popen[bytes]", owner: int) -> None:
    if os.getpid() != owner:
        return  # in a forked child
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()
