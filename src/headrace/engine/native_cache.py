"""The memory of one sequence as the model itself keeps it: transformers' own cache, for models beyond keys and values.

State-space and linear-attention layers sum up what they have seen; other models compute attention in ways of their own
(position biases, chosen keys, shared layers). They run as transformers would run them, one sequence at a time. What such a
cache has seen can be forgotten only where every layer keeps plain keys and values; else the sequence is computed again.

Some models keep their state in their modules, where it is put for each pass and taken from after it. Those that keep nothing
are given the whole text for each token: weights are read no more often for that, which is what a pass costs.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

# What a model calls the memory that it is given, if it takes one.
_MEMORIES = ("cache_params", "past_key_values", "state")


class NativeCache:
    """Speaks as `KVCache` does to those who schedule: a length, a capacity, and how to forget."""

    def __init__(self, model: PreTrainedModel, capacity: int, decoder_start_tokens: int = 0):
        """`decoder_start_tokens`: of the first pass so many tokens, its last, are the decoder's, and the others the encoder's; 0: there is
        none."""
        self.type = "F32"  # as the model itself keeps it
        self.whole = memory_of(model) is None
        self.accepts_multiple_rows = self.whole or not has_recurrent_state(
            model
        )  # several rows may follow what it has seen
        self.decoder_start_tokens = decoder_start_tokens
        self.encoded: Any = None  # what the encoder made of its tokens
        self.capacity = capacity
        self.length = 0
        self._make = maker_of(model)
        self.states: Any = self._make()
        self._tokens = torch.empty((1, 0), dtype=torch.long)  # the decoder's, where it is given all of them again
        self._places = _places_in_modules(model)
        self._in_modules: list[Any] = [None] * len(self._places)

    def rows(self, count: int) -> int:
        """How many rows a pass computes that adds so many tokens; those of a short decoder_start_tokens after an encoder's not counted."""
        if not self.length:
            return count - self.decoder_start_tokens
        return self._tokens.shape[1] + count if self.whole else count

    def given(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the decoder is given in the pass that adds these (1, rows)."""
        if not self.whole:
            return tokens
        self._tokens = torch.cat([self._tokens, tokens], 1)
        return self._tokens

    @contextmanager
    def state_in_modules(self) -> Iterator[None]:
        """During a pass, what this sequence has to remember lies in the model's modules, if that is where it belongs."""
        for (module, name), value in zip(self._places, self._in_modules, strict=True):
            setattr(module, name, value)
        try:
            yield
        finally:
            self._in_modules = [getattr(module, name) for module, name in self._places]
            for module, name in self._places:
                setattr(module, name, None)

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on, or everything where that cannot be done."""
        assert 0 <= length <= self.length
        if length == self.length:
            return
        plain = type(self.states) is DynamicCache and all(type(layer) is DynamicLayer for layer in self.states.layers)
        plain = plain and not self._places
        if length and self.whole and not self.decoder_start_tokens:
            self._tokens, self.length = self._tokens[:, :length], length
        elif length and plain:
            self.states.crop(length - self.length)
            self.length = length
        else:
            self._reset()

    def commit(self) -> None:
        """A pass with rows of this cache has ended well."""

    def rollback(self) -> None:
        """A pass with rows of this cache has failed: some layers may have seen its rows."""
        self._reset()

    def _reset(self) -> None:
        self.states, self.encoded, self.length = self._make(), None, 0
        self._tokens, self._in_modules = self._tokens[:, :0], [None] * len(self._places)


def parameters_of(model: PreTrainedModel) -> Mapping[str, inspect.Parameter]:
    """What the model's forward takes."""
    return inspect.signature(model.forward).parameters


def memory_of(model: PreTrainedModel) -> str | None:
    """What the model calls the memory that it is given; None: it wants the whole text for each token."""
    known = parameters_of(model)
    return next((name for name in _MEMORIES if name in known), None)


def _places_in_modules(model: PreTrainedModel) -> list[tuple[nn.Module, str]]:
    """Where modules keep what they have seen: what is empty in those that set up a cache of their own."""
    keepers = [one for one in model.modules() if hasattr(one, "_setup_cache") and not isinstance(one, PreTrainedModel)]
    return [
        (module, name)
        for keeper in keepers
        for module in keeper.modules()
        for name, value in vars(module).items()
        if value is None and not name.startswith("_")
    ]


def _rwkv_state(config: PreTrainedConfig) -> list[torch.Tensor]:
    """RWKV-4's, of all layers: the last inputs of both halves of a layer, and numerator, denominator and largest exponent of
    its sum."""
    state = [torch.zeros((1, config.hidden_size, config.num_hidden_layers)) for _ in range(5)]
    state[4] -= 1e30
    return state


def maker_of(model: PreTrainedModel) -> Callable[[], Any]:
    """Makes empty caches of the class that the model is written for."""
    memory = memory_of(model)
    if memory is None:
        return lambda: None
    if memory == "state":
        return lambda: _rwkv_state(model.config)
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


def has_recurrent_state(model: PreTrainedModel) -> bool:
    """Whether some layer has_cache other things than keys and values."""
    if memory_of(model) != "past_key_values" or _places_in_modules(model):
        return True
    try:
        cache = maker_of(model)()
    except (TypeError, ValueError, KeyError, AttributeError):
        return True
    if type(cache) is not DynamicCache:
        return True
    plain = ("DynamicLayer", "DynamicSlidingWindowLayer")
    return any(type(layer).__name__ not in plain for layer in cache.layers)


def arguments_for(model: PreTrainedModel, cache: NativeCache, tokens: torch.Tensor) -> dict[str, Any]:
    """Arguments of a forward over new tokens (1, rows) of one sequence. An encoder runs here, when the sequence begins."""
    known, memory = parameters_of(model), memory_of(model)
    arguments: dict[str, Any] = {"use_cache": False} if memory is None else {memory: cache.states, "use_cache": True}
    if cache.decoder_start_tokens and cache.encoded is None:
        cache.encoded = model.get_encoder()(input_ids=tokens[:, : -cache.decoder_start_tokens])
        tokens = tokens[:, -cache.decoder_start_tokens :]
    given = cache.given(tokens)
    if cache.decoder_start_tokens:
        return arguments | {"encoder_outputs": cache.encoded, "decoder_input_ids": given}
    if "position_ids" in known:
        last = cache.length + tokens.shape[1]
        arguments["position_ids"] = torch.arange(last - given.shape[1], last)[None]
    return arguments | {"input_ids": given}


def trial_of(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Arguments of two forwards: the beginning of a text, and its next token."""
    cache = NativeCache(model, 4, decoder_start_tokens=int(model.config.is_encoder_decoder))
    for count in (3 if cache.decoder_start_tokens else 2, 1):
        yield arguments_for(model, cache, torch.zeros((1, count), dtype=torch.long))
        cache.length += count
