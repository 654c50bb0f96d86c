"""Encoder-decoder models: their two streams, against the forward and the greedy decoding of transformers."""

import json
from pathlib import Path

import pytest
import torch

from headrace.engine import Engine, Rows
from headrace.errors import HeadraceError
from support.comparison import divergence
from support.engines import build_engine
from support.zoo.folders import write_folder
from support.zoo.gguf_files import VOCAB
from support.zoo.translators import CASES, FILES, REFUSED, translator, write_gguf, write_translator

pytestmark = pytest.mark.zoo

GENERATOR = torch.Generator().manual_seed(1)
TEXT = torch.randint(3, VOCAB, (1, 40), generator=GENERATOR)
OUTPUT = torch.randint(3, VOCAB, (1, 12), generator=GENERATOR)


def logits_of(engine: Engine, text: torch.Tensor = TEXT, output: torch.Tensor = OUTPUT) -> torch.Tensor:
    """Logits of the rows of an output, one by one after the pass that encodes the text."""
    cache, count = engine.new_cache(100, 32), len(engine.decoder_start_ids)
    found = [engine.step([Rows(cache=cache, tokens=[*text[0].tolist(), *engine.decoder_start_ids], logits=count)])]
    found += [engine.step([Rows(cache=cache, tokens=[token])]) for token in output[0].tolist()]
    return torch.cat(found)


def expected_of(model: torch.nn.Module, start: tuple[int, ...]) -> torch.Tensor:
    decoded = torch.cat([torch.tensor([start]), OUTPUT], 1)
    with torch.inference_mode():
        return model(input_ids=TEXT, decoder_input_ids=decoded).logits[0]


def greedy(engine: Engine, count: int) -> list[int]:
    cache = engine.new_cache(100, 32)
    tokens = [*TEXT[0].tolist(), *engine.decoder_start_ids]
    found: list[int] = []
    for _ in range(count):
        found.append(int(engine.step([Rows(cache=cache, tokens=tokens)]).argmax()))
        tokens = found[-1:]
    return found


def greedy_of_transformers(model: torch.nn.Module, start: tuple[int, ...], count: int) -> list[int]:
    """Greedy tokens of transformers, given the start tokens; without its cache, which counts the encoder's layers."""
    with torch.inference_mode():
        found = model.generate(
            TEXT, decoder_input_ids=torch.tensor([start]), do_sample=False, num_beams=1, max_new_tokens=count,
            use_cache=False, forced_bos_token_id=None, forced_eos_token_id=None,
        )  # fmt: skip
    return found[0, len(start) :].tolist()


@pytest.mark.parametrize("name", CASES)
def test_a_folder_gives_the_logits_and_the_tokens_of_transformers(name: str, tmp_path: Path) -> None:
    model = translator(name, CASES[name])
    with build_engine(write_translator(model, tmp_path / "model")) as engine:
        # fp32 all the way; only the order of sums differs.
        assert divergence(logits_of(engine), expected_of(model, engine.decoder_start_ids)) < 1e-5
        model.config.eos_token_id = model.generation_config.eos_token_id = None
        assert greedy(engine, 20) == greedy_of_transformers(model, engine.decoder_start_ids, 20)
        assert engine.attention_mode == "native"
        kept = [module for module in engine.model.modules() if type(module) is torch.nn.Linear]
        assert all(one.weight.is_meta or len(one.weight) <= 8 for one in kept), "only routers are kept in memory"


@pytest.mark.parametrize("name", FILES)
def test_a_gguf_file_gives_the_logits_of_the_model_it_was_made_of(name: str, tmp_path: Path) -> None:
    model = translator(name, FILES[name])
    with build_engine(write_gguf(model, tmp_path / "tiny.gguf")) as engine:
        assert divergence(logits_of(engine), expected_of(model, engine.decoder_start_ids)) < 1e-5
        assert type(engine.model).__name__ == type(model).__name__


@pytest.mark.parametrize("kind", ["Q8_0", "F16"])
def test_streamed_equals_resident_bit_for_bit(kind: str, tmp_path: Path) -> None:
    path = write_gguf(translator("t5:gated", FILES["t5:gated"]), tmp_path / "tiny.gguf", kind)
    # Long prompts of F16 weights go through torch's matmuls, whose bits depend on the cut (ARCHITECTURE.md).
    text = TEXT if kind == "Q8_0" else TEXT[:, :12]
    found = []
    for share, readers in ((1.0, 2), (0.5, 2), (0.5, 0), (0.0, 3)):
        with build_engine(path, share=share, options={"readers": readers}) as engine:
            found.append(logits_of(engine, text))
    assert all(torch.equal(found[0], one) for one in found[1:])


