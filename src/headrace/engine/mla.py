"""MLA uses absorbed projections: a layer caches one latent per position, from which keys and values of all heads derive.

DeepSeek's models and their descendants derive both by one matrix, `kv_b_proj`. Keys and values of DeepSeek V3 would take
5 MB a position; the latents take 70 KB. The matrix is not multiplied with every position's latent c_i
either. With its parts K_h and V_h for head h, the query q and the weights a_i of the positions,

    (K_h c_i) . q = c_i . (K_h^T q)            sum of a_i (V_h c_i) = V_h (sum of a_i c_i)

so K_h is applied to the query of each row instead, and V_h to its result.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from headrace.model.matrix import Matrix
from headrace.model.packed import PackedLinear

# Max elements in the queries, scores and results of heads that are computed together: 32 MiB of fp32.
MAX_SCORES = 8 << 20


class KvBSplit(NamedTuple):
    """K and V parts of a layer's `kv_b_proj`, in fp32: (heads, key width, rank) and (heads, value width, rank)."""

    keys: torch.Tensor
    values: torch.Tensor


def is_mla(module: nn.Module) -> bool:
    """True if this layer is MLA, as transformers writes it for all such families."""
    return hasattr(type(module), "expand_kv") and isinstance(getattr(module, "kv_b_proj", None), PackedLinear)


def split_kv_b(layer: Any, matrix: Matrix, found: Mapping[str, torch.Tensor]) -> KvBSplit:
    """The parts of a layer's `kv_b_proj` from its dequantised tensors: each (rows, columns) in fp32."""
    keys, values = layer.qk_nope_head_dim, layer.v_head_dim
    parts = [found[part.tensor.name][part.first : part.first + part.rows] for part in matrix.slices]
    if matrix.k_b_transposed:
        k_b, v_b = parts
        rank = v_b.shape[1]
        return KvBSplit(k_b.view(-1, rank, keys).transpose(1, 2), v_b.view(-1, values, rank))
    rows = parts[0] if len(parts) == 1 else torch.cat(parts)
    if matrix.order is not None:
        rows = rows.index_select(0, matrix.order)
    heads = rows.view(-1, keys + values, rows.shape[1])
    return KvBSplit(heads[:, :keys], heads[:, keys:])


def attend(
    query: torch.Tensor,
    vectors: torch.Tensor,
    rotated: torch.Tensor,
    kv_b: KvBSplit,
    mask: torch.Tensor | None,
    scaling: float | None,
    out: torch.Tensor,
) -> None:
    """Compute MLA of some rows over the positions of one sequence.

    Args:
        query: (heads, rows, key width + RoPE width), fp32.
        vectors: latents of the positions, (positions, rank), fp32.
        rotated: RoPE part of their keys, one for all heads, (positions, RoPE width), fp32.
        kv_b: split `kv_b_proj` of the layer.
        mask: True where a row may attend, (rows, positions); None: everywhere.
        scaling: factor of the scores; None: one by the root of the query's width.
        out: result, (rows, heads, value width), filled here.
    """
    heads, rows, width = query.shape
    plain = kv_b.keys.shape[1]
    scale = width**-0.5 if scaling is None else scaling
    together = max(1, MAX_SCORES // (rows * (2 * vectors.shape[0] + 3 * vectors.shape[1])))
    for first in range(0, heads, together):
        part = slice(first, min(heads, first + together))
        own = query[part]
        absorbed = own[..., :plain] @ kv_b.keys[part]
        scores = absorbed.flatten(0, 1) @ vectors.T
        scores += own[..., plain:].flatten(0, 1) @ rotated.T
        scores = scores.mul_(scale).view(len(own), rows, -1)
        if mask is not None:
            scores.masked_fill_(~mask, -torch.inf)
        mixed = (scores.softmax(-1).flatten(0, 1) @ vectors).view(len(own), rows, -1)
        out[:, part] = (mixed @ kv_b.values[part].transpose(1, 2)).transpose(0, 1)
