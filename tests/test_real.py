"""Real models: Gemma 3 270M and Qwen2.5-Coder 0.5B, against transformers' own loader, which dequantises to fp32."""

from functools import cache
from pathlib import Path

import pytest
import torch
from models import HOME, SOURCES

from headrace.checkpoint import open_checkpoint
from headrace.engine import Engine, Rows
from headrace.kernels import Backend, ReferenceKernels
from headrace.model import Tokenizer
from support.comparison import divergences
from support.engines import build_engine

PROMPTS = {
    "gemma-3-270m": "The water wheel is one of the oldest machines. It",
    "qwen-coder-0.5b": "def fibonacci(n):\n    ",
}
NEW_TOKENS = 24

pytestmark = pytest.mark.real


def path_of(name: str) -> Path:
    path = HOME / SOURCES[name].file
    assert path.exists(), f"run `make models` first, {path} is missing"
    return path


@cache
def oracle(name: str) -> tuple[list[int], list[int], torch.Tensor, object]:
    """(prompt, greedy tokens, logits of every row, transformers' tokenizer), from transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = path_of(name)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    prompt = tokenizer(PROMPTS[name])["input_ids"]
    with torch.inference_mode():
        tokens = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True)[0]
        logits = model(tokens[None]).logits[0]
    return prompt, tokens[len(prompt) :].tolist(), logits, tokenizer


def engine_of(name: str, share: float, backend: Backend | None = None) -> Engine:
    return build_engine(path_of(name), backend, share=share, options={"unit_bytes": 2 << 20, "slots": 8, "readers": 3})


@pytest.mark.parametrize("name", sorted(PROMPTS))
def test_with_reference_kernels_tokens_and_logits_equal_transformers_fp32(name: str) -> None:
    prompt, expected, logits, _ = oracle(name)
    with engine_of(name, 0.5, ReferenceKernels(2)) as engine:
        cache = engine.new_cache(128)
        rows = [engine.step([Rows(cache=cache, tokens=prompt, logits=len(prompt))])]
        rows += [engine.step([Rows(cache=cache, tokens=[token])]) for token in expected[:4]]
    ours = torch.cat(rows)

    # Only keys and values are rounded, to fp16: 5e-7 was measured for Gemma.
    assert divergences(ours, logits[: len(ours)]).max() < 1e-4
    assert ours[len(prompt) - 1 :].argmax(-1).tolist() == expected[:5]


# ggml multiplies with activations rounded to 8 bits, as in llama.cpp. That alone makes a mean KL of 4e-4 for Qwen and, with
# its large outliers and small width, of 8e-3 for Gemma 270M (docs/benchmarks/history.md, "Precision").
@pytest.mark.parametrize(("name", "limit"), [("gemma-3-270m", 2e-2), ("qwen-coder-0.5b", 1e-3)])
def test_with_ggml_the_divergence_is_that_of_8_bit_activations(name: str, limit: float) -> None:
    prompt, expected, logits, _ = oracle(name)
    tokens = prompt + expected[:-1]
    with engine_of(name, 0.5) as engine:
        cache = engine.new_cache(128)
        ours = torch.cat([engine.step([Rows(cache=cache, tokens=[token])]) for token in tokens])
        # The prefill path dequantises to bf16 and keeps the activations: the prompt once more, in one pass.
        prefill = engine.step([Rows(cache=engine.new_cache(128), tokens=tokens, logits=len(tokens))])
    theirs = logits[: len(ours)]
    decode_kl, prefill_kl = divergences(ours, theirs).mean(), divergences(prefill, theirs).mean()
    print(f"{name}: mean KL {decode_kl:.1e} row by row, {prefill_kl:.1e} in one pass")
    assert decode_kl < limit
    assert prefill_kl < 1e-3
    # Where fp32 separates the best two tokens by more than 0.5, the choice is the same.
    top = theirs.topk(2).values
    decided = top[:, 0] - top[:, 1] > 0.5
    assert torch.equal(ours.argmax(-1)[decided], theirs.argmax(-1)[decided])


@pytest.mark.parametrize("name", sorted(PROMPTS))
def test_text_becomes_the_same_tokens_as_in_transformers(name: str) -> None:
    _, _, _, theirs = oracle(name)
    ours = Tokenizer(open_checkpoint(path_of(name)))
    for text in (
        "Hello, world!",
        "  two spaces\n\n\ttab",
        "日本語 — ünïcödé 🙂👩‍👩‍👧",
        "x=1\nfor i in range(10):\n    print(i)",
        "<|im_end|>",
    ):
        expected = theirs(text)["input_ids"]  # type: ignore[operator]
        assert ours.encode(text) == expected
        assert (
            ours.decode(ours.encode(text, special=False)).strip()
            == theirs.decode(expected, skip_special_tokens=True).strip()
        )  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", sorted(PROMPTS))
def test_characters_split_over_tokens_come_out_whole(name: str) -> None:
    tokenizer = Tokenizer(open_checkpoint(path_of(name)))
    text = "a 🙂 b 👩‍👩‍👧 ünï 日本語 𝔘"
    stream = tokenizer.stream()
    pieces = [stream.step(token) for token in tokenizer.encode(text, special=False)]
    assert "".join(pieces).strip() == text
    assert "�" not in "".join(pieces)


def test_the_chat_template_is_the_models_own() -> None:
    _, _, _, theirs = oracle("qwen-coder-0.5b")
    ours = Tokenizer(open_checkpoint(path_of("qwen-coder-0.5b")))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi!"}]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)  # type: ignore[attr-defined]
    assert ours.chat(messages) == expected
    assert theirs.convert_tokens_to_ids("<|im_end|>") in ours.end_ids  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", sorted(PROMPTS))
def test_a_real_model_streams_bit_for_bit(name: str) -> None:
    prompt, expected, _, _ = oracle(name)
    results = []
    for share in (1.0, 0.4, 0.0):
        with engine_of(name, share) as engine:
            cache = engine.new_cache(64)
            results.append(
                torch.cat([engine.step([Rows(cache=cache, tokens=part)]) for part in (prompt[:12], expected[:1])])
            )
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
