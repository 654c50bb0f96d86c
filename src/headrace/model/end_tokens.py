"""Tokens that end an answer, by their texts in published models; metadata often names only one of them."""

from collections.abc import Callable

END_TOKENS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<turn|>",
    "<|tool_response>",  # the caller supplies the tool's response
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001 (as DeepSeek spells it)
    "</s>",
    "<eos>",
    "[EOS]",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[e~[",
    # After these, code models start another file.
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)
# Delimiters of gpt-oss's messages; `<|end|>` is one if it ends only one message of several.
MESSAGE_MARKS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>")
_MESSAGE_END = "<|end|>"
_RETURN, _CALLS, _FLUSH = "<|return|>", ("<|call|>", "<|calls|>"), "<|flush|>"


def find_end_tokens(exists: Callable[[str], bool]) -> tuple[list[str], list[str]]:
    """(tokens that end an answer, tokens that mark a message's parts) among a model's tokens."""
    ends = [token for token in END_TOKENS if exists(token)]
    marks = [token for token in MESSAGE_MARKS if exists(token)]
    if _MESSAGE_END in ends and any(map(exists, _CALLS)) and (exists(_RETURN) or exists(_FLUSH)):
        ends.remove(_MESSAGE_END)
        marks.append(_MESSAGE_END)
    if "<|tool_response>" in ends and "</s>" in ends:  # Gemma 4 uses `</s>` as ordinary text
        ends.remove("</s>")
    return ends, marks
