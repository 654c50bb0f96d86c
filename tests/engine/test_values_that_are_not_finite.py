"""NaN and infinity in a checkpoint are errors that name the place. Keys and values beyond fp16 get a wider cache."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import headrace
from headrace.errors import CheckpointError
from headrace.plan import Profile
from support.zoo.gguf_files import random_model, write_gguf
from support.zoo.scripted import byte_level, in_turn, write_scripted

pytestmark = pytest.mark.zoo

GREEDY = headrace.SamplingParams(temperature=0)
VOCABULARY = byte_level()
TOKEN = VOCABULARY["tokens"].index
LETTERS = [TOKEN(letter) for letter in "abcdef"]


def load(path: Path, profile: Profile, **options: Any) -> headrace.Model:
    given = {"memory": "4GiB", "context_tokens": 128, "draft": None, "profile": profile, **options}
    return headrace.load(path, **given)


def damaged(shape: tuple[int, ...], value: float, kind: Any = np.float32) -> np.ndarray:
    found = np.full(shape, 0.01, kind)
    found.reshape(-1)[3] = value
    return found


WIDTH = -(-len(VOCABULARY["tokens"]) // 64) * 64


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("name", "shape", "word"),
    [
        ("output_norm.weight", (WIDTH,), "norm"),
        ("blk.0.attn_norm.weight", (WIDTH,), "layers.0.input_layernorm"),
        ("blk.0.attn_v.weight", (64, WIDTH), "blk.0.attn_v.weight"),
        ("blk.0.ffn_up.weight", (64, WIDTH), "blk.0.ffn_up.weight"),
    ],
)
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_value_that_is_not_finite_is_an_error_that_names_its_tensor(
    tmp_path: Path, profile: Profile, name: str, shape: tuple[int, ...], word: str, value: float, temperature: float
) -> None:
    more = {"blk.0.attn_output.weight": np.ones((WIDTH, 64), np.float32)}  # without these no value reaches the logits
    more |= {"blk.0.ffn_down.weight": np.ones((WIDTH, 64), np.float32), name: damaged(shape, value)}
    path = write_scripted(tmp_path / "m.gguf", **VOCABULARY, eos=TOKEN("<|im_end|>"), tensors=more)
    with load(path, profile) as model:
        for _ in range(2):
            with pytest.raises(CheckpointError, match="not finite") as caught:
                model.generate("hi", sampling=headrace.SamplingParams(temperature=temperature), max_tokens=3)
            assert word in str(caught.value)
            assert caught.value.hint


@pytest.mark.parametrize("temperature", [0, 1e-4, 1e-12, 1e-40, 1e-320])
@pytest.mark.parametrize("more", [{}, {"top_k": 1}, {"top_k": 5}, {"top_p": 1e-9}, {"min_p": 1}])
def test_temperatures_near_zero_take_the_likeliest_token(
    tmp_path: Path, profile: Profile, temperature: float, more: dict[str, Any]
) -> None:
    follows = {**in_turn(*LETTERS, LETTERS[0]), TOKEN("Ċ"): LETTERS[0]}
    path = write_scripted(tmp_path / "m.gguf", **VOCABULARY, eos=TOKEN("<|im_end|>"), follows=follows)
    with load(path, profile) as model:
        sampling = headrace.SamplingParams(temperature=temperature, seed=1, **more)
        assert model.generate("hi", sampling=sampling, max_tokens=6).text == "abcdef"


@pytest.fixture(scope="module", params=["keys", "values"])
def large(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """A model with keys or values of some millions, and the same model in transformers."""
    model = random_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            up, down = (
                (attention.k_proj, attention.q_proj)
                if request.param == "keys"
                else (attention.v_proj, attention.o_proj)
            )
            up.weight *= 2.0**22
            down.weight /= 2.0**22
    return write_gguf(model, "llama", tmp_path_factory.mktemp("large") / f"{request.param}.gguf"), model


@pytest.mark.parametrize("kv_bits", [16, 8])
@pytest.mark.parametrize("words", [1, 9], ids=["decode rows", "prefill rows"])
@pytest.mark.parametrize("draft", [None, "prompt"])
def test_keys_and_values_beyond_fp16_are_kept_in_a_type_that_holds_them(
    large: tuple[Path, torch.nn.Module], profile: Profile, words: int, kv_bits: int, draft: str | None
) -> None:
    path, theirs = large
    with load(path, profile, draft=draft, kv_bits=kv_bits) as model:
        text = "tell me " * words
        first = model.generate(text, raw=True, sampling=GREEDY, max_tokens=6)
        tokens = model.encode(text, raw=True)
        streamed = [one.token for one in model.stream(text, raw=True, sampling=GREEDY, max_tokens=6)]
    assert first.kv_cache_type == ("BF16" if kv_bits == 16 else "Q8 with scales in F32")
    assert first.as_json()["kv_cache_type"] == first.kv_cache_type
    found = [token for token in streamed if token is not None]
    with torch.no_grad():
        given = torch.tensor([tokens + found])
        logits = theirs(given).logits[0, len(tokens) - 1 : -1]
    # Rounding of keys and values to 8 bits of precision moves logits; the tokens are still among the likeliest.
    best = logits.gather(1, torch.tensor(found)[:, None])[:, 0]
    assert bool((logits.amax(1) - best < 0.05 * (logits.amax(1) - logits.mean(1))).all())


def test_a_sequence_whose_keys_fit_is_kept_in_fp16(tiny_llama: Path, profile: Profile) -> None:
    with load(tiny_llama, profile) as model:
        assert model.generate("tell me", raw=True, sampling=GREEDY, max_tokens=3).kv_cache_type == "F16"


def test_large_keys_of_one_sequence_change_nothing_for_other_sequences(
    large: tuple[Path, torch.nn.Module], profile: Profile
) -> None:
    texts = ["tell me " * count for count in (1, 9, 3, 12)]
    with load(large[0], profile) as model:
        alone = [model.generate(text, raw=True, sampling=GREEDY, max_tokens=4).text for text in texts]
    with load(large[0], profile, sequences=4) as model:
        together = model.generate(texts, raw=True, sampling=GREEDY, max_tokens=4)
    assert [one.text for one in together] == alone
