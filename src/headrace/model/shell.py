"""The transformers model around the packed weights: built on meta, traced for its order, then filled with small tensors.

Traps met here (each cost somebody silently wrong text): rotary frequencies are non-persistent buffers, on meta too and in
no checkpoint; llama's writers permute the rows of q and k; gemma's store their norms plus one; a tied head has no tensor
of its own; a tensor of the file that finds no place in the model means that the model is a different one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)
from transformers.pytorch_utils import Conv1D

from headrace.checkpoint import Checkpoint, Tensor
from headrace.errors import CheckpointError, UnsupportedError
from headrace.model.config import make_config
from headrace.model.packed import GatheredEmbedding, PackedLinear, Product, RmsNorm

# Read for the config, or derived from it; not weights of a module.
_NOT_WEIGHTS = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})
EMBEDDING = "token_embd.weight"


@dataclass(frozen=True, kw_only=True)
class Shell:
    """A model without its large weights, and the order in which a pass asks for them."""

    model: PreTrainedModel
    groups: tuple[tuple[PackedLinear, ...], ...]  # linears that share their activations, in execution order


def build_shell(
    checkpoint: Checkpoint,
    *,
    attention: str,
    product: Product,
    unpack: Callable[[Tensor], torch.Tensor],
    gather: Callable[[torch.Tensor], torch.Tensor],
) -> Shell:
    """Build the model of a checkpoint.

    Args:
        checkpoint: the header, of a supported architecture.
        attention: the name of an attention function registered with transformers.
        product: multiplies a packed linear.
        unpack: reads a small tensor whole, fp32, in its shape.
        gather: reads rows of the token embedding.

    Raises:
        CheckpointError: a tensor is missing or has another shape than the model.
        UnsupportedError: the file holds tensors that the model has no place for.
    """
    config = make_config(checkpoint, lambda name: [float(x) for x in unpack(_find(checkpoint, name)).flatten()])
    config.use_cache = False
    model = _on_meta(config, attention).eval().requires_grad_(False)
    processor = TENSOR_PROCESSORS.get(checkpoint.architecture, TensorProcessor)(config=config.to_dict())
    names = _names(checkpoint, model, processor)
    _pack_linears(checkpoint, model, names, product)
    groups = _trace(model)
    _order_rows(model, processor)
    _fill_buffers(model)
    _scale_frequencies(checkpoint, model, unpack)
    _fill_parameters(checkpoint, model, names, processor, unpack)
    _fuse_norms(model)
    embedding = model.get_input_embeddings()
    embedding.padding_idx = None  # only training uses it, and it indexes the whole table
    embedding.register_forward_pre_hook(GatheredEmbedding(gather))
    return Shell(model=model, groups=groups)


def _on_meta(config: PreTrainedConfig, attention: str) -> PreTrainedModel:
    with torch.device("meta"):
        try:
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
        except KeyError:  # Falcon looks its attention up in a table of its own
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")


def _find(checkpoint: Checkpoint, name: str) -> Tensor:
    tensor = checkpoint.tensors.get(name)
    if tensor is None:
        raise CheckpointError(
            f"{checkpoint.path} has no tensor `{name}`", hint="the file is incomplete; get it from another source"
        )
    return tensor


def _names(checkpoint: Checkpoint, model: PreTrainedModel, processor: TensorProcessor) -> dict[str, Tensor]:
    """The tensor of every parameter, by the parameter's name."""
    names = {}
    mapped = get_gguf_hf_weights_map(model, processor)
    for gguf_name, parameter in mapped.items():
        if gguf_name in checkpoint.tensors:
            names[parameter] = checkpoint.tensors[gguf_name]
    homeless = checkpoint.tensors.keys() - mapped.keys() - _NOT_WEIGHTS
    if homeless:
        some = ", ".join(f"`{name}`" for name in sorted(homeless)[:3])
        raise UnsupportedError(
            f"{checkpoint.path}: {len(homeless)} tensors have no place in a {checkpoint.architecture} model: {some}",
            hint="the file needs a newer version, or is not what `general.architecture` says",
        )
    embedding = _find(checkpoint, EMBEDDING)
    return {"lm_head.weight": embedding} | names


def _pack_linears(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    names: dict[str, Tensor],
    product: Product,
) -> None:
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        tensor = names.get(f"{name}.weight")
        if tensor is None:
            raise CheckpointError(f"{checkpoint.path} has no weights for `{name}`", hint="the file is incomplete")
        shape = tuple(module.weight.shape)
        expected = shape[::-1] if isinstance(module, Conv1D) else shape
        _check_shape(checkpoint, tensor, expected)
        bias = module.bias if f"{name}.bias" in names else None
        model.set_submodule(name, PackedLinear(tensor, product, bias))


