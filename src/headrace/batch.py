"""Requests and results of a batch, as lines of JSON in the format of the OpenAI Batch API. No torch.

Results are appended one line at a time and synced, so that a kill at any moment loses at most the answers in the making.
What is in the output already is not computed again; a half line at its end, which only a kill can leave, is cut off.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from headrace.errors import HeadraceError, UsageError

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
# Parameters that would change the answer, and that we do not have: an error is better than another answer.
_UNSUPPORTED = ("tools", "functions", "logprobs", "top_logprobs", "logit_bias", "suffix", "echo")
_WITHOUT_EFFECT: dict[str, Any] = {  # values that ask for nothing
    "response_format": {"type": "text"},
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "repetition_penalty": 1,
    "repeat_penalty": 1,
    "best_of": 1,
    "n": 1,
}
_SAMPLING = {"temperature": (int, float), "top_p": (int, float), "min_p": (int, float), "top_k": (int,), "seed": (int,)}


@dataclass(frozen=True, kw_only=True)
class BatchRequest:
    """One line of the input that can be run."""

    line: int  # from 1
    custom_id: str
    model: str | None
    prompt: str | list[dict[str, str]]
    chat: bool
    max_tokens: int | None
    stop: tuple[str, ...]
    sampling: dict[str, float | int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class BadLine:
    """One line of the input that cannot be run, and why."""

    line: int
    custom_id: str | None
    code: str
    message: str


def read_requests(path: Path) -> Iterator[BatchRequest | BadLine]:
    """The lines of an input file, one by one. Empty lines are passed over.

    Raises:
        UsageError: the file cannot be read.
    """
    seen: set[str] = set()
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if raw.strip():
                    yield _parse(number, raw, seen)
    except OSError as error:
        raise UsageError(
            f"cannot read {path}: {error.strerror}", hint="give a file of one JSON request a line"
        ) from error


class _Refused(Exception):
    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


def _parse(line: int, raw: bytes, seen: set[str]) -> BatchRequest | BadLine:
    custom_id: str | None = None
    try:
        try:
            value = json.loads(raw)
            # JavaScript that cuts a text inside an emoji leaves half of it, which no file in UTF-8 can hold.
            json.dumps(value, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise _Refused("invalid_json_line", f"line {line} is not JSON: {error}") from error
        if not isinstance(value, dict) or not isinstance(value.get("custom_id"), str):
            raise _Refused("missing_custom_id", f"line {line} has no custom_id")
        custom_id = value["custom_id"]
        if custom_id in seen:
            custom_id = None
            raise _Refused("duplicate_custom_id", f"line {line} repeats the custom_id {value['custom_id']!r}")
        seen.add(custom_id)
        return _request(line, custom_id, value)
    except _Refused as refused:
        return BadLine(line=line, custom_id=custom_id, code=refused.code, message=str(refused))


def _request(line: int, custom_id: str, value: Mapping[str, Any]) -> BatchRequest:
    body, url = value.get("body"), value.get("url")
    if value.get("method", "POST") != "POST" or url not in (CHAT, COMPLETION):
        raise _Refused("invalid_url", f"only POST to {CHAT} and {COMPLETION} is known, not {value.get('method')} {url}")
    if not isinstance(body, dict):
        raise _Refused("invalid_request", "the body is not an object")
    asked = [key for key in _UNSUPPORTED if body.get(key)]
    asked += [key for key, nothing in _WITHOUT_EFFECT.items() if body.get(key) not in (None, nothing)]
    if asked:
        advice = ", ask several times with different seeds" if asked[0] == "n" else ""
        raise _Refused("unsupported_parameter", f"{asked[0]} is not supported{advice}")
    chat = url == CHAT
    most = body.get("max_completion_tokens", body.get("max_tokens"))
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        raise _Refused("invalid_request", f"max_tokens is {most!r}, not a number above 0")
    sampling = {}
    for key, kinds in _SAMPLING.items():
        given = body.get(key)
        if given is not None:
            if isinstance(given, bool) or not isinstance(given, kinds):
                raise _Refused("invalid_request", f"{key} is {given!r}, not a number")
            sampling[key] = given
    return BatchRequest(
        line=line,
        custom_id=custom_id,
        model=body.get("model") if isinstance(body.get("model"), str) else None,
        prompt=_messages(body.get("messages")) if chat else _text(body.get("prompt"), "prompt"),
        chat=chat,
        max_tokens=most,
        stop=_stops(body.get("stop")),
        sampling=sampling,
    )


def _messages(value: object) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise _Refused("invalid_request", "messages is not a list of messages")
    messages = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _Refused("invalid_request", "a message has no role")
        messages.append({"role": message["role"], "content": _text(message.get("content"), "content")})
    return messages


def _text(value: object, what: str) -> str:
    """A text, or the texts of a list of parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        return value[0]
    if isinstance(value, list) and value and all(isinstance(p, dict) and p.get("type") == "text" for p in value):
        return "".join(str(part.get("text", "")) for part in value)
    raise _Refused("invalid_request", f"{what} is not a text")


