"""Fields of a request in OpenAI's format, with those of vLLM and llama.cpp. Each is obeyed, neutral or refused by name.

A field with the value null is absent. A neutral value is the default of an unsupported feature, or only labels, bills or
schedules a request. Every other field would change the answer, so it is an error and not ignored.
"""

from collections.abc import Mapping
from typing import Any

from headrace.errors import UsageError, did_you_mean
from headrace.sampling_params import NAMES

_ANY = object()  # every value is neutral

_OBEYED = frozenset({"model", "max_tokens", "stop", "stop_token_ids", "logit_bias", "logprobs", *NAMES})
_OBEYED_IN_CHAT = _OBEYED | {
    "messages", "max_completion_tokens", "chat_template_kwargs", "reasoning_effort", "documents", "add_generation_prompt",
    "continue_final_message", "top_logprobs",
}  # fmt: skip
_OBEYED_IN_COMPLETIONS = _OBEYED | {"prompt", "echo"}

_NEUTRAL: dict[str, Any] = {
    # OpenAI
    **dict.fromkeys(("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"), _ANY),
    **dict.fromkeys(("prompt_cache_retention", "prediction", "stream_options", "parallel_tool_calls"), _ANY),
    "n": (1,),
    "best_of": (1,),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "stream": (False,),
    "echo": (False,),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    # vLLM
    **dict.fromkeys(("request_id", "session_id", "priority", "cache_salt", "truncation_side", "stream_interval"), _ANY),
    **dict.fromkeys(("return_tokens_as_token_ids", "return_token_offsets", "return_mm_kwargs"), _ANY),
    **dict.fromkeys(("routed_experts_prompt_start", "spaces_between_special_tokens"), _ANY),
    **dict.fromkeys(("guided_decoding_backend", "guided_whitespace_pattern"), _ANY),
    "length_penalty": (1,),
    **dict.fromkeys(("use_beam_search", "ignore_eos", "include_stop_str_in_output", "watermarking"), (False,)),
    **dict.fromkeys(("return_token_ids", "return_prompt_text"), (False,)),
    **dict.fromkeys(("skip_special_tokens", "include_reasoning", "detokenize"), (True,)),
    "min_tokens": (0,),
    "thinking_token_budget": (-1,),
    "bad_words": ([],),
    **dict.fromkeys(("media_io_kwargs", "mm_processor_kwargs", "vllm_xargs"), ({},)),
    # llama.cpp
    **dict.fromkeys(("cache_prompt", "id_slot", "n_keep", "n_cache_reuse", "repeat_last_n", "min_keep"), _ANY),
    **dict.fromkeys(("sse_ping_interval", "penalty_last_n", "mirostat_tau", "mirostat_eta", "dry_base"), _ANY),
    **dict.fromkeys(("dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers"), _ANY),
    **dict.fromkeys(("xtc_threshold", "dynatemp_exponent"), _ANY),
    **dict.fromkeys(("repeat_penalty", "typical_p", "typ_p", "tfs_z", "n_cmpl"), (1,)),
    **dict.fromkeys(("mirostat", "dry_multiplier", "xtc_probability", "dynatemp_range", "n_probs"), (0,)),
    **dict.fromkeys(("n_indent", "t_max_predict_ms"), (0,)),
    **dict.fromkeys(("top_n_sigma", "adaptive_target", "thinking_budget_tokens", "reasoning_budget_tokens"), (-1,)),
    **dict.fromkeys(("timings_per_token", "return_progress", "return_tokens", "post_sampling_probs"), (False,)),
    **dict.fromkeys(("thinking_forced_open", "parse_tool_calls"), (False,)),
    "lora": ([],),
    "grammar": ("",),
    "reasoning_format": ("auto", "deepseek"),
}
_NEUTRAL_IN_CHAT = _NEUTRAL | {
    "modalities": (["text"],), "add_special_tokens": (False,),
}  # fmt: skip
_NEUTRAL_IN_COMPLETIONS = _NEUTRAL | {"suffix": ("",), "add_special_tokens": (True,), "top_logprobs": (0,)}
_ADVICE = {"n": "ask several times with different seeds", "stream": "results are written when they are complete"}


def check_fields(body: Mapping[str, Any], *, chat: bool) -> None:
    """Raise `UsageError` for the first field that is neither obeyed nor neutral. `body` holds no nulls."""
    obeyed = _OBEYED_IN_CHAT if chat else _OBEYED_IN_COMPLETIONS
    neutral = _NEUTRAL_IN_CHAT if chat else _NEUTRAL_IN_COMPLETIONS
    for name, value in body.items():
        if name in obeyed:
            continue
        allowed = neutral.get(name, ())
        if allowed is _ANY or any(_same(value, one) for one in allowed):
            continue
        if name in neutral or name in _KNOWN:
            advice = f", {_ADVICE[name]}" if name in _ADVICE else ""
            raise UsageError(f"{name} is not supported{advice}", hint="leave it out")
        raise UsageError(f"the field {name!r} is not known", hint=did_you_mean(name, obeyed | neutral.keys()))


# Valid in other servers or endpoints: reported as unsupported, not as misspelled.
_KNOWN = frozenset({"echo", "suffix", "audio", "guided_json", "structured_outputs", "prompt", "messages"})


def _same(value: Any, neutral: Any) -> bool:
    """True if both are equal and both or neither are bool: True is not 1."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


def without_nulls(value: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are not null."""
    return {name: one for name, one in value.items() if one is not None}
