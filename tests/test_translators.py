"""Encoder-decoder models through the public interface: texts, budgets, the plan's bytes, and refusals."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, T5Tokenizer

import headrace
from headrace.checkpoint import open_checkpoint
from headrace.errors import BudgetError, CheckpointError, ContextError, UsageError
from headrace.model import Tokenizer
from headrace.plan import Budget, RunConfig, guessed_profile, make_plan
from headrace.plan.shape import shape_of
from support import command
from support.zoo.translators import CASES, FILES, translator, vocabulary, write_gguf, write_translator

pytestmark = [pytest.mark.zoo, pytest.mark.usefixtures("probed")]

PROMPT = "translate English to German: the house is big"
OPTIONS = {"max_tokens": 12, "sampling": headrace.SamplingParams(temperature=0.0)}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return translator("t5:gated", FILES["t5:gated"])


@pytest.fixture(scope="module", params=["folder", "gguf"])
def path(request: pytest.FixtureRequest, model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("translator")
    return write_translator(model, base / "model") if request.param == "folder" else write_gguf(model, base / "t5.gguf")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 90 MB, so that small budgets stream it."""
    sizes = {"d_model": 512, "d_kv": 64, "d_ff": 1536, "num_heads": 8, "num_layers": 3, "num_decoder_layers": 3}
    return write_translator(translator("t5", {**FILES["t5"], **sizes}), tmp_path_factory.mktemp("large") / "model")


def text_of_transformers(model: PreTrainedModel, prompt: str) -> str:
    tokenizer = T5Tokenizer(vocab=vocabulary())
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.inference_mode():
        found = model.generate(ids, do_sample=False, num_beams=1, max_new_tokens=12, use_cache=False)
    return str(tokenizer.decode(found[0], skip_special_tokens=True))


def test_the_text_is_that_of_transformers(path: Path, model: PreTrainedModel) -> None:
    with headrace.load(str(path), memory="2GiB") as loaded:
        expected = text_of_transformers(model, PROMPT)
        assert loaded.generate(PROMPT, **OPTIONS).text == expected
        assert loaded.generate(PROMPT, **OPTIONS).text == expected  # the same text again
        other = "the the house " * 30
        first, second = loaded.generate([other, PROMPT], **OPTIONS)
        assert (first.text, second.text) == (text_of_transformers(model, other.strip()), expected)
        assert expected.strip()


def test_the_prompt_ends_as_the_tokenizer_ends_texts_and_the_decoder_begins(path: Path) -> None:
    with headrace.load(str(path), memory="2GiB") as loaded:
        assert loaded.encode("the house") == [*T5Tokenizer(vocab=vocabulary())("the house").input_ids, 0]
        assert loaded.encode("the house")[-2:] == [1, 0]
        with pytest.raises(UsageError, match="conversations") as refusal:
            loaded.generate([{"role": "user", "content": "hello"}])
        assert refusal.value.hint
        assert any("draft none: an encoder" in reason for reason in loaded.plan.reasons)
        assert loaded.plan.sequences == 1


def test_the_unknown_token_is_the_one_that_the_file_names(model: PreTrainedModel, tmp_path: Path) -> None:
    for unknown in (2, 4):
        found = Tokenizer(open_checkpoint(write_gguf(model, tmp_path / f"{unknown}.gguf", unknown=unknown)))
        assert found.encode("the é") == [*found.encode("the")[:-1], 3, unknown, 1]


@pytest.mark.parametrize("charsmap", [b"abc", b"\x04\x00\x00\x00aaaa"])
def test_a_damaged_normalisation_is_an_error(charsmap: bytes, model: PreTrainedModel, tmp_path: Path) -> None:
    path = write_gguf(model, tmp_path / "t5.gguf", charsmap=charsmap)
    with pytest.raises(CheckpointError, match="tokenizer"):
        Tokenizer(open_checkpoint(path)).encode("the house")


def test_a_draft_is_refused(path: Path) -> None:
    for draft in ("prompt", "self", str(path)):
        with pytest.raises(UsageError, match="encoder") as refusal:
            headrace.load(str(path), memory="2GiB", draft=draft)
        assert refusal.value.hint


def test_an_encoder_reads_as_many_tokens_as_it_has_positions(tmp_path: Path) -> None:
    folder = write_translator(translator("bart", CASES["bart"]), tmp_path / "model")
    with headrace.load(str(folder), memory="2GiB", draft="none") as loaded:
        assert loaded.plan.context_tokens == 128  # 64 for the encoder, 64 for the decoder
        with pytest.raises(ContextError, match="at most 64"):
            loaded.generate("the " * 70)
        answer = loaded.generate("the " * 50, sampling=headrace.SamplingParams(temperature=0.0))
        assert answer.finish_reason == "stop" or answer.completion_tokens == 64


