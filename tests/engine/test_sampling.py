from typing import Any

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from headrace.engine.logits_processors import make_processors
from headrace.engine.sampler import Sampler, distribution
from headrace.engine.stops import StopScanner
from headrace.errors import UsageError
from headrace.model.reasoning import Part
from headrace.sampling_params import FIELDS, SamplingParams

LOGITS = torch.tensor([0.0, 3.0, 1.0, 2.0, -1.0])


def kept(**options: float) -> list[int]:
    return distribution(LOGITS, SamplingParams(**options))[1].tolist()  # type: ignore[arg-type]


def test_temperature_zero_takes_the_likeliest() -> None:
    assert Sampler(SamplingParams(temperature=0)).draw(LOGITS, range(0)) == 1


def test_top_k_keeps_the_k_likeliest() -> None:
    assert kept(top_k=2) == [1, 3]


def test_top_p_keeps_the_tokens_up_to_the_one_that_reaches_it() -> None:
    # probabilities: 0.63, 0.23, 0.09, 0.03, 0.01
    assert kept(top_p=0.6) == [1]
    assert kept(top_p=0.7) == [1, 3]
    assert kept(top_p=0.999) == [1, 3, 2, 0, 4]


def test_min_p_is_relative_to_the_likeliest() -> None:
    assert kept(min_p=0.2) == [1, 3]
    assert kept(min_p=1.0) == [1]


def test_temperature_does_not_change_which_tokens_are_kept() -> None:
    assert kept(top_p=0.7, temperature=5.0) == kept(top_p=0.7)


def test_the_same_seed_draws_the_same_tokens() -> None:
    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=3.0, seed=seed))
        return [sampler.draw(LOGITS, range(position)) for position in range(40)]

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)


def test_draws_follow_the_distribution() -> None:
    sampler = Sampler(SamplingParams(seed=0))
    counts = (
        torch.bincount(torch.tensor([sampler.draw(LOGITS, range(position)) for position in range(4000)]), minlength=5)
        / 4000
    )
    # Three standard deviations of a share of 0.63 in 4000 draws are 0.023.
    assert (counts - LOGITS.softmax(0)).abs().max() < 0.025


IDS = [0, 2, 2, 4, 4, 4]  # a prompt of three tokens, then three generated ones


def processed(**params: Any) -> torch.Tensor:
    logits = LOGITS.clone()
    for process in make_processors(SamplingParams(**params), prompt_tokens=3):
        logits = process(IDS, logits)
    assert torch.equal(LOGITS, UNTOUCHED), "logits belong to the pass"
    return logits


UNTOUCHED = LOGITS.clone()


@pytest.mark.parametrize("penalty", [0.5, 1.3, 4.0])
def test_a_repetition_penalty_equals_that_of_transformers(penalty: float) -> None:
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([IDS]), LOGITS[None].clone())[0]  # type: ignore[arg-type, no-untyped-call]
    assert torch.equal(processed(repetition_penalty=penalty), expected)


def test_presence_and_frequency_penalties_count_generated_tokens() -> None:
    # OpenAI: logit - frequency_penalty * count - presence_penalty * (count > 0)
    expected = LOGITS - torch.tensor([0, 0, 0, 0, 3 * 0.5 + 0.25])
    assert torch.allclose(processed(frequency_penalty=0.5, presence_penalty=0.25), expected)


def test_penalties_may_be_whole_numbers() -> None:
    expected = LOGITS - torch.tensor([0, 0, 0, 0, 3.0 + 1.0])
    assert torch.equal(processed(frequency_penalty=1, presence_penalty=1), expected)


def test_a_logit_bias_is_added_before_the_penalties() -> None:
    assert torch.allclose(processed(logit_bias={1: -2.5, "3": 4}), LOGITS + torch.tensor([0, -2.5, 0, 4, 0]))
    assert processed(logit_bias={0: 10}, repetition_penalty=2.0)[0] == (LOGITS[0] + 10) / 2


def test_penalties_change_what_is_drawn_and_its_confidence() -> None:
    plain, penalised = (
        Sampler(SamplingParams(temperature=0, frequency_penalty=penalty), prompt_tokens=0) for penalty in (0, 2)
    )
    assert plain.draw(LOGITS, [1, 1, 1]) == int(LOGITS.argmax()) == 1
    assert penalised.draw(LOGITS, [1, 1, 1]) != 1


def test_log_probabilities_are_those_of_the_unchanged_logits() -> None:
    sampler = Sampler(SamplingParams(temperature=0.2, logit_bias={0: 50}, logprobs=2))
    found = sampler.logprobs(LOGITS, 0)
    assert found is not None
    expected = LOGITS.log_softmax(0)
    assert found.logprob == pytest.approx(float(expected[0]))
    assert [token for token, _ in found.top] == torch.topk(LOGITS, 2).indices.tolist()
    assert [value for _, value in found.top] == pytest.approx(torch.topk(expected, 2).values.tolist())
    assert Sampler(SamplingParams()).logprobs(LOGITS, 0) is None


def test_whole_numbers_of_any_size_are_used_or_refused() -> None:
    huge = SamplingParams(seed=10**400, top_k=10**400)
    assert 0 <= Sampler(huge).draw(LOGITS, []) < len(LOGITS)
    for name in ("temperature", "presence_penalty"):
        with pytest.raises(UsageError, match="out of range"):
            SamplingParams(**{name: 10**400})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_parameter_that_is_not_finite_is_refused(value: float) -> None:
    for name in ("temperature", "top_p", "frequency_penalty"):
        with pytest.raises(UsageError, match="out of range"):
            SamplingParams(**{name: value})


def test_the_table_of_parameters_is_that_of_the_class() -> None:
    default = SamplingParams()
    assert {one.name: one.default for one in FIELDS} == {
        name: value for name, value in vars(default).items() if name not in ("logit_bias", "logprobs")
    }


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_p": 0}, {"min_p": 2}, {"top_k": -2}, {"presence_penalty": 3}, {"logprobs": 21}]
)
def test_options_out_of_range_are_usage_errors(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="out of range"):
        SamplingParams(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "texts", [["one END two"], ["one E", "ND two"], ["one ", "E", "N", "D", " two"], ["one EN", "D"]]
)
def test_a_stop_string_is_found_over_the_borders_of_tokens(texts: list[str]) -> None:
    scanner = StopScanner(["END"])
    shown = ""
    for text in texts:
        found, stopped = scanner.push([(Part.CONTENT, text)])
        shown += "".join(part for _, part in found)
        if stopped:
            break
    assert stopped
    assert shown == "one "


def test_text_that_only_starts_like_a_stop_string_is_shown() -> None:
    scanner = StopScanner(["END", "\n\n"])
    found = [segment for text in ["an E", "N", "T\n", "x\n"] for segment in scanner.push([(Part.CONTENT, text)])[0]]
    assert "".join(text for _, text in found + scanner.rest()) == "an ENT\nx\n"


def test_the_earliest_of_several_stop_strings_counts() -> None:
    scanner = StopScanner(["later", "now"])
    assert scanner.push([(Part.CONTENT, "right now or later")]) == ([(Part.CONTENT, "right ")], True)
