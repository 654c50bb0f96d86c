"""Perplexity of a text, ours beside llama.cpp's, over the same windows.

    python benchmarks/perplexity.py MODEL.gguf [--llama DIR] [--text FILE] [--memory 4GiB]

As llama-perplexity counts: windows of 512 tokens, the second half of each is scored. Ours is computed twice: in one pass per
window (the kernels of a prefill) and row by row in steps of 16 (those of decoding).
"""

import argparse
import math
import re
import subprocess
from pathlib import Path

import torch

import headrace
from headrace.engine import Rows
from headrace.kernels import DECODE_MAX_ROWS

WINDOW = 512


def perplexity(model: headrace.Model, tokens: list[int], rows_per_step: int, kv_bits: int = 16) -> float:
    """exp of the mean negative log-likelihood of the scored tokens."""
    engine, bos = model._engine, model.tokenizer.bos_id
    total, count = 0.0, 0
    for start in range(0, len(tokens) - WINDOW + 1, WINDOW):
        window = tokens[start : start + WINDOW]
        if bos is not None and model.tokenizer.adds_bos:
            window = [bos, *window[1:]]
        cache = engine.new_cache(WINDOW, kv_bits)
        logits = torch.cat(
            [
                engine.step([Rows(cache=cache, tokens=part, logits=len(part))])
                for part in (window[i : i + rows_per_step] for i in range(0, WINDOW, rows_per_step))
            ]
        )
        scored = range(WINDOW // 2, WINDOW - 1)
        chosen = logits[list(scored)].log_softmax(-1).gather(1, torch.tensor([[window[i + 1]] for i in scored]))
        total -= float(chosen.double().sum())
        count += len(scored)
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama", type=Path, default=Path.home() / ".cache/headrace/llama.cpp/bin")
    parser.add_argument("--text", type=Path, default=Path(__file__).parent / "text.txt")
    parser.add_argument("--memory", default="8GiB")
    arguments = parser.parse_args()
    with headrace.load(
        str(arguments.model), memory=arguments.memory, context_tokens=WINDOW, prompt_tokens=WINDOW, draft="none"
    ) as model:
        tokens = model.tokenizer.encode(arguments.text.read_text())
        print(f"{arguments.model.name}, {len(tokens) // WINDOW} windows of {WINDOW} tokens")
        ours = perplexity(model, tokens, WINDOW)
        decode = perplexity(model, tokens, DECODE_MAX_ROWS)
        kv8 = perplexity(model, tokens, WINDOW, kv_bits=8)
    command = [
        arguments.llama / "llama-perplexity",
        "-m",
        arguments.model,
        "-f",
        arguments.text,
        "-c",
        str(WINDOW),
        "--no-repack",
    ]
    output = subprocess.run(command, capture_output=True, text=True, check=True)
    match = re.search(r"PPL = ([\d.]+)", output.stdout + output.stderr)
    assert match is not None, output.stderr[-500:]
    theirs = float(match.group(1))
    print(
        f"one pass per window {ours:.4f} ({ours / theirs - 1:+.2%}),"
        f" steps of {DECODE_MAX_ROWS} rows {decode:.4f} ({decode / theirs - 1:+.2%})"
    )
    print(f"one pass per window, KV cache in 8 bits {kv8:.4f} ({kv8 / ours - 1:+.2%} of that in 16)")
    print(f"llama.cpp {theirs:.4f}")


if __name__ == "__main__":
    main()
