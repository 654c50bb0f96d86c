"""The weight map: the tensors of a checkpoint that make up each parameter, for GGUF files and Hugging Face folders.

Both classes run transformers' own conversion, on row indices in place of weights (`matrix`) or on small tensors
(`value`). No list of families is needed.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any, Protocol

import gguf
import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

from headrace.checkpoint import Checkpoint, Tensor
from headrace.checkpoint.encodings import Encoding, transposed
from headrace.checkpoint.tensor import Slice, block_of, layer_of
from headrace.errors import CheckpointError, UnsupportedError
from headrace.model.gguf_mappings import mapping_of
from headrace.model.matrix import Matrix, matrix_of, part_of
from headrace.model.transformers_compat import keys_that_may_be_unexpected

Read = Callable[[Tensor], torch.Tensor]  # reader of a small tensor, in its shape: fp32 or integers


class WeightMap(Protocol):
    """Finds the stored form of a model's parameters, by the parameters' names."""

    virtual_path: str
    # virtual tensors on that path, transcoded from stored ones when they are read
    virtual: list[tuple[Tensor, Encoding]]

    def __contains__(self, parameter: str) -> bool:
        """True if the checkpoint has this parameter."""

    def matrix(self, parameter: str, shape: Sequence[int], outputs_last: bool) -> Matrix:
        """The matrix of a linear. `shape` is the parameter's; with `outputs_last` it is (inputs, outputs)."""

    def stack(
        self, parameter: str, shape: Sequence[int], outputs_last: bool, interleaved: bool, spare: int = 0
    ) -> tuple[Matrix, ...]:
        """The matrices of all experts. `interleaved`: rows of gate and up alternate in the model, the file has two tensors.

        `spare`: number of zero-computation experts for which the stored tensor may have unused rows.
        """

    def value(self, parameter: str, shape: Sequence[int], read: Read) -> torch.Tensor:
        """The value of a small parameter: fp32, or the stored integers."""

    def unexpected(self) -> list[str]:
        """Names of unexpected tensors: those that no parameter of the model uses."""


def names_of(checkpoint: Checkpoint, model: PreTrainedModel) -> WeightMap:
    """The weight map of a checkpoint, for a model that is still as transformers built it."""
    if checkpoint.config is not None:
        return ConvertedNames(checkpoint, model, get_model_conversion_mapping(model))
    mapping = mapping_of(checkpoint.architecture, model.config)
    return GgufNames(checkpoint, model) if mapping is None else ConvertedNames(checkpoint, model, mapping)


