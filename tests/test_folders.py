"""Folders and MoE models as a user runs them: the command, and the library."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import headrace as library
from headrace.sampling_params import SamplingParams
from support.command import headrace, run_in_subprocess
from support.hub import StandIn, serve
from support.zoo.folders import VOCAB, tiny_model, write_folder

pytestmark = [pytest.mark.zoo, pytest.mark.usefixtures("probed")]

ROOMY = "2GiB"
GREEDY = SamplingParams(temperature=0.0)


def folder_of(name: str, path: Path) -> Path:
    """A tiny model with a tokenizer of bytes and a chat template."""
    write_folder(tiny_model(name), path)
    vocabulary = {
        token: i for i, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|im_start|>", "<|im_end|>"])
    }
    vocabulary |= {f"filler{i}": i for i in range(len(vocabulary), VOCAB)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(path / "tokenizer.json"))
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def moe_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of("qwen3_moe", tmp_path_factory.mktemp("folders") / "moe")


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of("qwen3_next", tmp_path_factory.mktemp("folders") / "hybrid")


def test_an_moe_model_runs_from_its_folder_and_reports_its_expert_cache(moe_model: Path) -> None:
    planned = headrace("plan", str(moe_model), "--memory", ROOMY, "--json")
    assert planned.exit_code == 0, planned.stderr
    experts = json.loads(planned.stdout)["experts"]
    assert experts["total"] == experts["slots"]
    result = run_in_subprocess("run", moe_model, "hello", "--memory", ROOMY, "-n", "6", "-t", "0", "--json", "-q")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["usage"]["completion_tokens"] <= 6
    assert 0 <= answer["experts"]["hit_rate"] <= 1
    assert answer["experts"]["wasted_bytes"] >= 0
    assert answer["memory"]["peak_bytes"] < answer["memory"]["budget_bytes"]


@pytest.mark.parametrize("name", ["jetmoe", "openai-gpt", "qwen4_exp_text", "recurrent_gemma", "rwkv"])
def test_models_with_a_native_cache_or_none_answer_as_transformers_does(name: str, tmp_path: Path) -> None:
    theirs = tiny_model(name)
    with library.load(str(folder_of(name, tmp_path / "model")), memory=ROOMY, draft="none") as model:
        for prompt in ("hello there", "a"):
            pieces = model.stream(prompt, raw=True, max_tokens=10, sampling=GREEDY)
            answer = [piece.token for piece in pieces if piece.token is not None]
            tokens = list(model.encode(prompt, raw=True))
            for token in answer:
                with torch.inference_mode():
                    assert token == int(theirs(torch.tensor([tokens])).logits[0, -1].argmax())
                tokens.append(token)
            assert answer


def test_a_text_prompt_goes_through_the_folders_own_chat_template(moe_model: Path) -> None:
    with library.load(str(moe_model), memory=ROOMY, draft="none") as model:
        ids = model.encode("hi")
        assert (
            model.tokenizer.decode(ids) == "user\nhi\nassistant"
        )  # Jinja drops the last newline, as transformers does
        assert model.tokenizer.has_chat_template
        assert model.tokenizer.end_ids == set(model.tokenizer.encode("<|im_end|>", special=False))


def test_router_scores_are_kept_for_the_next_run(moe_model: Path, tmp_path: Path) -> None:
    with library.load(str(moe_model), memory=ROOMY, draft="none", prompt_tokens=8, context_tokens=64) as model:
        model.generate("hello", raw=True, max_tokens=12, sampling=GREEDY)
    assert list((tmp_path / "home" / "routing").glob("*.npz"))
    with library.load(str(moe_model), memory=ROOMY, draft="none", prompt_tokens=8, context_tokens=64) as model:
        again = model.generate("hello", raw=True, max_tokens=12, sampling=GREEDY)
    assert again.experts is not None


def test_prompts_of_an_moe_model_give_the_same_text_together_and_alone(moe_model: Path) -> None:
    prompts = ["one", "two words", "three"]
    options = {"raw": True, "max_tokens": 8, "sampling": GREEDY}
    with library.load(str(moe_model), memory=ROOMY, draft="none", context_tokens=64) as model:
        alone = [model.generate(prompt, **options).text for prompt in prompts]
    with library.load(str(moe_model), memory=ROOMY, draft="none", context_tokens=64, sequences=3) as model:
        together = [answer.text for answer in model.generate(prompts, **options)]
    assert together == alone


def test_a_hybrid_runs_one_sequence_at_a_time_and_continues_a_conversation(hybrid: Path) -> None:
    with library.load(str(hybrid), memory=ROOMY, context_tokens=128, sequences=4) as model:
        assert model.plan.sequences == 1
        assert model.plan.drafting.name == "none"
        first = model.generate("some words", raw=True, max_tokens=6, sampling=GREEDY)
        longer = "some words" + first.text + " and more"
        continued = model.generate(longer, raw=True, max_tokens=6, sampling=GREEDY)
    with library.load(str(hybrid), memory=ROOMY, context_tokens=128) as model:
        assert model.generate(longer, raw=True, max_tokens=6, sampling=GREEDY).text == continued.text


def test_a_model_at_the_hub_is_planned_from_its_headers_and_run_by_its_name(tiny_llama: Path, tmp_path: Path) -> None:
    hub = StandIn()
    server = serve(hub)
    padded = tiny_llama.read_bytes()
    hub.add("org/tiny", {"tiny-Q8_0.gguf": padded})
    where = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1,localhost"}
    try:
        planned = run_in_subprocess("plan", "org/tiny", "--memory", ROOMY, "--json", **where)
        assert planned.returncode == 0, planned.stderr
        assert not list((tmp_path / "hf").rglob("*.gguf"))  # only headers were fetched
        first = run_in_subprocess("run", "org/tiny", "hello", "--memory", ROOMY, "-n", "4", "-t", "0", **where)
        assert first.returncode == 0, first.stderr
        again = run_in_subprocess(
            "run", "org/tiny", "hello", "--memory", ROOMY, "-n", "4", "-t", "0", HF_HUB_OFFLINE="1", **where
        )
        assert again.stdout == first.stdout
    finally:
        server.shutdown()
        server.server_close()
