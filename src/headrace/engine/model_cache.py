"""The memory of one sequence as the model itself keeps it: transformers' own cache, for models beyond keys and values.

State-space and linear-attention layers sum up what they have seen; other models compute attention in ways of their own
(position biases, chosen keys, shared layers). They run as transformers would run them, one sequence at a time. What such a
cache has seen can be forgotten only where every layer keeps plain keys and values; else the sequence is computed again.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer


class ModelCache:
    """Speaks as `KVCache` does to those who schedule: a length, a capacity, and how to forget."""

    def __init__(self, make: Callable[[], Any], capacity: int, continues: bool = True):
        """`make` gives an empty cache of the model; `continues`: several rows may follow what it has seen."""
        self.continues = continues
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
        self.states, self.length = self._make(), 0


def parameters_of(model: PreTrainedModel) -> Mapping[str, inspect.Parameter]:
    """What the model's forward takes."""
    return inspect.signature(model.forward).parameters


def maker_of(model: PreTrainedModel) -> Callable[[], Any]:
    """Makes empty caches of the class that the model is written for."""
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


def arguments_for(model: PreTrainedModel, cache: ModelCache, count: int) -> dict[str, Any]:
    """Arguments of a forward over `count` new rows of one sequence."""
    known = parameters_of(model)
    name = "cache_params" if "cache_params" in known else "past_key_values"
    arguments: dict[str, Any] = {name: cache.states, "use_cache": True}
    if "position_ids" in known:
        arguments["position_ids"] = torch.arange(cache.length, cache.length + count)[None]
    return arguments
