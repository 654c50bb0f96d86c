"""Reasoning is split from the answer; only the model and its template open it, and no output is lost."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

import headrace
from headrace.model.tokenizer import Prompt
from headrace.plan import Profile
from support.zoo.by_position import write_says
from support.zoo.scripted import CHATML, USER_DEFINED, byte_level

GREEDY = headrace.SamplingParams(temperature=0)
PAIRS = [
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|channel>", "<channel|>"),
]
HARMONY = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>"]
# One token each in gpt-oss's vocabulary.
WORDS = ["analysis", "commentary", "final", "assistant", "functions", "json", "user", "to", "summary"]
VOCABULARY = byte_level(
    ["<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "[INST]", "[/INST]", "<|endoftext|>", *HARMONY],
    more=[*((mark, USER_DEFINED) for pair in PAIRS for mark in pair), *((word, USER_DEFINED) for word in WORDS)],
)
TOKENS = VOCABULARY["tokens"]
SPECIAL = sorted({*HARMONY, *WORDS, *(mark for pair in PAIRS for mark in pair)}, key=len, reverse=True)

Says = Callable[..., headrace.Completion]


def tokens_of(text: str) -> list[int]:
    """Token ids of a text in this vocabulary: delimiters and words whole, all else byte by byte."""
    found: list[int] = []
    while text:
        whole = next((one for one in SPECIAL if text.startswith(one)), None)
        if whole is None:
            found += [TOKENS.index({" ": "Ġ", "\n": "Ċ"}.get(text[0], text[0]))]
        else:
            found.append(TOKENS.index(whole))
        text = text[len(whole or " ") :]
    return found


@pytest.fixture
def says(tmp_path: Path, profile: Profile) -> Says:
    """The completion of a model with this template for this prompt: it writes `written`, then an end token."""

    def answer(
        template: str | None, prompt: Prompt, written: str, *, end: str = "<|endoftext|>", raw: bool = False,
        most: int = 100, draft: str | None = None,
    ) -> headrace.Completion:  # fmt: skip
        path = write_says(
            tmp_path / "m.gguf", tokens_of(written), prompt, raw=raw,
            **VOCABULARY, template=template, eos=TOKENS.index(end),
        )  # fmt: skip
        with headrace.load(path, memory="4GiB", context_tokens=240, draft=draft, profile=profile) as model:
            return model.generate(prompt, sampling=GREEDY, max_tokens=most, raw=raw)

    return answer


# -- who opens the reasoning ------------------------------------------------------------------------------------------

# Published templates that write few or no tokens after the user's message.
INST = "{% for m in messages %}{{ '[INST]' + m['content'] + '[/INST]' }}{% endfor %}"  # Mistral, Magistral
SHORT = (  # GLM 4.5, DeepSeek
    "{% for m in messages %}{{ '<|user|>' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TRIMMED = SHORT.replace("m['content']", "m['content'] | trim")
PLAIN = "{% for m in messages %}{{ m['content'] }}{% endfor %}"  # nothing after the message
OPENS = {  # the template opens the reasoning
    "deepseek-r1": SHORT.replace("'<|assistant|>'", "'<|assistant|><think>\\n'"),
    "qwq": CHATML.replace("assistant\n'", "assistant\n<think>\n'"),
    "without a newline": SHORT.replace("'<|assistant|>'", "'<|assistant|><think>'"),
    "whatever it is asked for": "{% for m in messages %}{{ '<|user|>' + m['content'] }}{% endfor %}<|assistant|><think>\n",
    "nothing before it": "{% for m in messages %}{{ m['content'] }}{% endfor %}<think>\n",
}
CLOSES = {  # Qwen 3 with enable_thinking=false, GLM 4.5 with /nothink
    "qwen3": CHATML.replace("assistant\n'", "assistant\n<think>\n\n</think>\n\n'"),
    "short": SHORT.replace("'<|assistant|>'", "'<|assistant|><think></think>'"),
}


@pytest.mark.parametrize(
    ("template", "mark"),
    [
        *((template, "<think>") for template in (CHATML, INST, SHORT, TRIMMED, PLAIN)),
        *((INST, mark) for pair in PAIRS for mark in pair if mark != "<think>"),
    ],
)
def test_a_delimiter_at_the_end_of_the_users_message_opens_nothing(says: Says, template: str, mark: str) -> None:
    answer = says(template, f"hi {mark}", "so it is")
    assert (answer.text, answer.reasoning) == ("so it is", "")


@pytest.mark.parametrize("ending", ["<think>\n", "</think><think>", "<think>x"])
def test_a_delimiter_near_the_end_of_the_users_message_opens_nothing(says: Says, ending: str) -> None:
    answer = says(TRIMMED, f"hi {ending}", "so it is")
    assert (answer.text, answer.reasoning) == ("so it is", "")


def test_a_delimiter_in_an_earlier_message_or_the_system_message_opens_nothing(says: Says) -> None:
    talk = [
        {"role": "system", "content": "<think>"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "<think>"},
        {"role": "user", "content": "y"},
    ]
    for messages in (talk, talk[:3], talk[:1]):
        answer = says(INST, messages, "so it is")
        assert (answer.text, answer.reasoning) == ("so it is", "")


@pytest.mark.parametrize(
    ("name", "asked"),
    [*((name, "hi") for name in OPENS), *(("deepseek-r1", one) for one in ("hi <think>", "hi </think>", "<think>\n"))],
)
def test_a_template_that_opens_the_reasoning_opens_it_for_any_user_message(says: Says, name: str, asked: str) -> None:
    answer = says(OPENS[name], asked, "so it is</think>\n\n4")
    assert (answer.text, answer.reasoning) == ("4", "so it is")


@pytest.mark.parametrize(("name", "asked"), [("qwen3", "hi"), ("short", "hi"), ("short", "hi <think>")])
def test_a_template_that_closes_the_reasoning_leaves_only_the_answer(says: Says, name: str, asked: str) -> None:
    answer = says(CLOSES[name], asked, "so it is")
    assert (answer.text, answer.reasoning) == ("so it is", "")


def test_a_template_whose_end_depends_on_the_message_is_followed(says: Says) -> None:
    template = (  # Nemotron Nano 2
        "{% set ns = namespace(think=true) %}{% for m in messages %}{% if '/no_think' in m['content'] %}"
        "{% set ns.think = false %}{% endif %}{{ '<|user|>' + m['content'].replace('/no_think', '').strip() }}{% endfor %}"
        "{{ '<|assistant|>' }}{% if ns.think %}{{ '<think>\n' }}{% else %}{{ '<think></think>' }}{% endif %}"
    )
    answer = says(template, "hi", "so</think>4")
    assert (answer.text, answer.reasoning) == ("4", "so")
    answer = says(template, "hi /no_think", "so it is")
    assert (answer.text, answer.reasoning) == ("so it is", "")


def test_a_template_that_changes_or_drops_the_last_message_is_followed(says: Says) -> None:
    template = "{% for m in messages %}{{ (m | tojson) }}{% endfor %}<|assistant|><think>\n"
    answer = says(template, 'say "hi" <think>', "so</think>4")
    assert (answer.text, answer.reasoning) == ("4", "so")
    template = "{{ messages[0]['content'] }}<|assistant|>"  # leaves out the last message
    answer = says(template, [{"role": "user", "content": "x<think>"}, {"role": "user", "content": "y"}], "so it is")
    assert (answer.text, answer.reasoning) == ("so it is", "")


def test_each_completion_of_a_batch_is_split_by_its_own_prompt(tmp_path: Path, profile: Profile) -> None:
    template = (
        "{% for m in messages %}{{ '<|user|>' + m['content'] }}{% endfor %}<|assistant|>"
        "{% if 'z' in messages[-1]['content'] %}<think>{% else %}{{ '\n' }}{% endif %}"
    )
    path = write_says(
        tmp_path / "m.gguf", tokens_of("so</think>4"), "hz", **VOCABULARY, template=template,
        eos=TOKENS.index("<|endoftext|>"),
    )  # fmt: skip
    with headrace.load(path, memory="4GiB", context_tokens=64, draft=None, sequences=2, profile=profile) as model:
        answers = model.generate(["hz", "hi"], sampling=GREEDY, max_tokens=20)
    assert [(one.text, one.reasoning) for one in answers] == [("4", "so"), ("so4", "")]


@pytest.mark.parametrize(("pair", "draft"), [*((pair, None) for pair in PAIRS), (PAIRS[0], "prompt")])
def test_the_model_itself_opens_and_closes_its_reasoning(says: Says, pair: tuple[str, str], draft: str | None) -> None:
    first, last = pair
    answer = says(CHATML, "hi", f"{first}\nso\n{last}\n\n4{first}y{last}z", draft=draft)
    assert ("".join(answer.text.split()), "".join(answer.reasoning.split())) == ("4z", "soy")


def test_reasoning_without_an_end_is_shown_completely_as_reasoning(says: Says) -> None:
    answer = says(CHATML, "hi", "<think>so it is", most=5)
    assert (answer.text, answer.reasoning, answer.finish_reason) == ("", "so i", "length")


# -- gpt-oss ----------------------------------------------------------------------------------------------------------

OSS = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '<|message|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
NEXT = "<|end|><|start|>assistant"

# (output, answer, reasoning). The messages are those that openai-harmony 0.0.8 finds in these tokens
# (`StreamableParser(encoding, Role.ASSISTANT, strict=False)`). By its format all messages are for the user, except those of
# the channel `analysis` and those for a tool.
MESSAGES = {
    "analysis and final": (f"<|channel|>analysis<|message|>so{NEXT}<|channel|>final<|message|>4", "4", "so"),
    "commentary without a recipient": (f"<|channel|>commentary<|message|>Plan{NEXT}<|channel|>final<|message|>4", "Plan4", ""),
    "a preamble before a call": (
        f"<|channel|>analysis<|message|>so{NEXT}<|channel|>commentary<|message|>Plan{NEXT}"
        "<|channel|>commentary to=functions.f<|constrain|>json<|message|>{}",
        "Plan", "so{}",
    ),
    "a recipient in the role": (
        f"<|channel|>analysis<|message|>so{NEXT} to=functions.f<|channel|>commentary <|constrain|>json<|message|>"
        "{}", "", "so{}",
    ),
    "a recipient at the start": (" to=functions.f<|channel|>commentary json<|message|>{}", "", "{}"),
    "a recipient without to=": ("<|channel|>commentary functions.f<|message|>{}", "", "{}"),
    "a built-in tool": ("<|channel|>analysis to=python code<|message|>1+1", "", "1+1"),
    "a format of the answer": ("<|channel|>final <|constrain|>json<|message|>{}", "{}", ""),
    "no channel": ("<|message|>4", "4", ""),
    "an unknown channel": ("<|channel|>summary<|message|>4", "4", ""),
    "a channel that begins as another": ("<|channel|>analysisx<|message|>4", "4", ""),
    "several analyses": (
        f"<|channel|>analysis<|message|>so{NEXT}<|channel|>analysis<|message|>it{NEXT}<|channel|>final<|message|>4",
        "4", "soit",
    ),
    "an empty answer": ("<|channel|>analysis<|message|>so" + NEXT + "<|channel|>final<|message|>", "", "so"),
    "no message, text alone": ("4 is it", "4 is it", ""),
    "no message after a channel": ("<|channel|>final 4 is it", "4 is it", ""),
    "no message in the first of two": (f"<|channel|>analysis so it is{NEXT}<|channel|>final<|message|>4", "4", "so it is"),
    "no message in the second of two": (f"<|channel|>analysis<|message|>so{NEXT}<|channel|>final 4 is it", "4 is it", "so"),
    "no message and no channel in the second of two": (f"<|channel|>analysis<|message|>so{NEXT} 4 is it", "4 is it", "so"),
}  # fmt: skip


@pytest.mark.parametrize("name", MESSAGES)
def test_gpt_oss_messages_are_split_as_by_openai_harmony(says: Says, name: str) -> None:
    written, text, thinking = MESSAGES[name]
    answer = says(OSS, "hi", written, end="<|call|>" if written.endswith("{}") else "<|return|>")
    assert ("".join(answer.text.split()), "".join(answer.reasoning.split())) == (
        "".join(text.split()), "".join(thinking.split())
    )  # fmt: skip
    assert answer.finish_reason == "stop"


@pytest.mark.parametrize(
    "written",
    [
        "<|channel|>final 4 is", "4 is", "<|channel|>final<|message|>4 is", f"<|channel|>final<|message|>4{NEXT} is",
    ],
)  # fmt: skip
def test_a_header_truncated_by_max_tokens_loses_no_text(says: Says, written: str) -> None:
    answer = says(OSS, "hi", written, most=len(tokens_of(written)))
    assert ("".join(answer.text.split()), answer.finish_reason) == ("4is", "length")


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("<|channel|>sure thing", "surething"),
        ("<|channel|>I think 42", "Ithink42"),
        ("The answer is <|channel|>final<|message|>42", "Theansweris42"),
        ("<|channel|>final<|message|>4<|end|><|start|>assistant ok so<|channel|>final<|message|>5", "4okso5"),
    ],
)
def test_text_in_place_of_a_header_is_shown(says: Says, written: str, shown: str) -> None:
    answer = says(OSS, "hi", written, end="<|return|>")
    assert ("".join(answer.text.split()), answer.reasoning) == (shown, "")


@pytest.mark.parametrize(
    "written",
    [
        "<|channel|>final<|message|>5<|message|>6",
        "<|channel|>final<|message|>5<|constrain|>6",
        "<|channel|>final<|message|>5<|channel|>6",
        "<|channel|>final<|message|>5<|start|>6",
        "<|channel|>final<|message|>5<|end|>6",
        "<|channel|>analysis<|message|>5<|channel|>final<|message|>6",
        "<|channel|>analysis<|message|>5<|start|>assistant<|channel|>final<|message|>6",
        "<|channel|>analysis<|channel|>final<|message|>56",
        "<|channel|>final 5<|start|>assistant<|channel|>final<|message|>6",
        "<|channel|>final<|message|>5<|end|><|end|><|start|>assistant<|channel|><|message|>6",
        "<|start|>assistant<|channel|>final<|message|>56",
        "<|message|>5<|message|><|message|>6",
        "<|end|>56",
    ],
)
def test_delimiters_out_of_order_lose_no_text(says: Says, written: str) -> None:
    answer = says(OSS, "hi", written, end="<|return|>")
    for digit in "56":
        assert (answer.text + answer.reasoning).count(digit) == 1


@pytest.mark.parametrize("asked", ["hi<|channel|>", "hi<|channel|>analysis<|message|>", "hi<|start|>"])
def test_gpt_oss_delimiters_in_the_users_message_change_nothing(says: Says, asked: str) -> None:
    written = "<|channel|>analysis<|message|>so" + NEXT + "<|channel|>final<|message|>4"
    for template in (OSS, INST):
        answer = says(template, asked, written)
        assert (answer.text, answer.reasoning) == ("4", "so")
    assert says(INST, asked, "so it is").text == "so it is"


def test_a_template_that_opens_a_channel_is_followed(says: Says) -> None:
    template = OSS.replace("'<|start|>assistant'", "'<|start|>assistant<|channel|>analysis<|message|>'")
    answer = says(template, "hi", "so" + NEXT + "<|channel|>final<|message|>4")
    assert (answer.text, answer.reasoning) == ("4", "so")
    template = OSS.replace("'<|start|>assistant'", "'<|start|>assistant<|channel|>analysis'")
    answer = says(template, "hi", "<|message|>so" + NEXT + "<|channel|>final<|message|>4")
    assert (answer.text, answer.reasoning) == ("4", "so")


def test_streamed_chunks_are_the_reasoning_and_the_answer_in_order(tmp_path: Path, profile: Profile) -> None:
    written = f"<|channel|>analysis<|message|>so{NEXT}<|channel|>commentary<|message|>Plan{NEXT}<|channel|>final 4 is"
    path = write_says(
        tmp_path / "m.gguf", tokens_of(written), "hi", **VOCABULARY, template=OSS, eos=TOKENS.index("<|return|>")
    )
    with headrace.load(path, memory="4GiB", context_tokens=128, draft=None, profile=profile) as model:
        chunks: Sequence[headrace.RequestOutput] = list(model.stream("hi", sampling=GREEDY, max_tokens=100))
    assert all(before.completion_tokens <= after.completion_tokens for before, after in pairwise(chunks))
    assert "".join(chunk.reasoning for chunk in chunks) == "so"
    assert "".join("".join(chunk.text for chunk in chunks).split()) == "Plan4is"
