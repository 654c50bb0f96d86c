"""The sizes of a model that the plan needs: matrices, experts, widths, layers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat
from operator import mul
from typing import NamedTuple

from headrace.checkpoint import Checkpoint, Tensor
from headrace.checkpoint.architectures import check_architecture
from headrace.checkpoint.tensor import Slice, layer_of
from headrace.errors import CheckpointError
from headrace.plan.expert_cost import Experts

PAGE_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class Built:
    """Facts from a built model: the tensors that a pass multiplies, and the kind of its cache."""

    linears: tuple[Tensor, ...]
    prefill_only: tuple[Tensor, ...] = ()  # weights used only at the start of a sequence
    experts: Sequence[Sequence[Sequence[Slice]]]  # weight slices by layer and expert
    single_sequence: bool  # sequences are not batched, and the KV cache is fp32
    cached: Sequence[tuple[int, int]] = ()  # (KV heads, KV elements per token) by layer
    has_cache: bool = True  # False: every pass recomputes all positions


class Scan(NamedTuple):
    """A state-space model (Mamba-2) whose prefill scans chunks of rows; the rows of a chunk attend to each other."""

    heads: int
    state: int  # state elements per head channel
    chunk: int  # rows per chunk


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a model. `linears` are the matrices that every pass multiplies, including a tied head.

    `prefill_only` are multiplied once per prompt: an encoder, and the cross-attention K and V projections.
    """

    checkpoint: Checkpoint
    linears: tuple[Tensor, ...]
    prefill_only: tuple[Tensor, ...]
    experts: Experts | None
    small_bytes: int
    layers: int
    state_bytes: int  # bytes of recurrent state per sequence
    hidden: int
    feed_forward: int
    attention_width: int
    latent_elements: int  # elements of one layer's MLA kv_b matrix; 0 without MLA
    kv_heads: int
    head_dim: int
    cached_heads: int  # KV heads over all layers
    cached_elements: int  # KV elements per token over all layers
    context_limit: int
    single_sequence: bool = False
    has_cache: bool = True
    scanned: Scan | None = None  # chunked scan of a state-space model

    @property
    def tied(self) -> bool:
        """True if the embedding table is also the head."""
        return any(_TOKEN_TABLE.search(tensor.name) for tensor in self.linears)

    @property
    def makes_scores(self) -> bool:
        """True if attention scores are materialised: torch's fused attention lacks MLA, soft-capping and sinks."""
        capped = self.checkpoint.get("attn_logit_softcapping") is not None
        return bool(self.latent_elements) or capped or any("sinks" in name for name in self.checkpoint.tensors)

    @property
    def weights_count(self) -> int:
        """Number of weights that are multiplied, including experts."""
        dense = sum(self.weights.values()) + sum(self.prefill_only_weights.values())
        return dense + (sum(self.experts.weights.values()) if self.experts is not None else 0)

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weights that every pass multiplies."""
        return sum(tensor.nbytes for tensor in self.linears)

    @property
    def prefill_only_bytes(self) -> int:
        """Bytes of the weights that are multiplied once per prompt."""
        return sum(tensor.nbytes for tensor in self.prefill_only)

    @property
    def all_bytes(self) -> int:
        """Bytes of all weights, including experts."""
        return self.weights_bytes + self.prefill_only_bytes + (self.experts.nbytes if self.experts is not None else 0)

    def kv_bytes(self, context_tokens: int, bits: int) -> int:
        """Bytes of one sequence's K, V and recurrent state in all layers; an 8-bit cache adds a scale per head."""
        of_token = 2 * self.cached_elements if bits == 16 else self.cached_elements + 4 * self.cached_heads
        if self.single_sequence:  # fp32, and a copy while it grows
            of_token = 2 * 4 * self.cached_elements
        return context_tokens * of_token + self.state_bytes

    @property
    def decoding_core_s(self) -> float:
        """Core seconds to transcode all virtual tensors once."""
        return sum(_transcoding_core_s(tensor) for tensor in self.linears if tensor.path not in self.checkpoint.paths)

    @property
    def read_share(self) -> float:
        """Bytes read from disk per byte of the matrices: below 1 if stored in fewer bits."""
        return stored_share(self.checkpoint, [(tensor, tensor.nbytes) for tensor in self.linears])

    @property
    def page_slack_bytes(self) -> int:
        """Max extra bytes of pinned rows, because reads begin and end at pages."""
        return page_slack(self.linears) + page_slack(self.prefill_only)

    @property
    def weights(self) -> dict[str, int]:
        """Weights that every pass multiplies, by type."""
        return _by_type(self.linears)

    @property
    def prefill_only_weights(self) -> dict[str, int]:
        """Weights that are multiplied once per prompt, by type."""
        return _by_type(self.prefill_only)


