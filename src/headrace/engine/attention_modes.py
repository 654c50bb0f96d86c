"""The attention modes that may fit a model: packed (on each KV cache), concatenated (on all of them as one), native."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from headrace.engine.mla import is_mla
from headrace.engine.native_cache import has_recurrent_state, sees_a_window, sees_chunks, trial_of
from headrace.model.build import AttentionMode
from headrace.model.runtime import RuntimeHandle
from headrace.model.transformers_compat import use_eager_attention


def attention_modes(model: PreTrainedModel, handle: RuntimeHandle) -> Iterator[AttentionMode]:
    """Attention modes, best first. Each prepares the model before it is traced."""
    if not has_recurrent_state(model) and not sees_chunks(model):
        layers = [module for module in model.modules() if is_mla(module)]
        for layer in layers:
            layer.expand_kv = partial(handle.expand_kv, layer)
        yield "packed", _positions, lambda traced: bool(traced.layers) and not traced.unknown_arguments
        for layer in layers:
            del layer.expand_kv
        if not sees_a_window(model):
            yield "concatenated", _positions_and_mask, lambda traced: not traced.layers
    use_eager_attention(model)
    yield "native", partial(trial_of, model), lambda _: True


def _positions() -> Iterator[dict[str, Any]]:
    """Arguments of the traced forward."""
    ids = torch.zeros((1, 2), dtype=torch.long)
    yield {"input_ids": ids, "position_ids": ids}


def _positions_and_mask() -> Iterator[dict[str, Any]]:
    for given in _positions():
        yield given | {"attention_mask": torch.zeros((1, 1, 2, 2))}
