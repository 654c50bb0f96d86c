"""GGUF files of a model whose next token depends on the position alone.

An output may therefore contain one token several times, such as delimiters of reasoning. The model is GPT-2 with one-hot
position embeddings, token embeddings of zeros, and attention and MLP that add zero.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headrace.checkpoint import open_checkpoint
from headrace.model.tokenizer import Prompt, Tokenizer
from support.zoo.scripted import CHATML, byte_level, write_scripted

WIDTH = 256  # width of the model, and tokens of the longest text
_TOKENIZERS: dict[str, Tokenizer] = {}  # tokenizers of files written before, by their arguments


def write_says(path: Path, said: Sequence[int], prompt: Prompt, *, raw: bool = False, **options: Any) -> Path:
    """Write a model that answers this prompt with these tokens, and then with `eos` for ever.

    Args:
        path: path of the file.
        said: token ids of the answer.
        prompt: argument of `Model.generate`, with `raw`. The answer to a prompt of another length is shifted.
        options: options of `write_scripted`.
    """
    key = repr(sorted(options.items()))
    if key not in _TOKENIZERS:
        _TOKENIZERS[key] = Tokenizer(open_checkpoint(str(_write(path, {}, **options))))
    first = len(_TOKENIZERS[key].prompt(prompt, raw=raw)) - 1
    return _write(path, dict(enumerate(said, first)), **options)


def _write(path: Path, said: dict[int, int], **options: Any) -> Path:
    rows, end = len(options["tokens"]), options.get("eos") or 0
    zeros = {
        "attn_qkv": (3 * WIDTH, WIDTH), "attn_output": (WIDTH, WIDTH), "ffn_up": (64, WIDTH), "ffn_down": (WIDTH, 64),
    }  # fmt: skip
    tensors: dict[str, np.ndarray | None] = {
        f"blk.0.{name}.weight": None for name in ("attn_q", "attn_k", "attn_v", "ffn_gate")
    }
    for name, shape in zeros.items():
        tensors[f"blk.0.{name}.weight"] = np.zeros(shape, np.float32)
        tensors[f"blk.0.{name}.bias"] = np.zeros(shape[0], np.float32)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = np.ones(WIDTH, np.float32), np.zeros(WIDTH, np.float32)
    head = np.zeros((rows, WIDTH), np.float32)
    for position in range(WIDTH):
        head[said.get(position, end), position] = 1
    tensors |= {
        "token_embd.weight": np.zeros((rows, WIDTH), np.float32),
        "position_embd.weight": np.eye(WIDTH, dtype=np.float32),
        "output.weight": head,
    }
    metadata = {
        "gpt2.embedding_length": WIDTH, "gpt2.attention.layer_norm_epsilon": 1e-5,
        "gpt2.attention.layer_norm_rms_epsilon": None,
    }  # fmt: skip
    given = {**options, "metadata": {**metadata, **(options.get("metadata") or {})}, "tensors": tensors}
    return write_scripted(path, architecture="gpt2", context=WIDTH, **given)


VOCABULARY = byte_level()
NUMBER = VOCABULARY["tokens"].index
SAID = "abcdefg"


def write_alphabet(path: Path, vocabulary: dict[str, Any] = VOCABULARY) -> Path:
    """A model that says `SAID` to "hi", and ends."""
    number = vocabulary["tokens"].index
    said = [number(one) for one in SAID]
    return write_says(path, said, "hi", **vocabulary, template=CHATML, eos=number("<|im_end|>"))
