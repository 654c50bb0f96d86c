"""Cost of a token, from the hardware's price and from a seller's.

    $ per hour   = rent / utilisation, or (price - resale) / hours of life / utilisation + watts * $/kWh
    $ per token  = $ per hour / 3600 * seconds per token (of all devices together)
    markup       = a seller's price / the hardware's cost

Sources: the split of costs is that of Barroso, Hoelzle, Ranganathan, "The Datacenter as a Computer" (2018), chapter 6;
the markup checks a claim of 250 times the cost.
"""

from dataclasses import dataclass

HOURS_PER_YEAR = 8766.0


@dataclass(frozen=True, kw_only=True)
class Tariff:
    """The payment for a machine. Exactly one of `rent_usd_per_h` and `price_usd` is given."""

    rent_usd_per_h: float | None = None
    price_usd: float | None = None
    life_years: float = 4.0
    resale_share: float = 0.1
    watts: float = 0.0
    usd_per_kwh: float = 0.0
    overhead: float = 1.0  # power of the building per watt of the machine (PUE)
    utilisation: float = 1.0  # share of the paid hours with our computation

    def __post_init__(self) -> None:
        if (self.rent_usd_per_h is None) == (self.price_usd is None):
            raise ValueError("a tariff has either a rent or a price")
        if not 0 < self.utilisation <= 1:
            raise ValueError("utilisation is a share above 0 and at most 1")
        if self.life_years <= 0:
            raise ValueError("life_years must be above 0")

    @property
    def usd_per_h(self) -> float:
        """Dollars per hour of our computation; a rent includes the electricity."""
        if self.rent_usd_per_h is not None:
            return self.rent_usd_per_h / self.utilisation
        assert self.price_usd is not None
        capital = self.price_usd * (1 - self.resale_share) / (self.life_years * HOURS_PER_YEAR)
        return capital / self.utilisation + self.watts * self.overhead / 1000 * self.usd_per_kwh


def usd_per_million(usd_per_h: float, tok_per_s: float) -> float:
    """Dollars per million tokens at a rate."""
    return usd_per_h / 3600 / tok_per_s * 1e6


def markup(price_usd: float, cost_usd: float) -> float:
    """Price over cost."""
    return price_usd / cost_usd


def break_even_batch(price_usd_per_token: float, usd_per_h: float, pass_s_by_batch: dict[int, float]) -> int | None:
    """The smallest batch whose sold tokens pay for the hardware, or None.

    Args:
        price_usd_per_token: price of an output token.
        usd_per_h: cost of all devices.
        pass_s_by_batch: seconds of a decode pass by batch.
    """
    for batch, pass_s in sorted(pass_s_by_batch.items()):
        if price_usd_per_token * batch >= usd_per_h / 3600 * pass_s:
            return batch
    return None


def flop_price(usd_per_h: float, flop_per_s: float, unit: float = 1e14) -> float:
    """Dollars per hour of `unit` FLOP/s."""
    return usd_per_h * unit / flop_per_s
