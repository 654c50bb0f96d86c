"""What a model thinks is told from what it answers, by its marks, whether or not the prompt has opened the thought."""

import pytest

from headrace.model.reasoning import AnswerStream, Marks, Part, joined

QWEN = ["<think>", "</think>"]
GPT_OSS = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>"]
WORDS = ["\n\n", " so", " it", " is", " 4", "analysis", "final", "assistant", "commentary", " to=f", "\n"]


class Spelled:
    """A decoder of tokens that are the numbers of words; marks are silent, as special tokens are."""

    def __init__(self, vocabulary: list[str]):
        self._vocabulary = vocabulary

    def step(self, token: int) -> str:
        word = self._vocabulary[token]
        return "" if word in GPT_OSS else word

    def flush(self) -> str:
        return ""


def parts(marks: list[str], said: list[str], tail: list[str], raw: bool = False) -> tuple[str, str]:
    """(answer, thought), where the template has written `tail` after the conversation."""
    vocabulary = [*marks, *WORDS, "?"]
    number = {word: i for i, word in enumerate(vocabulary)}
    found = Marks() if raw else Marks.among(lambda token: number.get(token))
    stream = AnswerStream(found, lambda: Spelled(vocabulary), [number[word] for word in tail])
    found = [segment for word in said for segment in stream.step(number[word])] + stream.flush()
    return joined(found, Part.ANSWER), joined(found, Part.REASONING)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (["?"], ["<think>", "\n\n", " so", " it", "\n\n", "</think>", "\n\n", " is", " 4"]),
        (["?", "<think>", "\n"], ["\n", " so", " it", "\n\n", "</think>", "\n\n", " is", " 4"]),
    ],
)
def test_pairs(prompt: list[str], said: list[str]) -> None:
    answer, thought = parts(QWEN, said, prompt)
    assert (answer, thought.rstrip()) == ("is 4", "so it")


def test_a_thought_that_the_prompt_has_closed_is_none() -> None:
    said = [" is", " 4"]
    assert parts(QWEN, said, ["?", "<think>", "\n\n", "</think>", "\n\n"]) == ("is 4", "")


def test_channels() -> None:
    said = ["<|channel|>", "analysis", "<|message|>", " so", " it", "<|end|>"]
    said += ["<|start|>", "assistant", "<|channel|>", "commentary", " to=f", "<|message|>", " is", "<|end|>"]
    said += ["<|start|>", "assistant", "<|channel|>", "final", "<|message|>", " it", " is", " 4"]
    assert parts(GPT_OSS, said, ["?", "<|start|>", "assistant"]) == ("it is 4", "so itis")
    assert parts(GPT_OSS, ["<|message|>", " 4"], ["<|start|>", "assistant"]) == ("4", "")


def test_a_thought_that_has_no_end_is_no_answer() -> None:
    assert parts(QWEN, ["<think>", " so", " it"], ["?"]) == ("", "so it")


def test_raw_text_and_models_without_marks_are_left_as_they_are() -> None:
    said = ["<think>", " so", "</think>", "\n\n", " 4"]
    assert parts(QWEN, said, ["?"], raw=True) == ("<think> so</think>\n\n 4", "")
    assert parts([], ["\n\n", " so", " 4"], ["?"]) == ("\n\n so 4", "")
    assert parts(["<think>"], ["<think>", " 4"], ["?"]) == ("<think> 4", "")  # half a pair
