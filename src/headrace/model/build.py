"""The model skeleton: transformers' model, built on meta, traced for the order of its weights, filled with small tensors.

Traps, each of which leads to wrong text without an error:
- RoPE frequencies are non-persistent buffers: on meta too, and in no checkpoint.
- llama's converters permute the rows of q and k; gemma's store norms plus one.
- A tied head has no separate tensor.
- An unexpected tensor in the file means that the model is a different one.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.pytorch_utils import Conv1D

from headrace.checkpoint import Checkpoint, Tensor
from headrace.checkpoint.encodings import Encoding
from headrace.checkpoint.tensor import Slice
from headrace.errors import CheckpointError, HeadraceError, UnsupportedError
from headrace.limits import explained
from headrace.model.config import decoder_start_ids, make_config
from headrace.model.matrix import Matrix, below_one_another
from headrace.model.moe import ExpertWeights, MoeLayout, moe_layout_of, patch_moe_layers
from headrace.model.packed import (
    GatheredEmbedding,
    LinearFunction,
    PackedExperts,
    PackedLinear,
    RmsNorm,
    Router,
    Silu,
    WeightAskedError,
)
from headrace.model.runtime import RuntimeHandle
from headrace.model.trace import ExpertStep, LinearStep, Step, TracingRuntime, record_steps
from headrace.model.transformers_compat import initialise, keys_that_may_be_missing
from headrace.model.weight_map import WeightMap, names_of, tied_to
from headrace.torch_compat import has_forward_pre_hooks, own_buffers, own_parameters

_USE_GGUF = "use a GGUF file of the model with llama.cpp"
# Embedding tables smaller than this stay in memory; from larger ones only the needed rows are read.
_SMALL_TABLE_BYTES = 4 << 20


# Attention mode: name, arguments of the traced forwards, and a check after tracing that the model supports it.
AttentionMode: TypeAlias = tuple[str, Callable[[], Iterator[dict[str, Any]]], Callable[[TracingRuntime], bool]]


@dataclass(frozen=True, kw_only=True)
class ModelSkeleton:
    """A model without its large weights, and the order in which a pass uses them."""

    model: PreTrainedModel
    steps: tuple[Step, ...]  # steps of the first pass of a sequence, in order
    attention_mode: str  # name of one of the modes that the engine offered
    # (KV heads, KV elements per token) by layer; empty unless the attention mode is packed
    cached: tuple[tuple[int, int], ...]
    has_cache: bool  # whether a pass computes only its new tokens; False: it recomputes the whole sequence
    # tokens at the end of a prompt that go to the decoder; the others go to the encoder
    decoder_start_ids: tuple[int, ...]
    virtual_path: str  # path of the virtual file
    virtual: Sequence[tuple[Tensor, Encoding]]  # virtual tensors on that path, besides the checkpoint's own

    @property
    def experts(self) -> tuple[PackedExperts, ...]:
        """The layers with routed experts, in order."""
        return tuple(step.experts for step in self.steps if isinstance(step, ExpertStep))

    @property
    def expert_slices(self) -> tuple[tuple[tuple[Slice, ...], ...], ...]:
        """Slices to read, for every expert of every layer."""
        return tuple(
            tuple(up.slices + down.slices for up, down in zip(packed.up, packed.down, strict=True))
            for packed in self.experts
        )

    @property
    def linears(self) -> tuple[Tensor, ...]:
        """Tensors that every pass multiplies, each once."""
        return _tensors(step for step in self.steps if not step.prefill_only)

    @property
    def prefill_only_linears(self) -> tuple[Tensor, ...]:
        """Tensors that only the first pass of a sequence multiplies."""
        return _tensors(step for step in self.steps if step.prefill_only)


def _tensors(steps: Iterable[Step]) -> tuple[Tensor, ...]:
    return tuple({t.name: t for step in steps if isinstance(step, LinearStep) for t in step.tensors}.values())


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """Parts of the engine that the model is built with."""

    implementation: str  # name under which attention and experts of `runtime` are registered with transformers
    runtime: RuntimeHandle  # called by the model's modules
    read: Callable[[Tensor], torch.Tensor]  # reader of a small tensor, in its shape: fp32 or integers
    attention_modes: Callable[[PreTrainedModel], Iterator[AttentionMode]]  # modes that may fit the model, best first
    has_cache: Callable[[PreTrainedModel], bool]  # check for native mode: does the model accept a cache?


def build_skeleton(checkpoint: Checkpoint, hooks: Hooks) -> ModelSkeleton:
    """Build the model skeleton of a checkpoint.

    Raises:
        CheckpointError: a tensor is missing or has another shape than the model.
        UnsupportedError: transformers has no such language model, or the file holds unexpected tensors.
    """
    config = make_config(checkpoint, lambda name: [float(x) for x in hooks.read(_find(checkpoint, name)).flatten()])
    config.use_cache = False
    with _as_checkpoint_error(checkpoint):
        model = _on_meta(checkpoint, config, hooks.implementation).eval().requires_grad_(False)
        _check_size(checkpoint, model)
        patch_moe_layers(model, hooks.implementation)
        _refuse_what_would_go_wrong(checkpoint, model)
        weight_map = names_of(checkpoint, model)
        tied = tied_to(model)
        derived = _fill_derived(model, weight_map, tied)
        before = _pack_linears(model, weight_map, tied, hooks.runtime.linear)
        elsewhere = derived | _pack_experts(model, weight_map)
    steps, attention_mode, tracer = _record(model, before, hooks)
    _scale_frequencies(checkpoint, model, hooks.read)
    _gather_tables(model, weight_map, tied, derived, hooks)
    _fill(model, weight_map, tied, elsewhere, hooks)
    _refuse_unexpected(checkpoint, weight_map)
    _replace_small(model, hooks)
    return ModelSkeleton(
        model=model,
        steps=steps,
        attention_mode=attention_mode,
        cached=tuple(tracer.layers.values()) if attention_mode == "packed" else (),
        has_cache=attention_mode != "native" or hooks.has_cache(model),
        decoder_start_ids=decoder_start_ids(checkpoint),
        virtual_path=weight_map.virtual_path,
        virtual=weight_map.virtual,
    )


@contextmanager
def _as_checkpoint_error(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn any error from transformers' code into `CheckpointError`: impossible sizes in the config cause all kinds of them."""
    try:
        yield
    except (HeadraceError, ImportError, OSError, MemoryError):
        raise
    except Exception as error:
        problem = explained(error)  # torch raises RuntimeError when memory runs out
        if problem is not None:
            raise problem from error
        raise CheckpointError(
            f"{checkpoint.path}: the sizes it gives make no {checkpoint.architecture} model: {error}",
            hint="the file is damaged, or of another version of transformers",
        ) from error


