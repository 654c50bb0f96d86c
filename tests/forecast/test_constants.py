"""The constants that come with this version."""

import pytest

from headrace.forecast.architecture import table
from headrace.forecast.constants import SOFTWARE, load_constants
from headrace.forecast.passes import Rates
from headrace.forecast.streaming import FeedRates

CONSTANTS = load_constants()


@pytest.mark.parametrize("family", sorted(CONSTANTS.rates))
def test_fitted_rates_are_shares_and_seconds(family: str) -> None:
    rates = CONSTANTS.rates[family]

    assert all(0 < share <= 1 for share in (rates.memory_share, rates.die_share, rates.flop_share, rates.unhidden))
    assert all(0 < seconds < 0.01 for seconds in (rates.layer_s, rates.routing_s, rates.start_s, rates.hop_s))
    assert rates.chain_bytes > 4


@pytest.mark.parametrize("category", sorted(CONSTANTS.feeds))
def test_fitted_feed_rates_are_shares(category: str) -> None:
    feed, rates = CONSTANTS.feed_of(category)

    assert all(0 < share <= 1 for share in (feed.link_share, feed.unhidden, feed.expert_share))
    # Share of the disk's nominal rate: a file in the page cache, or a disk above its nominal rate, may exceed 1.
    assert 0 < feed.disk_share < 1.5
    assert 0 < rates.layer_s < 0.01


@pytest.mark.parametrize("category", ["decode", "prefill", "tensor parallel", "dense streaming", "MoE streaming"])
def test_measurements_lie_on_both_sides_of_the_prediction(category: str) -> None:
    low, high = CONSTANTS.spread[category]
    assert 0.3 < low < 1 < high < 3


def test_every_family_of_devices_has_software_rates() -> None:
    assert set(SOFTWARE.values()) <= set(CONSTANTS.rates)
    assert {entry.get("family", "cuda") for entry in table("devices").values()} & set(SOFTWARE) == set(SOFTWARE)


def test_unmeasured_software_has_the_rates_of_servers() -> None:
    assert CONSTANTS.rates_of("abacus") == CONSTANTS.rates_of("server")
    assert CONSTANTS.rates_of("server") != Rates()


def test_an_unmeasured_category_of_streaming_has_the_default_rates() -> None:
    assert CONSTANTS.feed_of("carrier pigeons")[0] == FeedRates()
