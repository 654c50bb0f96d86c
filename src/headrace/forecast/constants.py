"""Constants fitted to published measurements by `make accuracy`, and the error interval of the predictions."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache

from headrace.forecast.architecture import table
from headrace.forecast.passes import Rates
from headrace.forecast.streaming import FeedRates

# Software family of a machine, by the family of its devices in the table.
SOFTWARE = {"cuda": "server", "metal": "metal", "rocm": "other-gpu", "oneapi": "other-gpu", "tpu": "tpu", "cpu": "cpu"}


@dataclass(frozen=True, kw_only=True)
class Constants:
    """Rates by family, feed rates by category, and measured / predicted (middle 80 %) by category."""

    rates: Mapping[str, Rates]
    feeds: Mapping[str, tuple[FeedRates, float, float]]
    spread: Mapping[str, tuple[float, float]]

    def rates_of(self, family: str) -> Rates:
        """The constants of a software family; an unmeasured one gets those of servers."""
        return self.rates.get(family) or self.rates.get("server") or Rates()

    def feed_of(self, category: str) -> tuple[FeedRates, Rates]:
        """Feed rates of a streaming category, and the rates of its compute."""
        feed, layer_s, chain_bytes = self.feeds.get(category, (FeedRates(), 3e-4, 60.0))
        return feed, replace(Rates(), layer_s=layer_s, chain_bytes=chain_bytes)


@cache
def load_constants() -> Constants:
    """The constants of this version."""
    found = table("constants")
    names = {field.name for field in fields(FeedRates)}
    return Constants(
        rates={family: Rates(**values) for family, values in found.get("rates", {}).items()},
        feeds={
            category: (
                FeedRates(**{k: v for k, v in values.items() if k in names}),
                values["layer_s"],
                values["chain_bytes"],
            )
            for category, values in found.get("feed", {}).items()
        },
        spread={category: (values["low"], values["high"]) for category, values in found.get("spread", {}).items()},
    )
