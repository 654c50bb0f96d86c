"""Selects the encodings of a checkpoint by its `quantization_config`, and lists the model's tensors.

Virtual tensors lie in a virtual file, like those of `low_bit_copy`; its reader must run their encodings. Stored tensors that
belong to no encoding stay unchanged.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from headrace.checkpoint.encodings.awq import awq
from headrace.checkpoint.encodings.compressed_tensors import compressed_tensors, pair
from headrace.checkpoint.encodings.encoding import ANOTHER_VERSION, Encoding, Settings, Virtual, setting
from headrace.checkpoint.encodings.exponents import METHOD, exponents
from headrace.checkpoint.encodings.float8 import float8
from headrace.checkpoint.encodings.gptq import gptq
from headrace.checkpoint.encodings.mxfp4 import mxfp4
from headrace.checkpoint.encodings.placing import PAGE_BYTES, placed
from headrace.checkpoint.tensor import Tensor
from headrace.errors import CheckpointError, UnsupportedError

# Scales of activations and of the KV cache, which are not quantised here.
_DROPPED = (
    "input_scale", "input_scale_ub", "input_zero_point", "input_global_scale", "activation_scale",
    "output_scale", "output_zero_point", ".k_scale", ".v_scale", ".q_scale", ".prob_scale",
)  # fmt: skip


def decoded(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], path: str
) -> tuple[dict[str, Tensor], dict[str, Encoding]]:
    """The model's tensors, and the encodings of the virtual ones, by name.

    Args:
        tensors: stored tensors by name.
        config: the model's `config.json`.
        path: checkpoint path; virtual tensors lie in `{path}[decoded]`, one after another, each on its own page.

    Raises:
        UnsupportedError: a method or a variant that cannot be decoded, named.
        CheckpointError: a part is missing, or shapes and types contradict each other or the configuration.
    """
    settings = _settings(config)
    if settings is None:
        return dict(tensors), {}
    found: dict[str, Virtual] = {}
    for virtual in _virtuals(tensors, settings):
        if virtual.name in found or (virtual.name in tensors and virtual.name not in virtual.parts):
            raise CheckpointError(f"tensor `{virtual.name}` is stored both plain and quantised")
        found[virtual.name] = virtual
    replaced = set(chain.from_iterable(virtual.parts for virtual in found.values()))
    kept = {name: t for name, t in tensors.items() if name not in replaced and not name.endswith(_DROPPED)}
    virtual_tensors = _all_placed(found.values(), f"{path}[decoded]")
    return kept | virtual_tensors, {name: virtual.encoding for name, virtual in found.items()}


def _settings(config: Mapping[str, Any]) -> Settings | None:
    text = config.get("text_config")
    for owner in (config, text if isinstance(text, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            value = owner.get(key)
            if value is not None and not isinstance(value, Mapping):
                raise CheckpointError(f"`{key}` of the configuration is {value!r}, not an object")
            if value:
                return value
    return None


def _virtuals(tensors: Mapping[str, Tensor], settings: Settings) -> Iterator[Virtual]:
    method = str(setting(settings, "quant_method", "")).lower().replace("_", "-")
    if method in ("fp8", "fbgemm-fp8", "mxfp8") or _modelopt_fp8(method, settings):
        return float8(tensors, pair(settings.get("weight_block_size")))
    if method in ("compressed-tensors", "sparseml") or (not method and "config_groups" in settings):
        return compressed_tensors(tensors, settings)
    if method == METHOD:
        return exponents(tensors, settings)
    if method == "mxfp4":
        return mxfp4(tensors)
    if method == "gptq":
        return gptq(tensors, settings)
    if method == "awq":
        return awq(tensors, settings)
    if method in ("auto-round", "intel/auto-round"):
        return _auto_round(tensors, settings)
    named = f"`{settings.get('quant_method')}`" if method else "a method without a name"
    raise UnsupportedError(f"the weights are quantised by {named}, which cannot be decoded", hint=ANOTHER_VERSION)


def _modelopt_fp8(method: str, settings: Settings) -> bool:
    return method == "modelopt" and setting(settings, "quant_algo") in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")


def _auto_round(tensors: Mapping[str, Tensor], settings: Settings) -> Iterator[Virtual]:
    """AutoRound uses the packings of GPTQ and AWQ. Its own stores zero points unchanged, like GPTQ's version 2."""
    packing = setting(settings, "packing_format") or setting(settings, "backend") or "auto_round"
    if packing == "auto_round:auto_awq":
        return awq(tensors, settings)
    if packing in ("auto_round", "auto_round:gptqmodel"):
        return gptq(tensors, settings, stored_less=0)
    if packing in ("auto_round:auto_gptq", "auto_round:gptq"):
        return gptq(tensors, settings, stored_less=1)
    raise UnsupportedError(f"weights of AutoRound's format `{packing}` cannot be decoded", hint=ANOTHER_VERSION)


def _all_placed(virtuals: Iterable[Virtual], path: str) -> dict[str, Tensor]:
    """Place virtual tensors one after another, each from the start of a page."""
    tensors: dict[str, Tensor] = {}
    offset = 0
    for virtual in virtuals:
        tensor = placed(virtual, path, offset)
        tensors[virtual.name] = tensor
        offset += -(-tensor.nbytes // PAGE_BYTES) * PAGE_BYTES
    return tensors
