"""Sampling parameters: one table makes the options of the command line, the parsing of requests and the defaults. No torch.

To add a parameter, add a row to `FIELDS`, an attribute to `SamplingParams`, and its effect to `engine/sampler.py` or
`engine/logits_processors.py`.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from typing import Any

from headrace.errors import UsageError

MAX_TOP_LOGPROBS = 20  # as in OpenAI's API
MAX_LOGIT_BIAS = 300  # tokens, as in OpenAI's API


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingField:
    """One numeric sampling parameter: its range, and its names elsewhere."""

    name: str  # of the attribute, the JSON key and transformers' generation_config
    kind: type[int] | type[float]
    default: float | None  # a value that changes nothing, except temperature's
    least: float = -inf
    most: float = inf
    least_is_allowed: bool = True
    off: float | None = None  # another server's value for `default`
    gguf_key: str | None = None  # in the metadata, behind `general.sampling.`
    flags: tuple[str, ...] = ()
    help: str = ""

    @property
    def range(self) -> str:
        """The allowed values in words."""
        if self.most == inf:
            return f"{self.least:g} or more" if self.least > -inf else "any number"
        return f"{'' if self.least_is_allowed else 'above '}{self.least:g} to {self.most:g}"

    def checked(self, value: object) -> float | None:
        """The value, if it has the type and is in range.

        Raises:
            UsageError: it is not.
        """
        if value is None and self.default is None:
            return None
        numbers = (int, float) if self.kind is float else (int,)
        if isinstance(value, bool) or not isinstance(value, numbers):
            raise UsageError(f"{self.name} is {value!r}", hint="a number" if self.kind is float else "a whole number")
        if self.off is not None and value == self.off:
            return self.default
        in_range = self.least <= value <= self.most and (self.least_is_allowed or value != self.least)
        if not in_range:  # NaN is in no range
            raise UsageError(f"{self.name} {value} is out of range", hint=self.range)
        return self.kind(value)


FIELDS = (
    SamplingField(
        name="temperature",
        kind=float,
        default=1.0,
        least=0,
        most=100,
        gguf_key="temp",
        flags=("-t", "--temperature", "--temp"),
        help="0 is greedy.",
    ),
    SamplingField(
        name="top_k",
        kind=int,
        default=0,
        least=0,
        off=-1,  # vLLM, llama.cpp
        gguf_key="top_k",
        flags=("--top-k",),
        help="Keep the k likeliest tokens; 0 is off.",
    ),
    SamplingField(
        name="top_p",
        kind=float,
        default=1.0,
        least=0,
        most=1,
        least_is_allowed=False,
        gguf_key="top_p",
        flags=("--top-p",),
        help="Keep the likeliest of this much probability.",
    ),
    SamplingField(
        name="min_p",
        kind=float,
        default=0.0,
        least=0,
        most=1,
        gguf_key="min_p",
        flags=("--min-p",),
        help="Keep tokens at least this likely, relative to the likeliest.",
    ),
    SamplingField(
        name="repetition_penalty",
        kind=float,
        default=1.0,
        least=0,
        most=100,
        least_is_allowed=False,
        gguf_key="penalty_repeat",
        flags=("--repetition-penalty", "--repeat-penalty"),
        help="Divide the logits of tokens in prompt and answer; 1 is off.",
    ),
    SamplingField(
        name="presence_penalty",
        kind=float,
        default=0.0,
        least=-2,
        most=2,
        flags=("--presence-penalty",),
        help="Subtract from the logits of tokens in the answer; 0 is off.",
    ),
    SamplingField(
        name="frequency_penalty",
        kind=float,
        default=0.0,
        least=-2,
        most=2,
        flags=("--frequency-penalty",),
        help="Subtract from the logits of tokens for each time they are in the answer; 0 is off.",
    ),
    SamplingField(name="seed", kind=int, default=None, flags=("--seed",), help="Draw the same tokens every time."),
)
NAMES = {one.name: one for one in FIELDS}


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of a request, named as in vLLM. Temperature 0 is greedy; without a seed every run differs.

    Penalties and `logit_bias` change the logits before anything else. `repetition_penalty` looks at prompt and answer, the
    other penalties at the answer, as in vLLM.

    Raises:
        UsageError: a value has the wrong type or is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to the logits, by token id; -100 to 100
    logprobs: int | None = (
        None  # likeliest tokens whose log-probabilities are reported with each token; None: nothing is
    )

    def __post_init__(self) -> None:
        for one in FIELDS:
            object.__setattr__(self, one.name, one.checked(getattr(self, one.name)))
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))
        count = self.logprobs
        if count is not None and (isinstance(count, bool) or not isinstance(count, int)):
            raise UsageError(f"logprobs is {count!r}", hint=f"0 to {MAX_TOP_LOGPROBS}, or None")
        if count is not None and not 0 <= count <= MAX_TOP_LOGPROBS:
            raise UsageError(f"logprobs {count} is out of range", hint=f"0 to {MAX_TOP_LOGPROBS}")


def _checked_bias(bias: object) -> dict[int, float]:
    if not isinstance(bias, Mapping) or len(bias) > MAX_LOGIT_BIAS:
        raise UsageError("logit_bias is not a table of at most 300 tokens", hint="give {token id: bias}")
    found: dict[int, float] = {}
    for token, value in bias.items():
        if isinstance(token, str) and token.isascii() and token.isdecimal():  # keys of JSON objects are texts
            token = int(token)
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise UsageError(f"logit_bias names {token!r}", hint="keys are token ids")
        if isinstance(value, bool) or not isinstance(value, int | float) or not -100 <= value <= 100:
            raise UsageError(f"logit_bias of token {token} is {value!r}", hint="-100 to 100")
        found[token] = float(value)
    return found


def recommended(found: Mapping[str, object]) -> SamplingParams:
    """The parameters that a file recommends, by name; invalid values are ignored."""
    kept: dict[str, Any] = {}
    for name, value in found.items():
        if value is not None:
            with suppress(UsageError):
                kept[name] = NAMES[name].checked(value)
    return SamplingParams(**kept)
