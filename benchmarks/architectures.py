"""Perplexity of tiny random GGUF files of every architecture, headrace beside llama.cpp: both must agree on a file.

    python benchmarks/architectures.py [--llama DIR] [ARCHITECTURE ...]

The files are those of the tests (tests/support/zoo/gguf_files.py), written in fp32 as llama.cpp's converter would write
the model. The tests compare them with the transformers model behind them, which cannot show mistakes of the writer;
llama.cpp can. Two windows of 128 tokens of which the second half is scored, all in fp32.
"""

import argparse
import math
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from headrace.checkpoint import open_checkpoint
from headrace.engine import Engine, Rows
from headrace.engine.model_weights import StreamOptions
from headrace.kernels import Kernels
from headrace.model import Tokenizer
from support.zoo.gguf_files import FAMILIES, Family, random_model, write_gguf  # type: ignore[import-not-found]

WINDOW, WINDOWS = 128, 2
# (config, metadata) that llama.cpp requires, or the only variant it supports; the test's file differs there.
AS_LLAMA_CPP_WANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **dict.fromkeys(
        ("qwen35", "qwen35moe", "qwen3next"), ({"linear_value_head_dim": 16}, {"ssm.inner_size": 96})
    ),  # K and V of one width
    **dict.fromkeys(("olmoe", "dots1"), ({"num_key_value_heads": 4}, {})),  # a KV head for each query head
    "gemma4-31b": ({"final_logit_softcapping": 30.0}, {"final_logit_softcapping": 30.0}),  # its default
    "gemma4-unified": ({"final_logit_softcapping": 30.0}, {"final_logit_softcapping": 30.0}),
    "command-r": ({"use_qk_norm": False}, {}),  # query norms only from 64 layers on
    "phi3": ({"sliding_window": None}, {"attention.sliding_window": 0}),  # it ignores the window
    "olmo3": ({}, {"rope.scaling.yarn_attn_factor": 0.1 * math.log(8) + 1}),  # by the formula, whatever the file says
}


def wanted(name: str) -> Family:
    """The family of a tiny file, changed where llama.cpp would refuse it."""
    family = FAMILIES[name]
    config, metadata = AS_LLAMA_CPP_WANTS.get(name, ({}, {}))
    config = family.config | config
    if name == "olmo3":
        rope = config["rope_parameters"]
        full = rope["full_attention"] | {"attention_factor": metadata["rope.scaling.yarn_attn_factor"]}
        config = config | {"rope_parameters": rope | {"full_attention": full}}
    return replace(family, config=config, metadata=family.metadata | metadata)


def ours(path: Path, text: str) -> float:
    """exp of the mean negative log-likelihood of the scored tokens."""
    checkpoint = open_checkpoint(path)
    tokens = Tokenizer(checkpoint).encode(text)
    pinned = {tensor.name: tensor.rows for tensor in checkpoint.tensors.values()}
    options = StreamOptions(pinned_rows=pinned, unit_bytes=16 << 10, slots=3, readers=1, expert_slots=64)
    found = []
    with Engine(checkpoint, options, Kernels(2, bf16_prefill=False)) as engine:
        for start in range(0, WINDOWS * WINDOW, WINDOW):
            window = tokens[start : start + WINDOW]
            rows = Rows(cache=engine.new_cache(WINDOW, 32), tokens=window, logits=WINDOW)
            likely = engine.step([rows]).log_softmax(-1)
            scored = torch.arange(WINDOW // 2, WINDOW - 1)
            found.append(likely[scored, torch.tensor(window)[scored + 1]])
    return math.exp(-float(torch.cat(found).double().mean()))


def theirs(path: Path, text: Path, llama: Path) -> float | str:
    """llama-perplexity's result, or the reason why there is none."""
    command = [str(llama / "llama-perplexity"), "-m", str(path), "-f", str(text), "-c", str(WINDOW), "-b", str(WINDOW)]
    command += ["--chunks", str(WINDOWS), "-t", "2", "--no-repack", "-ctk", "f32", "-ctv", "f32", "-fa", "off"]
    for _ in range(3):  # now and then it ends before its last line is out
        result = subprocess.run(command, capture_output=True, text=True)
        said = result.stdout + result.stderr
        match = re.search(r"Final estimate: PPL = ([0-9.]+)", said)
        if match is not None:
            return float(match[1])
    wrong = [line for line in said.splitlines() if "error loading model:" in line or "GGML_ASSERT" in line]
    return wrong[0].rpartition("error loading model:")[2].strip()[:100] if wrong else f"ended with {result.returncode}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="*", metavar="ARCHITECTURE", help=", ".join(sorted(FAMILIES)))
    parser.add_argument("--llama", type=Path, default=Path.home() / ".cache/headrace/llama.cpp/bin")
    arguments = parser.parse_args()
    unknown = set(arguments.architectures) - set(FAMILIES)
    if unknown or not (arguments.llama / "llama-perplexity").exists():
        parser.error(
            f"no such architecture: {', '.join(unknown)}" if unknown else f"no llama-perplexity in {arguments.llama}"
        )
    text = (Path(__file__).parent / "text.txt").read_text().encode("ascii", "ignore").decode()[:1200]
    print("| architecture | ours | llama.cpp | apart |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "text").write_text(text)
        for name in arguments.architectures or sorted(FAMILIES):
            FAMILIES[name] = wanted(name)
            path = write_gguf(random_model(name), name, Path(folder) / "tiny.gguf")
            mine, other = ours(path, text), theirs(path, Path(folder) / "text", arguments.llama)
            apart = f"{abs(mine / other - 1):.0e}" if isinstance(other, float) else ""
            print(f"| {name} | {mine:.3f} | {other} | {apart} |", flush=True)


if __name__ == "__main__":
    main()