def _check_shape(checkpoint: Checkpoint, tensor: Tensor, expected: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise CheckpointError(
            f"{checkpoint.path}: tensor `{tensor.name}` has the shape {tensor.shape}, the metadata asks for {tuple(expected)}",
            hint="metadata and tensors are of different models",
        )


def _order_rows(model: PreTrainedModel, processor: TensorProcessor) -> None:
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.row_order = _row_order(module.tensor, processor)


def _row_order(tensor: Tensor, processor: TensorProcessor) -> torch.Tensor | None:
    """Where each output row lies in the file: what transformers does to the weight, done to the row numbers."""
    numbers = np.arange(tensor.rows)[:, None]
    placed = processor.process(numbers, tensor.name, parsed_parameters={"tensors": {}}).weights
    if placed.shape != numbers.shape or np.array_equal(placed, numbers):
        return None  # untouched, or only transposed for a module that multiplies from the other side
    return torch.from_numpy(np.ascontiguousarray(placed[:, 0]))


def _trace(model: PreTrainedModel) -> tuple[tuple[PackedLinear, ...], ...]:
    """One forward on meta that records which linears are called, in which order, on which activations."""
    calls: list[tuple[PackedLinear, torch.Tensor]] = []

    def record(linear: PackedLinear, x: torch.Tensor) -> torch.Tensor:
        calls.append((linear, x))
        return x.new_empty((*x.shape[:-1], linear.tensor.rows))

    linears = [module for module in model.modules() if isinstance(module, PackedLinear)]
    products = [linear.product for linear in linears]
    for linear in linears:
        linear.product = record
    with torch.inference_mode(), torch.device("meta"):
        ids = torch.empty((1, 2), dtype=torch.long)
        model(input_ids=ids, position_ids=ids, attention_mask=torch.empty((1, 1, 2, 2)), use_cache=False)
    for linear, product in zip(linears, products, strict=True):
        linear.product = product
    groups: list[list[PackedLinear]] = []
    last: Any = None
    for linear, x in calls:
        if x is last:
            groups[-1].append(linear)
        else:
            groups.append([linear])
        last = x
    assert len(calls) == len(linears), "every linear is called exactly once in a pass"
    return tuple(tuple(group) for group in groups)


@torch.inference_mode()
def _fuse_norms(model: PreTrainedModel) -> None:
    """Norms written as six operations cost 25 us each at one row, and there are two to six in a layer."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, PackedLinear) and not list(module.children()):
            norm = RmsNorm.equal_to(module)
            if norm is not None:
                model.set_submodule(name, norm)


def _fill_buffers(model: PreTrainedModel) -> None:
    """Compute what is in no checkpoint (rotary frequencies, scales) by the model's own initialisation."""
    persistent = set(model.state_dict())
    for name, module in model.named_modules():
        meta = [key for key, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        own = [key for key in meta if (f"{name}.{key}" if name else key) not in persistent]
        for key in own:
            module._buffers[key] = torch.empty_like(module._buffers[key], device="cpu")
        if own:
            model._init_weights(module)


def _scale_frequencies(
    checkpoint: Checkpoint, model: PreTrainedModel, unpack: Callable[[Tensor], torch.Tensor]
) -> None:
    """Llama 3 stores one factor per rotary frequency, computed by the file's writer."""
    if "rope_freqs.weight" not in checkpoint.tensors:
        return
    factors = unpack(checkpoint.tensors["rope_freqs.weight"]).flatten()
    for module in model.modules():
        for key in ("inv_freq", "original_inv_freq"):
            buffer = module._buffers.get(key)
            if buffer is not None:
                if buffer.shape != factors.shape:
                    raise CheckpointError(f"{checkpoint.path}: `rope_freqs.weight` does not fit the rotary width")
                buffer /= factors


def _fill_parameters(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    names: dict[str, Tensor],
    processor: TensorProcessor,
    unpack: Callable[[Tensor], torch.Tensor],
) -> None:
    embedding = model.get_input_embeddings()
    _check_shape(checkpoint, _find(checkpoint, EMBEDDING), embedding.weight.shape)
    for name, module in model.named_modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is None or not parameter.is_meta or module is embedding:
                continue
            full = f"{name}.{key}"
            tensor = names.get(full)
            if tensor is None:
                raise CheckpointError(f"{checkpoint.path} has no tensor for `{full}`", hint="the file is incomplete")
            value = processor.process(unpack(tensor).numpy(), tensor.name, parsed_parameters={"tensors": {}}).weights
            _check_shape(checkpoint, tensor, parameter.shape)
            module._parameters[key] = nn.Parameter(torch.from_numpy(np.array(value, np.float32)), requires_grad=False)
