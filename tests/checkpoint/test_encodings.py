"""Quantised layouts: each equals its plain dequantisation, in any range of rows, and bad ones are refused."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.checkpoint import Tensor
from headrace.checkpoint.encodings import decoded, transposed
from headrace.checkpoint.encodings.blocks import half
from headrace.checkpoint.tensor import block_of
from headrace.errors import CheckpointError, UnsupportedError

pytestmark = pytest.mark.zoo

Array = np.ndarray[Any, Any]
HALF = 2.0**-11  # half a step of fp16, of a value
DTYPES = {"F32": np.float32, "F16": np.float16, "I32": np.int32, "I8": np.int8, "U8": np.uint8}


@dataclass
class Store:
    """Stored tensors with their bytes, in place of a checkpoint and its reader."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    data: dict[str, Array] = field(default_factory=dict)

    def add(self, name: str, type_name: str, values: Array) -> None:
        if type_name in DTYPES:
            assert values.dtype == DTYPES[type_name]
        self.data[name] = np.frombuffer(values.tobytes(), np.uint8)
        size = values.size * block_of(type_name)[1]
        assert size == values.nbytes
        self.tensors[name] = Tensor(name=name, shape=values.shape, type=type_name, path="m", offset=0, nbytes=size)

    def virtual(self, config: Mapping[str, Any], name: str, first: int = 0, last: int | None = None) -> Array:
        """Bytes of rows of a virtual tensor, decoded as a reader does it."""
        tensors, encodings = decoded(self.tensors, config, "m")
        tensor, encoding = tensors[name], encodings[name]
        last = tensor.rows if last is None else last
        raw = []
        for source, offset, count in encoding.reads(first, last):
            assert 0 <= offset <= offset + count <= source.nbytes
            odd = np.empty(count + 1, np.uint8)[1:]  # readers promise no alignment
            odd[:] = self.data[source.name][offset : offset + count]
            raw.append(odd)
        out = np.full((last - first) * tensor.row_bytes, 0xA5, np.uint8)
        encoding.decode(raw, first, last, out)
        return out

    def values(self, config: Mapping[str, Any], name: str) -> Array:
        """Weights of a virtual tensor, dequantised by the `gguf` package."""
        tensor = decoded(self.tensors, config, "m")[0][name]
        assert tensor.nbytes == tensor.rows * tensor.row_bytes
        packed = self.virtual(config, name).reshape(tensor.rows, -1)
        return dequantize(packed, GGMLQuantizationType[tensor.type]).reshape(tensor.shape)


def random(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def bf16(values: Array) -> tuple[Array, Array]:
    """Values rounded to BF16, as stored and as fp32."""
    bits = (values.astype(np.float32).view(np.uint32) + 0x8000 >> 16).astype(np.uint16)
    return bits, (bits.astype(np.uint32) << 16).view(np.float32)


def packed(codes: Array, bits: int) -> Array:
    """Codes in words along the last dimension, the first in the lowest bits."""
    per = 32 // bits
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % per)])
    lanes = codes.reshape(*codes.shape[:-1], -1, per).astype(np.uint64)
    words: Array = (lanes << np.arange(0, 32, bits, dtype=np.uint64)).sum(-1)
    return words.astype(np.uint32).view(np.int32)


def packed_down(codes: Array, bits: int) -> Array:
    """The same along the last dimension but one."""
    return np.ascontiguousarray(packed(codes.swapaxes(-1, -2), bits).swapaxes(-1, -2))


def wide(values: Array, high: int, width: int, shape: tuple[int, ...]) -> Array:
    """A value for each block of the last two dimensions, repeated for each weight."""
    return values.repeat(high, -2).repeat(width, -1)[..., : shape[-2], : shape[-1]]


# FP8


def fp8_config(block: list[int] | None = None) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": "fp8", "weight_block_size": block}}


