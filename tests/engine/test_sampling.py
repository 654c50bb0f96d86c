import pytest
import torch

from headrace.engine import Sampling
from headrace.engine.sampling import Sampler, distribution
from headrace.engine.stops import StopScanner
from headrace.errors import UsageError
from headrace.model.reasoning import Part

LOGITS = torch.tensor([0.0, 3.0, 1.0, 2.0, -1.0])


def kept(**options: float) -> list[int]:
    return distribution(LOGITS, Sampling(**options))[1].tolist()  # type: ignore[arg-type]


def test_temperature_zero_takes_the_likeliest() -> None:
    assert Sampler(Sampling(temperature=0)).draw(LOGITS, 0) == 1


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
        sampler = Sampler(Sampling(temperature=3.0, seed=seed))
        return [sampler.draw(LOGITS, position) for position in range(40)]

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)


def test_draws_follow_the_distribution() -> None:
    sampler = Sampler(Sampling(seed=0))
    counts = (
        torch.bincount(torch.tensor([sampler.draw(LOGITS, position) for position in range(4000)]), minlength=5) / 4000
    )
    # Three standard deviations of a share of 0.63 in 4000 draws are 0.023.
    assert (counts - LOGITS.softmax(0)).abs().max() < 0.025


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_p": 0}, {"min_p": 2}, {"top_k": -1}])
def test_options_out_of_range_are_usage_errors(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="out of range"):
        Sampling(**wrong)  # type: ignore[arg-type]


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
