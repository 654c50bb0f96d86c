"""Requests and results of a batch, as lines of JSON in the format of the OpenAI Batch API. No torch.

Results are appended one line at a time and synced. A kill at any moment loses at most the running requests.
Results already in the output are not computed again. A half line at its end, which only a kill can leave, is cut off.
"""

import fcntl
import hashlib
import json
import os
import stat
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from headrace.errors import HeadraceError, UsageError
from headrace.request_fields import check_fields, without_nulls
from headrace.sampling_params import FIELDS, SamplingParams
from headrace.text import is_utf8

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
_LONGEST_LINE = 64 << 20
_HASH_DIGITS = 16


@dataclass(frozen=True, kw_only=True)
class BatchRequest:
    """A line of the input that can be run."""

    line: int  # number of the line, from 1
    custom_id: str
    model: str | None
    prompt: str | list[dict[str, Any]]
    chat: bool
    max_tokens: int | None
    stop: tuple[str, ...]
    stop_token_ids: frozenset[int] = frozenset()
    sampling: dict[str, Any] = field(default_factory=dict)  # parameters that the request gives
    echo: bool = False  # the answer of a completion begins with the prompt
    template_variables: dict[str, Any] = field(default_factory=dict)  # `chat_template_kwargs`
    reasoning_effort: str | None = None
    documents: list[Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    digest: str = ""  # hash of the request without its custom_id


@dataclass(frozen=True, kw_only=True)
class BadLine:
    """A line of the input that cannot be run, and the reason."""

    line: int
    custom_id: str | None
    code: str
    message: str
    digest: str = ""


def read_requests(path: Path) -> Iterator[BatchRequest | BadLine]:
    """The lines of an input file, one by one. Empty lines are skipped.

    Raises:
        UsageError: the file cannot be read.
    """
    seen: set[str] = set()
    try:
        with path.open("rb") as file:
            kind = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(kind) and not stat.S_ISFIFO(kind):
                raise UsageError(f"{path} is not a regular file", hint="give a file of one JSON request a line")
            if stat.S_ISREG(kind) and b"\0" in os.pread(file.fileno(), 512, 0):
                raise UsageError(
                    f"{path} is no text", hint="IN.jsonl comes first, then OUT.jsonl; --model names the model"
                )
            for number, raw in enumerate(_lines(file, path), 1):
                if raw.strip():
                    yield _parse(number, raw, seen)
    except OSError as error:
        raise UsageError(
            f"cannot read {path}: {error.strerror}", hint="give a file of one JSON request a line"
        ) from error


def _lines(file: IO[bytes], path: Path) -> Iterator[bytes]:
    while raw := file.readline(_LONGEST_LINE):
        if len(raw) == _LONGEST_LINE:
            raise UsageError(
                f"{path} holds a line of more than {_LONGEST_LINE} bytes", hint="give a file of one JSON request a line"
            )
        yield raw


def _digest(value: object) -> str:
    """Hash of a request; white space, escapes and the order of keys do not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:_HASH_DIGITS]


class _Refused(Exception):
    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


def _parse(line: int, raw: bytes, seen: set[str]) -> BatchRequest | BadLine:
    custom_id: str | None = None
    digest = hashlib.sha256(raw.strip()).hexdigest()[:_HASH_DIGITS]
    try:
        try:
            value = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise _Refused("invalid_json_line", f"line {line} is not JSON: {error}") from error
        if not isinstance(value, dict) or not isinstance(value.get("custom_id"), str):
            raise _Refused("missing_custom_id", f"line {line} has no custom_id")
        if not is_utf8(value["custom_id"]):
            raise _Refused("invalid_json_line", f"line {line} holds half a character in its custom_id")
        digest = _digest({name: one for name, one in value.items() if name != "custom_id"})
        custom_id = value["custom_id"]
        if custom_id in seen:
            custom_id = None
            raise _Refused("duplicate_custom_id", f"line {line} repeats the custom_id {value['custom_id']!r}")
        seen.add(custom_id)
        # JavaScript that splits a text inside an emoji leaves half of it, which no file in UTF-8 can hold.
        if not is_utf8(json.dumps(value, ensure_ascii=False)):
            raise _Refused("invalid_json_line", f"line {line} holds half a character")
        return _request(line, custom_id, without_nulls(value), digest)
    except _Refused as refused:
        return BadLine(line=line, custom_id=custom_id, code=refused.code, message=str(refused), digest=digest)


def _request(line: int, custom_id: str, value: Mapping[str, Any], digest: str) -> BatchRequest:
    body, url = value.get("body"), value.get("url")
    if value.get("method", "POST") != "POST" or url not in (CHAT, COMPLETION):
        raise _Refused("invalid_url", f"only POST to {CHAT} and {COMPLETION} is known, not {value.get('method')} {url}")
    if not isinstance(body, dict):
        raise _Refused("invalid_request", "the body is not an object")
    body, chat = without_nulls(body), url == CHAT
    try:
        check_fields(body, chat=chat)
    except UsageError as error:
        raise _Refused("unsupported_parameter", f"{error}; {error.hint}" if error.hint else str(error)) from error
    continues = _flag(body, "continue_final_message", default=False)
    generation = _flag(body, "add_generation_prompt", default=not continues)
    messages = _messages(body.get("messages")) if chat else []
    if continues and (generation or messages[-1]["role"] != "assistant"):
        raise _Refused(
            "invalid_request",
            "continue_final_message goes on with the assistant's message, without add_generation_prompt",
        )
    return BatchRequest(
        line=line,
        custom_id=custom_id,
        model=body.get("model") if isinstance(body.get("model"), str) else None,
        prompt=messages if chat else _text(body.get("prompt"), "prompt"),
        chat=chat,
        max_tokens=_max_tokens(body),
        stop=_stops(body.get("stop")),
        stop_token_ids=_token_ids(body.get("stop_token_ids", [])),
        sampling=_sampling(body, chat),
        echo=_flag(body, "echo", False),
        template_variables=_object(body, "chat_template_kwargs"),
        reasoning_effort=_word(body, "reasoning_effort"),
        documents=_list(body, "documents"),
        add_generation_prompt=generation,
        continue_final_message=continues,
        digest=digest,
    )


def _max_tokens(body: Mapping[str, Any]) -> int | None:
    limit = body.get("max_completion_tokens", body.get("max_tokens"))
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise _Refused("invalid_request", f"max_tokens is {limit!r}, not a number above 0")
    return limit


def _sampling(body: Mapping[str, Any], chat: bool) -> dict[str, Any]:
    """The sampling parameters that a request gives. Others come from the model's recommendation."""
    found = {one.name: body[one.name] for one in FIELDS if body.get(one.name) is not None}
    if body.get("logit_bias"):
        found["logit_bias"] = body["logit_bias"]
    if chat and _flag(body, "logprobs", False):
        found["logprobs"] = body.get("top_logprobs", 0)
    elif not chat and body.get("logprobs") is not None:
        found["logprobs"] = body["logprobs"]
    if "logprobs" in found and body.get("echo"):
        raise _Refused("unsupported_parameter", "echo together with logprobs is not supported")
    try:
        checked = SamplingParams(**found)
    except UsageError as error:
        raise _Refused("invalid_request", str(error)) from error
    return {name: getattr(checked, name) for name in found}


def _flag(body: Mapping[str, Any], name: str, default: bool) -> bool:
    value = body.get(name, default)
    if not isinstance(value, bool):
        raise _Refused("invalid_request", f"{name} is {value!r}, not true or false")
    return value


def _object(body: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = body.get(name, {})
    if not isinstance(value, dict):
        raise _Refused("invalid_request", f"{name} is not an object")
    return value


def _list(body: Mapping[str, Any], name: str) -> list[Any] | None:
    value = body.get(name)
    if value is not None and (not isinstance(value, list) or not all(isinstance(one, dict) for one in value)):
        raise _Refused("invalid_request", f"{name} is not a list of objects")
    return value or None


def _word(body: Mapping[str, Any], name: str) -> str | None:
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise _Refused("invalid_request", f"{name} is {value!r}, not a text")
    return value


def _token_ids(value: object) -> frozenset[int]:
    if not isinstance(value, list) or not all(isinstance(one, int) and not isinstance(one, bool) for one in value):
        raise _Refused("invalid_request", "stop_token_ids is not a list of token ids")
    return frozenset(value)


def _messages(value: object) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise _Refused("invalid_request", "messages is not a list of messages")
    messages = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _Refused("invalid_request", "a message has no role")
        fields = without_nulls(message)
        if fields.get("tool_calls") and message.get("content") in (None, "", []):
            fields["content"] = "" if "content" in fields else None
        else:
            _text(fields.get("content"), "content")
        messages.append(fields)
    return messages


def _text(value: object, what: str) -> str:
    """A text, or the texts of a list of parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        return value[0]
    if isinstance(value, list) and value and all(isinstance(p, dict) and p.get("type") == "text" for p in value):
        texts = [part.get("text") for part in value]
        if all(isinstance(text, str) for text in texts):
            return "".join(map(str, texts))
    raise _Refused("invalid_request", f"{what} is not a text")


def _stops(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else ([] if value is None else value)
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise _Refused("invalid_request", "stop is not a text or a list of texts")
    if "" in stops:
        raise _Refused("invalid_request", "a stop string is empty")
    return tuple(stops)


def answer_record(
    request: BatchRequest,
    *,
    text: str,
    finish_reason: str,
    prompt_tokens: int,
    completion_tokens: int,
    model: str,
    reasoning: str = "",
    logprobs: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """The result of a request that was answered, with reasoning in `reasoning_content` as in other servers."""
    echoed = request.prompt if request.echo and isinstance(request.prompt, str) else ""
    choice: dict[str, Any] = {"index": 0, "finish_reason": finish_reason, "logprobs": _logprobs(logprobs, request.chat)}
    shown = {"content": text} | ({"reasoning_content": reasoning} if reasoning else {})
    choice |= {"message": {"role": "assistant", **shown}} if request.chat else {"text": echoed + text}
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


def _logprobs(logprobs: list[dict[str, Any]] | None, chat: bool) -> dict[str, Any] | None:
    """Log-probabilities in the format of chat completions, or of completions."""
    if logprobs is None or chat:
        return None if logprobs is None else {"content": logprobs}
    texts = [one["token"] for one in logprobs]
    return {
        "tokens": texts,
        "token_logprobs": [one["logprob"] for one in logprobs],
        "top_logprobs": [{top["token"]: top["logprob"] for top in one["top_logprobs"]} for one in logprobs],
        "text_offset": list(accumulate(map(len, texts), initial=0))[:-1],
    }


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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Done:
    """A result in the file: hashes of its request and model, and whether it is an error."""

    digest: str
    model: str
    failed: bool


class Results:
    """The output file: earlier results, and one appended line for each new one. A context manager.

    Each result's id ends with the hashes of its request and of the model: `batch_req_7-<request>-<model>`.

    Raises:
        HeadraceError: the file holds something else, another process writes to it, or the disk is full.
        UsageError: the path is no regular file.
    """

    def __init__(self, path: Path, model_id: str = "0" * _HASH_DIGITS):
        """Open and lock the file. `model_id` is the model's identity (`checkpoint.identity`)."""
        self.path = path
        self._model_id = model_id
        self._fd = _open(path)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._done: dict[tuple[str, str], _Done] = self._resume()
        except BlockingIOError as error:
            os.close(self._fd)
            raise HeadraceError(
                f"another process writes to {path}", hint="wait for it, or give another file"
            ) from error
        except OSError as error:
            os.close(self._fd)
            raise HeadraceError(
                f"cannot lock or read {path}: {error.strerror}", hint="give a file on another file system"
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

    @property
    def failed(self) -> int:
        """Results in the file that are errors."""
        return sum(one.failed for one in self._done.values())

    def check(self, requests: Collection[BatchRequest | BadLine]) -> None:
        """Raise `HeadraceError` unless every result in the file is of one of these requests, and of this model."""
        expected = {_key(request.custom_id, request.digest): request.digest for request in requests}
        for key, one in self._done.items():
            if not one.digest:
                reason = "results without the hash of a request (of another tool, or an older version)"
            elif one.model != self._model_id:
                reason = "results of another model"
            elif expected.get(key) != one.digest:
                reason = "results of other requests"
            else:
                continue
            raise HeadraceError(
                f"{self.path} holds {reason}", hint="give another output file, or delete these lines of it"
            )

    def has(self, request: BatchRequest | BadLine) -> bool:
        """True if the file holds a result for this request."""
        return _key(request.custom_id, request.digest) in self._done

    def add(self, record: Mapping[str, Any], digest: str = "0" * _HASH_DIGITS) -> None:
        """Append a result of the request with this digest. Afterwards it is on the disk; after an error, not in the file."""
        record = {**record, "id": f"{record['id']}-{digest}-{self._model_id}"}
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        try:
            written = 0
            while written < len(line):
                written += os.pwrite(self._fd, line[written:], self._end + written)
            os.fsync(self._fd)
        except OSError as error:
            with suppress(OSError):  # half a line at the end is cut off when the batch goes on
                os.ftruncate(self._fd, self._end)
            raise HeadraceError(
                f"cannot write to {self.path}: {error.strerror}",
                hint="free some space, or raise the limit of file sizes, and run the same command again: what is done is kept",
            ) from error
        self._end += len(line)
        key, done = _result(record)
        self._done[key] = done

    def _resume(self) -> dict[tuple[str, str], _Done]:
        """Read earlier results; cut off a half line."""
        done: dict[tuple[str, str], _Done] = {}
        self._end = 0
        other = HeadraceError(
            f"{self.path} holds something else than results of a batch", hint="give another output file"
        )
        with os.fdopen(os.dup(self._fd), "rb") as file:
            while raw := file.readline(_LONGEST_LINE):
                if not raw.endswith(b"\n"):
                    break
                try:
                    key, one = _result(json.loads(raw))
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                    raise other from error
                done[key] = one
                self._end += len(raw)
        if not raw:
            return done
        if len(raw) == _LONGEST_LINE or (not done and not raw.startswith(b'{"id": "batch_req_'[: len(raw)])):
            raise other
        os.ftruncate(self._fd, self._end)
        return done


def _open(path: Path) -> int:
    """Open a regular file to read and write; create it if there is none."""
    other = UsageError(f"cannot write {path}: it is not a regular file", hint="give the path of a file")
    try:
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(path.stat().st_mode):
                raise other
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
    except (OSError, ValueError) as error:
        raise HeadraceError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}",
            hint="give a file in a folder that can be written to",
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise other
    return descriptor


def _key(custom_id: str | None, digest: str) -> tuple[str, str]:
    """The key of a result: the custom_id that the request's author gave, or else the digest."""
    return ("digest", digest) if custom_id is None else ("custom", custom_id)


def _result(record: Mapping[str, Any]) -> tuple[tuple[str, str], _Done]:
    name, *hashes = str(record["id"]).split("-")
    custom_id, failed = record["custom_id"], record["error"] is not None
    if not name.startswith("batch_req_") or not (custom_id is None or isinstance(custom_id, str)):
        raise ValueError(record["id"])
    digest, model = hashes if len(hashes) == 2 else ("", "")
    return _key(custom_id, digest or name), _Done(digest=digest, model=model, failed=failed)


def pending(requests: Sequence[BatchRequest | BadLine], results: Results) -> Sequence[BatchRequest | BadLine]:
    """Requests that have no result yet."""
    return [request for request in requests if not results.has(request)]
