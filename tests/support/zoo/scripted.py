"""GGUF files with a chosen vocabulary, of a model whose next token depends on the last token alone.

Embeddings are one-hot, attention and MLP add zero, and the output matrix says which token follows which. Every
answer is therefore known before the run, to the token.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level(
    control: Sequence[str] = ("<|im_start|>", "<|im_end|>"),
    more: Iterable[tuple[str, int]] = (),
    merges: Sequence[str] = ("h e",),
) -> dict[str, Any]:
    """A byte-level BPE vocabulary: the 256 bytes, "he", `more` as (token, type), then control tokens.

    Returns arguments of `write_scripted`.
    """
    found = [(token, NORMAL) for token in (*bytes_to_unicode().values(), "he")]
    found += [*more, *((token, CONTROL) for token in control)]
    return {"tokens": [token for token, _ in found], "types": [kind for _, kind in found], "merges": list(merges)}


def sentencepiece(
    pieces: Sequence[str], control: Sequence[str] = (), user_defined: Sequence[str] = ()
) -> dict[str, Any]:
    """A SentencePiece vocabulary: unknown, BOS, EOS, the 256 bytes, `pieces` by falling score, then the others.

    Returns arguments of `write_scripted`.
    """
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *control, *user_defined]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(pieces)]
    types += [CONTROL] * len(control) + [USER_DEFINED] * len(user_defined)
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))] + [0.0] * (len(control) + len(user_defined))
    return {
        "tokens": tokens, "types": types, "scores": scores, "model": "llama", "pre": "default", "bos": 1, "eos": 2,
        "add_bos": True,
    }  # fmt: skip


def in_turn(*tokens: int) -> dict[int, int]:
    """`follows` for a sequence: each token after the one before it."""
    return dict(pairwise(tokens))


def write_scripted(
    path: Path,
    *,
    tokens: Sequence[str],
    types: Sequence[int],
    merges: Sequence[str] | None = None,
    scores: Sequence[float] | None = None,
    model: str = "gpt2",
    pre: str | None = "qwen2",
    template: str | None = CHATML,
    bos: int | None = None,
    eos: int | None = None,
    add_bos: bool | None = False,
    follows: Mapping[int, int] | None = None,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
    architecture: str = "llama",
    context: int = 512,
    layers: int = 1,
    kind: Any = np.float32,
    rows: int | None = None,
    name: str = "scripted",
) -> Path:
    """Write a scripted model.

    Args:
        path: path of the file.
        tokens: vocabulary, with `types`, `merges` and `scores` as in GGUF.
        follows: the token that comes after a token, by their ids; the default is `eos`, or token 0.
        metadata: further keys. None leaves a key out.
        tensors: further or other tensors by name; None leaves one out.
        rows: rows of the embedding and the output matrix; the default is one for each token.
        kind: type of the matrices' elements.
    """
    rows = rows or len(tokens)
    width = -(-rows // 64) * 64
    writer = gguf.GGUFWriter(str(path), architecture)
    keys: dict[str, Any] = {
        "general.name": name,
        f"{architecture}.context_length": context,
        f"{architecture}.embedding_length": width,
        f"{architecture}.block_count": layers,
        f"{architecture}.feed_forward_length": 64,
        f"{architecture}.attention.head_count": 2,
        f"{architecture}.attention.head_count_kv": 2,
        f"{architecture}.attention.key_length": 32,
        f"{architecture}.attention.value_length": 32,
        f"{architecture}.rope.dimension_count": 32,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-6,
        f"{architecture}.vocab_size": rows,
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": bos,
        "tokenizer.ggml.eos_token_id": eos,
        "tokenizer.ggml.add_bos_token": add_bos,
        "tokenizer.chat_template": template,
        **(metadata or {}),
    }
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for key, value in keys.items():
        _add(writer, key, value)
    for tensor, values in {**_weights(rows, width, layers, follows or {}, eos or 0), **(tensors or {})}.items():
        if values is not None:
            writer.add_tensor(tensor, values if values.ndim == 1 else values.astype(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, Sequence) and not isinstance(value, str):
        writer.add_array(key, value)
        return
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    adders[type(value)](key, value)


def _weights(rows: int, width: int, layers: int, follows: Mapping[int, int], end: int) -> dict[str, np.ndarray]:
    drawn = np.random.default_rng(0)
    embedding, head = np.zeros((rows, width), np.float32), np.zeros((rows, width), np.float32)
    for token in range(rows):
        embedding[token, token] = 1
        head[follows.get(token, end), token] = 1
    found = {"token_embd.weight": embedding, "output.weight": head, "output_norm.weight": np.ones(width, np.float32)}
    for layer in range(layers):
        for norm in ("attn_norm", "ffn_norm"):
            found[f"blk.{layer}.{norm}.weight"] = np.ones(width, np.float32)
        for matrix in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up"):
            small = drawn.standard_normal((64, width)).astype(np.float32) * 0.05
            found[f"blk.{layer}.{matrix}.weight"] = small
        for matrix in ("attn_output", "ffn_down"):
            found[f"blk.{layer}.{matrix}.weight"] = np.zeros((width, 64), np.float32)
    return found