def _check_size(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Refuse a model far larger than its checkpoint: it is another model, and its sizes could take any amount of memory."""
    asked = sum(parameter.numel() for parameter in model.parameters())
    asked += max((buffer.numel() for buffer in model.buffers()), default=0)
    stored = sum(tensor.rows * tensor.columns for tensor in checkpoint.tensors.values())
    if asked > 2 * stored + _SLACK:
        raise CheckpointError(
            f"{checkpoint.path}: the sizes it gives make {asked / 1e9:.1f} billion parameters, it holds {stored / 1e9:.1f}",
            hint="the file is damaged, or config and tensors are of different models",
        )


_SLACK = 256 << 20  # extra parameters: derived, masks of long contexts, shared


def _on_meta(checkpoint: Checkpoint, config: PreTrainedConfig, implementation: str) -> PreTrainedModel:
    options: dict[str, Any] = {"dtype": torch.float32, "experts_implementation": implementation}
    kind = AutoModelForSeq2SeqLM if checkpoint.has_encoder else AutoModelForCausalLM
    with torch.device("meta"):
        # Some models look attention up in their own table, which lacks the engine's.
        for attention in (implementation, "sdpa", "eager"):
            try:
                return kind.from_config(config, attn_implementation=attention, trust_remote_code=False, **options)
            except (KeyError, ValueError) as error:
                refused = error
    raise UnsupportedError(
        f"{checkpoint.path}: transformers cannot build its {config.model_type} model: {refused}",
        hint="is it a language model that generates text?",
    )


# Main inputs of models for images and sound.
_NOT_TEXT = frozenset({"pixel_values", "pixel_values_videos", "input_features", "input_values"})


def _refuse_what_would_go_wrong(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Refuse models that would run and be wrong.

    With its own expert matmul, a model would hold all experts in memory. An image model would ignore its images.
    """
    kind = model.config.model_type
    packed = _expert_parameter_ids(model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.main_input_name in _NOT_TEXT:
            raise UnsupportedError(
                f"{checkpoint.path}: the {kind} model has parts for images or sound (`{type(module).__name__}`),"
                " which are not supported",
                hint="use the text-only model of the family, or a GGUF file of its language model",
            )
        of_many = isinstance(module, nn.ModuleList | nn.ModuleDict) and len(module) > 1
        own = [
            one
            for one in (module.parameters() if of_many else own_parameters(module).values())
            if one is not None and one.dim() > 1 and id(one) not in packed
        ]
        if (
            own
            and "Expert" in type(module).__name__
            and "Shared" not in type(module).__name__
            and not moe_layout_of(module)
        ):
            raise UnsupportedError(
                f"{checkpoint.path}: the {kind} model computes its experts in its own code"
                f" (`{type(module).__name__}`), which is not supported",
                hint=_USE_GGUF,
            )


def _expert_parameter_ids(model: nn.Module) -> set[int]:
    """The `id()` of each routed-expert parameter in a module."""
    return {
        id(module.get_parameter(parameter))
        for module in model.modules()
        if (layout := moe_layout_of(module)) is not None
        for stack in layout.stacks
        for parameter in stack.parameters
    }


def _find(checkpoint: Checkpoint, name: str) -> Tensor:
    tensor = checkpoint.tensors.get(name)
    if tensor is None:
        raise CheckpointError(
            f"{checkpoint.path} has no tensor `{name}`", hint="the file is incomplete; get it from another source"
        )
    return tensor


def _pack_linears(
    model: PreTrainedModel, weight_map: WeightMap, tied: Mapping[str, str], linear_function: LinearFunction
) -> dict[PackedLinear, tuple[str, nn.Module]]:
    """Replace every linear. Returns the original module and its path for each replacement."""
    before: dict[PackedLinear, tuple[str, nn.Module]] = {}
    layouts = ((name, moe_layout_of(module)) for name, module in model.named_modules())
    routers = [_router(model, name, layout) for name, layout in layouts if layout is not None]
    kept = {found[0] for found in routers if found is not None}
    experts = _expert_parameter_ids(model)
    for name, module in list(model.named_modules()):
        kind: Any = type(module)
        if module in kept or id(own_parameters(module).get("weight")) in experts:
            continue
        if not (kind.forward is Conv1D.forward or _multiplies(kind)):
            continue
        matrix = weight_map.matrix(
            _owner(f"{name}.weight", weight_map, tied), tuple(module.weight.shape), isinstance(module, Conv1D)
        )
        bias = module.bias if _owner(f"{name}.bias", weight_map, tied) in weight_map else None
        packed = PackedLinear(matrix, linear_function, bias)
        model.set_submodule(name, packed)
        before[packed] = name, module
    return before


@cache
def _multiplies(kind: type[nn.Module]) -> bool:
    """Test by computing whether modules of this class are linears, whatever their name."""
    if not issubclass(kind, nn.Linear) or kind.forward is nn.Linear.forward:
        return issubclass(kind, nn.Linear)
    x = torch.randn((2, 3), generator=torch.Generator().manual_seed(0))
    try:
        with torch.device("cpu"):
            one: nn.Linear = kind(3, 2)
        return torch.allclose(one(x), nn.functional.linear(x, one.weight, one.bias), atol=1e-6)
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError):
        return False


def _router(model: PreTrainedModel, name: str, layout: MoeLayout) -> tuple[nn.Module, nn.Module] | None:
    """(router of an experts module, module around both). The router has one row of weights per expert and stays in memory."""
    module, owner = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    experts = _expert_parameter_ids(module)
    for candidate in (*module.modules(), *owner.modules()):
        weight = own_parameters(candidate).get("weight")
        if weight is None or id(weight) in experts:
            continue
        if weight.dim() == 2 and weight.shape[0] == layout.choices:
            return candidate, owner
    return None


def _owner(parameter: str, weight_map: WeightMap, tied: Mapping[str, str]) -> str:
    """The parameter whose tensor this one uses: its own, or the one it is tied to."""
    return parameter if parameter in weight_map or parameter not in tied else tied[parameter]


def _pack_experts(model: PreTrainedModel, weight_map: WeightMap) -> set[str]:
    """Give every module of routed experts the places of its matrices. Its parameters stay on meta; returns their names."""
    count, taken = 0, set()
    for name, module in model.named_modules():
        layout = moe_layout_of(module)
        if layout is None:
            continue
        *ups, down = (_matrices(weight_map, name, one, layout.identities) for one in layout.stacks)
        up = ups[0] if len(ups) == 1 else tuple(below_one_another(parts) for parts in zip(*ups, strict=True))
        found = _router(model, name, layout)
        module.packed = PackedExperts(
            count, module, up, down, None if found is None else Router(*found), layout.identities
        )
        taken |= {f"{name}.{parameter}" for one in layout.stacks for parameter in one.parameters}
        count += 1
    return taken


def _matrices(weight_map: WeightMap, module: str, stack: ExpertWeights, spare: int) -> tuple[Matrix, ...]:
    parameters = [f"{module}.{parameter}" for parameter in stack.parameters]
    if len(parameters) == 1:
        return weight_map.stack(parameters[0], stack.shape, stack.outputs_last, stack.interleaved, spare)
    return tuple(weight_map.matrix(one, stack.shape[1:], stack.outputs_last) for one in parameters)


def _record(
    model: PreTrainedModel, before: Mapping[PackedLinear, tuple[str, nn.Module]], hooks: Hooks
) -> tuple[tuple[Step, ...], str, TracingRuntime]:
    """(steps of a pass, attention mode, its tracing runtime). A linear whose weight is accessed becomes an ordinary one again."""
    refused: Exception | None = None
    for name, arguments, supported in hooks.attention_modes(model):
        while True:
            hooks.runtime.current = tracer = TracingRuntime()
            try:
                steps = record_steps(model, tracer, arguments)
            except WeightAskedError as accessed:
                path, module = before[accessed.linear]
                model.set_submodule(path, module)
                continue
            except (HeadraceError, ImportError, OSError):
                raise
            except Exception as error:  # anything from transformers' code
                refused = error
                break
            if supported(tracer):
                return steps, name, tracer
            break
    raise UnsupportedError(
        f"the {model.config.model_type} model cannot be traced: {str(refused).partition('. ')[0][:200]}",
        hint=_USE_GGUF,
    )


@torch.inference_mode()
def _replace_small(model: PreTrainedModel, hooks: Hooks) -> None:
    """Let the engine compute norms and gates. A layer has two to six norms; as six operations each costs 25 us at one row."""
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear) or list(module.children()):
            continue
        if isinstance(module, (nn.SiLU, SiLUActivation)):
            model.set_submodule(name, Silu(hooks.runtime.silu))
        elif (norm := RmsNorm.equal_to(module, hooks.runtime.rms_norm)) is not None:
            model.set_submodule(name, norm)


