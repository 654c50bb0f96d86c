"""Private attributes of transformers, in one place."""

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

if TYPE_CHECKING:
    from headrace.model.runtime import RuntimeHandle


class Registration:
    """Attention and experts of a runtime, registered with transformers under a name."""

    def __init__(self, name: str):
        self.name = name

    def remove(self) -> None:
        """Forget the functions. Safe to call twice."""
        AttentionInterface._global_mapping.pop(self.name, None)
        ALL_EXPERTS_FUNCTIONS._global_mapping.pop(self.name, None)


def registered(name: str, handle: "RuntimeHandle") -> Registration:
    """Register the attention and experts of a runtime."""
    AttentionInterface.register(name, handle.attention)
    ALL_EXPERTS_FUNCTIONS.register(name, handle.experts)
    return Registration(name)


def use_eager_attention(model: PreTrainedModel) -> None:
    """Let every part of a model compute attention in its own code."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._attn_implementation = "eager"


def has_usual_gate(experts: Any) -> bool:
    """True if experts compute down(act(gate) * up) by transformers' own function."""
    return getattr(type(experts), "_apply_gate", None) is _default_apply_gate


def keys_that_may_be_missing(model: PreTrainedModel) -> list[str]:
    """Patterns of the names of tensors that a checkpoint of this model need not hold."""
    return list(model._keys_to_ignore_on_load_missing or ())


def keys_that_may_be_unexpected(model: PreTrainedModel) -> list[str]:
    """Patterns of the names of tensors that the model does not use."""
    return list(model._keys_to_ignore_on_load_unexpected or ())


def initialise(model: PreTrainedModel, module: nn.Module) -> None:
    """Fill a module by the model's own initialisation."""
    model._init_weights(module)
