"""Reasoning is split from the answer by the model's delimiters, also where the prompt has opened it."""

import pytest

from headrace.model.reasoning import AnswerStream, Marks, Part, joined

QWEN = ["<think>", "</think>"]
GPT_OSS = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>"]
WORDS = ["\n\n", " so", " it", " is", " 4", "analysis", "final", "assistant", "commentary", " to=f", "\n"]


class Spelled:
    """A decoder of token ids that index words; delimiters decode to nothing, like special tokens."""

    def __init__(self, vocabulary: list[str]):
        self._vocabulary = vocabulary

    def step(self, token: int) -> str:
        word = self._vocabulary[token]
        return "" if word in GPT_OSS else word

    def flush(self) -> str:
        return ""


def parts(marks: list[str], said: list[str], tail: list[str], raw: bool = False) -> tuple[str, str]:
    """(answer, reasoning), with `tail` written by the template after the conversation."""
    vocabulary = [*marks, *WORDS, "?"]
    number = {word: i for i, word in enumerate(vocabulary)}
    found = Marks() if raw else Marks.among(lambda token: number.get(token))
    stream = AnswerStream(found, lambda: Spelled(vocabulary), [number[word] for word in tail])
    found = [segment for word in said for segment in stream.step(number[word])] + stream.flush()
    return joined(found, Part.CONTENT), joined(found, Part.REASONING)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (["?"], ["<think>", "\n\n", " so", " it", "\n\n", "</think>", "\n\n", " is", " 4"]),
        (["?", "<think>", "\n"], ["\n", " so", " it", "\n\n", "</think>", "\n\n", " is", " 4"]),
    ],
)
def test_a_delimiter_pair_encloses_the_reasoning(prompt: list[str], said: list[str]) -> None:
    answer, thought = parts(QWEN, said, prompt)
    assert (answer, thought.rstrip()) == ("is 4", "so it")


def test_reasoning_closed_by_the_prompt_is_empty() -> None:
    said = [" is", " 4"]
    assert parts(QWEN, said, ["?", "<think>", "\n\n", "</think>", "\n\n"]) == ("is 4", "")


def test_gpt_oss_channels_split_reasoning_and_answer() -> None:
    said = ["<|channel|>", "analysis", "<|message|>", " so", " it", "<|end|>"]
    said += ["<|start|>", "assistant", "<|channel|>", "commentary", " to=f", "<|message|>", " is", "<|end|>"]
    said += ["<|start|>", "assistant", "<|channel|>", "final", "<|message|>", " it", " is", " 4"]
    assert parts(GPT_OSS, said, ["?", "<|start|>", "assistant"]) == ("it is 4", "so itis")
    assert parts(GPT_OSS, ["<|message|>", " 4"], ["<|start|>", "assistant"]) == ("4", "")


def test_reasoning_without_an_end_is_no_answer() -> None:
    assert parts(QWEN, ["<think>", " so", " it"], ["?"]) == ("", "so it")


def test_raw_output_and_models_without_delimiters_are_not_split() -> None:
    said = ["<think>", " so", "</think>", "\n\n", " 4"]
    assert parts(QWEN, said, ["?"], raw=True) == ("<think> so</think>\n\n 4", "")
    assert parts([], ["\n\n", " so", " 4"], ["?"]) == ("\n\n so 4", "")
    assert parts(["<think>"], ["<think>", " 4"], ["?"]) == ("<think> 4", "")  # half a pair