def _fill_derived(model: PreTrainedModel, weight_map: WeightMap, tied: Mapping[str, str]) -> set[str]:
    """Compute tensors that no checkpoint stores, by the model's own initialisation.

    These are RoPE frequencies, scales, and parameters that the model says may be missing (sinusoidal positions, zero
    biases). Returns the names of the latter. A parent module may fill its children's buffers, so parents are initialised
    as well. `_init_weights` is called on the innermost `PreTrainedModel` around each module.
    """
    may_be_missing = [re.compile(pattern) for pattern in keys_that_may_be_missing(model)]
    persistent = set(model.state_dict())
    missing = {
        name
        for name in persistent
        if name not in weight_map and name not in tied and any(pattern.search(name) for pattern in may_be_missing)
    }
    owners: list[str] = []
    for name, module in model.named_modules():
        meta = [key for key, buffer in own_buffers(module).items() if buffer is not None and buffer.is_meta]
        own = [key for key in meta if _within(name, key) not in persistent - missing]
        for key in own:
            own_buffers(module)[key] = torch.empty_like(own_buffers(module)[key], device="cpu")
        drawn = [key for key in own_parameters(module) if _within(name, key) in missing]
        for key in drawn:
            empty = torch.empty_like(own_parameters(module)[key], device="cpu")
            own_parameters(module)[key] = nn.Parameter(empty, requires_grad=False)
        if own or drawn:
            owners.append(name)
    models = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    for name, module in model.named_modules():
        if any(owner == name or not name or owner.startswith(f"{name}.") for owner in owners):
            around = max((m for m in models if not m or m == name or name.startswith(f"{m}.")), key=len)
            initialise(models[around], module)
    return missing