class _VirtualTensors:
    """Adds virtual tensors for matrices stored transposed [in, out]: they are read as K-splits."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self.virtual_path = f"{checkpoint.path}[transposed]"
        self.virtual: list[tuple[Tensor, Encoding]] = []
        self._virtual_of: dict[tuple[str, int], Tensor] = {}
        self._offset = 0

    def _transposed(self, tensor: Tensor) -> Matrix:
        key = (tensor.path, tensor.offset)
        if key not in self._virtual_of:
            virtual, encoding = transposed(tensor, self.virtual_path, self._offset)
            self.virtual.append((virtual, encoding))
            self._offset += -(-virtual.nbytes // 4096) * 4096
            self._virtual_of[key] = virtual
        virtual = self._virtual_of[key]
        return Matrix((Slice(virtual, 0, virtual.outputs),))

    def _contradiction(self, parameter: str, stored: Sequence[int], expected: Sequence[int]) -> CheckpointError:
        return CheckpointError(
            f"{self._checkpoint.path}: the tensor of `{parameter}` has the shape {tuple(stored)},"
            f" the config asks for {tuple(expected)}",
            hint="config and tensors are of different models",
        )

    def _missing(self, parameter: str) -> CheckpointError:
        return CheckpointError(
            f"{self._checkpoint.path} has no tensor for `{parameter}`",
            hint="the checkpoint is incomplete; get it from another source",
        )


@dataclass(eq=False)
class _Group:
    """Tensors that one conversion combines."""

    converter: WeightConverter | None
    target: str  # name of the parameter, or of the first of several
    # pairs of (the converter's pattern, name in the checkpoint)
    members: list[tuple[str, str]] = field(default_factory=list)


class ConvertedNames(_VirtualTensors):
    """WeightMap by transformers' conversion mapping: for Hugging Face folders, and GGUF files that have such a mapping."""

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel, mapping: Sequence[Any]):
        super().__init__(checkpoint)
        self._model = model
        self._tensors = checkpoint.tensors
        self._of: dict[str, _Group] = {}
        self._converted: tuple[_Group | None, dict[str, npt.NDArray[np.int64]]] = (None, {})
        self._unexpected: list[tuple[str, str]] = []  # (name in the checkpoint, name after the mapping)
        self._known = model.state_dict()
        self._assign(mapping)
        self._find_targets()

    def __contains__(self, parameter: str) -> bool:
        return parameter in self._of

    def _assign(self, mapping: Sequence[Any]) -> None:
        """Put every tensor into the group of its parameter, as transformers' loader does."""
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        prefix = self._model.base_model_prefix
        for name in sorted(self._tensors, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, self._known)
            if target not in self._known and name in self._known:
                target, pattern = name, None
            if target not in self._known:
                self._unexpected.append((name, target))
                continue
            converter = by_pattern[pattern] if pattern is not None else None
            group = self._of.setdefault(target, _Group(converter, target))
            if converter is None and group.members:
                first = group.members[0][1]
                raise CheckpointError(
                    f"{self._checkpoint.path}: tensors `{first}` and `{name}` are both `{target}` of the model",
                    hint="remove one of the two files that hold it",
                )
            group.members.append((pattern or name, name))

    def _find_targets(self) -> None:
        """Register the further parameters of conversions that make several from one group."""
        for group in list(self._of.values()):
            if group.converter is not None and len(group.converter.target_patterns) > 1:
                for target in self._row_indices_of(group):
                    self._of[target] = group

    def _convert(self, group: _Group, value: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        if group.converter is None:
            return {group.target: value(group.members[0][1])}
        converter = deepcopy(group.converter)
        converter.operations = [one for one in converter.operations if not _reorders_inputs(one)]
        for pattern, name in group.members:
            converter.add_tensor(group.target, name, pattern, partial(value, name))
        try:
            found = converter.convert(group.target, model=self._model, config=self._model.config)
        except (RuntimeError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
            some = group.members[0][1]
            raise CheckpointError(
                f"{self._checkpoint.path}: tensors like `{some}` cannot be made into `{group.target}`: {error}",
                hint="the checkpoint is incomplete, or config and tensors are of different models",
            ) from error
        return {name: one[0] if isinstance(one, list) else one for name, one in found.items()}

    def _row_indices_of(self, group: _Group) -> dict[str, npt.NDArray[np.int64]]:
        """Row indices of the group's tensors, as the conversion arranges them; they count through all tensors."""
        if self._converted[0] is not group:
            bases = dict(zip((name for _, name in group.members), self._bases(group), strict=True))
            found = self._convert(group, lambda name: _row_indices(self._tensors[name], bases[name]))
            self._converted = group, {name: rows.numpy() for name, rows in found.items()}
        return self._converted[1]

    def _input_order(self, group: _Group) -> torch.Tensor | None:
        """The activation for each column in the file; None: in order."""
        if group.converter is None:
            return None
        orders = [one.input_permutation for one in group.converter.operations if _reorders_inputs(one)]
        return orders[0] if orders else None

    def _bases(self, group: _Group) -> list[int]:
        sizes = [_height(self._tensors[name]) for _, name in group.members]
        return [0, *np.cumsum(sizes)[:-1].tolist()]

    def matrix(self, parameter: str, shape: Sequence[int], outputs_last: bool) -> Matrix:
        """See `WeightMap.matrix`."""
        return self._matrices(parameter, 1, shape, outputs_last)[0]

    def stack(
        self, parameter: str, shape: Sequence[int], outputs_last: bool, interleaved: bool, spare: int = 0
    ) -> tuple[Matrix, ...]:
        """See `WeightMap.stack`. In folders gate and up are stored as in the model, or the conversion arranges them so."""
        return self._matrices(parameter, shape[0], shape[1:], outputs_last, spare)

    def _matrices(
        self, parameter: str, count: int, shape: Sequence[int], outputs_last: bool, spare: int = 0
    ) -> tuple[Matrix, ...]:
        """The `count` matrices of this shape in a parameter. It may have `spare` more, which are unused."""
        group = self._of.get(parameter)
        if group is None:
            raise self._missing(parameter)
        tensors = [self._tensors[name] for _, name in group.members]
        outputs, inputs = reversed(shape) if outputs_last else shape
        indices, columns = self._row_indices_of(group)[parameter], {tensor.inputs for tensor in tensors}
        if spare and len(indices) == count + spare:
            indices = indices[:count]
        if (
            indices.size == count * outputs
            and columns == {inputs}
            and self._outputs_are_rows(tensors, indices, shape, outputs_last)
        ):
            bases, order = self._bases(group), self._input_order(group)
            return tuple(matrix_of(one, tensors, bases, order) for one in indices.reshape(count, outputs))
        if indices.size == count * inputs and columns == {outputs}:
            if len(tensors) == count and all(len(tensor.shape) == 2 for tensor in tensors):
                return tuple(self._transposed(tensor) for tensor in tensors)
            if len(tensors) == 1:
                return tuple(self._transposed(part_of(tensors[0], i, count)) for i in range(count))
            raise UnsupportedError(
                f"{self._checkpoint.path}: `{parameter}` is put together from {len(tensors)} tensors by columns,"
                " which is not supported",
                hint="use a GGUF file of the model",
            )
        raise self._contradiction(parameter, tensors[0].shape, self._known[parameter].shape)

    @staticmethod
    def _outputs_are_rows(
        tensors: Sequence[Tensor], indices: npt.NDArray[np.int64], shape: Sequence[int], outputs_last: bool
    ) -> bool:
        """True if the stored rows are outputs. Only square matrices without blocks are ambiguous: the conversion tells."""
        if shape[0] != shape[1] or any(tensor.k_splits or block_of(tensor.type)[0] > 1 for tensor in tensors):
            return True
        is_transposed = indices.ndim > 1 and indices.shape[-1] != 1  # by the conversion
        return is_transposed == outputs_last

    def value(self, parameter: str, shape: Sequence[int], read: Read) -> torch.Tensor:
        """See `WeightMap.value`."""
        group = self._of.get(parameter)
        if group is None:
            raise self._missing(parameter)
        found = self._convert(group, lambda name: read(self._tensors[name]))[parameter]
        if tuple(found.shape) != tuple(shape) and found.numel() == prod(shape) == 1:
            found = found.reshape(tuple(shape))
        if tuple(found.shape) != tuple(shape):
            raise self._contradiction(parameter, found.shape, shape)
        return found.contiguous()

    def unexpected(self) -> list[str]:
        """See `WeightMap.unexpected`. Tensors that transformers itself drops are not counted."""
        patterns = [*(self._model._keys_to_ignore_on_load_unexpected or ()), *_DROPPED]
        layers = getattr(self._model.config.get_text_config(), "num_hidden_layers", 0) or 0

        def dropped(name: str) -> bool:
            if layer_of(name) >= layers:
                return True  # multi-token prediction heads are stored as further layers
            return any(re.search(pattern, name) for pattern in patterns)

        return [name for name, target in self._unexpected if not dropped(name) and not dropped(target)]


# Buffers that older transformers stored, MTP heads, activation and KV scales, RoPE factors.
_DROPPED = (
    r"rotary_emb\.inv_freq",
    r"(^|\.)position_ids$",
    r"\.attn\.(masked_)?bias$",
    r"\.attention\.(masked_)?bias$",
    r"(^|\.)mtp\.",
    r"\.(input|activation|k|v)_scale$",
    r"^rope_(freqs|factors_long|factors_short)\.weight$",
)


def _reorders_inputs(operation: Any) -> bool:
    """True if a conversion reorders columns. They stay as stored; the activations are reordered instead."""
    return hasattr(operation, "input_permutation")


def _row_indices(tensor: Tensor, base: int) -> torch.Tensor:
    """The indices of a tensor's rows in its shape, with one column; for a vector, of its elements."""
    if len(tensor.shape) < 2:
        return torch.arange(base, base + prod(tensor.shape)).view(tensor.shape)
    shape = (tensor.outputs,) if tensor.k_splits else tensor.shape[:-1]
    return torch.arange(base, base + _height(tensor)).view(*shape, 1)


def _height(tensor: Tensor) -> int:
    """Number of rows of the matrices in a tensor; for a vector, of its elements."""
    return prod(tensor.shape) if len(tensor.shape) < 2 else tensor.outputs


class GgufNames(_VirtualTensors):
    """WeightMap of a GGUF file, by transformers' GGUF name mapping and tensor processors."""

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel):
        super().__init__(checkpoint)
        family = _PROCESSED_LIKE.get(checkpoint.architecture, checkpoint.architecture)
        self._processor = TENSOR_PROCESSORS.get(family, TensorProcessor)(config=model.config.to_dict())
        self._mapped = _gguf_names(checkpoint, model, self._processor)
        self._ignored = _ignored_names(checkpoint, model)
        self._of: dict[str, Tensor] = {}
        for name, parameter in self._mapped.items():
            tensor = checkpoint.tensors.get(name) or checkpoint.tensors.get(f"{name}.weight")
            if tensor is not None:
                self._of[parameter] = tensor
        embedding = checkpoint.tensors.get(EMBEDDING)
        if embedding is None:
            raise CheckpointError(
                f"{checkpoint.path} has no tensor `{EMBEDDING}`",
                hint="the file is incomplete; get it from another source",
            )
        self._of.setdefault("lm_head.weight", embedding)
        self._kv_b_halves = {  # MLA's kv_b_proj, where its key half (k_b) and value half (v_b) are stored apart
            parameter: tuple(checkpoint.tensors[name.replace("kv_b", half)] for half in ("k_b", "v_b"))
            for name, parameter in self._mapped.items()
            if name.endswith(".attn_kv_b.weight")
            and parameter not in self._of
            and all(name.replace("kv_b", half) in checkpoint.tensors for half in ("k_b", "v_b"))
        }
        self._used: set[str] = set()

    def __contains__(self, parameter: str) -> bool:
        known = parameter in self._of or parameter in self._kv_b_halves
        return known or bool(self._expert_tensors(parameter) or self._single_experts(parameter))

    def _find(self, parameter: str) -> Tensor:
        tensor = self._of.get(parameter)
        if tensor is None:
            raise self._missing(parameter)
        self._used.add(tensor.name)
        return tensor

    def matrix(self, parameter: str, shape: Sequence[int], outputs_last: bool) -> Matrix:
        """See `WeightMap.matrix`. GGUF converters store outputs as rows in every matrix except MLA's `attn_k_b`."""
        if parameter in self._kv_b_halves:
            return self._split_kv_b(parameter, shape)
        tensor = self._find(parameter)
        expected = (shape[1], shape[0]) if outputs_last else tuple(shape)
        if (tensor.rows, tensor.columns) != expected:
            raise self._contradiction(parameter, tensor.shape, expected)
        return Matrix((Slice(tensor, 0, tensor.rows),), self._row_order(tensor))

    def _split_kv_b(self, parameter: str, shape: Sequence[int]) -> Matrix:
        """k_b (heads, rank, key width) and v_b (heads, value width, rank) as one matrix."""
        keys, values = halves = self._kv_b_halves[parameter]
        self._used.update(tensor.name for tensor in halves)
        fits = len(keys.shape) == len(values.shape) == 3 and keys.shape[0] == values.shape[0]
        if not fits or (keys.shape[0] * (keys.shape[2] + values.shape[1]), keys.shape[1]) != tuple(shape):
            raise self._contradiction(parameter, keys.shape + values.shape, shape)
        return Matrix(tuple(Slice(tensor, 0, tensor.rows) for tensor in halves), k_b_transposed=True)

    def _row_order(self, tensor: Tensor) -> torch.Tensor | None:
        """The row in the file of each output, by transformers' weight conversion of row indices."""
        indices = np.arange(tensor.rows)[:, None]
        try:
            placed = self._processor.process(indices, tensor.name, parsed_parameters={"tensors": {}}).weights
        except ValueError:  # bloom's needs all columns; it reorders the bias in the same way
            bias = tensor.name.replace("weight", "bias")
            placed = self._processor.process(indices[:, 0], bias, parsed_parameters={"tensors": {}}).weights[:, None]
        if placed is None or placed.shape != indices.shape or np.array_equal(placed, indices):
            return None  # unchanged, or only transposed for a module with (inputs, outputs) weights
        return torch.from_numpy(np.ascontiguousarray(placed[:, 0]))

    def _expert_tensors(self, parameter: str) -> list[Tensor]:
        """The `blk.N.ffn_{gate,up,down}_exps` of a parameter of any model; for gate_up, gate comes first."""
        match = re.search(r"\.layers\.(\d+)\..*\b(gate_up|up|down)_proj(_bias)?$", parameter)
        if match is None:
            return []
        suffix = "bias" if match[3] else "weight"
        kinds = {"gate_up": ("gate", "up")}.get(match[2], (match[2],))
        if f"blk.{match[1]}.ffn_{match[2]}_exps.{suffix}" in self._checkpoint.tensors:
            kinds = (match[2],)
        names = [f"blk.{match[1]}.ffn_{kind}_exps.{suffix}" for kind in kinds]
        found = [self._checkpoint.tensors[name] for name in names if name in self._checkpoint.tensors]
        return found if len(found) == len(kinds) else []

    def _single_experts(self, parameter: str) -> list[list[Tensor]]:
        """The `blk.N.ffn_{gate,up,down}.E.weight` of each expert, as the first converters wrote Mixtral."""
        match = re.search(r"\.layers\.(\d+)\..*\b(gate_up|up|down)_proj$", parameter)
        if match is None:
            return []
        kinds = {"gate_up": ("gate", "up")}.get(match[2], (match[2],))
        found: list[list[Tensor]] = []
        while True:
            names = [f"blk.{match[1]}.ffn_{kind}.{len(found)}.weight" for kind in kinds]
            if any(name not in self._checkpoint.tensors for name in names):
                return found
            found.append([self._checkpoint.tensors[name] for name in names])

    def _stack_of_single(
        self, parameter: str, parts: list[list[Tensor]], shape: Sequence[int], outputs_last: bool, interleaved: bool
    ) -> tuple[Matrix, ...]:
        count, outputs, inputs = (shape[0], shape[2], shape[1]) if outputs_last else shape
        if len(parts) != count:
            raise self._missing(parameter)
        for tensor in (tensor for one in parts for tensor in one):
            self._used.add(tensor.name)
            expected = (outputs // len(parts[0]), inputs)
            if tuple(tensor.shape) != expected:
                raise self._contradiction(parameter, tensor.shape, expected)
        order = _alternating(outputs) if interleaved and len(parts[0]) == 2 else None
        return tuple(Matrix(tuple(Slice(tensor, 0, tensor.rows) for tensor in one), order) for one in parts)

    def stack(
        self, parameter: str, shape: Sequence[int], outputs_last: bool, interleaved: bool, spare: int = 0
    ) -> tuple[Matrix, ...]:
        """See `WeightMap.stack`."""
        tensors = self._expert_tensors(parameter)
        single = [] if tensors else self._single_experts(parameter)
        if single:
            return self._stack_of_single(parameter, single, shape, outputs_last, interleaved)
        if not tensors:
            raise self._missing(parameter)
        self._used.update(tensor.name for tensor in tensors)
        count, outputs, inputs = (shape[0], shape[2], shape[1]) if outputs_last else shape
        for tensor in tensors:
            expected = (count, outputs // len(tensors), inputs)
            if tuple(tensor.shape) != expected:
                raise self._contradiction(parameter, tensor.shape, expected)
        order = _alternating(outputs) if interleaved and len(tensors) == 2 else None
        return tuple(
            Matrix(tuple(Slice(one, 0, one.rows) for one in (part_of(t, i, count) for t in tensors)), order)
            for i in range(count)
        )

    def value(self, parameter: str, shape: Sequence[int], read: Read) -> torch.Tensor:
        """See `WeightMap.value`."""
        experts = self._expert_tensors(parameter) if parameter not in self._of else []
        if experts:
            self._used.update(tensor.name for tensor in experts)
            found = torch.cat([read(tensor) for tensor in experts], -1)
            return found[:, _alternating(shape[-1])] if len(experts) == 2 else found
        tensor = self._find(parameter)
        value = self._processor.process(read(tensor).numpy(), tensor.name, parsed_parameters={"tensors": {}}).weights
        if value.size == prod(shape):
            value = value.reshape(tuple(shape))
        if tuple(value.shape) != tuple(shape):
            raise self._contradiction(parameter, value.shape, shape)
        return torch.from_numpy(np.array(value, np.float32))

    def unexpected(self) -> list[str]:
        """See `WeightMap.unexpected`."""
        mapped = self._mapped.keys() | {f"{name}.weight" for name in self._mapped}
        left = self._checkpoint.tensors.keys() - mapped - self._used - _NOT_WEIGHTS
        left = {name for name in left if layer_of(name) < self._checkpoint.layers and not _UNUSED_BIAS.search(name)}
        left = {name for name in left if self._checkpoint.architecture != "glm-dsa" or ".indexer." not in name}
        return sorted(name for name in left if name.rpartition(".")[0] not in self._ignored)


def _table(checkpoint: Checkpoint) -> gguf.TensorNameMap:
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == checkpoint.architecture)
    blocks = checkpoint.number("block_count")
    return gguf.get_tensor_name_map(number, max(blocks, checkpoint.number("decoder_block_count", blocks)))


def _ignored_names(checkpoint: Checkpoint, model: PreTrainedModel) -> set[str]:
    """Tensors in files that transformers' model does not use, such as the keys of layers that share KV with others."""
    table = _table(checkpoint)
    names = {table.get_name(f"model.{name}") for name in keys_that_may_be_unexpected(model)}
    return {name for name in names if name is not None}


def _gguf_names(checkpoint: Checkpoint, model: PreTrainedModel, processor: TensorProcessor) -> dict[str, str]:
    """The parameter of every tensor name. transformers' own function builds the whole name table once per module."""
    table = _table(checkpoint)
    found: dict[str, str] = {}
    for parameter in model.state_dict():
        path = processor.preprocess_name(parameter).split(".")
        suffix = f".{path.pop()}" if path[-1] in ("weight", "bias") else ""
        if path[-1] == "e_score_correction_bias":  # a buffer of the block in the model, stored as a bias
            path[-1], suffix = "e_score_correction", ".bias"
            path = [word for word in path if word != "gate" or "moe_statics" not in path]
        if path[-1] == "expert_bias":
            suffix = ".bias"
        if path[-2:] == ["router", "scale"]:  # scale of the router's input; files store it beside the router's matrix
            path[-1], suffix = "proj", ".scale"
        if path[-2:] == ["router", "per_expert_scale"]:
            path[-2:], suffix = ["experts", "down_proj"], ".scale"
        # gguf's table has some names without their first word, of models without a head.
        names = (table.get_name(".".join(path[start:])) for start in range(len(path)))
        name = next((name for name in names if name is not None), None)
        if name is not None:
            found.setdefault(name + suffix, parameter)
    return found


# Families whose tensors are converted like another's: q and k permuted, or one added to norms.
_PROCESSED_LIKE = {"arcee": "llama", "mistral3": "llama", "gemma": "gemma2", "granite": "llama", "smollm3": "llama"}
EMBEDDING = "token_embd.weight"
# The first T5s store this bias, and no program uses it.
_UNUSED_BIAS = re.compile(r"^dec\.blk\.\d+\.cross_attn_rel_b\.weight$")
# Tensors read for the config, or derived from it; no module has them as weights.
_NOT_WEIGHTS = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})


def _alternating(outputs: int) -> torch.Tensor:
    """The row order that alternates the first and the second half."""
    return torch.arange(outputs).view(2, -1).T.reshape(-1)


def tied_to(model: PreTrainedModel) -> Mapping[str, str]:
    """Tied parameters, mapped to the parameter whose tensor they share."""
    return dict(model.all_tied_weights_keys)