def test_the_answer_is_the_same_from_the_floor_up(large: Path) -> None:
    with pytest.raises(BudgetError) as refusal:
        headrace.load(str(large), memory="100MiB")
    assert refusal.value.hint
    answers, plans = set(), []
    with headrace.load(str(large), memory="4GiB") as loaded:
        floor = loaded.plan.floor_bytes
    request = RunConfig(prompt_tokens=512, context_tokens=4096)
    unbuilt = make_plan(open_checkpoint(large), guessed_profile(), Budget(nbytes=4 << 30, reason="test"), request)
    floor = max(floor, unbuilt.floor_bytes)
    for budget in (floor + (8 << 20), floor + (40 << 20), floor + (90 << 20), 4 << 30):
        with headrace.load(str(large), memory=budget) as loaded:
            answers.add(loaded.generate("the house", **OPTIONS).text)
            plans.append(loaded.plan)
            passes = loaded.passes
            prefetched = plans[-1].streamed_bytes_per_prompt  # upper bound: a ring is prefetched for the next prompt
            assert sum(one.read_bytes for one in passes[1:]) <= prefetched + 1.1 * len(passes) * (
                plans[-1].streamed_bytes_per_pass + 4096
            )
    assert len(answers) == 1
    assert plans[0].streamed_bytes_per_pass > 0
    assert plans[0].streamed_bytes_per_prompt > 0
    assert plans[-1].streamed_bytes_per_pass == plans[-1].streamed_bytes_per_prompt == 0
    assert plans[-1].pinned_bytes == plans[-1].weights_bytes
    for plan in plans:  # weights of every token are pinned before prefill-only weights
        assert plan.streamed_bytes_per_pass == 0 or plan.pinned_bytes <= plan.pass_bytes


def test_experts_of_encoder_and_decoder_are_read_as_they_are_chosen(tmp_path: Path) -> None:
    sizes = {"d_model": 256, "d_kv": 64, "d_ff": 1024, "num_heads": 4, "num_experts": 32}
    model = translator("switch_transformers", {**CASES["switch_transformers"], **sizes})
    folder = write_translator(model, tmp_path / "model")
    expected = text_of_transformers(model, PROMPT)
    with headrace.load(str(folder), memory="4GiB") as loaded:
        assert loaded.generate(PROMPT, **OPTIONS).text == expected
        floor, experts = loaded.plan.floor_bytes, loaded.plan.experts
        assert experts is not None
        assert (experts.layers, experts.count, experts.per_token, experts.cached) == (2, 32, 1, 64)
    with headrace.load(str(folder), memory=floor + (48 << 20)) as loaded:
        assert loaded.plan.experts is not None
        assert loaded.plan.experts.cached < 64
        answer = loaded.generate(PROMPT, **OPTIONS)
        assert answer.text == expected
        assert answer.experts is not None
        assert answer.experts["bytes_per_token"] > 0


@pytest.mark.parametrize(
    "name",
    [
        "t5", "t5:gated", "umt5", "bart", "marian", "pegasus", "m2m_100", "bigbird_pegasus",
        "switch_transformers", "t5gemma",
    ],
)  # fmt: skip
def test_the_header_alone_counts_the_bytes_that_the_built_model_needs(name: str, tmp_path: Path) -> None:
    from headrace.api import _built
    from headrace.engine import Engine
    from headrace.engine.model_weights import StreamOptions
    from headrace.kernels import Kernels
    from headrace.model import ModelSkeleton

    paths = [write_translator(translator(name, CASES[name]), tmp_path / "model")]
    if name in FILES:
        paths.append(write_gguf(translator(name, FILES[name]), tmp_path / "tiny.gguf", "Q8_0"))
    for path in paths:
        checkpoint, skeletons = open_checkpoint(path), list[ModelSkeleton]()

        def options(skeleton: ModelSkeleton, found: list[ModelSkeleton] = skeletons) -> StreamOptions:
            found.append(skeleton)
            rows = {t.name: t.rows for t in (*skeleton.linears, *skeleton.prefill_only_linears)}
            return StreamOptions(pinned_rows=rows, unit_bytes=1 << 20, slots=3, readers=0)

        with Engine(checkpoint, options, Kernels(1)):
            pass
        built, header = shape_of(checkpoint, _built(skeletons[0])), shape_of(checkpoint)
        for expected, found in ((header.linears, built.linears), (header.prefill_only, built.prefill_only)):
            routers = {tensor.name for tensor in expected if ".router." in tensor.name}  # routers stay in memory
            assert {tensor.name for tensor in expected} - routers == {tensor.name for tensor in found}
        assert header.layers == built.layers == (4 if name == "switch_transformers" else 3)


def test_the_plan_counts_bytes_streamed_once_per_prompt(large: Path) -> None:
    checkpoint, profile = open_checkpoint(large), guessed_profile()
    shape = shape_of(checkpoint)
    tight = make_plan(checkpoint, profile, Budget(nbytes=700 << 20, reason="test"), RunConfig())
    roomy = make_plan(checkpoint, profile, Budget(nbytes=8 << 30, reason="test"), RunConfig())
    assert tight.weights_bytes == shape.weights_bytes + shape.prefill_only_bytes
    assert tight.prefill_only_bytes == shape.prefill_only_bytes
    assert roomy.streamed_bytes_per_pass == roomy.streamed_bytes_per_prompt == 0
    longer = make_plan(checkpoint, profile, roomy.budget, RunConfig(prompt_tokens=2000, context_tokens=3000))
    assert longer.activation_bytes > roomy.activation_bytes  # every row of an encoder attends to every other
    assert longer.decode_s_per_token == roomy.decode_s_per_token
    assert longer.ttft_s.expected > roomy.ttft_s.expected


def test_the_command_writes_the_text_and_plans_it(model: PreTrainedModel, tmp_path: Path) -> None:
    path = str(write_gguf(model, tmp_path / "t5.gguf"))

    def output(*arguments: str) -> str:
        done = command.headrace(*arguments, "--memory", "2GiB")
        assert done.exit_code == 0, done.stderr
        return done.stdout

    written = output("run", path, PROMPT, "--max-tokens", "12", "--temperature", "0")
    assert written.strip() == text_of_transformers(model, PROMPT).strip()
    assert "once per prompt" in output("plan", path)
