"""Checks messages in OpenAI's format against the chat template: every tool call and field must appear in the prompt.

A template that leaves out a tool call, or a field of a message, would make another prompt without any error.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from headrace.errors import UsageError
from headrace.model.chat_template import REASONING_FIELDS, ChatTemplate

_ALWAYS = frozenset({"role", "content", "tool_calls", "tool_call_id"})
_EMPTY: tuple[Any, ...] = ("", [], {})  # values of empty fields


def template_variables(
    template: ChatTemplate, told: Mapping[str, Any], effort: str | None, documents: Sequence[Any] | None
) -> dict[str, Any]:
    """The variables of a template beside the conversation.

    Args:
        template: the model's chat template.
        told: `chat_template_kwargs`.
        effort: `reasoning_effort`. "none" sets `enable_thinking` to False if the template knows only that.
        documents: documents for templates that use them.

    Raises:
        UsageError: the template has no such variable.
    """
    found = dict(told)
    unknown = next((name for name in found if name not in template.variables), None)
    if unknown is not None:
        raise UsageError(
            f"chat_template_kwargs holds {unknown!r}, which is no variable of the model's chat template",
            hint=f"it has {', '.join(sorted(template.variables)) or 'none'}",
        )
    if effort is not None:
        if "reasoning_effort" in template.variables:
            found.setdefault("reasoning_effort", effort)
        elif effort == "none" and "enable_thinking" in template.variables:
            found.setdefault("enable_thinking", False)
        else:
            raise UsageError(
                "reasoning_effort is not supported: the model's chat template does not know it", hint="leave it out"
            )
    if documents:
        if "documents" not in template.source:
            raise UsageError(
                "documents are not supported: the model's chat template has no place for them", hint="leave them out"
            )
        found["documents"] = list(documents)
    return found


def checked_messages(
    template: ChatTemplate, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The messages in a form that the template renders completely, with tool call arguments as objects if it takes them.

    Raises:
        UsageError: the template would leave out a tool call or a field.
    """
    for message in messages:
        _check_fields(template, message)
    found = [_as_written(template, without_empty(message)) for message in messages]
    _check_names(template, found, variables)
    if not any(message.get("tool_calls") for message in found):
        return found
    parsed = [_with_objects(message) for message in found]
    # Some templates render calls only beside a null content, others only beside an empty one.
    empty = [
        [
            {**message, "content": content} if message.get("tool_calls") and not message.get("content") else message
            for message in parsed
        ]
        for content in (None, "")
    ]
    reason = "the model's chat template leaves them out"
    for attempt in (parsed, *empty, found):
        try:
            if _renders_calls(template, attempt, variables):
                return attempt
        except UsageError as error:
            reason = str(error)
    raise UsageError(f"tool_calls are not supported: {reason}", hint="write the calls into the content")


def without_empty(message: Mapping[str, Any]) -> dict[str, Any]:
    """Drop empty fields; a content may be empty, or null beside tool calls."""
    return {
        name: value
        for name, value in message.items()
        if name == "content" or (value is not None and not any(value == one for one in _EMPTY))
    }


def _as_written(template: ChatTemplate, message: dict[str, Any]) -> dict[str, Any]:
    """Join a content in parts to one text, for templates that only take text."""
    content = message.get("content")
    if not isinstance(content, list) or _TAKES_PARTS.search(template.source):
        return message
    return {**message, "content": "".join(part if isinstance(part, str) else str(part["text"]) for part in content)}


# A loop over a content, or a test of its type.
_TAKES_PARTS = re.compile(
    r"in\s+[\w.]*(\[['\"])?content\b|content(['\"]\])?\s+is\s+(not\s+)?(string|iterable|sequence|mapping)"
)


def _check_fields(template: ChatTemplate, message: Mapping[str, Any]) -> None:
    for name, value in message.items():
        if name in _ALWAYS or value is None or any(value == one for one in _EMPTY):
            continue
        if name == "name" and message.get("role") == "tool":
            continue
        names = REASONING_FIELDS if name in REASONING_FIELDS else (name,)
        if not any(one in template.source for one in names):
            raise UsageError(
                f"the field {name!r} of a message is not supported: the model's chat template does not know it",
                hint="leave it out",
            )


def _check_names(template: ChatTemplate, messages: Sequence[dict[str, Any]], variables: Mapping[str, Any]) -> None:
    """Search the rendered text for each `name`: a template may use the word only for something else, such as a function."""
    marks = {
        i: f"named{i:04d}here" for i, message in enumerate(messages) if "name" in message and message["role"] != "tool"
    }
    if not marks:
        return
    text = template.render(
        [{**message, "name": marks[i]} if i in marks else message for i, message in enumerate(messages)],
        variables=variables,
    )
    if not all(mark in text for mark in marks.values()):
        raise UsageError(
            "the field 'name' of a message is not supported: the model's chat template does not show it",
            hint="leave it out",
        )


def _with_objects(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not calls:
        return message
    if not isinstance(calls, list) or not all(map(_calls_a_function, calls)):
        raise UsageError(
            "tool_calls is no list of calls of functions", hint='[{"type": "function", "function": {...}}]'
        )
    found = []
    for call in calls:
        arguments = call["function"].get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except ValueError as error:
                raise UsageError(
                    f"the arguments of a call in tool_calls are not JSON: {error}", hint="give an object as JSON"
                ) from error
        found.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": found}


def _calls_a_function(call: Any) -> bool:
    return isinstance(call, dict) and isinstance(call.get("function"), dict)


def _renders_calls(template: ChatTemplate, messages: Sequence[dict[str, Any]], variables: Mapping[str, Any]) -> bool:
    """True if every tool call is rendered; each gets a unique name to search for."""
    marks: list[str] = []

    def marked(call: dict[str, Any]) -> dict[str, Any]:
        marks.append(f"called{len(marks):04d}here")
        return {**call, "function": {**call["function"], "name": marks[-1]}}

    renamed = [
        {**message, "tool_calls": [marked(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]
    text = template.render(renamed, variables=variables)
    return all(mark in text for mark in marks)
