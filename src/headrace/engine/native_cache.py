"""The native cache: transformers' cache of one sequence, for models that our KV cache does not cover.

State-space and linear-attention layers keep a recurrent state; other models compute attention differently (position
biases, chosen keys, shared layers). They run as in transformers, one sequence at a time. Such a cache can be rolled back
only if every layer keeps plain keys and values. Else the sequence is computed again.

Some models keep their state in their modules: it is put there for each pass and taken out after it. Models without a cache
get the whole text for each token. That costs compute, but no further reads of weights.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

# Names of the cache argument of models' forwards.
_CACHE_ARGUMENTS = ("cache_params", "past_key_values", "state")


class NativeCache:
    """A cache with the interface of `KVCache` for scheduling: length, capacity, truncation, rollback."""

    def __init__(self, model: PreTrainedModel, capacity: int, decoder_start_tokens: int = 0):
        """`decoder_start_tokens`: number of tokens at the end of the first pass that go to the decoder.

        The others go to the encoder. 0 for decoder-only models.
        """
        self.type = "F32"  # type of transformers' caches
        self.whole = memory_of(model) is None
        # True if several rows may follow the cached ones.
        self.accepts_multiple_rows = self.whole or not has_recurrent_state(model)
        self.decoder_start_tokens = decoder_start_tokens
        self.encoded: Any = None  # the encoder's output
        self.capacity = capacity
        self.length = 0
        self._make = maker_of(model)
        self.states: Any = self._make()
        self._tokens = torch.empty((1, 0), dtype=torch.long)  # all decoder tokens, for models without a cache
        self._places = _places_in_modules(model)
        self._in_modules: list[Any] = [None] * len(self._places)

    def rows(self, count: int) -> int:
        """Rows of a pass that adds `count` tokens; only the encoder's, if it starts with an encoder."""
        if not self.length:
            return count - self.decoder_start_tokens
        return self._tokens.shape[1] + count if self.whole else count

    def given(self, tokens: torch.Tensor) -> torch.Tensor:
        """Decoder input of the pass that adds these tokens (1, rows)."""
        if not self.whole:
            return tokens
        self._tokens = torch.cat([self._tokens, tokens], 1)
        return self._tokens

    @contextmanager
    def state_in_modules(self) -> Iterator[None]:
        """Hold this sequence's state in the model's modules during a pass, if the model keeps it there."""
        for (module, name), value in zip(self._places, self._in_modules, strict=True):
            setattr(module, name, value)
        try:
            yield
        finally:
            self._in_modules = [getattr(module, name) for module, name in self._places]
            for module, name in self._places:
                setattr(module, name, None)

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on, or everything if the cache cannot be rolled back."""
        assert 0 <= length <= self.length
        if length == self.length:
            return
        if not length or not self.can_truncate:
            self._reset()
        elif self.whole:
            self._tokens, self.length = self._tokens[:, :length], length
        else:
            self.states.crop(length - self.length)
            self.length = length

    @property
    def can_truncate(self) -> bool:
        """True if the last positions alone can be forgotten."""
        if self.whole:
            return not self.decoder_start_tokens
        layers = self.states.layers if type(self.states) is DynamicCache else None
        return layers is not None and all(type(layer) is DynamicLayer for layer in layers) and not self._places

    def commit(self) -> None:
        """Confirm a successful pass with rows of this cache."""

    def rollback(self) -> None:
        """Clear the cache after a failed pass: some layers may have seen its rows."""
        self._reset()

    def _reset(self) -> None:
        self.states, self.encoded, self.length = self._make(), None, 0
        self._tokens, self._in_modules = self._tokens[:, :0], [None] * len(self._places)


def parameters_of(model: PreTrainedModel) -> Mapping[str, inspect.Parameter]:
    """Parameters of the model's forward."""
    return inspect.signature(model.forward).parameters


def memory_of(model: PreTrainedModel) -> str | None:
    """Name of the forward's cache argument; None: the model needs the whole text for each token."""
    known = parameters_of(model)
    return next((name for name in _CACHE_ARGUMENTS if name in known), None)


def _places_in_modules(model: PreTrainedModel) -> list[tuple[nn.Module, str]]:
    """(module, attribute) of state in modules: empty attributes of those that set up a cache themselves."""
    keepers = [one for one in model.modules() if hasattr(one, "_setup_cache") and not isinstance(one, PreTrainedModel)]
    return [
        (module, name)
        for keeper in keepers
        for module in keeper.modules()
        for name, value in vars(module).items()
        if value is None and not name.startswith("_")
    ]


def _rwkv_state(config: PreTrainedConfig) -> list[torch.Tensor]:
    """RWKV-4's state of all layers: last inputs of a layer's halves; numerator, denominator, largest exponent of its sum."""
    state = [torch.zeros((1, config.hidden_size, config.num_hidden_layers)) for _ in range(5)]
    state[4] -= 1e30
    return state


def maker_of(model: PreTrainedModel) -> Callable[[], Any]:
    """A function that makes empty caches of the class that the model is written for."""
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
    """Prefix of the class names of the model's family."""
    return type(model).__name__.removesuffix("ForCausalLM").removesuffix("LMHeadModel")


def sees_a_window(model: PreTrainedModel) -> bool:
    """True if some layers have a sliding window, which one mask for all layers cannot express."""
    config = model.config.get_text_config()
    return bool(getattr(config, "sliding_window", None)) or "local" in getattr(config, "attention_layers", ())


def sees_chunks(model: PreTrainedModel) -> bool:
    """True if some layers attend within a chunk only, which no argument of their attention says."""
    return "chunked_attention" in (getattr(model.config.get_text_config(), "layer_types", None) or ())


def has_recurrent_state(model: PreTrainedModel) -> bool:
    """True if the model caches anything but keys and values."""
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
    """Arguments of a forward over new tokens (1, rows) of one sequence. An encoder runs here, when the sequence starts."""
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
    """Arguments of two forwards: the start of a sequence, and its next token."""
    cache = NativeCache(model, 4, decoder_start_tokens=int(model.config.is_encoder_decoder))
    for count in (3 if cache.decoder_start_tokens else 2, 1):
        yield arguments_for(model, cache, torch.zeros((1, count), dtype=torch.long))
        cache.length += count
