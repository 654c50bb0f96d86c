"""compressed-tensors checkpoints: the stored tensors of a matrix are matched by shape, not by pattern.

The configuration selects groups of modules by regular expressions, which are not evaluated. A group's bits and size either
fit the shapes of a tensor or do not. A tensor that fits groups with different bits is refused. Modules on the `ignore` list
are stored unquantised and stay so.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from headrace.checkpoint.encodings.encoding import (
    FLOAT_TYPES,
    Settings,
    Virtual,
    require,
    scale_tensor,
    scaling,
    setting,
)
from headrace.checkpoint.encodings.float8 import float8
from headrace.checkpoint.encodings.integers import Integers
from headrace.checkpoint.encodings.mxfp4 import microscaled
from headrace.checkpoint.tensor import Tensor
from headrace.errors import CheckpointError, UnsupportedError

FORMATS = frozenset({
    "dense", "pack-quantized", "int-quantized", "naive-quantized", "float-quantized", "mixed-precision",
    "mxfp4-pack-quantized", "mxfp8-quantized",
})  # fmt: skip
_HINT = "get the model as W4A16, W8A8 or FP8 of compressed-tensors, as a GGUF, or in BF16"


def compressed_tensors(tensors: Mapping[str, Tensor], settings: Settings) -> Iterator[Virtual]:
    """A virtual tensor for each packed, integer or FP8 matrix.

    Raises:
        UnsupportedError: a format that cannot be decoded, named.
        CheckpointError: a tensor is missing, or shapes that contradict each other.
    """
    schemes = _schemes(settings)
    for name, tensor in tensors.items():
        if name.endswith("_packed"):
            yield _packed(tensors, tensor, schemes)
        elif tensor.type == "I8" and len(tensor.shape) >= 2 and not name.endswith("_zero_point"):
            yield _bytes(tensors, tensor, schemes)
    yield from float8(tensors, _block(schemes))


def _schemes(settings: Settings) -> list[Settings]:
    """Weight settings of the configuration's groups."""
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError("the quantisation of compressed-tensors has no `config_groups`", hint=_HINT)
    formats = [setting(settings, "format", "")]
    schemes = []
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            continue
        formats.append(setting(group, "format") or formats[0])
        schemes.append(weights)
    unknown = sorted({str(name) for name in formats} - FORMATS)
    if unknown:
        raise UnsupportedError(f"weights of compressed-tensors' format `{unknown[0]}` cannot be decoded", hint=_HINT)
    _refuse_transforms(settings)
    return schemes


def _refuse_transforms(settings: Settings) -> None:
    """Refuse settings that change the model and not only its weights' storage."""
    sparsity = settings.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") not in ("dense", None):
        raise UnsupportedError(f"weights are stored sparse, as `{sparsity['format']}`", hint=_HINT)
    transforms = settings.get("transform_config")
    if isinstance(transforms, Mapping) and transforms.get("config_groups"):
        raise UnsupportedError("the model rotates its activations (`transform_config`)", hint=_HINT)


def _block(schemes: list[Settings]) -> tuple[int, int] | None:
    """Configured (rows, columns) per scale; None if no group has a `block_structure`."""
    structures = [scheme.get("block_structure") for scheme in schemes]
    return next((block for block in map(pair, structures) if block is not None), None)


def pair(value: Any) -> tuple[int, int] | None:
    """Checked (rows, columns) of a configured block; None if absent."""
    if value is None:
        return None
    if isinstance(value, list) and len(value) == 2 and all(type(n) is int and n > 0 for n in value):
        return value[0], value[1]
    raise CheckpointError(f"the quantisation's block is {value!r}, which should be two numbers")


