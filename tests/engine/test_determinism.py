"""A prompt gives the same logits, bit for bit, after any earlier prompts and beside any other sequences."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import support.zoo.gguf_files as tiny
from headrace.engine import Engine, Rows
from headrace.engine.chunks import Chunks
from headrace.engine.sampler import Sampler
from headrace.kernels import Kernels
from headrace.kernels.convert import q4_k_blocks
from headrace.kernels.thresholds import CHUNK_ROWS, DECODE_MAX_ROWS, GEMM_CHUNK_ROWS, SMALL_CHUNK_ROWS
from headrace.sampling_params import SamplingParams
from support.engines import build_engine
from support.stepping import Stepper
from support.zoo.folders import tiny_model, write_folder
from support.zoo.gguf_files import VOCAB, random_model, write_gguf

pytestmark = pytest.mark.zoo

CONTEXT, NEW_TOKENS = 320, 2


def prompts() -> list[list[int]]:
    """Prompts of lengths around the chunk sizes, some with a common prefix, some that continue others."""
    drawn = torch.Generator().manual_seed(7)
    text = torch.randint(0, VOCAB, (280,), generator=drawn).tolist()
    found = [text[:length] for length in (3, 7, 8, 12, 16, 17, 30, 64, 70, 200, 128, 141)]
    return [*found, text[:100] + text[7:40], torch.randint(0, VOCAB, (90,), generator=drawn).tolist()]


class LogitsKeeper(Sampler):
    """Takes the likeliest token and keeps the logits that it was drawn from."""

    def __init__(self) -> None:
        super().__init__(SamplingParams(temperature=0))
        self.logits: list[torch.Tensor] = []

    def draw(self, logits: torch.Tensor, token_ids: Sequence[int]) -> int:
        self.logits.append(logits.clone())
        return super().draw(logits, token_ids)


def ask(engine: Engine, prompts: Sequence[list[int]], at_a_time: int, prefill_rows: int = 160) -> list[torch.Tensor]:
    """Logits of the tokens generated for each prompt, (NEW_TOKENS, vocab)."""
    recorders = [LogitsKeeper() for _ in prompts]
    stepper = Stepper(engine, at_a_time, CONTEXT, prefill_rows)
    stepper.finish([stepper.add(prompt, NEW_TOKENS, one) for prompt, one in zip(prompts, recorders, strict=True)])
    return [torch.stack(tracer.logits) for tracer in recorders]


def engine_of(path: Path) -> Engine:
    return build_engine(path, Kernels(2, tiled=["Q4_K"]), options={"expert_slots": 24})


GGUF = [
    ("llama", "F32"), ("qwen2", "BF16"), ("gemma3", "Q4_0"), ("gpt2", "F16"), ("deepseek2", "Q8_0"), ("qwen3moe", "Q8_0"),
    ("qwen2", "Q4_K"), ("bloom", "F16"), ("bloom", "Q4_K"),
]  # fmt: skip


def write_q4_k(path: Path, architecture: str) -> Path:
    """A model whose matrices are whole blocks of 256 weights."""
    with pytest.MonkeyPatch.context() as patch:
        family = tiny.FAMILIES[architecture]
        wide = {**family.config, "hidden_size": 256}
        if architecture == "qwen2":
            wide["intermediate_size"] = 512
        patch.setitem(tiny.FAMILIES, architecture, replace(family, config=wide))
        quantize = gguf.quantize

        def quantized(value: np.ndarray, number: gguf.GGMLQuantizationType) -> np.ndarray:
            if number != gguf.GGMLQuantizationType.Q4_K:
                return np.asarray(quantize(value, number))
            return q4_k_blocks(value.astype(np.float32)).reshape(len(value), -1)

        patch.setattr(gguf, "quantize", quantized)
        return write_gguf(random_model(architecture), architecture, path, "Q4_K")


@pytest.fixture(scope="module", params=[*GGUF, "gpt_oss"], ids=str)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    if isinstance(request.param, str):
        return write_folder(tiny_model(request.param), folder / request.param)
    architecture, kind = request.param
    if kind == "Q4_K":
        return write_q4_k(folder / "tiny.gguf", architecture)
    return write_gguf(random_model(architecture), architecture, folder / "tiny.gguf", kind)


def test_earlier_prompts_and_other_sequences_of_a_pass_change_no_bit(path: Path) -> None:
    texts = prompts()
    with engine_of(path) as engine:
        alone = [ask(engine, [prompt], 1)[0] for prompt in texts]
        forwards = ask(engine, texts, 1)
        backwards = ask(engine, texts[::-1], 1)[::-1]
        together = ask(engine, texts, len(texts))
        some = ask(engine, texts[1:] + texts[:1], 3)
    for index, expected in enumerate(alone):
        for found in (forwards, backwards, together, [some[-1], *some[:-1]]):
            assert torch.equal(found[index], expected), f"prompt {index} of {len(texts[index])} tokens"


def test_a_short_prompt_does_not_depend_on_the_rows_that_the_plan_gives_a_pass(path: Path) -> None:
    """A run of short prompts alone is planned with 16 rows a pass."""
    texts = [text for text in prompts() if len(text) <= DECODE_MAX_ROWS]
    with engine_of(path) as engine:
        some, more = (ask(engine, texts, 1, rows) for rows in (DECODE_MAX_ROWS, 160))
    assert all(map(torch.equal, some, more))


@pytest.mark.parametrize("deterministic", [True, False])
def test_chunks_of_a_prompt_give_the_logits_of_the_whole_prompt(path: Path, deterministic: bool) -> None:
    prompt = prompts()[9]
    with engine_of(path) as engine:
        whole = engine.step([Rows(cache=engine.new_cache(CONTEXT), tokens=prompt, row_invariant=False)])[0]
        stepper = Stepper(engine, 1, CONTEXT, 64, deterministic=deterministic)
        for start in (prompt[:21], prompt):  # the second goes on where the first ended, off a chunk's end
            keeper = LogitsKeeper()
            stepper.finish([stepper.add(start, 1, keeper)])
    # Kernels of other row counts round differently; a wrong position changes logits by their own size.
    assert (keeper.logits[0] - whole).abs().max() < 0.05 * whole.abs().max()


def test_whole_chunks_of_a_prompt_are_reused(path: Path) -> None:
    prompt = prompts()[9]
    with engine_of(path) as engine:
        if engine.attention_mode != "packed":
            pytest.skip("a chunk fills a pass in this attention mode")
        stepper = Stepper(engine, 1, CONTEXT, 160)
        rows = []
        for _ in range(2):
            before = len(engine.passes)
            stepper.finish([stepper.add(prompt, 1, LogitsKeeper())])
            rows.append(sum(one.rows for one in engine.passes[before:]))
        chunk = CHUNK_ROWS if stepper.runner.info.prefill_is_row_invariant else GEMM_CHUNK_ROWS
    assert rows == [len(prompt), len(prompt) - (len(prompt) - 1) // chunk * chunk]


@pytest.mark.parametrize("chunks", [Chunks(SMALL_CHUNK_ROWS, 64), Chunks(64, 64), Chunks(16, 16), Chunks(40, 40)])
def test_a_reused_prefix_ends_where_a_chunk_ends(chunks: Chunks) -> None:
    ends, end = [0], 0
    while end < 300:
        end = chunks.end(end)
        ends.append(end)
    for count in range(300):
        assert chunks.whole(count) == max(one for one in ends if one <= count)


def test_small_chunks_are_for_the_start_of_a_prompt_only() -> None:
    chunks = Chunks(16, 64)
    assert [chunks.end(start) for start in (0, 16, 48, 63, 64, 100, 128)] == [16, 32, 64, 64, 128, 128, 192]


def test_matrices_of_super_blocks_use_small_chunks(tmp_path: Path) -> None:
    prompt = prompts()[6]
    with engine_of(write_q4_k(tmp_path / "tiny.gguf", "qwen2")) as engine:
        stepper = Stepper(engine, 3, CONTEXT, 160)
        stepper.finish([stepper.add(prompt, 1, LogitsKeeper()) for _ in range(3)])
        shared = (len(prompt) - 1) // SMALL_CHUNK_ROWS * SMALL_CHUNK_ROWS
        assert engine.passes[-1].rows == len(prompt) + 2 * (len(prompt) - shared)
