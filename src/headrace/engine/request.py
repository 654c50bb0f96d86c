"""Data between callers and the engine: requests go in, outputs and statistics come back."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from headrace.engine.sampler import TokenLogprobs
from headrace.engine.timeline import PassStats
from headrace.errors import UsageError
from headrace.sampling_params import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and its settings."""

    token_ids: Sequence[int]  # of the prompt
    sampling: SamplingParams
    max_tokens: int | None = None  # None: until the model ends or the context is full
    stop: Sequence[str] = ()
    stop_token_ids: frozenset[int] = frozenset()  # tokens that end the output beside the model's own
    tail: Sequence[int] = ()  # tokens that the chat template wrote after the conversation
    raw: bool = False  # no separation of reasoning and content

    def __post_init__(self) -> None:
        """Refuse values that would fail later, or never end.

        Raises:
            UsageError: a field is invalid.
        """
        if not self.token_ids or not all(isinstance(token, int) for token in self.token_ids):
            raise UsageError("the prompt is empty or holds something else than tokens", hint="at least one token")
        limit = self.max_tokens
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
            raise UsageError(f"max_tokens is {limit!r}", hint="1 or more, or None")
        if not isinstance(self.sampling, SamplingParams):
            raise UsageError(f"sampling is {self.sampling!r}", hint="give a headrace.SamplingParams, or None")
        stops = self.stop
        if (
            isinstance(stops, str | bytes)
            or not isinstance(stops, Sequence)
            or not all(isinstance(s, str) for s in stops)
        ):
            raise UsageError(f"stop is {stops!r}", hint="give a text or a list of texts")


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Progress of a prefill: the pass, and the position in it."""

    pass_number: int
    passes: int
    done: int  # steps of this pass that are done: weight groups, MoE layers
    steps: int  # steps of a pass
    read_bytes: int  # bytes read since the request began, without experts
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PassTotals:
    """Sums over passes that computed rows of a request. Others may have shared them."""

    passes: int = 0
    tokens: int = 0  # generated for this request
    seconds: float = 0.0
    read_bytes: int = 0
    stall_s: float = 0.0
    draft_s: float = 0.0
    drafted: int = 0  # draft tokens of this request
    accepted: int = 0
    expert_read_bytes: int = 0
    expert_hits: int = 0
    expert_prefetched: int = 0
    expert_misses: int = 0
    expert_wasted_bytes: int = 0
    bound_by: dict[str, int] = field(default_factory=dict)  # passes by their bottleneck

    def plus(self, stats: PassStats, tokens: int, drafted: int, accepted: int) -> "PassTotals":
        """The sums with one more pass."""
        return PassTotals(
            passes=self.passes + 1,
            tokens=self.tokens + tokens,
            seconds=self.seconds + stats.seconds,
            read_bytes=self.read_bytes + stats.read_bytes,
            stall_s=self.stall_s + stats.stall_s,
            draft_s=self.draft_s + stats.draft_s,
            drafted=self.drafted + drafted,
            accepted=self.accepted + accepted,
            expert_read_bytes=self.expert_read_bytes + stats.expert_read_bytes,
            expert_hits=self.expert_hits + stats.expert_hits,
            expert_prefetched=self.expert_prefetched + stats.expert_prefetched,
            expert_misses=self.expert_misses + stats.expert_misses,
            expert_wasted_bytes=self.expert_wasted_bytes + stats.expert_wasted_bytes,
            bound_by=self.bound_by | {stats.bound_by: self.bound_by.get(stats.bound_by, 0) + 1},
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestStats:
    """Times and sums of one request. Times are seconds since the request was added."""

    queue_s: float  # until its first pass began
    ttft_s: float
    last_token_s: float
    cached_tokens: int  # tokens of the prompt from a KV cache, or from a sequence that computed them
    prefill: PassTotals  # passes up to the first token
    decode: PassTotals  # passes after it


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestOutput:
    """One generated token of a request, or the end of it."""

    request_id: int
    text: str  # text that the token completed
    reasoning: str = ""  # reasoning before the content, where the model marks it
    token: int | None  # token id; None in the last output of a request, which says why it ended
    prompt_tokens: int
    completion_tokens: int
    stats: RequestStats
    index: int = 0  # number of the prompt, where several were given
    finish_reason: str | None = None  # "stop" or "length", in the last output of its request
    kv_cache_type: str = "F16"  # type of the KV cache; a wider one after an overflow
    logprobs: TokenLogprobs | None = None  # of `token`, if the sampling parameters ask for them

    @property
    def ttft_s(self) -> float:
        """Seconds until the first token."""
        return self.stats.ttft_s


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestError:
    """The end of a request that failed."""

    request_id: int
    error: BaseException


Event = Progress | RequestOutput | RequestError