def stored_share(checkpoint: Checkpoint, used: Sequence[tuple[Tensor, int]]) -> float:
    """Stored bytes, which are read, per byte of these (tensor, used bytes)."""
    stored = {
        tensor.name: sum(count for _, _, count in encoding.reads(0, tensor.rows)) / tensor.nbytes
        for virtual in checkpoint.virtual.values()
        for tensor, encoding in virtual
    }
    read = sum(nbytes * stored.get(tensor.name, 1.0) for tensor, nbytes in used)
    return read / max(1, sum(nbytes for _, nbytes in used))


def page_slack(tensors: Sequence[Tensor]) -> int:
    """Max extra bytes of these tensors' pinned rows: two pages each."""
    return 2 * PAGE_BYTES * len(tensors)


def _by_type(tensors: Sequence[Tensor]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for tensor in tensors:
        counts[tensor.type] = counts.get(tensor.type, 0) + tensor.rows * tensor.columns
    return counts


_MOST_EXPERTS = 1 << 16  # max experts per layer


def _check_experts(checkpoint: Checkpoint) -> None:
    count = checkpoint.number("expert_count", 0)
    used = checkpoint.number("expert_used_count", 1)
    if count and not (0 < count <= _MOST_EXPERTS and 0 < used <= count):
        raise CheckpointError(
            f"{checkpoint.path}: {used} of {count} experts for a token (`expert_used_count`, `expert_count`) make no model",
            hint="the metadata is damaged; get the file from another source",
        )


def shape_of(checkpoint: Checkpoint, built: Built | None = None) -> Shape:
    """Read the sizes from a header, and from the model where it has been built.

    Raises:
        UnsupportedError: the architecture does not run.
        CheckpointError: the metadata is inconsistent.
    """
    if checkpoint.config is None:
        check_architecture(checkpoint.architecture, checkpoint.path)
    checkpoint.context_limit(1)
    _check_experts(checkpoint)
    layers = checkpoint.layers
    checkpoint = replace(checkpoint, tensors={n: t for n, t in checkpoint.tensors.items() if layer_of(n) < layers})
    tensors = checkpoint.tensors
    stacks = expert_tensors(checkpoint)
    named = {tensor.name for layer in stacks.values() for tensor in layer} | _unused(checkpoint)
    linears = built.linears if built is not None else _linears(checkpoint, named)
    prefill_only = built.prefill_only if built is not None else ()
    if built is None and checkpoint.has_encoder:
        prefill_only = tuple(tensor for tensor in linears if _PREFILL_ONLY.search(tensor.name))
        linears = tuple(tensor for tensor in linears if not _PREFILL_ONLY.search(tensor.name))
    if not linears:
        raise CheckpointError(f"{checkpoint.path} has no weight matrices", hint="it is no language model")
    hidden = checkpoint.number("embedding_length")
    heads = checkpoint.number("attention.head_count", None if checkpoint.config is None else 1)
    head_dim = checkpoint.number("attention.key_length", hidden // max(1, heads))
    head_dim = checkpoint.number("attention.key_length_mla", head_dim)
    kv_heads = checkpoint.number("attention.head_count_kv", heads)
    if checkpoint.architecture == "falcon" and kv_heads > 1:
        kv_heads = heads  # its cache repeats each group's K and V for every head
    rank, rope_dim = checkpoint.number("attention.kv_lora_rank", 0), checkpoint.number("rope.dimension_count", 0)
    latent = 0
    attention_width = heads * head_dim
    if rank:  # MLA: all heads share one latent and one RoPE key per token
        values = checkpoint.number("attention.value_length_mla", checkpoint.number("attention.value_length", head_dim))
        latent = heads * (head_dim - rope_dim + values) * rank
        kv_heads, head_dim = 1, rank + rope_dim
    has_attention = heads > 0 or not _state_elements(checkpoint)
    layers = checkpoint.number("decoder_block_count", layers)
    if not has_attention:
        heads = kv_heads = 1
    if min(heads, hidden, head_dim, kv_heads, layers) < 1:
        raise CheckpointError(
            f"{checkpoint.path}: the metadata gives {layers} layers, width {hidden}, {heads} heads, {kv_heads} KV heads,"
            f" head width {head_dim}",
            hint="the file is damaged; get it from another source",
        )
    kv_layers = _kv_layers(checkpoint, layers) if has_attention else 0
    if built is not None and built.cached:
        cached_heads, cached_elements = (sum(column) for column in zip(*built.cached, strict=True))
    elif rank:
        cached_heads, cached_elements = kv_layers, kv_layers * head_dim
    else:
        cached_heads, cached_elements = _cached(checkpoint, kv_layers, kv_heads, head_dim)
    known = {tensor.name for tensor in (*linears, *prefill_only)} | named
    # Once the model is built, its small tensors are in memory and counted with the process.
    small = 0 if built is not None else sum(4 * t.rows * t.columns for t in tensors.values() if _is_small(t, known))
    return Shape(
        checkpoint=checkpoint,
        linears=linears,
        prefill_only=prefill_only,
        experts=_experts(checkpoint, stacks, built, hidden),
        small_bytes=small,
        layers=layers,
        state_bytes=_state_layers(checkpoint, layers, kv_layers) * 2 * 4 * _state_elements(checkpoint),
        hidden=hidden,
        feed_forward=max((t.outputs for t in (*linears, *prefill_only) if _is_wide(t)), default=hidden),
        attention_width=attention_width,
        latent_elements=latent,
        kv_heads=kv_heads,
        head_dim=head_dim,
        cached_heads=cached_heads,
        cached_elements=cached_elements,
        context_limit=checkpoint.context_limit(1 << 20),
        single_sequence=checkpoint.has_encoder or (kv_layers < layers if built is None else built.single_sequence),
        has_cache=built is None or built.has_cache,
        scanned=_scanned(checkpoint),
    )


def _kv_layers(checkpoint: Checkpoint, layers: int) -> int:
    """Number of layers with a KV cache: all, except layers that the header marks as convolutional or recurrent."""
    by_layer = checkpoint.array("attention.head_count_kv")[:layers]
    if by_layer:
        return sum(1 for count in by_layer if count)
    if not _state_elements(checkpoint):
        return layers
    types = (checkpoint.config or {}).get("layer_types")
    if isinstance(types, list):
        return sum(1 for kind in types if kind not in _STATES)
    usual = 4 if checkpoint.architecture == "qwen3next" else 1
    return layers // max(1, checkpoint.number("full_attention_interval", usual))


def _scanned(checkpoint: Checkpoint) -> Scan | None:
    """The Mamba-2 scan, from the config; GGUF files give no chunk size, so transformers' default is used."""
    config = checkpoint.config
    if config is None:
        chunk = {"granitehybrid": 256, "nemotron_h": 128, "nemotron_h_moe": 128}.get(checkpoint.architecture)
        if chunk is None:
            return None
        return Scan(checkpoint.number("ssm.time_step_rank"), checkpoint.number("ssm.state_size"), chunk)
    kind = config.get("model_type")
    names = (
        "mamba_num_heads",
        "mamba_n_heads",
        *({"mamba2": ["num_heads"], "zamba2": ["n_mamba_heads"]}.get(str(kind), ())),
    )

    def number(keys: Sequence[str], usual: int) -> int:
        return next((config[key] for key in keys if isinstance(config.get(key), int)), usual)

    heads = number(names, 0)
    state = number(("ssm_state_size", "mamba_d_state", "state_size"), 128)
    return Scan(heads, state, max(1, number(("chunk_size", "mamba_chunk_size"), 256))) if heads > 0 else None


def _state_layers(checkpoint: Checkpoint, layers: int, kv_layers: int) -> int:
    """Number of layers with recurrent state: layers without a KV cache, except MLP-only layers."""
    widths = checkpoint.array("feed_forward_length")[:layers]
    kept = checkpoint.array("attention.head_count_kv")[:layers]
    if 0 not in widths or len(kept) != len(widths):
        return layers - kv_layers
    return sum(1 for width, heads in zip(widths, kept, strict=True) if not width and not heads)


_STATES = ("linear_attention", "conv", "mamba")


def _state_elements(checkpoint: Checkpoint) -> int:
    """State elements of one linear-attention layer per sequence: a matrix per head."""
    if checkpoint.get("ssm.inner_size") is None:
        return 0
    return checkpoint.number("ssm.inner_size") * checkpoint.number("ssm.state_size", 1)


def _cached(checkpoint: Checkpoint, kv_layers: int, kv_heads: int, head_dim: int) -> tuple[int, int]:
    """(KV heads, KV elements per token) over all layers; layers may differ, or share a cache."""
    own = max(0, checkpoint.layers - _shared(checkpoint))
    counts = [max(0, count) for count in checkpoint.array("attention.head_count_kv")[:own] if isinstance(count, int)]
    windowed = checkpoint.array("attention.sliding_window_pattern")[:own]
    full = head_dim + checkpoint.number("attention.value_length", head_dim)
    key = checkpoint.number("attention.key_length_swa", head_dim)
    local = key + checkpoint.number("attention.value_length_swa", full - head_dim)
    listed = counts or [kv_heads] * len(windowed)
    unlisted = kv_heads * max(0, min(own, kv_layers) - len(listed))
    widths = (local if one else full for one in chain(windowed, repeat(False)))
    return sum(listed) + unlisted, sum(map(mul, listed, widths)) + unlisted * full


def _shared(checkpoint: Checkpoint) -> int:
    """Number of last layers, which attend to the K and V of earlier layers."""
    return checkpoint.number("attention.shared_kv_layers", 0)


def _linears(checkpoint: Checkpoint, others: set[str]) -> tuple[Tensor, ...]:
    """Matrices by the header alone, without tables and `others` (experts and unused tensors)."""
    tensors = checkpoint.tensors
    linears = [t for t in tensors.values() if is_linear(t) and t.name not in others]
    if not any(_HEAD.search(name) for name in tensors):
        tables = [tensor for name, tensor in tensors.items() if _TOKEN_TABLE.search(name)]
        if not tables:
            raise CheckpointError(
                f"{checkpoint.path} has no table of token embeddings (`token_embd.weight`)",
                hint="it is no language model",
            )
        linears.append(tables[0])  # tied: gathered by row and multiplied as the head
    return tuple(linears)


def _unused(checkpoint: Checkpoint) -> set[str]:
    """Tensors that are never read: K and V projections of layers that share a cache, and sparse-attention indexers."""
    first = checkpoint.layers - _shared(checkpoint)
    found = (re.match(r"^blk\.(\d+)\.attn_[kv](_norm)?\.weight$", name) for name in checkpoint.tensors)
    unused = {match[0] for match in found if match is not None and int(match[1]) >= first}
    return unused | {name for name in checkpoint.tensors if name.startswith("blk.") and ".indexer." in name}


def _is_small(tensor: Tensor, known: set[str]) -> bool:
    return tensor.name not in known and not _TABLE.search(tensor.name)


def _is_wide(tensor: Tensor) -> bool:
    return not _HEAD.search(tensor.name) and not _TABLE.search(tensor.name)


# Tensor names of GGUF files and of Hugging Face models.
_HEAD = re.compile(r"^output\.weight|(^|\.)(lm_head|embed_out|unembed|output_projection)\.weight")
_TOKEN_TABLE = re.compile(
    r"^token_embd\.weight|(^|\.)(embed_tokens|tokens_embed|embed|wte|word_embeddings|embed_in|embeddings|tok_embeddings)\.weight|"
    r"^(\w+\.)?shared\.weight|^transformer\.w\.weight"
)
_TABLE = re.compile(
    r"^((per_layer_)?token_embd|position_embd|token_types)\.weight|(?<!un)embed(?!_out)|(^|\.)(wte|wpe|tokens_embed|positions_embed)\.|"
    r"^(\w+\.)?shared\.weight|^transformer\.w\.weight|attn_rel_b\.|relative_attention_bias\.|^final_logits_bias$"
)
# Encoders, and the K and V projections of cross-attention.
_PREFILL_ONLY = re.compile(
    r"^enc\.|\.cross_attn_[kv]\.|(^|\.)encoder\.|\.(EncDecAttention|encoder_attn|cross_attn)\.(k|v|key|value)(_proj)?\."
)
_KV_B = re.compile(r"\.attn_[kv]_b\.weight$")  # MLA's halves of kv_b, head by head
_EXPERTS = re.compile(
    r"^(blk\.\d+)\.ffn_(?:\w+_exps|\w+\.\d+)\.weight$|^(.*(?<!shared_)experts)\.(?:(?:expert_)?\d+\.|mlp\.)?\w+(?:\.weight)?$"
)
# Vectors, groups and convolution kernels, not matrices.
_SSM_PARAMS = re.compile(r"\.(ssm_(a|d|norm|conv1d)|shortconv\.conv)(\.weight)?$")
_ATTENTION_EXPERTS = re.compile(r"attention\.experts\.")  # JetMoe's attention experts, which are all computed


def is_linear(tensor: Tensor) -> bool:
    """True if a tensor is multiplied in every pass, by name and shape: a matrix, but not an embedding table."""
    plain = (
        len(tensor.shape) == 2
        or tensor.k_splits > 0
        or _KV_B.search(tensor.name)
        or _ATTENTION_EXPERTS.search(tensor.name)
    )
    return bool(plain) and not _TABLE.search(tensor.name) and not _SSM_PARAMS.search(tensor.name)


def expert_tensors(checkpoint: Checkpoint) -> dict[str, list[Tensor]]:
    """The matrices of routed experts by layer; empty if the header counts no experts."""
    found: dict[str, list[Tensor]] = {}
    count = checkpoint.number("expert_count", 0)
    for tensor in checkpoint.tensors.values() if count else ():
        match = _EXPERTS.match(tensor.name)
        if _ATTENTION_EXPERTS.search(tensor.name):
            continue
        if match is not None and len(tensor.shape) >= 2:
            found.setdefault(match[1] or match[2], []).append(tensor)
        elif len(tensor.shape) == 3 and tensor.shape[0] == count and not is_linear(tensor):
            found.setdefault(tensor.name.rsplit(".", 2)[0], []).append(tensor)
    return found


def _experts(
    checkpoint: Checkpoint, stacks: dict[str, list[Tensor]], built: Built | None, hidden: int
) -> Experts | None:
    if built is not None and not built.experts:
        return None
    if built is None and not stacks:
        return None
    count = checkpoint.number("expert_count")
    weights: dict[str, int] = {}
    if built is not None:
        layers, count = len(built.experts), len(built.experts[0])
        slices = [weight_slice for experts in built.experts for expert in experts for weight_slice in expert]
        for weight_slice in slices:
            kind = weight_slice.tensor.type
            weights[kind] = weights.get(kind, 0) + weight_slice.rows * weight_slice.tensor.inputs
        used = [(weight_slice.tensor, _slice_bytes(weight_slice)) for weight_slice in slices]
        slot = max(
            sum(_paged(_slice_bytes(weight_slice)) for weight_slice in expert)
            for experts in built.experts
            for expert in experts
        )
    else:
        layers = len(stacks)
        for tensor in (tensor for layer in stacks.values() for tensor in layer):
            weights[tensor.type] = weights.get(tensor.type, 0) + tensor.rows * tensor.columns
        used = [(tensor, tensor.nbytes) for layer in stacks.values() for tensor in layer]
        slot = max(sum(tensor.nbytes for tensor in layer) // count + 3 * 2 * PAGE_BYTES for layer in stacks.values())
    per_token = checkpoint.number("expert_used_count", min(count, 2))
    return Experts(
        layers=layers,
        count=count,
        per_token=min(count, per_token),
        nbytes=sum(nbytes for _, nbytes in used),
        read_share=stored_share(checkpoint, used),
        slot_bytes=slot,
        hidden=hidden,
        width=sum(weights.values()) // (3 * layers * count * hidden) or 1,
        weights=weights,
    )


def _transcoding_core_s(tensor: Tensor) -> float:
    if tensor.type == "BF16" and not tensor.k_splits:
        return tensor.rows * tensor.columns / _UNPACKED_EXPONENTS_PER_S
    return tensor.rows * tensor.columns / _TRANSCODED_WEIGHTS_PER_S.get(tensor.type, _TRANSCODED_OTHERS_PER_S)


# Weights per second that one core transcodes, by target type (docs/benchmarks/history.md); other types are only transposed.
_TRANSCODED_WEIGHTS_PER_S = {"F16": 0.5e9, "Q4_0": 2e9, "Q4_1": 1.2e9, "Q8_0": 2.5e9, "MXFP4": 3e9}
_TRANSCODED_OTHERS_PER_S = 1.3e9
_UNPACKED_EXPONENTS_PER_S = (
    0.6e9  # exponents per second of packed folders, in a run's reader threads; alone twice as fast
)


def _slice_bytes(weights: Slice) -> int:
    return weights.tensor.nbytes if weights.tensor.k_splits else weights.rows * weights.tensor.row_bytes


def _paged(nbytes: int) -> int:
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES + PAGE_BYTES
