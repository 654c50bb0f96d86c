"""Write docs/architectures.md: every architecture of tests/corpus.py, run against transformers. A test checks its words.

python docs/make_architectures.py
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]

from corpus import CASES, REFUSED  # noqa: E402
from parity import Outcome, kind_of, outcome_of  # noqa: E402

TARGET = Path(__file__).parent / "architectures.md"
HEAD = """# Architectures

Made by `python docs/make_architectures.py`. Each row is a tiny random model of the architecture, written as a Hugging Face folder
in F32 and run with half of every linear streamed, memory for four experts, and 40 tokens in steps of 30, 1, 1, 5, 1, 1, 1,
against one forward of transformers' own model. *Greedy* says whether the likeliest token is the same in all 40 rows (ties within
1e-3 of a logit allowed), *KL* is the largest divergence of a row. A name with a colon is a variant of the same model type.

Ways: `packed`, sequences share a pass and guesses can be taken back; `joined`, the same, but the model computes attention itself
under a mask; `model`, as transformers would, one sequence at a time. OpenAI's first GPT has no cache: it is given the whole
text for each token, and reads its weights as often as others.

| Model type | Kind | Way | Greedy | KL |
|---|---|---|---|---|
"""
REFUSED_HEAD = """
## With an encoder

T5, mT5, UMT5, LongT5, T5Gemma, Switch Transformers (experts on demand), BART, mBART, Pegasus, BigBird-Pegasus (with full
attention), Marian, M2M100, Blenderbot, MVP, PLBart and LED run as folders, T5 and UMT5 as GGUF: the prompt goes to the encoder,
which is read once for it. `tests/engine/test_encoder_decoder.py` holds them to transformers. Refused are FSMT, which has a
vocabulary for each of two languages, speech models, NLLB-MoE, of which transformers asks the first two experts only, and
ProphetNet, of which it computes a token in another way when more tokens follow.

## As GGUF

`checkpoint/architectures.py` lists the names that run, `tests/model/test_against_transformers.py` holds each to the
transformers model that a tiny file was made of. That is transformers' own mapping of GGUF but Deci, for which it has no
model, and further ones: Gemma 1 and 4 with its mixtures, DeepSeek V2 and V3 and what is converted as they are, Llama 4,
Ministral 3, GLM 4, 4.5, 4.6 and 5, Qwen3-Next, the language models of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, Nemotron-H and
Nemotron 3, Granite with its mixtures and hybrids, LFM2 with experts, OLMo 2 and 3, OLMoE, ERNIE 4.5, Hunyuan, dots.llm1,
SmolLM3, Command R, EXAONE 4 and with experts, Seed-OSS, Arcee and Trinity, Phi-3.5-MoE. GLM 5 chooses 2048 positions to look
at where there are more; here each token sees all before it, and the plan says so.

A test whose writer and reader share a mistake would not see it. So `python benchmarks/architectures.py` gives the same tiny
files to llama.cpp, all in fp32, and compares perplexities: of 64 files 61 are taken by both (the other three it wants in another
shape: EXAONE 4 with heads of one width, DeepSeek V2 Lite by its number of layers, GLM 4.5 with a whole block that guesses).
46 agree to 1e-6 and better, 13 to 1e-4, eleven of them with GELU, which ggml looks up in a table of fp16; gpt-oss to 4e-4:
llama.cpp rounds where YaRN begins and ends, which the model's config forbids; Phi-3.5-MoE to 5e-3: transformers routes as the
model was trained, llama.cpp by a softmax (and of long contexts, its files scale rotations by less than the model's config does).

## Refused

Language models that transformers has and that do not run here. They are refused before anything is read. Half of an encoder-
decoder is refused, the whole is not.

| Model type | Reason |
|---|---|
"""


def row(name: str, outcome: Outcome) -> str:
    """A line of the table without its last column."""
    return f"| {name} | {kind_of(name)} | {outcome.way} | {'equal' if outcome.same else 'differs'} |"


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
