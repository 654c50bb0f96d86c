"""The memory of one sequence as the model itself keeps it: transformers' own cache, for models beyond keys and values.

State-space and linear-attention layers sum up what they have seen; other models compute attention in ways of their own
(position biases, chosen keys, shared layers). They run as transformers would run them, one sequence at a time. What such a
cache has seen can be forgotten only where every layer keeps plain keys and values; else the sequence is computed again.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer


class ModelCache:
    """Speaks as `KVCache` does to those who schedule: a length, a capacity, and how to forget."""

    def __init__(self, make: Callable[[], Any], capacity: int, continues: bool = True, opening: int = 0):
        """`make` gives an empty cache of the model; `continues`: several rows may follow what it has seen.

        `opening`: of the first pass so many tokens, its last, are the decoder's, and the others the encoder's; 0: there is none.
        """
        self.continues = continues
        self.opening = opening
        self.encoded: Any = None  # what the encoder made of its tokens
        self.capacity = capacity
        self.length = 0
        self.states: Any = make()
        self._make = make

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on, or everything where that cannot be done."""
        assert 0 <= length <= self.length
        if length == self.length:
            return
        plain = type(self.states) is DynamicCache and all(type(layer) is DynamicLayer for layer in self.states.layers)
        if length and plain:
            self.states.crop(length - self.length)
            self.length = length
        else:
            self._reset()

    def settle(self) -> None:
        """A pass with rows of this cache has ended well."""

    def abandon(self) -> None:
        """A pass with rows of this cache has failed: some layers may have seen its rows."""
        self._reset()

    def _reset(self) -> None:
        self.states, self.encoded, self.length = self._make(), None, 0


def parameters_of(model: PreTrainedModel) -> Mapping[str, inspect.Parameter]:
    """What the model's forward takes."""
    return inspect.signature(model.forward).parameters


def maker_of(model: PreTrainedModel) -> Callable[[], Any]:
    """Makes empty caches of the class that the model is written for."""
    if model.config.is_encoder_decoder:
        config = getattr(model.get_decoder(), "config", model.config)
        return lambda: EncoderDecoderCache(DynamicCache(config=config), DynamicCache())
    module = inspect.getmodule(type(model))
    own = [
        value
        for name, value in vars(module).items()
        if name.endswith("Cache") and name.startswith(_family(model)) and not issubclass(value, CacheLayerMixin)
    ]
    if own:
        given = {"config": model.config, "max_batch_size": 1, "dtype": torch.float32}
        taken = {key: given[key] for key in given.keys() & inspect.signature(own[0]).parameters.keys()}
        return lambda: own[0](**taken)
    return lambda: DynamicCache(config=model.config)


def _family(model: PreTrainedModel) -> str:
    """What the classes of the model's family begin with."""
    return type(model).__name__.removesuffix("ForCausalLM").removesuffix("LMHeadModel")


def sees_a_window(model: PreTrainedModel) -> bool:
    """Whether some layers look only so far back, which one mask for all layers cannot say."""
    config = model.config.get_text_config()
    return bool(getattr(config, "sliding_window", None)) or "local" in getattr(config, "attention_layers", ())


def sees_chunks(model: PreTrainedModel) -> bool:
    """Whether some layers look back to the beginning of a chunk only, which no argument of their attention says."""
    return "chunked_attention" in (getattr(model.config.get_text_config(), "layer_types", None) or ())


def keeps_states(model: PreTrainedModel) -> bool:
    """Whether some layer remembers other things than keys and values."""
    if "past_key_values" not in parameters_of(model):
        return True
    try:
        cache = maker_of(model)()
    except (TypeError, ValueError, KeyError, AttributeError):
        return True
    if type(cache) is not DynamicCache:
        return True
    plain = ("DynamicLayer", "DynamicSlidingWindowLayer")
    return any(type(layer).__name__ not in plain for layer in cache.layers)


def arguments_for(model: PreTrainedModel, cache: ModelCache, tokens: torch.Tensor) -> dict[str, Any]:
    """Arguments of a forward over new tokens (1, rows) of one sequence. An encoder runs here, when the sequence begins."""
    known = parameters_of(model)
    name = "cache_params" if "cache_params" in known else "past_key_values"
    arguments: dict[str, Any] = {name: cache.states, "use_cache": True}
    if cache.opening:
        if cache.encoded is None:
            cache.encoded = model.get_encoder()(input_ids=tokens[:, : -cache.opening])
            tokens = tokens[:, -cache.opening :]
        return arguments | {"encoder_outputs": cache.encoded, "decoder_input_ids": tokens}
    if "position_ids" in known:
        arguments["position_ids"] = torch.arange(cache.length, cache.length + tokens.shape[1])[None]
    return arguments | {"input_ids": tokens}


def trial_of(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Arguments of two forwards: the beginning of a text, and its next token."""
    cache = ModelCache(maker_of(model), 4, opening=int(model.config.is_encoder_decoder))
    for count in (3 if cache.opening else 2, 1):
        yield arguments_for(model, cache, torch.zeros((1, count), dtype=torch.long))
        cache.length += count
