"""Write docs/architectures.md: every architecture of tests/support/zoo/folders.py, run against transformers.

A test checks its words.

python docs/make_architectures.py
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]

from support.parity import Outcome, outcome_of  # noqa: E402
from support.zoo.folders import CASES, REFUSED  # noqa: E402

TARGET = Path(__file__).parent / "architectures.md"
HEAD = """# Architectures

Made by `python docs/make_architectures.py`.

## These models give the logits of transformers

Each row is a tiny random model of the architecture, written as a Hugging Face folder in F32. It runs with half of every linear
streamed and memory for four experts. Its 40 tokens come in steps of 30, 1, 1, 5, 1, 1, 1. The result is compared with one
forward of transformers' model. A name with a colon is a variant of the same model type.

| Column | Meaning |
|---|---|
| Attention: `packed` | sequences share a pass, and the cache can be rolled back |
| Attention: `concatenated` | the same, but the model computes attention itself over concatenated caches, under a mask |
| Attention: `native` | transformers' own cache, one sequence at a time |
| Greedy | whether the likeliest token is the same in all 40 rows (ties within 1e-3 of a logit allowed) |
| KL | the largest divergence of a row |

OpenAI's first GPT has no cache. It recomputes the whole text for each token, and reads its weights as often as others.

| Model type | Kind | Attention | Greedy | KL |
|---|---|---|---|---|
"""
REFUSED_HEAD = """
## Encoder-decoder models read their encoder once per prompt

These run as folders:

- T5, mT5, UMT5, LongT5, T5Gemma, Switch Transformers (experts on demand)
- BART, mBART, Pegasus, BigBird-Pegasus (with full attention), Marian, M2M100, Blenderbot, MVP, PLBart, LED

T5 and UMT5 also run as GGUF. The prompt goes to the encoder. `tests/engine/test_encoder_decoder.py` compares them with
transformers.

| Refused | Reason |
|---|---|
| FSMT | a vocabulary for each of two languages |
| speech models | models of speech, not of text |
| NLLB-MoE | transformers uses only its first two experts |
| ProphetNet | transformers computes a token differently when more tokens follow |

## GGUF files run where transformers or this engine has a mapping

`checkpoint/architectures.py` lists the names that run. `tests/model/test_against_transformers.py` compares each with the
transformers model that a tiny file was made of. The list has all of transformers' GGUF mapping but Deci, for which it has no
model. It adds:

- Gemma 1, and Gemma 4 with its MoE models
- DeepSeek V2 and V3, and models converted as they are; Llama 4; Ministral 3
- GLM 4, 4.5, 4.6 and 5; Qwen3-Next; the language models of Qwen2-VL, Qwen2.5-VL and Qwen3-VL
- Nemotron-H and Nemotron 3; Granite with its MoE models and hybrids; LFM2 with experts
- OLMo 2 and 3, OLMoE, ERNIE 4.5, Hunyuan, dots.llm1, SmolLM3, Command R, EXAONE 4 and with experts
- Seed-OSS, Arcee, Trinity, Phi-3.5-MoE

GLM 5 attends to 2048 selected positions where there are more. Here each token attends to all positions before it, and the plan
says so.

## llama.cpp gives the same perplexities

A test whose writer and reader share a mistake would not see it. So `python benchmarks/architectures.py` gives the same tiny
files to llama.cpp, all in fp32, and compares perplexities. Of 64 files, both accept 61. llama.cpp wants the other three in
another shape:

- EXAONE 4 with heads of one width
- DeepSeek V2 Lite by its number of layers
- GLM 4.5 with a complete draft block

| Files | Agree to | Cause |
|---|---|---|
| 46 files | 1e-6 and better | |
| 13 files | 1e-4 | eleven have GELU, which ggml reads from a table of fp16 |
| 1 file: gpt-oss | 4e-4 | llama.cpp rounds where YaRN starts and ends, which the model's config forbids |
| 1 file: Phi-3.5-MoE | 5e-3 | transformers routes as the model was trained, llama.cpp by a softmax |

In long contexts, Phi-3.5-MoE's GGUF files also scale RoPE by less than the model's config does.

## Refused models are reported before anything is read

These language models of transformers do not run here. Half of an encoder-decoder is refused, the whole is not.

| Model type | Reason |
|---|---|
"""


def row(name: str, outcome: Outcome) -> str:
    """A line of the table without its last column."""
    return f"| {name} | {CASES[name].kind} | {outcome.attention_mode} | {'equal' if outcome.same else 'differs'} |"


def page() -> str:
    """The whole page; takes about a minute."""
    return HEAD + "".join(_rows()) + REFUSED_HEAD + "".join(refusals())


def _rows() -> Iterator[str]:
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            outcome = outcome_of(name, Path(folder) / "model")
        yield f"{row(name, outcome)} {max(outcome.divergence, 0):.0e} |\n"


def refusals() -> Iterator[str]:
    """The lines of the second table."""
    for name, reason in sorted(REFUSED.items()):
        yield f"| {name} | {reason} |\n"


if __name__ == "__main__":
    TARGET.write_text(page())