def _within(module: str, key: str) -> str:
    return f"{module}.{key}" if module else key


def _scale_frequencies(checkpoint: Checkpoint, model: PreTrainedModel, read: Callable[[Tensor], torch.Tensor]) -> None:
    """Divide the RoPE frequencies by the factors that converters store in Llama 3's GGUF files, one per frequency."""
    if "rope_freqs.weight" not in checkpoint.tensors:
        return
    factors = read(checkpoint.tensors["rope_freqs.weight"]).flatten()
    for module in model.modules():
        for key in ("inv_freq", "original_inv_freq"):
            buffer = own_buffers(module).get(key)
            if buffer is not None:
                if buffer.shape != factors.shape:
                    raise CheckpointError(f"{checkpoint.path}: `rope_freqs.weight` does not fit the rotary width")
                buffer /= factors


def _gather_tables(
    model: PreTrainedModel, weight_map: WeightMap, tied: Mapping[str, str], derived: set[str], hooks: Hooks
) -> None:
    """Read the rows of the token embedding and other large tables as they are needed."""
    main = model.get_input_embeddings().weight
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or f"{name}.weight" in derived:
            continue
        if module.weight is not main and module.weight.numel() * 4 < _SMALL_TABLE_BYTES:
            continue
        matrix = weight_map.matrix(_owner(f"{name}.weight", weight_map, tied), tuple(module.weight.shape), False)
        module.padding_idx = None  # only training uses it, and it indexes the whole table
        empty = torch.empty((0, module.embedding_dim))  # some models read the table's device
        own_parameters(module)["weight"] = nn.Parameter(empty, requires_grad=False)
        module.register_forward_pre_hook(GatheredEmbedding(_rows_of(matrix, hooks)))