def _stops(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else ([] if value is None else value)
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise _Refused("invalid_request", "stop is not a text or a list of texts")
    return tuple(stops)


def answer_record(
    request: BatchRequest,
    *,
    text: str,
    finish_reason: str,
    prompt_tokens: int,
    completion_tokens: int,
    model: str,
    thinking: str = "",
) -> dict[str, Any]:
    """The result of a request that was answered; `reasoning_content` is where other servers put what was thought."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": finish_reason, "logprobs": None}
    thought = {"reasoning_content": thinking} if thinking else {}
    choice |= {"message": {"role": "assistant", "content": text, **thought}} if request.chat else {"text": text}
    body = {
        "id": f"{'chatcmpl' if request.chat else 'cmpl'}-{request.line}",
        "object": "chat.completion" if request.chat else "text_completion",
        "created": int(time.time()),
        "model": request.model or model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }
    response = {"status_code": 200, "request_id": _id(request.line), "body": body}
    return {"id": _id(request.line), "custom_id": request.custom_id, "response": response, "error": None}


def error_record(line: int, custom_id: str | None, code: str, message: str) -> dict[str, Any]:
    """The result of a line that cannot be answered."""
    return {
        "id": _id(line),
        "custom_id": custom_id,
        "response": None,
        "error": {"code": code, "message": message},
    }


def _id(line: int) -> str:
    return f"batch_req_{line}"


class Results:
    """The output file: what is done, and one appended line for each new result. A context manager.

    Raises:
        HeadraceError: the file holds something else, another process writes to it, or the disk is full.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise HeadraceError(f"cannot write {path}: {error.strerror}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._done: set[_Key] = self._resume()
        except BlockingIOError as error:
            os.close(self._fd)
            raise HeadraceError(
                f"another process writes to {path}", hint="wait for it, or give another file"
            ) from error
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._fd)

    @property
    def done(self) -> int:
        """Results in the file."""
        return len(self._done)

    def has(self, request: BatchRequest | BadLine) -> bool:
        """Whether the file holds a result for it."""
        return _key(_id(request.line), request.custom_id) in self._done

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a result. It is on the disk when this returns, or not in the file at all."""
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        try:
            written = 0
            while written < len(line):
                written += os.pwrite(self._fd, line[written:], self._end + written)
            os.fsync(self._fd)
        except OSError as error:
            os.ftruncate(self._fd, self._end)
            raise HeadraceError(
                f"cannot write to {self.path}: {error.strerror}",
                hint="free some space and run the same command again: what is done is kept",
            ) from error
        self._end += len(line)
        self._done.add(_key_of(record))

    def _resume(self) -> "set[_Key]":
        """Read what is done; cut a half line off."""
        done: set[_Key] = set()
        self._end = 0
        with os.fdopen(os.dup(self._fd), "rb") as file:
            for raw in file:
                if not raw.endswith(b"\n"):
                    break
                try:
                    done.add(_key_of(json.loads(raw)))
                except (ValueError, KeyError, TypeError) as error:
                    raise HeadraceError(
                        f"{self.path} holds something else than results of a batch", hint="give another output file"
                    ) from error
                self._end += len(raw)
            else:
                return done
        if not done and not raw.startswith(b'{"id": "batch_req_'[: len(raw)]):
            raise HeadraceError(
                f"{self.path} holds something else than results of a batch", hint="give another output file"
            )
        os.ftruncate(self._fd, self._end)
        return done


# What tells requests apart: a name that its author gave, or the number of its line where there is none.
_Key: TypeAlias = tuple[str, str]


def _key(own_id: str, custom_id: str | None) -> _Key:
    return ("line", own_id) if custom_id is None else ("custom", custom_id)


def _key_of(record: Mapping[str, Any]) -> _Key:
    if not str(record["id"]).startswith("batch_req_"):
        raise ValueError(record["id"])
    custom_id = record["custom_id"]
    return _key(str(record["id"]), None if custom_id is None else str(custom_id))


def pending(path: Path, results: Results) -> Sequence[BatchRequest | BadLine]:
    """The lines of the input that have no result yet."""
    return [request for request in read_requests(path) if not results.has(request)]
