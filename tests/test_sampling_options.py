"""Sampling parameters from the command line and from Python to the tokens that are drawn, on a model whose tokens are known."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from transformers.convert_slow_tokenizer import bytes_to_unicode

import headrace
from headrace.cli import main
from headrace.errors import UsageError
from headrace.plan import Profile
from headrace.plan.profile import save_profile
from headrace.units import MIB
from support.zoo.by_position import write_says
from support.zoo.scripted import CHATML, NORMAL, byte_level

VOCABULARY = byte_level()
NUMBER = VOCABULARY["tokens"].index


@pytest.fixture
def path(tmp_path: Path, profile: Profile) -> Path:
    save_profile(
        replace(profile, runtime_bytes=400 * MIB, disk_bytes_per_s={"0": 2e9})
    )  # else `run` measures the machine
    said = [NUMBER(one) for one in "abcdef"]
    return write_says(tmp_path / "m.gguf", said, "hi", **VOCABULARY, template=CHATML, eos=NUMBER("<|im_end|>"))


def run(path: Path, *options: str) -> Result:
    command = ["run", str(path), "hi", "--json", "-q", "-n", "3", "--draft", "none", "--temp", "0", "--memory", "2GiB"]
    return CliRunner().invoke(main, [*command, *options])


def test_the_value_that_switches_top_k_off_elsewhere_does_so_here(path: Path) -> None:
    assert json.loads(run(path, "--top-k", "-1").stdout)["text"] == json.loads(run(path, "--top-k", "0").stdout)["text"]
    assert run(path, "--top-k", "-2").exit_code == 2


def test_a_bias_and_log_probabilities_are_taken_from_the_command_line(path: Path) -> None:
    result = run(path, "--logit-bias", f"{NUMBER('z')}+100", "--logprobs", "2")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["text"] == "zzz"
    first = found["logprobs"]["content"][0]
    assert first["token"] == "z"
    assert first["top_logprobs"][0]["token"] == "a"
    assert first["logprob"] < first["top_logprobs"][0]["logprob"] < 0


def test_without_logprobs_there_are_none(path: Path) -> None:
    found = json.loads(run(path, "--presence-penalty", "0.5").stdout)
    assert found["text"] == "abc"
    assert "logprobs" not in found


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--logit-bias", "5"], "no token id with a bias"),
        (["--logit-bias", "5+1000"], "-100 to 100"),
        (["--frequency-penalty", "3"], "range -2"),
        (["--repetition-penalty", "0"], "range 0<x"),
        (["--logprobs", "21"], "range 0<=x<=20"),
        (["--logit-bias", "999999+1"], "logit_bias names token 999999"),
    ],
)
def test_a_parameter_out_of_range_is_a_usage_error(path: Path, options: list[str], said: str) -> None:
    result = run(path, *options)
    assert result.exit_code == 2
    assert said in result.stderr


def test_a_completion_holds_the_log_probabilities_of_its_tokens(path: Path, profile: Profile) -> None:
    sampling = headrace.SamplingParams(temperature=0, logprobs=0)
    with headrace.load(path, memory="2GiB", draft=None, profile=profile) as model:
        found = model.generate("hi", max_tokens=2, sampling=sampling)
        assert found.logprobs is not None
        assert [one["token"] for one in found.logprobs] == ["a", "b"]
        assert [one["top_logprobs"] for one in found.logprobs] == [[], []]
        with pytest.raises(UsageError, match="logit_bias names token 999999"):
            model.generate("hi", sampling=headrace.SamplingParams(logit_bias={999999: 1}))
        assert model.generate("hi", max_tokens=2, sampling=headrace.SamplingParams(temperature=0)).logprobs is None


def test_log_probabilities_hold_the_bytes_of_tokens_that_end_within_a_character(
    tmp_path: Path, profile: Profile
) -> None:
    parts = [spelled("é".encode()[:1]), spelled("é".encode()[1:])]
    vocabulary = byte_level(more=[("spare", NORMAL)])
    said = [vocabulary["tokens"].index(part) for part in parts]
    end = vocabulary["tokens"].index("<|im_end|>")
    path = write_says(tmp_path / "m.gguf", said, "hi", **vocabulary, template=CHATML, eos=end)
    with headrace.load(path, memory="2GiB", draft=None, profile=profile) as model:
        found = model.generate("hi", max_tokens=4, sampling=headrace.SamplingParams(temperature=0, logprobs=0))
    assert found.text == "é"
    assert found.logprobs is not None
    assert [one["bytes"] for one in found.logprobs] == [[0xC3], [0xA9]]


def spelled(data: bytes) -> str:
    return "".join(bytes_to_unicode()[byte] for byte in data)
