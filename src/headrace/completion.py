"""A whole answer with its measurements, made from the outputs of its request."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from headrace._version import __version__
from headrace.engine.request import PassTotals, RequestOutput
from headrace.model import Tokenizer
from headrace.plan import Plan
from headrace.process import peak_bytes

_LEAST_LOGPROB = -9999.0  # for impossible tokens, as in OpenAI's API: JSON has no infinity


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A whole answer with its measurements; `--json` prints its `as_json`."""

    text: str
    reasoning: str  # reasoning before the answer, where the model marks it; not part of `text`
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    timings: dict[str, float | int | None]
    memory: dict[str, int]
    speculation: dict[str, Any]
    experts: dict[str, Any] | None  # expert cache statistics of an MoE model
    plan: Plan = field(repr=False)
    kv_cache_type: str = "F16"
    cached_tokens: int = 0  # tokens of the prompt that were in a KV cache
    logprobs: list[dict[str, Any]] | None = None  # of each token, in the format of OpenAI's chat completions

    def as_json(self) -> dict[str, Any]:
        """One JSON-ready object; keys carry their units and are only ever added to."""
        return {
            "text": self.text,
            "reasoning": self.reasoning,
            "finish_reason": self.finish_reason,
            "model": self.plan.model,
            "version": __version__,
            "usage": {
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": self.completion_tokens,
                "total_tokens": self.prompt_tokens + self.completion_tokens,
                "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            },
            "timings": self.timings,
            "memory": self.memory,
            "kv_cache_type": self.kv_cache_type,
            "speculation": self.speculation,
            "experts": self.experts,
            "plan": self.plan.as_json(),
        } | ({} if self.logprobs is None else {"logprobs": {"content": self.logprobs}})


def make_completion(
    outputs: Sequence[RequestOutput],
    plan: Plan,
    load_s: float,
    accepted_by_position: Sequence[tuple[int, int]],
    logprobs: list[dict[str, Any]] | None,
) -> Completion:
    """The completion of one request.

    Args:
        outputs: all outputs of the request, or those before it was interrupted.
        plan: the plan of the model.
        load_s: seconds that loading took.
        accepted_by_position: draft tokens tested and accepted since loading, by their position in a draft.
        logprobs: log-probabilities as JSON, if they were asked for.
    """
    last = outputs[-1] if outputs else None
    prefill, decode = (last.stats.prefill, last.stats.decode) if last else (PassTotals(), PassTotals())
    decode_s = last.stats.last_token_s - last.stats.ttft_s if last and decode.passes else None
    read, seconds = prefill.read_bytes + decode.read_bytes, prefill.seconds + decode.seconds
    stall_s = prefill.stall_s + decode.stall_s
    return Completion(
        text="".join(output.text for output in outputs),
        reasoning="".join(output.reasoning for output in outputs).rstrip(),
        finish_reason=(last.finish_reason if last else None) or "interrupted",
        prompt_tokens=last.prompt_tokens if last else 0,
        completion_tokens=sum(output.token is not None for output in outputs),
        timings={
            "load_s": load_s,
            "queue_s": last.stats.queue_s if last else None,
            "ttft_s": last.stats.ttft_s if last else None,
            "decode_s": decode_s,
            "decode_tok_per_s": decode.tokens / decode_s if decode_s else None,
            "passes": prefill.passes + decode.passes,
            "tokens_per_pass": decode.tokens / decode.passes if decode.passes else None,
            "read_bytes": read,
            "read_bytes_per_pass": decode.read_bytes // decode.passes if decode.passes else None,
            "read_bytes_per_s": read / seconds if seconds else None,
            "stall_s": stall_s,
            "decode_stall_s": decode.stall_s,
            "compute_s": seconds - stall_s,
            "draft_s": prefill.draft_s + decode.draft_s,
        },
        memory={
            "budget_bytes": plan.budget.nbytes,
            "peak_bytes": peak_bytes(),
            "pinned_bytes": plan.pinned_bytes,
            "decode_pinned_bytes": plan.decode_pinned_bytes,
            "streamed_bytes_per_pass": plan.streamed_bytes_per_pass,
            "ring_bytes": plan.ring_bytes,
            "repacked_bytes": plan.repacked_bytes,
            "kv_bytes": plan.kv_bytes,
            "draft_bytes": plan.draft_bytes,
        },
        speculation={
            "draft": plan.drafting.name,
            "drafted": decode.drafted,
            "accepted": decode.accepted,
            "accepted_by_position": [{"tested": tested, "accepted": hits} for tested, hits in accepted_by_position],
            "passes_bound_by": dict(decode.bound_by),
        },
        experts=_experts(plan, decode),
        plan=plan,
        kv_cache_type=last.kv_cache_type if last else "F16",
        cached_tokens=last.stats.cached_tokens if last else 0,
        logprobs=logprobs,
    )


def _experts(plan: Plan, decode: PassTotals) -> dict[str, Any] | None:
    """Expert cache hits and bytes read during decode; None for a dense model."""
    if plan.experts is None:
        return None
    requested = decode.expert_hits + decode.expert_prefetched + decode.expert_misses
    return {
        "hit_rate": decode.expert_hits / requested if requested else None,
        "prefetched_rate": decode.expert_prefetched / requested if requested else None,
        "bytes_per_token": decode.expert_read_bytes / decode.tokens if decode.tokens else None,
        "wasted_bytes": decode.expert_wasted_bytes,
        "slots": plan.expert_slots,
    }


def logprobs_json(outputs: Sequence[RequestOutput], tokenizer: Tokenizer) -> list[dict[str, Any]] | None:
    """Log-probabilities of each token, as in OpenAI's chat completions; None: not asked for."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.bytes_of(token)
        text = data.decode(errors="replace")  # a token may end within a character
        return {"token": text, "logprob": max(logprob, _LEAST_LOGPROB), "bytes": list(data), "id": token}

    found = [output.logprobs for output in outputs if output.logprobs is not None]
    if not found:
        return None
    return [
        entry(one.token, one.logprob) | {"top_logprobs": [entry(token, value) for token, value in one.top]}
        for one in found
    ]
