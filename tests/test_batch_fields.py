"""Each field of a batch request is obeyed, has no effect by definition, or is refused by name. Null means absent.

The fields are those of OpenAI's chat completions and completions, and further ones of vLLM and llama.cpp's server.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from transformers.utils.chat_template_utils import render_jinja_template

from headrace.cli import main
from headrace.plan import guessed_profile
from headrace.plan.profile import save_profile
from headrace.units import MIB
from support.llama_cpp import LlamaVocabulary
from support.zoo.scripted import CHATML, byte_level, in_turn, write_scripted

pytestmark = pytest.mark.zoo

VOCABULARY = byte_level()
TOKEN = VOCABULARY["tokens"].index
START, END, NEWLINE = TOKEN("<|im_start|>"), TOKEN("<|im_end|>"), TOKEN("Ċ")
LETTERS = [TOKEN(chr(ord("a") + i)) for i in range(26)]
# Each letter is followed by the next one, a new line by a, the end of a turn by p. The prompt's last token decides the answer.
FOLLOWS = {**in_turn(*LETTERS, LETTERS[0]), NEWLINE: LETTERS[0], END: TOKEN("p"), TOKEN("X"): END, TOKEN("Y"): START}

# A template that renders every field of a conversation.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}\n"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments.city }}]{% endfor %}"
    "<|im_end|>{% endfor %}"
    "{% if documents %}{{ documents[0].text }}{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}f{% endif %}"
    "{% if reasoning_effort is defined and reasoning_effort %}{{ reasoning_effort }}{% endif %}{% endif %}"
)
# A template that renders tool calls only beside a content of null, as DeepSeek V3 does.
BESIDE_NULL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is none %}"
    "{% for c in m.tool_calls %}[{{ c.function.name }}]{% endfor %}{% else %}{{ m.content }}{% endif %}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"all": TEMPLATE, "plain": CHATML, "beside null": BESIDE_NULL}

USER = {"role": "user", "content": "hi"}
CHAT = {"messages": [USER], "max_tokens": 3, "temperature": 0}
TEXT = {"prompt": "a", "max_tokens": 3, "temperature": 0}


def calls(*cities: str) -> list[dict[str, Any]]:
    return [
        {"id": f"c{i}", "type": "function", "function": {"name": "weather", "arguments": json.dumps({"city": city})}}
        for i, city in enumerate(cities)
    ]


def answered(assistant: Mapping[str, Any], **body: Any) -> dict[str, Any]:
    """A conversation in which the assistant has called a tool."""
    result = {"role": "tool", "tool_call_id": "c0", "content": "7"}
    return {**CHAT, "messages": [USER, {"role": "assistant", **assistant}, result], **body}


# Fields of a chat that are obeyed: (fields added to the request, the answer).
OBEYED: list[tuple[dict[str, Any], str]] = [
    ({}, "abc"),
    ({"max_tokens": 4}, "abcd"),
    ({"max_completion_tokens": 4}, "abcd"),
    ({"max_completion_tokens": 2, "max_tokens": 5}, "ab"),
    ({"max_completion_tokens": None, "max_tokens": 4}, "abcd"),
    ({"max_completion_tokens": 4, "max_tokens": None}, "abcd"),
    ({"stop": "c"}, "ab"),
    ({"stop": ["x", "b"]}, "a"),
    ({"top_k": -1}, "abc"),
    ({"top_k": 0, "top_p": 1, "min_p": 0}, "abc"),
    ({"seed": -1}, "abc"),
    ({"temperature": 1, "top_k": 1}, "abc"),
    ({"frequency_penalty": 0.5, "presence_penalty": -1}, "abc"),
    ({"repetition_penalty": 1.2}, "abc"),
    ({"logit_bias": {str(LETTERS[25]): 100}}, "zzz"),
    ({"logit_bias": {str(LETTERS[1]): -100, str(LETTERS[25]): 1}}, "aza"),
    ({"temperature": 1e-42}, "abc"),  # logits divided by it are not finite
    ({"temperature": 5e-324, "top_p": 0.9}, "abc"),
    ({"chat_template_kwargs": {"enable_thinking": False}}, "ghi"),
    ({"chat_template_kwargs": {"enable_thinking": True}}, "abc"),
    ({"chat_template_kwargs": {}}, "abc"),
    ({"chat_template_kwargs": {"reasoning_effort": "low"}}, "xyz"),
    ({"reasoning_effort": "low"}, "xyz"),
    ({"reasoning_effort": "high"}, "ijk"),
    ({"reasoning_effort": "none"}, "fgh"),
    ({"add_generation_prompt": False}, "pqr"),
    ({"add_generation_prompt": True}, "abc"),
    (
        {
            "messages": [USER, {"role": "assistant", "content": "d"}],
            "continue_final_message": True,
            "add_generation_prompt": False,
        },
        "efg",
    ),
]
# Fields of a chat that may be obeyed or refused: (added, answer as vLLM defines it).
OBEYED_OR_REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"stop_token_ids": [LETTERS[1]], "max_tokens": 5}, "ab"),  # vLLM shows a stop token, unless it is a special one
    ({"stop_token_ids": [START], "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}, "abcd"),
    ({"min_tokens": 2}, "abc"),
    ({"ignore_eos": True}, "abc"),
    ({"include_stop_str_in_output": True, "stop": "b"}, "ab"),
    ({"documents": [{"title": "t", "text": "k"}], "add_generation_prompt": False}, "lmn"),
    ({"n_predict": 2, "max_tokens": None}, "ab"),
]
# Fields and their neutral values: defaults, and labels, billing or scheduling of a request.
WITHOUT_EFFECT: dict[str, list[Any]] = {
    # OpenAI
    "model": ["any"],
    "n": [1],
    "frequency_penalty": [0, 0.0],
    "presence_penalty": [0],
    "logit_bias": [{}],
    "logprobs": [False],
    "top_logprobs": [0],
    "response_format": [{"type": "text"}],
    "stop": [[]],
    "stream": [False],
    "tools": [[]],
    "functions": [[]],
    "tool_choice": ["none", "auto"],
    "function_call": ["none", "auto"],
    "parallel_tool_calls": [True, False],
    "modalities": [["text"]],
    "prediction": [{"type": "content", "content": "abc"}],  # speeds up the same answer
    "user": ["u"],
    "metadata": [{"job": "7"}],
    "store": [True, False],
    "service_tier": ["auto", "flex"],
    "safety_identifier": ["s"],
    "prompt_cache_key": ["k"],
    "prompt_cache_retention": ["24h"],
    # vLLM
    "repetition_penalty": [1, 1.0],
    "use_beam_search": [False],
    "length_penalty": [1.0],
    "best_of": [1],
    "stop_token_ids": [[]],
    "include_stop_str_in_output": [False],
    "ignore_eos": [False],
    "min_tokens": [0],
    "skip_special_tokens": [True],
    "bad_words": [[]],
    "echo": [False],
    "continue_final_message": [False],
    "include_reasoning": [True],
    "priority": [0, 3],
    "request_id": ["r"],
    "cache_salt": ["salt"],
    "return_token_ids": [False],
    # llama.cpp's server
    "repeat_penalty": [1.0],
    "cache_prompt": [True, False],
    "id_slot": [-1],
    "mirostat": [0],
    "dry_multiplier": [0],
    "xtc_probability": [0],
    "typical_p": [1.0],
    "dynatemp_range": [0],
    "n_probs": [0],
    "timings_per_token": [False],
}
SCHEMA = {"type": "object"}
# Fields and values that would change the answer or its form, and are not supported.
REFUSED: dict[str, list[Any]] = {
    # OpenAI
    "n": [2],
    "frequency_penalty": [2.5, "1", True],
    "presence_penalty": [-2.5],
    "logit_bias": [{"97": 101}, {"x": 1}, {"-1": 1}, {"97": "1"}, [97], {str(len(VOCABULARY["tokens"])): 1}],
    "logprobs": [1, "yes"],
    "response_format": [
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
    ],
    "tools": [[{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]],
    "functions": [[{"name": "f"}]],
    "tool_choice": ["required", {"type": "function", "function": {"name": "f"}}],
    "function_call": [{"name": "f"}],
    "modalities": [["text", "audio"]],
    "audio": [{"voice": "ash", "format": "wav"}],
    "web_search_options": [{}, {"search_context_size": "low"}],
    "verbosity": ["low"],
    "stream": [True],
    # vLLM
    "repetition_penalty": [0, -1, 1000],
    "use_beam_search": [True],
    "best_of": [3],
    "skip_special_tokens": [False],
    "truncate_prompt_tokens": [5],
    "prompt_logprobs": [0, 1],
    "logprob_token_ids": [[97]],
    "allowed_token_ids": [[97, 98]],
    "bad_words": [["b"]],
    "echo": [True],
    "chat_template": ["{{ messages }}"],
    "guided_json": [SCHEMA],
    "guided_regex": ["a+"],
    "guided_choice": [["a", "b"]],
    "guided_grammar": ["root ::= 'a'"],
    "structured_outputs": [{"json": SCHEMA}],
    "thinking_token_budget": [4],
    "repetition_detection": [{"max_pattern_size": 2}],
    "vllm_xargs": [{"a": 1}],
    "logits_processors": [["x"]],
    "return_token_ids": [True],
    # llama.cpp's server
    "grammar": ['root ::= "a"'],
    "json_schema": [SCHEMA],
    "repeat_penalty": [1.1],
    "mirostat": [2],
    "dry_multiplier": [0.8],
    "xtc_probability": [0.5],
    "typical_p": [0.5],
    "dynatemp_range": [0.5],
    "samplers": [["top_k"]],
    "n_probs": [2],
    "lora": [[{"id": 0, "scale": 0.5}]],
    # SGLang, and fields of no server
    "regex": ["a+"],
    "min_new_tokens": [2],
    "temprature": [0],
    "Temperature": [0],
    "prompt": ["hi"],
    "": [1],
    # variables that this template does not have, and variables that a request must not set
    "chat_template_kwargs": [{"thinking_budget": 3}, {"messages": []}, {"bos_token": "x"}, ["enable_thinking"], "x"],
}
# Fields of a completion, which differ.
REFUSED_OF_COMPLETIONS: dict[str, list[Any]] = {
    "suffix": ["x"],
    "logprobs": [True, -1, 21, 0.5],
    "best_of": [2],
    "prompt_embeds": ["AAAA"],
    "messages": [[USER]],
    "chat_template_kwargs": [{"enable_thinking": False}],
    "reasoning_effort": ["low"],
    "guided_regex": ["a+"],
    "no_such_field": [1],
}
WITHOUT_EFFECT_OF_COMPLETIONS: dict[str, list[Any]] = {
    "suffix": [""], "echo": [False], "best_of": [1], "add_special_tokens": [True], "user": ["u"], "n": [1],
}  # fmt: skip
# Fields of the assistant's message with its text "d".
REFUSED_OF_MESSAGES: dict[str, list[Any]] = {
    "function_call": [{"name": "f", "arguments": "{}"}],
    "audio": [{"id": "a1"}],
    "no_such_field": [1],
    "tool_calls": [
        "x",
        [3],
        [{"type": "function"}],
        [{"type": "function", "function": {"name": "f", "arguments": "{"}}],
    ],
}
WITHOUT_EFFECT_OF_MESSAGES: dict[str, list[Any]] = {
    "tool_calls": [[]],
    "refusal": [""],
    "annotations": [[]],
}


def _cases(table: Mapping[str, list[Any]]) -> list[tuple[str, Any]]:
    return [(name, value) for name, values in table.items() for value in values]


def _ids(table: Mapping[str, list[Any]]) -> list[str]:
    return [f"{name}={json.dumps(value)}"[:60] for name, value in _cases(table)]


Record = dict[str, Any]


class Answers:
    """Results of `headrace batch` for all requests of this file, in one run for each template."""

    def __init__(self, folder: Path):
        self.models = {
            name: write_scripted(
                folder / f"{i}.gguf", **VOCABULARY, template=template, eos=END, follows=FOLLOWS, context=256
            )
            for i, (name, template) in enumerate(TEMPLATES.items())
        }
        self._folder = folder
        self._found: dict[str, dict[str, Record]] = {}

    def of(self, body: Mapping[str, Any], model: str = "all", **line: Any) -> Record:
        """The record of a request with this body; a completion where it has a prompt and no messages."""
        if model not in self._found:
            self._found[model] = self._run(model)
        return self._found[model][_key(body, line)]

    def _run(self, model: str) -> dict[str, Record]:
        source, target = self._folder / f"{model}.jsonl", self._folder / f"{model}.out"
        keys = {_key(body, line): (body, line) for body, line in _requests(model)}
        with source.open("w") as file:
            for key, (body, line) in keys.items():
                url = (
                    "/v1/completions" if "messages" not in body or body.get("prompt") == "a" else "/v1/chat/completions"
                )
                given = {"custom_id": key, "method": "POST", "url": url, "body": body, **line}
                file.write(json.dumps(given) + "\n")
        arguments = [
            "batch",
            source,
            target,
            "-m",
            self.models[model],
            "--memory",
            "2GiB",
            "--draft",
            "none",
            "-n",
            "7",
        ]
        with pytest.MonkeyPatch.context() as patch:  # a kept profile, so that the machine is not measured
            patch.setenv("HEADRACE_HOME", str(self._folder / "home"))
            save_profile(replace(guessed_profile(), runtime_bytes=400 * MIB, disk_bytes_per_s={"0": 2e9}))
            result = CliRunner().invoke(main, [str(one) for one in arguments])
        assert result.exit_code in (0, 1), result.output
        found = {record["custom_id"]: record for record in map(json.loads, target.read_text().splitlines())}
        assert set(found) == set(keys)
        return found


def _key(body: Mapping[str, Any], line: Mapping[str, Any]) -> str:
    return json.dumps([body, line])


def _with_field_of_message(name: str, value: Any) -> dict[str, Any]:
    return {**CHAT, "messages": [USER, {"role": "assistant", "content": "d", name: value}, USER]}


CALL_AND_CONTENT: list[dict[str, Any]] = [
    {"tool_calls": calls("x")},
    {"content": None, "tool_calls": calls("x")},
    {"content": "", "tool_calls": calls("x")},
    {"content": [], "tool_calls": calls("x")},
    {"content": "I look", "tool_calls": calls("x")},
    {"content": None, "tool_calls": calls("x", "yy")},
]
NOT_TEXTS: list[Any] = [
    *(None, 3, {}, [], [None]),
    *([{"type": "text"}], [{"type": "text", "text": None}], [{"type": "text", "text": 3}]),
]
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
NULLS = sorted(
    {"max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "reasoning_effort", "add_generation_prompt"}
    | {"documents", "stream_options", "no_such_field"} | set(WITHOUT_EFFECT) | set(REFUSED)
)  # fmt: skip
MESSAGE_NULLS = sorted({"name", "reasoning_content", "reasoning", "refusal", "no_such_field", *REFUSED_OF_MESSAGES})
LINE_NULLS: dict[str, Any] = {"method": None}


def _requests(model: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for assistant in CALL_AND_CONTENT:
        yield answered(assistant), {}
    if model != "all":
        yield CHAT, {}
        yield _with_field_of_message("name", "ann"), {}
        yield _with_field_of_message("reasoning_content", "hm"), {}
        yield {**CHAT, "reasoning_effort": "low"}, {}
        yield {**CHAT, "chat_template_kwargs": {"enable_thinking": False}}, {}
        return
    for added, _ in (*OBEYED, *OBEYED_OR_REFUSED):
        yield {**CHAT, **added}, {}
    for name, value in (*_cases(WITHOUT_EFFECT), *_cases(REFUSED)):
        yield {**CHAT, name: value}, {}
    for name, value in (*_cases(WITHOUT_EFFECT_OF_COMPLETIONS), *_cases(REFUSED_OF_COMPLETIONS)):
        yield {**TEXT, name: value}, {}
    for name, value in (*_cases(WITHOUT_EFFECT_OF_MESSAGES), *_cases(REFUSED_OF_MESSAGES)):
        yield _with_field_of_message(name, value), {}
    for content in NOT_TEXTS:
        yield {**CHAT, "messages": [{"role": "user", "content": content}]}, {}
    yield {**CHAT, "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, IMAGE]}]}, {}
    yield {**CHAT, **dict.fromkeys(NULLS)}, {}
    yield TEXT, {}
    yield {**CHAT, "logprobs": True, "top_logprobs": 2}, {}
    for more in ({"echo": True}, {"logprobs": 1}, {"echo": True, "logprobs": 1}):
        yield {**TEXT, **more}, {}
    yield {**TEXT, **dict.fromkeys({*NULLS, *REFUSED_OF_COMPLETIONS} - {"prompt"})}, {}
    for name in NULLS:
        yield {**CHAT, name: None}, {}
    for name in MESSAGE_NULLS:
        yield _with_field_of_message(name, None), {}
    yield _with_field_of_message("name", "ann"), {}
    yield _with_field_of_message("reasoning_content", "hm"), {}
    yield _with_field_of_message("content", "d"), {}
    yield CHAT, LINE_NULLS


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return Answers(tmp_path_factory.mktemp("fields"))


def text_of(record: Record) -> str:
    assert record["error"] is None, record["error"]
    choice = record["response"]["body"]["choices"][0]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


def prompt_tokens(record: Record) -> int:
    assert record["error"] is None, record["error"]
    return int(record["response"]["body"]["usage"]["prompt_tokens"])


def assert_refused(record: Record, name: str) -> None:
    assert record["response"] is None, text_of(record)
    assert record["error"]["code"] in ("unsupported_parameter", "invalid_request")
    assert name in record["error"]["message"]


def tokens_of_transformers(answers: Answers, model: str, body: Mapping[str, Any]) -> int:
    """The tokens of a conversation as rendered by transformers, which needs arguments of tool calls as objects."""
    messages = json.loads(json.dumps(body["messages"]))
    for call in (call for message in messages for call in message.get("tool_calls") or []):
        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    rendered, _ = render_jinja_template([messages], chat_template=TEMPLATES[model], add_generation_prompt=True)
    return len(LlamaVocabulary(answers.models[model]).tokens(rendered[0]))


@pytest.mark.parametrize(("added", "text"), OBEYED, ids=[json.dumps(added)[:60] for added, _ in OBEYED])
def test_a_field_of_a_request_is_obeyed(answers: Answers, added: dict[str, Any], text: str) -> None:
    assert text_of(answers.of({**CHAT, **added})) == text


@pytest.mark.parametrize(
    ("added", "text"), OBEYED_OR_REFUSED, ids=[json.dumps(added)[:60] for added, _ in OBEYED_OR_REFUSED]
)
def test_a_field_of_a_request_is_obeyed_as_vllm_does_or_refused(
    answers: Answers, added: dict[str, Any], text: str
) -> None:
    record = answers.of({**CHAT, **added})
    if record["error"] is None:
        assert text_of(record) == text
    else:
        assert_refused(record, next(iter(added)))


@pytest.mark.parametrize(("name", "value"), _cases(WITHOUT_EFFECT), ids=_ids(WITHOUT_EFFECT))
def test_a_neutral_value_is_accepted(answers: Answers, name: str, value: Any) -> None:
    assert text_of(answers.of({**CHAT, name: value})) == "abc"


@pytest.mark.parametrize(("name", "value"), _cases(REFUSED), ids=_ids(REFUSED))
def test_a_field_that_cannot_be_obeyed_is_refused_by_name(answers: Answers, name: str, value: Any) -> None:
    assert_refused(answers.of({**CHAT, name: value}), name)


@pytest.mark.parametrize(("name", "value"), _cases(REFUSED_OF_COMPLETIONS), ids=_ids(REFUSED_OF_COMPLETIONS))
def test_a_field_of_a_completion_that_cannot_be_obeyed_is_refused_by_name(
    answers: Answers, name: str, value: Any
) -> None:
    assert_refused(answers.of({**TEXT, name: value}), name)


@pytest.mark.parametrize(
    ("name", "value"), _cases(WITHOUT_EFFECT_OF_COMPLETIONS), ids=_ids(WITHOUT_EFFECT_OF_COMPLETIONS)
)
def test_a_neutral_value_of_a_completion_is_accepted(answers: Answers, name: str, value: Any) -> None:
    assert text_of(answers.of({**TEXT, name: value})) == "bcd"


def test_the_prompt_comes_before_the_answer_where_it_is_echoed(answers: Answers) -> None:
    assert text_of(answers.of({**TEXT, "echo": True})) == "abcd"


def test_echo_and_logprobs_together_are_refused(answers: Answers) -> None:
    assert_refused(answers.of({**TEXT, "echo": True, "logprobs": 1}), "echo")


def test_log_probabilities_come_in_the_format_of_chats_and_of_completions(answers: Answers) -> None:
    chat = answers.of({**CHAT, "logprobs": True, "top_logprobs": 2})["response"]["body"]["choices"][0]["logprobs"]
    text = answers.of({**TEXT, "logprobs": 1})["response"]["body"]["choices"][0]["logprobs"]

    assert [one["token"] for one in chat["content"]] == ["a", "b", "c"]
    for one in chat["content"]:
        assert one["bytes"] == list(one["token"].encode())
        assert len(one["top_logprobs"]) == 2
        assert one["top_logprobs"][0]["token"] == one["token"]
        assert one["top_logprobs"][0]["logprob"] == one["logprob"] < 0
        assert one["top_logprobs"][1]["logprob"] < one["logprob"]
    assert text["tokens"] == ["b", "c", "d"]
    assert text["text_offset"] == [0, 1, 2]
    assert text["token_logprobs"] == [
        top[token] for token, top in zip(text["tokens"], text["top_logprobs"], strict=True)
    ]


def test_log_probabilities_that_were_not_asked_for_are_null(answers: Answers) -> None:
    assert answers.of(CHAT)["response"]["body"]["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("model", ["plain", "beside null"])
@pytest.mark.parametrize("added", [{"reasoning_effort": "low"}, {"chat_template_kwargs": {"enable_thinking": False}}])
def test_a_variable_that_the_template_does_not_have_is_refused(
    answers: Answers, model: str, added: dict[str, Any]
) -> None:
    record = answers.of({**CHAT, **added}, model)
    assert_refused(record, next(iter(added)))
    assert text_of(answers.of(CHAT, model)) == "abc"


@pytest.mark.parametrize("name", NULLS)
def test_a_field_that_is_null_is_absent(answers: Answers, name: str) -> None:
    assert text_of(answers.of({**CHAT, name: None})) == "abc"


def test_all_fields_may_be_null_at_once(answers: Answers) -> None:
    assert text_of(answers.of({**CHAT, **dict.fromkeys(NULLS)})) == "abc"
    assert text_of(answers.of({**TEXT, **dict.fromkeys({*NULLS, *REFUSED_OF_COMPLETIONS} - {"prompt"})})) == "bcd"
    assert text_of(answers.of(CHAT, **LINE_NULLS)) == "abc"


@pytest.mark.parametrize("name", MESSAGE_NULLS)
def test_a_field_of_a_message_that_is_null_is_absent(answers: Answers, name: str) -> None:
    record = answers.of(_with_field_of_message(name, None))
    assert prompt_tokens(record) == prompt_tokens(answers.of(_with_field_of_message("content", "d")))


@pytest.mark.parametrize("content", NOT_TEXTS, ids=json.dumps)
def test_a_content_that_is_no_text_is_refused(answers: Answers, content: Any) -> None:
    """Null in a part is not the text `None`."""
    assert_refused(answers.of({**CHAT, "messages": [{"role": "user", "content": content}]}), "content")


def test_an_image_is_refused(answers: Answers) -> None:
    body = {**CHAT, "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, IMAGE]}]}
    assert_refused(answers.of(body), "content")


@pytest.mark.parametrize(("name", "value"), _cases(REFUSED_OF_MESSAGES), ids=_ids(REFUSED_OF_MESSAGES))
def test_a_field_of_a_message_that_is_not_rendered_is_refused_by_name(answers: Answers, name: str, value: Any) -> None:
    assert_refused(answers.of(_with_field_of_message(name, value)), name)


@pytest.mark.parametrize(("name", "value"), _cases(WITHOUT_EFFECT_OF_MESSAGES), ids=_ids(WITHOUT_EFFECT_OF_MESSAGES))
def test_an_empty_field_of_a_message_is_accepted(answers: Answers, name: str, value: Any) -> None:
    record = answers.of(_with_field_of_message(name, value))
    assert prompt_tokens(record) == prompt_tokens(answers.of(_with_field_of_message("content", "d")))


@pytest.mark.parametrize(("name", "value"), [("name", "ann"), ("reasoning_content", "hm")])
def test_fields_of_messages_reach_a_template_that_has_a_place_for_them(answers: Answers, name: str, value: str) -> None:
    body = _with_field_of_message(name, value)
    assert prompt_tokens(answers.of(body)) == tokens_of_transformers(answers, "all", body)
    assert_refused(answers.of(body, "plain"), name)


@pytest.mark.parametrize("assistant", CALL_AND_CONTENT, ids=lambda one: json.dumps(one.get("content", "absent")))
def test_tool_calls_in_the_history_are_rendered_by_the_template(answers: Answers, assistant: dict[str, Any]) -> None:
    body = answered(assistant)
    plain = {**assistant, "content": assistant.get("content") or ""}
    assert prompt_tokens(answers.of(body)) == tokens_of_transformers(answers, "all", answered(plain))


@pytest.mark.parametrize("assistant", CALL_AND_CONTENT, ids=lambda one: json.dumps(one.get("content", "absent")))
def test_tool_calls_that_the_template_would_drop_are_refused(answers: Answers, assistant: dict[str, Any]) -> None:
    assert_refused(answers.of(answered(assistant), "plain"), "tool_calls")
    record = answers.of(answered(assistant), "beside null")
    if assistant.get("content"):
        assert_refused(record, "tool_calls")
    else:  # without text (absent, null or empty), the calls are rendered
        expected = tokens_of_transformers(answers, "beside null", answered({**assistant, "content": None}))
        assert prompt_tokens(record) == expected