def fp8_store(shape: tuple[int, ...], scales: tuple[int, ...], kind: str = "F8_E4M3") -> tuple[Store, Array, Array]:
    """A store, the weights without their scales, and the scales."""
    rng = random(1)
    dtype = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}[kind]
    weights = torch.from_numpy(rng.normal(0, 20, shape).astype(np.float32)).to(dtype)
    scale = rng.uniform(1e-3, 1e-2, scales).astype(np.float32)
    store = Store()
    store.add("a.weight", kind, weights.view(torch.uint8).numpy())
    store.add("a.weight_scale_inv", "F32", scale)
    store.add("a.bias", "F32", np.ones(shape[-2], np.float32))
    store.add("a.input_scale", "F32", np.ones(1, np.float32))
    return store, weights.float().numpy(), scale


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize(
    ("shape", "scales", "block"),
    [
        ((256, 384), (2, 3), [128, 128]),
        ((200, 300), (2, 3), [128, 128]),
        ((3, 200, 256), (3, 2, 2), [128, 128]),
        ((3, 64, 96), (3, 1, 1), None),
        ((3, 64, 96), (3,), None),
        ((64, 96), (64, 1), None),
        ((64, 96), (64,), None),
        ((64, 96), (), None),
        ((3, 64, 96), (1,), None),
        ((64, 96), (64, 3), None),
    ],
)
def test_fp8_equals_values_times_scales(
    kind: str, shape: tuple[int, ...], scales: tuple[int, ...], block: list[int] | None
) -> None:
    store, weights, scale = fp8_store(shape, scales, kind)
    if scale.ndim < len(shape):  # one for all, or one for each of the first dimension
        scale = scale.reshape(-1, *[1] * (len(shape) - 1))
    high, width = block or (-(-shape[-2] // scale.shape[-2]), -(-shape[-1] // scale.shape[-1]))

    got = store.values(fp8_config(block), "a.weight")

    # Rounded once to fp16; below 2^-14 in steps of 2^-24.
    np.testing.assert_allclose(got, weights * wide(scale, high, width, shape), rtol=HALF, atol=2.0**-25)


def test_every_code_of_fp8_has_the_value_that_torch_gives_it() -> None:
    for kind, dtype in (("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2)):
        store = Store()
        codes = np.arange(256, dtype=np.uint8).reshape(4, 64)
        store.add("a.weight", kind, codes)
        store.add("a.weight_scale", "F32", np.ones((), np.float32))

        expected = torch.from_numpy(codes).view(dtype).float().numpy()
        np.testing.assert_array_equal(store.values(fp8_config(), "a.weight"), expected)


def test_exponent_scales_are_powers_of_two() -> None:
    store, weights, _ = fp8_store((64, 96), (64, 3))
    exponents = random(2).integers(110, 130, (64, 3)).astype(np.uint8)
    for kind in ("U8", "F8_E8M0"):
        store.add("a.weight_scale_inv", kind, exponents)
        expected = weights * wide(2.0 ** (exponents.astype(np.float32) - 127), 1, 32, (64, 96))
        np.testing.assert_allclose(store.values(fp8_config(), "a.weight"), expected, rtol=HALF, atol=2.0**-25)


@pytest.mark.parametrize(
    "method",
    [{"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, {"quant_method": "modelopt", "quant_algo": "FP8"}],
)
def test_other_methods_whose_weights_are_fp8_are_decoded_too(method: dict[str, Any]) -> None:
    store, weights, scale = fp8_store((64, 96), (64, 1))
    store.add("a.weight_scale", "F32", scale)
    del store.tensors["a.weight_scale_inv"]

    got = store.values({"quantization_config": method}, "a.weight")
    np.testing.assert_allclose(got, weights * scale, rtol=HALF, atol=2.0**-25)


def test_only_the_weight_is_left_of_a_group_and_the_rest_is_unchanged() -> None:
    store, _, _ = fp8_store((200, 300), (2, 3))
    store.add("b.weight", "F8_E4M3", np.zeros((64, 64), np.uint8))
    store.add("b.weight_scale_inv", "F32", np.ones((1, 1), np.float32))

    tensors, encodings = decoded(store.tensors, fp8_config([128, 128]), "model")

    assert set(tensors) == {"a.weight", "b.weight", "a.bias"}
    assert tensors["a.bias"] is store.tensors["a.bias"]
    assert set(encodings) == {"a.weight", "b.weight"}
    assert {tensors[name].path for name in encodings} == {"model[decoded]"}
    assert [tensors[name].offset for name in encodings] == [0, 30 * 4096]
    assert encodings["a.weight"].label == "FP8 E4M3, a scale for 128 x 128"


def test_without_a_quantisation_all_tensors_are_unchanged() -> None:
    store, _, _ = fp8_store((200, 300), (2, 3))

    assert decoded(store.tensors, {"model_type": "llama"}, "m") == (store.tensors, {})


def test_a_scale_with_which_weights_exceed_fp16_is_an_error() -> None:
    for scale in (147.0, float("inf"), float("nan")):
        store, _, _ = fp8_store((64, 96), (64, 1))
        store.add("a.weight_scale_inv", "F32", np.full((64, 1), scale, np.float32))

        with pytest.raises(CheckpointError, match=r"`a.weight_scale_inv` allows weights of .*, fp16 ends at 65504"):
            store.virtual(fp8_config(), "a.weight")


def test_fp8_without_a_scale_is_an_error() -> None:
    store, _, _ = fp8_store((64, 96), (64, 1))
    del store.tensors["a.weight_scale_inv"]

    with pytest.raises(CheckpointError, match=r"`a.weight` is quantised, but `a.weight_scale_inv` is missing"):
        decoded(store.tensors, fp8_config(), "m")


@pytest.mark.parametrize("shape", [(2, 2), (3, 3), (1, 4), (2, 3, 1), (0, 3), (5,), (300,)])
def test_scales_that_fit_no_block_are_an_error(shape: tuple[int, ...]) -> None:
    store, _, _ = fp8_store((200, 300), shape)
    if shape in ((2, 2), (1, 4)):  # these divide the matrix evenly, and are accepted as blocks of another size
        assert decoded(store.tensors, fp8_config([128, 128]), "m")[1]
        return

    with pytest.raises(CheckpointError, match=r"`a.weight"):
        decoded(store.tensors, fp8_config([128, 128]), "m")


# compressed-tensors


def ct_config(format_name: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, "group_size": None, **weights}}
    quantisation = {"quant_method": "compressed-tensors", "format": format_name, "config_groups": {"group_0": group}}
    return {"quantization_config": quantisation}


def ct_store(
    shape: tuple[int, ...], bits: int, group: int, *, symmetric: bool = True, kind: str = "BF16"
) -> tuple[Store, Array]:
    """A store of packed weights, and their plain dequantisation."""
    rng = random(3)
    *stack, outputs, columns = shape
    groups = columns // group
    codes = rng.integers(0, 1 << bits, shape)
    scales = rng.uniform(1e-3, 1e-2, (*stack, outputs, groups)).astype(np.float32)
    stored, scales = bf16(scales) if kind == "BF16" else (scales.astype(kind), scales.astype(kind).astype(np.float32))
    zeros = rng.integers(0, 1 << bits, (*stack, outputs, groups))
    store = Store()
    store.add("a.weight_packed", "I32", packed(codes, bits))
    store.add("a.weight_scale", {"float16": "F16", "float32": "F32"}.get(kind, kind), stored)
    store.add("a.weight_shape", "I32", np.array(shape, np.int32))
    if not symmetric:
        store.add("a.weight_zero_point", "I32", packed_down(zeros, bits))
    zero = (1 << bits - 1) if symmetric else wide(zeros, 1, group, shape)
    return store, (codes - zero) * wide(scales, 1, group, shape)


@pytest.mark.parametrize("kind", ["BF16", "float16", "float32"])
@pytest.mark.parametrize(
    ("bits", "shape", "group", "symmetric", "target"),
    [
        (4, (64, 256), 128, True, "Q4_0"),
        (4, (64, 256), 32, True, "Q4_0"),
        (4, (33, 192), 64, True, "Q4_0"),
        (4, (64, 256), 256, True, "Q4_0"),
        (4, (3, 12, 256), 128, True, "Q4_0"),
        (4, (64, 256), 128, False, "Q4_1"),
        (4, (3, 12, 256), 64, False, "Q4_1"),
        (4, (61, 256), 256, False, "Q4_1"),
        (4, (33, 192), 48, True, "F16"),
        (4, (33, 192), 16, False, "F16"),
        (8, (64, 256), 128, True, "Q8_0"),
        (8, (64, 256), 256, True, "Q8_0"),
        (8, (61, 256), 64, False, "F16"),
        (8, (3, 6, 256), 64, False, "F16"),
    ],
)
def test_packed_integers_equal_their_plain_dequantisation(
    bits: int, shape: tuple[int, ...], group: int, symmetric: bool, target: str, kind: str
) -> None:
    store, expected = ct_store(shape, bits, group, symmetric=symmetric, kind=kind)
    config = ct_config(
        "pack-quantized", num_bits=bits, group_size=None if group == shape[-1] else group, symmetric=symmetric
    )

    assert decoded(store.tensors, config, "m")[0]["a.weight"].type == target
    assert set(decoded(store.tensors, config, "m")[0]) == {"a.weight"}
    got = store.values(config, "a.weight")

    if target in ("Q4_0", "Q8_0") and kind != "float32":
        np.testing.assert_array_equal(got, expected.astype(np.float32))  # BF16 and fp16 scales are kept
    elif target == "Q4_1":
        # The minimum, at most 15 steps of 0.01, and an fp32 scale times 15, each rounded to fp16.
        np.testing.assert_allclose(got, expected, rtol=0, atol=2 * 15 * 0.01 * HALF)
    else:
        np.testing.assert_allclose(got, expected, rtol=2 * HALF, atol=2.0**-25)


@pytest.mark.parametrize("symmetric", [True, False])
def test_act_order_is_decoded_to_fp16(symmetric: bool) -> None:
    store, _ = ct_store((32, 256), 4, 64, symmetric=symmetric)
    codes = random(3).integers(0, 16, (32, 256))  # the first that the store draws
    order = random(4).permutation(256).astype(np.int32) // 64
    store.add("a.weight_g_idx", "I32", order)
    config = ct_config("pack-quantized", num_bits=4, group_size=64, symmetric=symmetric, actorder="group")

    scales = (store.data["a.weight_scale"].view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(32, 4)
    zeros = np.full((32, 4), 8)
    if not symmetric:
        words = store.data["a.weight_zero_point"].view(np.uint32).reshape(4, 1, 4)
        zeros = (words >> np.arange(0, 32, 4, dtype=np.uint32)[:, None] & 15).reshape(32, 4).astype(int)
    expected = (codes - zeros[:, order]) * scales[:, order]

    np.testing.assert_allclose(store.values(config, "a.weight"), expected, rtol=HALF, atol=2.0**-25)


@pytest.mark.parametrize("group", [64, 16])
def test_a_scale_with_which_integers_exceed_fp16_is_an_error(group: int) -> None:
    for scale in (4096.0, 3e38, float("inf"), float("nan")):
        store, _ = ct_store((32, 256), 4, group)
        store.add("a.weight_scale", "F32", np.full((32, 256 // group), scale, np.float32))

        with pytest.raises(CheckpointError, match=r"`a.weight_scale` has a scale of .*, the limit for fp16 is 4094"):
            store.virtual(ct_config("pack-quantized", num_bits=4, group_size=group), "a.weight")


def test_act_order_with_an_unknown_group_is_an_error() -> None:
    store, _ = ct_store((32, 256), 4, 64)
    store.add("a.weight_g_idx", "I32", np.full(256, 4, np.int32))

    with pytest.raises(CheckpointError, match=r"`a.weight_g_idx` names the group 4 of 4"):
        store.virtual(ct_config("pack-quantized", num_bits=4, group_size=64, actorder="group"), "a.weight")


@pytest.mark.parametrize("format_name", ["int-quantized", "naive-quantized"])
@pytest.mark.parametrize(("groups", "symmetric"), [(1, True), (4, True), (1, False), (4, False)])
def test_integers_in_bytes_equal_their_plain_dequantisation(format_name: str, groups: int, symmetric: bool) -> None:
    rng = random(5)
    codes, zeros = rng.integers(-128, 128, (64, 256)), rng.integers(-128, 128, (64, groups))
    stored, scales = bf16(rng.uniform(1e-3, 1e-2, (64, groups)))
    store = Store()
    store.add("a.weight", "I8", codes.astype(np.int8))
    store.add("a.weight_scale", "BF16", stored)
    store.add("a.weight_zero_point", "I8", zeros.astype(np.int8))
    config = ct_config(format_name, num_bits=8, symmetric=symmetric)

    expected = (codes - (0 if symmetric else wide(zeros, 1, 256 // groups, (64, 256)))) * wide(
        scales, 1, 256 // groups, (64, 256)
    )
    np.testing.assert_allclose(
        store.values(config, "a.weight"), expected, rtol=0 if symmetric else HALF, atol=0 if symmetric else 2.0**-25
    )


def test_float_quantized_is_fp8() -> None:
    store, weights, scale = fp8_store((64, 96), (64, 1))
    store.add("a.weight_scale", "F32", scale)
    del store.tensors["a.weight_scale_inv"]
    config = ct_config("float-quantized", num_bits=8, type="float")

    np.testing.assert_allclose(store.values(config, "a.weight"), weights * scale, rtol=HALF, atol=2.0**-25)


def test_groups_of_different_bits_are_told_apart_by_their_shapes() -> None:
    store, four = ct_store((64, 256), 4, 128)
    other, eight = ct_store((64, 256), 8, 128)
    for part in ("packed", "scale"):
        store.tensors[f"b.weight_{part}"] = replace(other.tensors[f"a.weight_{part}"], name=f"b.weight_{part}")
        store.data[f"b.weight_{part}"] = other.data[f"a.weight_{part}"]
    config = ct_config("pack-quantized", num_bits=4, group_size=128)
    groups = config["quantization_config"]["config_groups"]
    groups["group_1"] = {"weights": {"num_bits": 8, "group_size": 128, "symmetric": True}}

    np.testing.assert_array_equal(store.values(config, "a.weight"), four.astype(np.float32))
    np.testing.assert_array_equal(store.values(config, "b.weight"), eight.astype(np.float32))


@pytest.mark.parametrize("part", ["a.weight_scale", "a.weight_zero_point"])
def test_packed_weights_without_a_scale_or_zero_point_tensor_are_an_error(part: str) -> None:
    store, _ = ct_store((64, 256), 4, 128, symmetric=False)
    del store.tensors[part]

    with pytest.raises(CheckpointError, match=f"`a.weight` is quantised, but `{part}` is missing"):
        decoded(store.tensors, ct_config("pack-quantized", num_bits=4, group_size=128, symmetric=False), "m")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"num_bits": 4, "group_size": 64}, "fits no group"),
        ({"num_bits": 8, "group_size": 128}, "fits no group"),
        ({"num_bits": "four", "group_size": 128}, "fits no group"),
        ({"num_bits": 4, "group_size": 128, "block_structure": [0, 1]}, "should be two numbers"),
        ({"num_bits": [4], "group_size": 128}, "should be a single value"),
    ],
)
def test_a_configuration_that_contradicts_the_shapes_is_an_error(weights: dict[str, Any], message: str) -> None:
    store, _ = ct_store((64, 256), 4, 128)

    with pytest.raises(CheckpointError, match=message):
        decoded(store.tensors, ct_config("pack-quantized", **weights), "m")


def test_zero_points_of_a_single_scale_are_an_error() -> None:
    store, _ = ct_store((64, 256), 4, 256, symmetric=False)
    store.add("a.weight_scale", "F32", np.ones((), np.float32))

    with pytest.raises(CheckpointError, match=r"`a.weight_scale` of shape \(\) is not by rows"):
        decoded(store.tensors, ct_config("pack-quantized", num_bits=4, symmetric=False), "m")


@pytest.mark.parametrize("name", ["nvfp4-pack-quantized", "marlin-24", "sparse-24-bitmask", "new"])
def test_an_unknown_format_of_compressed_tensors_is_named(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"format `{name}`") as caught:
        decoded({}, ct_config(name, num_bits=4), "m")
    assert caught.value.hint


def test_three_bits_are_refused_by_name() -> None:
    store = Store()
    store.add("a.weight_packed", "I32", np.zeros((8, 12), np.int32))
    store.add("a.weight_scale", "F32", np.ones((8, 1), np.float32))

    with pytest.raises(UnsupportedError, match="packed in 3 bits; 4 and 8 are known"):
        decoded(store.tensors, ct_config("pack-quantized", num_bits=3, group_size=128), "m")


# MXFP4

MXFP4 = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}


def mxfp4_store(shape: tuple[int, ...] = (3, 20, 4)) -> tuple[Store, Array]:
    rng = random(6)
    elements = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    codes = rng.integers(0, 16, (*shape, 32))
    exponents = rng.integers(100, 140, shape).astype(np.uint8)
    store = Store()
    store.add("a.proj_blocks", "U8", (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8))
    store.add("a.proj_scales", "U8", exponents)
    store.add("a.proj_bias", "F32", np.zeros(shape[:-1], np.float32))
    values = elements[codes] * 2.0 ** (exponents[..., None].astype(np.float32) - 127)
    return store, values.reshape(*shape[:-1], -1).astype(np.float32)


def test_mxfp4_is_kept_without_loss() -> None:
    store, expected = mxfp4_store()
    tensors, _ = decoded(store.tensors, MXFP4, "m")

    assert set(tensors) == {"a.proj", "a.proj_bias"}
    assert (tensors["a.proj"].type, tensors["a.proj"].shape) == ("MXFP4", (3, 20, 128))
    np.testing.assert_array_equal(store.values(MXFP4, "a.proj"), expected)


def test_mxfp4_of_compressed_tensors_is_kept_too() -> None:
    store, expected = mxfp4_store()
    again = Store()
    again.add("a.weight_packed", "U8", store.data["a.proj_blocks"].reshape(60, 64))
    again.add("a.weight_scale", "U8", store.data["a.proj_scales"].reshape(60, 4))

    got = again.values(ct_config("mxfp4-pack-quantized", num_bits=4, group_size=32, type="float"), "a.weight")
    np.testing.assert_array_equal(got, expected.reshape(60, 128))


@pytest.mark.parametrize("part", ["blocks", "scales"])
def test_half_of_a_pair_of_mxfp4_is_an_error(part: str) -> None:
    store, _ = mxfp4_store()
    del store.tensors[f"a.proj_{part}"]

    with pytest.raises(CheckpointError, match=f"`a.proj_{part}` is missing"):
        decoded(store.tensors, MXFP4, "m")


def test_blocks_of_mxfp4_that_are_not_16_bytes_a_scale_are_an_error() -> None:
    store, _ = mxfp4_store()
    store.add("a.proj_blocks", "U8", np.zeros((3, 20, 4, 8), np.uint8))

    with pytest.raises(CheckpointError, match=r"`a.proj_blocks` has the shape \(3, 20, 4, 8\)"):
        decoded(store.tensors, MXFP4, "m")


# GPTQ, AWQ and AutoRound

AWQ_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)  # outputs of a word's nibbles, from the lowest


@dataclass(frozen=True, kw_only=True)
class Case:
    """A matrix stored transposed, [in, out]: codes and their values."""

    inputs: int = 256
    outputs: int = 48
    group: int = 64
    bits: int = 4
    symmetric: bool = True
    ordered: bool = False

    def numbers(self) -> tuple[Array, Array, Array, Array, Array]:
        """Codes (inputs, outputs), scales and zero points (groups, outputs), group of each input, and weights."""
        rng = random(7)
        groups, top = -(-self.inputs // self.group), 1 << self.bits
        codes = rng.integers(0, top, (self.inputs, self.outputs))
        scales = rng.uniform(1e-3, 1e-2, (groups, self.outputs)).astype(np.float16)
        zeros = rng.integers(1, top, (groups, self.outputs))
        if self.symmetric:
            zeros[:] = top // 2
        order = np.arange(self.inputs) // self.group
        if self.ordered:
            order = rng.permutation(order)
        weights = (codes - zeros[order]) * scales.astype(np.float64)[order]
        return codes, scales, zeros, order.astype(np.int32), weights


def gptq_store(case: Case, stored_less: int = 1) -> tuple[Store, Array]:
    codes, scales, zeros, order, weights = case.numbers()
    store = Store()
    store.add("a.qweight", "I32", packed_down(codes, case.bits))
    store.add("a.qzeros", "I32", packed(zeros - stored_less, case.bits))
    store.add("a.scales", "F16", scales)
    store.add("a.g_idx", "I32", order)
    return store, weights


def awq_store(case: Case) -> tuple[Store, Array]:
    codes, scales, zeros, _, weights = case.numbers()
    interleaved = [8 * word + output for word in range(case.outputs // 8) for output in AWQ_OUTPUTS]
    store = Store()
    store.add("a.qweight", "I32", packed(codes[:, interleaved], 4))
    store.add("a.qzeros", "I32", packed(zeros[:, interleaved], 4))
    store.add("a.scales", "F16", scales)
    return store, weights


def gptq_config(case: Case, **more: Any) -> dict[str, Any]:
    settings = {"bits": case.bits, "group_size": case.group, "sym": case.symmetric, "desc_act": case.ordered}
    return {"quantization_config": {"quant_method": "gptq", **settings, **more}}


def awq_config(case: Case, **more: Any) -> dict[str, Any]:
    settings = {"bits": 4, "group_size": case.group, "zero_point": not case.symmetric, "version": "gemm"}
    return {"quantization_config": {"quant_method": "awq", **settings, **more}}


def auto_round_config(case: Case, packing: str) -> dict[str, Any]:
    return gptq_config(case, quant_method="auto-round", packing_format=packing)


def joined(store: Store, config: Mapping[str, Any], target: str) -> Array:
    """The (outputs, inputs) matrix of a K-split tensor."""
    tensor = decoded(store.tensors, config, "m")[0]["a.weight"]
    assert tensor.type == target
    assert tensor.k_splits == tensor.shape[0]
    return np.concatenate(list(store.values(config, "a.weight")), axis=1)


def assert_near(got: Array, weights: Array, target: str, bits: int) -> None:
    if target in ("Q4_0", "Q8_0"):
        np.testing.assert_array_equal(got, weights.T.astype(np.float32))  # fp16 scales are kept
    elif target == "Q4_1":
        np.testing.assert_allclose(got, weights.T, rtol=0, atol=(1 << bits) * 0.01 * HALF)  # the minimum in fp16
    else:
        np.testing.assert_allclose(got, weights.T, rtol=HALF, atol=2.0**-25)  # rounded once


GPTQ_CASES = [
    (Case(), "Q4_0", 64),
    (Case(group=32), "Q4_0", 32),
    (Case(inputs=384, group=128), "Q4_0", 128),
    (Case(inputs=1024, group=512), "Q4_0", 128),
    (Case(inputs=1024, group=256), "Q4_0", 256),
    (Case(group=256), "Q4_0", 256),
    (Case(inputs=192, group=192, outputs=1032), "Q4_0", 192),
    (Case(symmetric=False), "Q4_1", 64),
    (Case(inputs=160, group=64, symmetric=False), "Q4_1", 32),
    (Case(bits=8), "Q8_0", 64),
    (Case(bits=8, symmetric=False), "F16", 64),
    (Case(bits=2), "Q4_0", 64),
    (Case(bits=2, symmetric=False), "Q4_1", 64),
    (Case(group=16), "F16", 128),
    (Case(ordered=True), "F16", 64),
    (Case(ordered=True, symmetric=False, outputs=1040), "F16", 64),
    (Case(ordered=True, bits=8), "F16", 64),
    (Case(ordered=True, group=256), "Q4_0", 256),
]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("case", "target", "width"), GPTQ_CASES)
def test_gptq_equals_its_plain_dequantisation(case: Case, target: str, width: int, version: int) -> None:
    store, weights = gptq_store(case, stored_less=2 - version)
    config = gptq_config(case, checkpoint_format="gptq" if version == 1 else "gptq_v2")

    tensors, encodings = decoded(store.tensors, config, "m")
    assert set(tensors) == {"a.weight"}
    assert tensors["a.weight"].shape == (case.inputs // width, case.outputs, width)
    assert encodings["a.weight"].row_multiple == case.outputs
    assert_near(joined(store, config, target), weights, target, case.bits)


def test_a_group_of_minus_one_is_one_scale_per_output() -> None:
    store, weights = gptq_store(Case(group=256))

    got = joined(store, gptq_config(Case(group=-1)), "Q4_0")
    np.testing.assert_array_equal(got, weights.T.astype(np.float32))


def test_a_zero_point_borrow_from_its_neighbour_is_undone() -> None:
    case = Case(symmetric=False)
    store, _ = gptq_store(case)
    codes, scales, zeros, order, _ = case.numbers()
    zeros[:, ::3] = 0
    words = packed(zeros, 4).view(np.uint32) - np.uint32(0x11111111)
    store.add("a.qzeros", "I32", words.view(np.int32))

    weights = (codes - zeros[order]) * scales.astype(np.float64)[order]
    assert_near(joined(store, gptq_config(case), "Q4_1"), weights, "Q4_1", 4)


@pytest.mark.parametrize(
    ("case", "target"),
    [
        (Case(), "Q4_0"),
        (Case(symmetric=False), "Q4_1"),
        (Case(inputs=384, group=128, outputs=1032, symmetric=False), "Q4_1"),
        (Case(group=256, symmetric=False), "Q4_1"),
        (Case(group=16, symmetric=False), "F16"),
    ],
)
def test_awq_equals_its_plain_dequantisation(case: Case, target: str) -> None:
    store, weights = awq_store(case)

    assert set(decoded(store.tensors, awq_config(case), "m")[0]) == {"a.weight"}
    assert_near(joined(store, awq_config(case), target), weights, target, 4)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("packing", ["auto_round:auto_gptq", "auto_round:auto_awq", "auto_round"])
def test_auto_round_is_gptq_or_awq_by_another_name(packing: str, symmetric: bool) -> None:
    case = Case(symmetric=symmetric)
    store, weights = awq_store(case) if "awq" in packing else gptq_store(case, stored_less=int("gptq" in packing))
    target = "Q4_0" if symmetric else "Q4_1"

    assert_near(joined(store, auto_round_config(case, packing), target), weights, target, 4)


@pytest.mark.parametrize("family", ["gptq", "awq"])
def test_asymmetric_weights_declared_symmetric_are_an_error_with_a_hint(family: str) -> None:
    case = Case(symmetric=False)
    store = gptq_store(case)[0] if family == "gptq" else awq_store(case)[0]
    config = gptq_config(Case()) if family == "gptq" else awq_config(Case())

    with pytest.raises(
        CheckpointError, match=r"`a.qzeros` has the zero point \d+, symmetric .* 4 bits have 8"
    ) as caught:
        store.virtual(config, "a.weight")
    assert '"sym"' in str(caught.value.hint)


def test_modules_with_other_bits_or_symmetry_are_decoded() -> None:
    store, weights = gptq_store(Case(bits=8))

    got = joined(store, gptq_config(Case(), dynamic={"+:a": {"bits": 8}}), "Q8_0")
    np.testing.assert_array_equal(got, weights.T.astype(np.float32))

    store, weights = gptq_store(Case(symmetric=False))
    got = joined(store, gptq_config(Case(), dynamic={"+:a": {"sym": False}}), "Q4_1")
    assert_near(got, weights, "Q4_1", 4)


@pytest.mark.parametrize("part", ["a.scales", "a.qzeros", "a.g_idx"])
def test_gptq_without_scales_zero_points_or_g_idx_is_an_error(part: str) -> None:
    store, _ = gptq_store(Case(ordered=True))
    del store.tensors[part]

    with pytest.raises(CheckpointError, match=f"`a.weight` is quantised, but `{part}` is missing"):
        decoded(store.tensors, gptq_config(Case(ordered=True)), "m")


@pytest.mark.parametrize("part", ["a.scales", "a.qzeros"])
def test_awq_without_scales_or_zero_points_is_an_error(part: str) -> None:
    store, _ = awq_store(Case())
    del store.tensors[part]

    with pytest.raises(CheckpointError, match=f"`{part}` is missing"):
        decoded(store.tensors, awq_config(Case()), "m")


@pytest.mark.parametrize(
    ("part", "kind", "shape"),
    [
        ("qweight", "I32", (32, 40)),
        ("qweight", "F32", (32, 48)),
        ("qweight", "I32", (32, 48, 1)),
        ("qweight", "I32", (0, 48)),
        ("qzeros", "I32", (3, 6)),
        ("qzeros", "I32", (4, 5)),
        ("qzeros", "I32", (4, 0)),
        ("scales", "I32", (4, 48)),
        ("scales", "F16", (3, 48)),
        ("scales", "F16", (4, 0)),
        ("scales", "F16", ()),
    ],
)
@pytest.mark.parametrize("family", ["gptq", "awq"])
def test_shapes_and_types_that_contradict_each_other_are_an_error(
    family: str, part: str, kind: str, shape: tuple[int, ...]
) -> None:
    store = (gptq_store if family == "gptq" else awq_store)(Case())[0]
    if family == "awq" and part == "qweight":
        shape = {(32, 40): (256, 5), (32, 48): (256, 6)}.get(shape, shape)
    store.add(f"a.{part}", kind, np.zeros(shape, DTYPES[kind]))
    config = gptq_config(Case()) if family == "gptq" else awq_config(Case())

    with pytest.raises(CheckpointError, match=r"`a\."):
        decoded(store.tensors, config, "m")


def test_bits_that_are_not_the_configured_ones_are_an_error() -> None:
    store, _ = gptq_store(Case(bits=8))

    with pytest.raises(CheckpointError, match=r"`a.qweight` is packed in 8 bits, the configuration says 4"):
        decoded(store.tensors, gptq_config(Case()), "m")


def test_gptq_act_order_with_an_unknown_group_is_an_error() -> None:
    store, _ = gptq_store(Case(ordered=True))
    store.add("a.g_idx", "I32", np.full(256, -1, np.int32))

    with pytest.raises(CheckpointError, match=r"`a.g_idx` names the group -1 of 4"):
        store.virtual(gptq_config(Case(ordered=True)), "a.weight")


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (gptq_config(Case(), checkpoint_format="marlin"), "format `marlin`"),
        (awq_config(Case(), version="gemv"), "version `gemv`"),
        (awq_config(Case(), bits=8), "in 8 bits"),
        (auto_round_config(Case(), "auto_round:fp8_static"), "`auto_round:fp8_static`"),
    ],
)
def test_variants_that_cannot_be_decoded_are_named(config: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedError, match=named) as caught:
        decoded({}, config, "m")
    assert caught.value.hint


def test_gptq_of_three_bits_is_refused_by_name() -> None:
    store = Store()
    store.add("a.qweight", "I32", np.zeros((24, 64), np.int32))
    store.add("a.qzeros", "I32", np.zeros((4, 6), np.int32))
    store.add("a.scales", "F16", np.zeros((4, 64), np.float16))

    with pytest.raises(UnsupportedError, match="packed in 3 bits; 2, 4 and 8 are known"):
        decoded(store.tensors, gptq_config(Case(bits=3)), "m")


# Unquantised matrices stored transposed


@pytest.mark.parametrize(
    ("shape", "k_splits"),
    [
        ((512, 48), (2, 48, 256)),
        ((384, 300), (3, 300, 128)),
        ((96, 8), (3, 8, 32)),
        ((45, 8), (1, 8, 45)),
        ((3, 192, 40), (3, 3, 40, 64)),
    ],
)
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_transposed_k_splits_hold_the_same_values(shape: tuple[int, ...], k_splits: tuple[int, ...], kind: str) -> None:
    stored = random(8).integers(0, 1 << 15, shape).astype(np.float32 if kind == "F32" else np.uint16)
    stored = stored.view(np.float16) if kind == "F16" else stored
    store = Store()
    store.add("a", kind, stored)
    tensor, encoding = transposed(store.tensors["a"], "m[decoded]", 8192)

    assert (tensor.shape, tensor.k_splits, tensor.offset, tensor.path) == (k_splits, k_splits[-3], 8192, "m[decoded]")
    ((source, offset, count),) = encoding.reads(0, tensor.rows)
    assert (source.name, offset, count) == ("a", 0, tensor.nbytes)
    out = np.empty(tensor.nbytes, np.uint8)
    encoding.decode([store.data["a"]], 0, tensor.rows, out)
    matrix = np.concatenate(list(np.moveaxis(out.view(stored.dtype).reshape(k_splits), -3, 0)), axis=-1)
    np.testing.assert_array_equal(matrix, stored.swapaxes(-1, -2))


def test_a_single_k_split_of_a_stack_reads_only_its_inputs() -> None:
    stored = random(8).normal(size=(3, 192, 40)).astype(np.float32)
    store = Store()
    store.add("a", "F32", stored)
    tensor, encoding = transposed(store.tensors["a"], "m", 0)
    first = (3 * 1 + 2) * 40  # the last K-split of the second matrix

    ((_, offset, count),) = encoding.reads(first, first + 40)
    out = np.empty(40 * tensor.row_bytes, np.uint8)
    encoding.decode([store.data["a"][offset : offset + count]], first, first + 40, out)
    np.testing.assert_array_equal(out.view(np.float32).reshape(40, 64), stored[1, 128:].T)


@pytest.mark.parametrize(("kind", "shape"), [("F32", (4,)), ("F32", (0, 4)), ("U8", (4, 4)), ("F32", (1, 2, 3, 4))])
def test_only_unquantised_matrices_are_transposed(kind: str, shape: tuple[int, ...]) -> None:
    store = Store()
    store.add("a", kind, np.zeros(shape, DTYPES[kind]))

    with pytest.raises(CheckpointError, match="`a`"):
        transposed(store.tensors["a"], "m", 0)


# Any method


@pytest.mark.parametrize(
    "method", ["bitsandbytes", "hqq", "eetq", "quanto", "torchao", "spqr", "vptq", "aqlm", "modelopt", "", "new"]
)
def test_an_unknown_method_is_named_with_a_hint(method: str) -> None:
    with pytest.raises(UnsupportedError, match=f"`{method}`" if method else "without a name") as caught:
        decoded({}, {"quantization_config": {"quant_method": method, "bits": 4}}, "m")
    assert "GGUF" in str(caught.value.hint)


@pytest.mark.parametrize("value", ["fp8", 8, ["fp8"]])
def test_a_quantisation_that_is_no_object_is_an_error(value: Any) -> None:
    with pytest.raises(CheckpointError, match="not an object"):
        decoded({}, {"quantization_config": value}, "m")


def test_the_quantisation_of_the_text_part_counts() -> None:
    store, _, _ = fp8_store((64, 96), (64, 1))

    assert decoded(store.tensors, {"text_config": fp8_config()}, "m")[1]


@given(st.lists(st.floats(-65504, 65504, width=32), min_size=1, max_size=64))
def test_rounding_to_fp16_is_that_of_numpy(values: list[float]) -> None:
    floats = np.array(values, np.float32)
    # Below 2^-14 a value is first rounded to steps of 2^-37, whose halves may then go the other way by one step of 2^-24.
    normal = np.abs(floats) >= 2.0**-14

    np.testing.assert_array_equal(half(floats)[normal], floats.astype(np.float16)[normal])
    np.testing.assert_allclose(half(floats).astype(np.float32), floats, rtol=HALF, atol=2.0**-25 * (1 + 2.0**-11))


@pytest.mark.parametrize("layout", ["fp8, large blocks", "int4, asymmetric", "gptq, ordered", "awq"])
def test_threads_that_decode_at_once_do_not_disturb_each_other(layout: str) -> None:
    store, config, name = LAYOUTS[layout]()
    whole = store.virtual(config, name)

    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: store.virtual(config, name), range(32)):
            np.testing.assert_array_equal(found, whole)


LAYOUTS: dict[str, Callable[[], tuple[Store, dict[str, Any], str]]] = {
    "fp8, blocks": lambda: (fp8_store((3, 45, 70), (3, 3, 3))[0], fp8_config([16, 32]), "a.weight"),
    "fp8, large blocks": lambda: (fp8_store((3, 145, 270), (3, 2, 3))[0], fp8_config([128, 128]), "a.weight"),
    "fp8, rows": lambda: (fp8_store((80, 96), (80, 1))[0], fp8_config(), "a.weight"),
    "fp8, one": lambda: (fp8_store((80, 96), ())[0], fp8_config(), "a.weight"),
    "int4": lambda: (ct_store((90, 64), 4, 32)[0], ct_config("pack-quantized", num_bits=4, group_size=32), "a.weight"),
    "int4, asymmetric": lambda: (
        ct_store((3, 30, 64), 4, 32, symmetric=False)[0],
        ct_config("pack-quantized", num_bits=4, group_size=32, symmetric=False),
        "a.weight",
    ),
    "int8, asymmetric": lambda: (
        ct_store((3, 30, 64), 8, 32, symmetric=False)[0],
        ct_config("pack-quantized", num_bits=8, group_size=32, symmetric=False),
        "a.weight",
    ),
    "int4, ordered": lambda: (ordered_store(), ct_config("pack-quantized", num_bits=4, group_size=32), "a.weight"),
    "mxfp4": lambda: (mxfp4_store()[0], MXFP4, "a.proj"),
    "gptq": lambda: (gptq_store(Case())[0], gptq_config(Case()), "a.weight"),
    "gptq, large groups": lambda: (
        gptq_store(Case(inputs=1024, group=512, symmetric=False))[0],
        gptq_config(Case(group=512, symmetric=False)),
        "a.weight",
    ),
    "gptq, ordered": lambda: (gptq_store(Case(ordered=True))[0], gptq_config(Case(ordered=True)), "a.weight"),
    "awq": lambda: (awq_store(Case(symmetric=False))[0], awq_config(Case(symmetric=False)), "a.weight"),
    "awq, small groups": lambda: (
        awq_store(Case(group=16, symmetric=False))[0],
        awq_config(Case(group=16, symmetric=False)),
        "a.weight",
    ),
}


def ordered_store() -> Store:
    store, _ = ct_store((90, 64), 4, 32)
    store.add("a.weight_g_idx", "I32", random(4).integers(0, 2, 64).astype(np.int32))
    return store


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_range_of_rows_decodes_to_the_same_bytes_as_the_whole_tensor(layout: str, data: st.DataObject) -> None:
    store, config, name = LAYOUTS[layout]()
    tensors, encodings = decoded(store.tensors, config, "m")
    step, count = encodings[name].row_multiple, tensors[name].rows // encodings[name].row_multiple
    first = data.draw(st.integers(0, count - 1)) * step
    last = data.draw(st.integers(first // step + 1, count)) * step
    size = tensors[name].row_bytes

    whole = store.virtual(config, name)
    np.testing.assert_array_equal(store.virtual(config, name, first, last), whole[first * size : last * size])


KINDS = ["F32", "F16", "BF16", "I32", "I8", "U8", "F8_E4M3", "F8_E8M0"]
VALUES = st.one_of(st.none(), st.booleans(), st.integers(-2, 130), st.text(max_size=3), st.lists(st.integers(-1, 9)))
KEYS = ["bits", "group_size", "sym", "desc_act", "zero_point", "weight_block_size", "version", "config_groups"]


@st.composite
def changed(draw: st.DrawFn, store: Store) -> dict[str, Tensor]:
    """The tensors of a store, one or two of them missing, of another type or of another shape."""
    tensors = dict(store.tensors)
    for name in draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, max_size=2, unique=True)):
        shape, kind = list(tensors[name].shape), tensors[name].type
        match draw(st.sampled_from(["missing", "type", "size", "dimension", "rank"])):
            case "missing":
                del tensors[name]
                continue
            case "type":
                kind = draw(st.sampled_from(KINDS))
            case "size":
                shape = [draw(st.sampled_from([0, 1, size // 2, size * 2, size + 1])) for size in shape]
            case "dimension" if shape:
                place = draw(st.integers(0, len(shape) - 1))
                shape[place] = draw(st.sampled_from([0, 1, shape[place] // 2, shape[place] * 2, shape[place] + 1]))
            case _:
                shape = draw(st.sampled_from([[], [1], shape[:1], shape[1:], [2, *shape], [*shape, 1], shape[::-1]]))
        nbytes = prod(shape) * block_of(kind)[1]
        tensors[name] = Tensor(name=name, shape=tuple(shape), type=kind, path="m", offset=0, nbytes=nbytes)
    return tensors


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_layout_with_something_changed_is_decoded_within_its_tensors_or_refused(
    layout: str, data: st.DataObject
) -> None:
    store, config, _ = LAYOUTS[layout]()
    tensors = data.draw(changed(store))
    more = data.draw(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=1))
    try:
        virtual, encodings = decoded(tensors, {"quantization_config": config["quantization_config"] | more}, "m")
    except CheckpointError:
        return
    for name, encoding in encodings.items():
        tensor, raw = virtual[name], []
        assert tensor.nbytes == tensor.rows * tensor.row_bytes > 0
        for source, offset, count in encoding.reads(0, tensor.rows):
            assert 0 <= offset < offset + count <= source.nbytes
            raw.append(np.zeros(count, np.uint8))
        with suppress(CheckpointError):  # zeros are no zero points of symmetric weights
            encoding.decode(raw, 0, tensor.rows, np.empty(tensor.nbytes, np.uint8))