def _packed(tensors: Mapping[str, Tensor], tensor: Tensor, schemes: list[Settings]) -> Virtual:
    base = tensor.name.removesuffix("_packed")
    scale = scale_tensor(tensors, base, base + "_scale")
    require(tensor, ("I32", "U8"))
    if len(tensor.shape) < 2:
        raise CheckpointError(f"tensor `{tensor.name}` has the shape {tensor.shape}, which is no matrix")
    if tensor.type == "U8":
        require(scale, ("U8", "F8_E8M0"), (*tensor.shape[:-1], tensor.columns // 16))
        require(tensor, ("U8",), (*tensor.shape[:-1], scale.columns * 16))
        return microscaled(base, (*tensor.shape[:-1], tensor.columns * 2), tensor, scale)
    fitting = [scheme for scheme in schemes if _fits(scheme, tensor, scale)]
    bits = {setting(scheme, "num_bits") for scheme in fitting}
    if not bits:
        raise CheckpointError(
            f"tensor `{tensor.name}` of shape {tensor.shape} with scales of {scale.shape} fits no group of the"
            " quantisation",
            hint="the configuration and the weights are of different models; download both again",
        )
    if len(bits) > 1 or not bits <= {4, 8}:
        raise UnsupportedError(
            f"tensor `{tensor.name}` is packed in {' or '.join(map(str, sorted(bits)))} bits; 4 and 8 are known",
            hint=_HINT,
        )
    return _integers(tensors, base, tensor, bits.pop(), fitting)


def _fits(scheme: Settings, tensor: Tensor, scale: Tensor) -> bool:
    """True if a group's bits and size fit the columns of a tensor's words and scales."""
    bits, group = setting(scheme, "num_bits"), setting(scheme, "group_size") or -1
    if type(bits) is not int or type(group) is not int or not 1 <= bits <= 8 or tensor.columns * 32 % bits:
        return False
    groups = scale.columns if len(scale.shape) == len(tensor.shape) else 1
    return groups * group == tensor.columns * 32 // bits if group > 0 else groups == 1


def _bytes(tensors: Mapping[str, Tensor], tensor: Tensor, schemes: list[Settings]) -> Virtual:
    scale_tensor(tensors, tensor.name, tensor.name + "_scale")
    return _integers(tensors, tensor.name, tensor, 8, schemes)


def _integers(tensors: Mapping[str, Tensor], base: str, weight: Tensor, bits: int, schemes: list[Settings]) -> Virtual:
    packed = weight.type == "I32"
    shape = (*weight.shape[:-1], weight.columns * 32 // bits if packed else weight.columns)
    scale, order = tensors[base + "_scale"], tensors.get(base + "_g_idx")
    require(scale, FLOAT_TYPES)
    grid, group = scaling(weight, shape, scale, _block(schemes))
    zero = _zero(tensors, base, weight, scale, bits, schemes)
    if order is not None:
        require(order, ("I32",), (shape[-1],))
    type_name = _target(bits, zero is not None, group, order is not None or shape[-1] % group > 0)
    what = "one scale a row" if group == shape[-1] else f"group {group}"
    encoding = Integers(
        label=f"compressed-tensors int{bits}, {what}",
        type=type_name,
        bits=bits,
        columns=shape[-1],
        weight=weight,
        scale=scale,
        grid=grid,
        columns_per_scale=group,
        zero=zero,
        order=order,
    )
    names = (weight.name, *(base + suffix for suffix in ("_scale", "_zero_point", "_shape", "_g_idx")))
    return Virtual(name=base, shape=shape, type=type_name, encoding=encoding, parts=names)


def _target(bits: int, asymmetric: bool, group: int, scattered: bool) -> str:
    """ggml format that holds the integers unchanged, else F16."""
    if scattered or group % 32 or (bits == 8 and asymmetric):
        return "F16"
    return "Q8_0" if bits == 8 else "Q4_1" if asymmetric else "Q4_0"


def _zero(
    tensors: Mapping[str, Tensor], base: str, weight: Tensor, scale: Tensor, bits: int, schemes: list[Settings]
) -> Tensor | None:
    """Zero points; None for symmetric weights, for which old versions wrote zeros too."""
    symmetric = {bool(setting(scheme, "symmetric", True)) for scheme in schemes}
    name = base + "_zero_point"
    if symmetric == {True} or (name not in tensors and symmetric != {False}):
        return None
    zero = scale_tensor(tensors, base, name)
    if weight.type == "I8":
        require(zero, ("I8",), scale.shape)
        return zero
    if scale.shape[:-1] != weight.shape[:-1]:
        raise CheckpointError(
            f"tensor `{scale.name}` of shape {scale.shape} is not by rows, and cannot have zero points"
        )
    require(zero, ("I32",), (*weight.shape[:-2], -(-weight.shape[-2] * bits // 32), scale.columns))
    return zero