def _rows_of(matrix: Matrix, hooks: Hooks) -> Callable[[torch.Tensor], torch.Tensor]:
    tensor, first = matrix.slices[0].tensor, matrix.slices[0].first
    if len(matrix.slices) > 1 or matrix.order is not None or tensor.k_splits:
        raise UnsupportedError(
            f"`{tensor.name}` is a table whose rows do not lie one after another, which is not supported",
            hint="use a version of the model with embeddings that are not quantised",
        )
    return lambda rows: hooks.runtime.gather(tensor, rows + first)


def _fill(
    model: PreTrainedModel, weight_map: WeightMap, tied: Mapping[str, str], elsewhere: set[str], hooks: Hooks
) -> None:
    """Read every small tensor: stored buffers, and all parameters but those in `elsewhere` (packed or derived).

    This includes parameters that are not on meta: some models draw random values in a way the meta device does not catch.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and has_forward_pre_hooks(module):
            continue
        for key, parameter in list(own_parameters(module).items()):
            if parameter is None or _within(name, key) in elsewhere:
                continue
            full = _owner(_within(name, key), weight_map, tied)
            value = weight_map.value(full, parameter.shape, hooks.read).to(parameter.dtype)
            own_parameters(module)[key] = nn.Parameter(value, requires_grad=False)
        for key, buffer in list(own_buffers(module).items()):
            full = _within(name, key)
            if buffer is not None and (buffer.is_meta or full in weight_map):
                own_buffers(module)[key] = weight_map.value(full, buffer.shape, hooks.read).to(buffer.dtype)


def _refuse_unexpected(checkpoint: Checkpoint, weight_map: WeightMap) -> None:
    unexpected = weight_map.unexpected()
    if unexpected:
        some = ", ".join(f"`{name}`" for name in sorted(unexpected)[:3])
        raise UnsupportedError(
            f"{checkpoint.path}: {len(unexpected)} tensors have no place in a {checkpoint.architecture} model: {some}",
            hint="the file needs a newer version, or is not the model that it says it is",
        )
