"""Answers end without losing text: stop strings with control tokens, characters split over tokens."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from transformers.convert_slow_tokenizer import bytes_to_unicode

import headrace
from headrace.cli import main
from headrace.plan import Profile
from headrace.plan.profile import save_profile
from support.zoo.by_position import write_says
from support.zoo.scripted import CHATML, NORMAL, USER_DEFINED, byte_level

pytestmark = pytest.mark.zoo

GREEDY = headrace.SamplingParams(temperature=0)


def spelled(data: bytes) -> str:
    """The spelling of these bytes in byte-level vocabularies."""
    return "".join(bytes_to_unicode()[byte] for byte in data)


# Tokens as in Qwen and o200k: one whole character and the first bytes of the next.
XUAN_AND_2 = spelled("选".encode() + "择".encode()[:2])
REST = spelled("择".encode()[2:])
SPACE_AND_1 = spelled(b" " + "é".encode()[:1])
TWO_AND_3 = spelled(b"ab" + "🙂".encode()[:3])
UNKNOWN = spelled("\N{REPLACEMENT CHARACTER}".encode())  # a regular character, which a model may write
INVALID = spelled(b"\x80")
ANSWERING = "A" + spelled(b"\n")  # text on both sides of a line's end
VOCABULARY = byte_level(
    ["<|im_start|>", "<|im_end|>", "<|custom|>"],
    more=[
        *((one, NORMAL) for one in (XUAN_AND_2, SPACE_AND_1, TWO_AND_3, UNKNOWN, ANSWERING)),
        *((one, USER_DEFINED) for one in ("<marker>", "<think>", "</think>")),
    ],
)
NUMBER = VOCABULARY["tokens"].index

Says = Callable[..., headrace.Completion]


@contextmanager
def model_that_says(
    path: Path, profile: Profile, said: Sequence[str], prompt: Any = "hi", raw: bool = False, **options: Any
) -> Iterator[headrace.Model]:
    write_says(
        path, [NUMBER(one) for one in said], prompt, raw=raw, **VOCABULARY, template=CHATML, eos=NUMBER("<|im_end|>")
    )
    given = {"memory": "4GiB", "context_tokens": 128, "draft": None, "profile": profile, **options}
    with headrace.load(path, **given) as model:
        yield model


@pytest.fixture
def says(tmp_path: Path, profile: Profile) -> Says:
    """The answer of a model that writes these tokens and then ends its turn."""

    def answer(said: Sequence[str], *, draft: str | None = None, **options: Any) -> headrace.Completion:
        raw = bool(options.get("raw"))
        with model_that_says(tmp_path / "m.gguf", profile, said, raw=raw, draft=draft) as model:
            return model.generate("hi", sampling=GREEDY, **{"max_tokens": 20, **options})

    return answer


# -- stop strings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft", [None, "prompt"])
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("stop", ["<|custom|>", "<marker>"])
def test_a_control_or_user_defined_token_given_as_stop_string_ends_the_answer(
    says: Says, stop: str, raw: bool, draft: str | None
) -> None:
    answer = says(["h", "i", stop, "x", "y"], stop=stop, raw=raw, draft=draft)
    assert (answer.text, answer.finish_reason, answer.completion_tokens) == ("hi", "stop", 3)


@pytest.mark.parametrize(
    ("said", "stop"),
    [
        (["h", "i", "<|custom|>", "x", "y", "h"], ["<|custom|>x"]),
        (["h", "i", "<|custom|>", "x", "y", "h"], ["<|custom|>xy"]),
        (["h", "i", "<|custom|>", "x", "y", "h"], ["never", "<|custom|>xy"]),
        (["h", "i", "x", "<|custom|>", "y", "h"], ["x<|custom|>"]),
        (["h", "i", "x", "<|custom|>", "y", "h"], ["x<|custom|>y"]),
        (["h", "i", "<|custom|>", "<|custom|>", "y"], ["<|custom|><|custom|>"]),
        (["h", "i", "<marker>", "<|custom|>", "y"], ["<marker><|custom|>"]),
        (["h", "i", "<|custom|>", "A", spelled(b"\n"), "y"], ["<|custom|>A\n"]),
        (["h", "i", "x", "<|im_end|>"], ["x<|im_end|>"]),  # the end of a turn completes the stop string
        (["h", "i", "<|im_end|>"], ["<|im_end|>\n"]),
    ],
)
def test_control_tokens_and_text_make_one_stop_string(says: Says, said: list[str], stop: list[str]) -> None:
    answer = says(said, stop=stop)
    assert (answer.text, answer.finish_reason) == ("hi", "stop")


@pytest.mark.parametrize(
    ("said", "right"),
    [
        (
            ["h", "i", "<|custom|>", "y", "h"],
            "hiyh",
        ),  # the control token starts the stop string, the text does not continue it
        (["h", "i", "<|custom|>", "<|custom|>", "y"], "hiy"),
        (["h", "x", "i", "<|custom|>"], "hxi"),
        (["h", "i", "<|custom|>"], "hi"),
    ],
)
def test_a_control_token_that_only_begins_a_stop_string_is_not_shown_and_hides_nothing(
    says: Says, said: list[str], right: str
) -> None:
    answer = says(said, stop="<|custom|>x")
    assert (answer.text, answer.finish_reason) == (right, "stop")  # the end of the turn


def test_text_that_spells_a_control_token_matches_as_text(says: Says) -> None:
    assert says(["h", *"<|custom|>", "x"], stop="<|custom|>").text == "h"


@pytest.mark.parametrize("stop", ["<|custom|>", "</think>", "<|custom|>b"])
def test_a_control_token_stops_within_the_reasoning_too(says: Says, stop: str) -> None:
    said = ["<think>", "a", *([stop] if stop in VOCABULARY["tokens"] else ["<|custom|>", "b"]), "c", "</think>", "h"]
    answer = says(said, stop=stop)
    assert (answer.text, answer.reasoning, answer.finish_reason) == ("", "a", "stop")


def test_a_stop_token_that_opens_the_reasoning_ends_the_answer(says: Says) -> None:
    answer = says(["h", "<think>", "a", "</think>", "i"], stop="<think>")
    assert (answer.text, answer.reasoning, answer.finish_reason) == ("h", "", "stop")


def test_stop_tokens_end_each_answer_of_a_batch_for_itself(tmp_path: Path, profile: Profile) -> None:
    with model_that_says(
        tmp_path / "m.gguf", profile, ["h", "i", "<|custom|>", "x"], prompt="hi", sequences=2
    ) as model:
        answers = model.generate(["hi", "ho"], sampling=GREEDY, max_tokens=9, stop="<|custom|>")
    assert [(one.text, one.finish_reason) for one in answers] == [("hi", "stop")] * 2


def test_stop_tokens_on_the_command_line(tmp_path: Path, profile: Profile) -> None:
    save_profile(profile)
    path = tmp_path / "m.gguf"
    with model_that_says(path, profile, ["h", "i", "<|custom|>", "x"]):
        pass
    arguments = ["run", str(path), "hi", "-t", "0", "-n", "9", "--stop", "<|custom|>", "--memory", "4GiB", "-q"]
    assert CliRunner().invoke(main, arguments).stdout == "hi\n"


# -- characters split over tokens ---------------------------------------------------------------------------------------

# The whole characters of the bytes. The rest of a split one may be shown as U+FFFD, as llama.cpp and transformers do.
CUT = [
    ([XUAN_AND_2], "选"),
    (["a", SPACE_AND_1], "a "),
    ([TWO_AND_3], "ab"),
    (["h", XUAN_AND_2, REST, XUAN_AND_2], "h选择选"),
    ([XUAN_AND_2, XUAN_AND_2], "选\N{REPLACEMENT CHARACTER}选"),
]


def whole(text: str) -> str:
    return text.rstrip("\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize("draft", [None, "prompt"])
@pytest.mark.parametrize(("said", "right"), CUT)
def test_whole_characters_are_shown_where_the_length_ends_an_answer(
    says: Says, said: list[str], right: str, draft: str | None
) -> None:
    answer = says(said, max_tokens=len(said), draft=draft)
    assert (whole(answer.text), answer.finish_reason) == (right, "length")


@pytest.mark.parametrize(("said", "right"), CUT)
def test_whole_characters_are_shown_where_the_model_ends_its_answer(says: Says, said: list[str], right: str) -> None:
    answer = says(said)
    assert (whole(answer.text), answer.finish_reason) == (right, "stop")
    assert whole(says(said, raw=True).text) == right


@pytest.mark.parametrize("stop", ["<|custom|>", "x", "<|custom|>x"])
def test_whole_characters_are_shown_before_a_stop_string(says: Says, stop: str) -> None:
    answer = says(["a", XUAN_AND_2, *(["x"] if stop == "x" else ["<|custom|>", "x"]), "y"], stop=stop)
    assert (whole(answer.text), answer.finish_reason) == ("a选", "stop")


def test_whole_characters_that_come_last_are_looked_at_for_stop_strings(says: Says) -> None:
    for stop in ("选", "a选"):
        answer = says(["h", "a", XUAN_AND_2], stop=stop, max_tokens=3)
        assert (answer.text, answer.finish_reason) == ("ha" if stop == "选" else "h", "stop")


def test_text_held_for_a_stop_string_is_shown_with_the_last_characters(says: Says) -> None:
    answer = says(["h", "a", XUAN_AND_2], stop="a选x", max_tokens=3)
    assert (whole(answer.text), answer.finish_reason) == ("ha选", "length")


@pytest.mark.parametrize("most", [3, 20])
def test_whole_characters_are_kept_where_the_reasoning_ends(says: Says, most: int) -> None:
    answer = says(["<think>", "a", XUAN_AND_2, "</think>", "h"], max_tokens=most)
    assert whole(answer.reasoning) == "a选"
    assert answer.text == ("h" if most > 3 else "")


def test_whole_characters_are_kept_where_the_reasoning_begins(says: Says) -> None:
    answer = says(["a", XUAN_AND_2, "<think>", "b", "</think>", "h"])
    assert (answer.text.replace("\N{REPLACEMENT CHARACTER}", ""), answer.reasoning) == ("a选h", "b")


def test_a_replacement_character_that_the_model_writes_is_shown(says: Says) -> None:
    assert says(["a", UNKNOWN]).text == "a\N{REPLACEMENT CHARACTER}"
    assert says(["a", UNKNOWN, "b"]).text == "a\N{REPLACEMENT CHARACTER}b"


@pytest.mark.parametrize("invalid", [[INVALID], [INVALID] * 5, [SPACE_AND_1], [XUAN_AND_2, INVALID, INVALID]])
def test_bytes_that_are_no_character_lose_nothing_around_them(says: Says, invalid: list[str]) -> None:
    answer = says(["h", *invalid, "i", "j"])
    # In the last case, one byte completes the started character: E6 8B 80.
    right = "hij" if invalid[0] == INVALID else ("h ij" if invalid[0] == SPACE_AND_1 else "h选拀ij")
    assert answer.text.replace("\N{REPLACEMENT CHARACTER}", "") == right


def test_whole_characters_are_shown_in_the_last_piece_of_each_answer_of_a_batch(
    tmp_path: Path, profile: Profile
) -> None:
    with model_that_says(tmp_path / "m.gguf", profile, ["h", XUAN_AND_2], sequences=2) as model:
        answers = model.generate(["hi", "ho"], sampling=GREEDY, max_tokens=2)
    assert [(whole(one.text), one.finish_reason) for one in answers] == [("h选", "length")] * 2


def test_whole_characters_are_shown_where_the_context_is_full(tmp_path: Path, profile: Profile) -> None:
    with model_that_says(tmp_path / "m.gguf", profile, ["h", XUAN_AND_2]) as model:
        context = len(model.encode("hi")) + 2
    with headrace.load(
        tmp_path / "m.gguf", memory="4GiB", context_tokens=context, draft=None, profile=profile
    ) as model:
        answer = model.generate("hi", sampling=GREEDY)
    assert (whole(answer.text), answer.finish_reason) == ("h选", "length")