def test_the_encoder_is_read_once_for_a_prompt_and_the_decoder_for_every_token(tmp_path: Path) -> None:
    path = write_gguf(translator("t5", FILES["t5"]), tmp_path / "tiny.gguf", "Q8_0")
    with build_engine(path, options={"readers": 0}) as engine:
        logits_of(engine)
        logits_of(engine)
        decoder, prefill_only = (stream.layout for stream in engine.weights._streams)
        total = decoder.streamed_bytes + decoder.pinned_bytes + prefill_only.streamed_bytes + prefill_only.pinned_bytes
        read = [stats.read_bytes for stats in engine.passes]
        expected = (
            [total, *[decoder.streamed_bytes] * 12]
            + [decoder.streamed_bytes + prefill_only.streamed_bytes]
            + [decoder.streamed_bytes] * 12
        )
        assert read == pytest.approx(expected, abs=4096)  # in whole pages, of which the file's last may be short
        names = {tensor.name for group in prefill_only.groups for tensor in group.tensors}
        assert all(name.startswith("enc.") or ".cross_attn_" in name for name in names)
        assert len(names) == 2 * 6 + 3 * 2  # six matrices of an encoder's layer, keys and values of a decoder's


def test_with_everything_pinned_nothing_is_read_after_the_first_pass(tmp_path: Path) -> None:
    path = write_gguf(translator("t5", FILES["t5"]), tmp_path / "tiny.gguf", "Q8_0")
    with build_engine(path, share=1.0) as engine:
        logits_of(engine)
        logits_of(engine)
        assert all(stats.read_bytes == 0 for stats in engine.passes[1:])


def test_sequences_do_not_touch_each_other_and_a_text_can_be_encoded_again(tmp_path: Path) -> None:
    model = translator("bart", CASES["bart"])
    with build_engine(write_translator(model, tmp_path / "model")) as engine:
        first, second = engine.new_cache(100, 32), engine.new_cache(100, 32)
        texts = [[*TEXT[0].tolist(), 2], [*TEXT[0, ::2].tolist(), 2]]
        begun = engine.step([Rows(cache=first, tokens=texts[0]), Rows(cache=second, tokens=texts[1])])
        alone = engine.new_cache(100, 32)
        assert torch.equal(begun[0], engine.step([Rows(cache=alone, tokens=texts[0])])[0])
        later = engine.step([Rows(cache=first, tokens=[7]), Rows(cache=second, tokens=[8])])
        assert torch.equal(later[0], engine.step([Rows(cache=alone, tokens=[7])])[0])
        first.truncate(10)
        assert first.length == 0
        assert torch.equal(begun[0], engine.step([Rows(cache=first, tokens=texts[0])])[0])


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_would_go_wrong_are_refused(name: str, tmp_path: Path) -> None:
    values, words = REFUSED[name]
    with (
        pytest.raises(HeadraceError, match=words) as refusal,
        build_engine(write_folder(translator(name, values), tmp_path)),
    ):
        pass
    assert name in str(refusal.value)
    assert refusal.value.hint


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "whisper", "is_encoder_decoder": True}, "whisper"),
        ({"model_type": "t5", "is_encoder_decoder": False}, "t5 model"),
        ({"decoder_start_token_id": 10_000}, "decoder start tokens"),
        ({"decoder_start_token_id": "zero"}, "decoder start tokens"),
    ],
)
def test_models_that_cannot_run_are_refused(values: dict[str, object], words: str, tmp_path: Path) -> None:
    folder = write_translator(translator("t5", CASES["t5"]), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    (folder / "generation_config.json").unlink(missing_ok=True)
    with pytest.raises(HeadraceError, match=words) as refusal, build_engine(folder):
        pass
    assert refusal.value.hint


def test_an_encoder_alone_is_refused(tmp_path: Path) -> None:
    from transformers import T5EncoderModel

    model = translator("t5", CASES["t5"])
    T5EncoderModel(model.config).save_pretrained(tmp_path / "model")
    with pytest.raises(HeadraceError) as refusal, build_engine(tmp_path / "model"):
        pass
    assert refusal.value.hint
