"""What the plan needs to know of a model: its matrices, its experts, its widths, its layers."""

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

_PAGE_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class Built:
    """What is known once the model has been built: which tensors a pass multiplies, and how it keeps what it has seen."""

    linears: tuple[Tensor, ...]
    prefill_only: tuple[Tensor, ...] = ()  # what only the beginning of a text multiplies
    experts: Sequence[Sequence[Sequence[Slice]]]  # of every expert of every layer, its slices
    single_sequence: bool  # sequences do not share passes, and keys and values are kept in fp32
    cached: Sequence[tuple[int, int]] = ()  # of each layer, heads that keep keys and values, and numbers of a position
    has_cache: bool = True  # False: every pass computes all positions anew


class Scan(NamedTuple):
    """State spaces that take rows in chunks, all of which see each other."""

    heads: int
    state: int  # numbers for each width of a head
    chunk: int  # rows


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a model. `linears` are the matrices that every pass multiplies, a tied head included.

    `opening` are those that are multiplied once for a prompt: an encoder, and what makes keys and values of its results.
    """

    checkpoint: Checkpoint
    linears: tuple[Tensor, ...]
    prefill_only: tuple[Tensor, ...]
    experts: Experts | None
    small_bytes: int
    layers: int
    state_bytes: int  # what the others keep of a sequence
    hidden: int
    feed_forward: int
    attention_width: int
    latent_numbers: int  # of a layer's matrix that makes keys and values from latent vectors; 0: there is none
    kv_heads: int
    head_dim: int
    cached_heads: int  # that keep keys and values, over all layers
    cached_numbers: int  # that these keep of one position
    context_limit: int
    single_sequence: bool = False
    has_cache: bool = True
    scanned: Scan | None = None  # of state spaces that take rows in chunks

    @property
    def tied(self) -> bool:
        """Whether the table of embeddings is the head."""
        return any(_TOKEN_TABLE.search(tensor.name) for tensor in self.linears)

    @property
    def makes_scores(self) -> bool:
        """Whether attention's scores come into memory: for vectors, caps or sinks torch has no function that avoids it."""
        capped = self.checkpoint.get("attn_logit_softcapping") is not None
        return bool(self.latent_numbers) or capped or any("sinks" in name for name in self.checkpoint.tensors)

    @property
    def weights_count(self) -> int:
        """Weights that are multiplied, experts included."""
        dense = sum(self.weights.values()) + sum(self.prefill_only_weights.values())
        return dense + (sum(self.experts.weights.values()) if self.experts is not None else 0)

    @property
    def weights_bytes(self) -> int:
        """Bytes of what every pass multiplies."""
        return sum(tensor.nbytes for tensor in self.linears)

    @property
    def prefill_only_bytes(self) -> int:
        """Bytes of what is multiplied once for a prompt."""
        return sum(tensor.nbytes for tensor in self.prefill_only)

    @property
    def all_bytes(self) -> int:
        """Bytes of both and of all experts."""
        return self.weights_bytes + self.prefill_only_bytes + (self.experts.nbytes if self.experts is not None else 0)

    def kv_bytes(self, context_tokens: int, bits: int) -> int:
        """Keys and values of one sequence in all layers; in 8 bits each head has a scale beside them. And its states."""
        of_token = 2 * self.cached_numbers if bits == 16 else self.cached_numbers + 4 * self.cached_heads
        if self.single_sequence:  # fp32, and a copy while it grows
            of_token = 2 * 4 * self.cached_numbers
        return context_tokens * of_token + self.state_bytes

    @property
    def decoding_core_s(self) -> float:
        """Seconds of one core for making every matrix that is not stored as it is multiplied, once."""
        return sum(_decoding_core_s(tensor) for tensor in self.linears if tensor.path not in self.checkpoint.paths)

    @property
    def read_share(self) -> float:
        """Bytes that are read from the disk for each byte of the matrices: less than 1 where they are stored in fewer bits."""
        return stored_share(self.checkpoint, [(tensor, tensor.nbytes) for tensor in self.linears])

    @property
    def page_slack_bytes(self) -> int:
        """What pinned rows may take beside their own bytes, because reads begin and end at pages."""
        return page_slack(self.linears) + page_slack(self.prefill_only)

    @property
    def weights(self) -> dict[str, int]:
        """Weights that every pass multiplies, by type."""
        return _by_type(self.linears)

    @property
    def prefill_only_weights(self) -> dict[str, int]:
        """Weights that are multiplied once for a prompt, by type."""
        return _by_type(self.prefill_only)


def stored_share(checkpoint: Checkpoint, used: Sequence[tuple[Tensor, int]]) -> float:
    """Bytes that are stored, and read, for each byte of these tensors, of which so many are used."""
    stored = {
        tensor.name: sum(count for _, _, count in encoding.reads(0, tensor.rows)) / tensor.nbytes
        for made in checkpoint.virtual.values()
        for tensor, encoding in made
    }
    read = sum(nbytes * stored.get(tensor.name, 1.0) for tensor, nbytes in used)
    return read / max(1, sum(nbytes for _, nbytes in used))


def page_slack(tensors: Sequence[Tensor]) -> int:
    """What the pinned rows of these tensors may take beside their own bytes."""
    return 2 * _PAGE_BYTES * len(tensors)


def _by_type(tensors: Sequence[Tensor]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for tensor in tensors:
        counts[tensor.type] = counts.get(tensor.type, 0) + tensor.rows * tensor.columns
    return counts


_MOST_EXPERTS = 1 << 16  # of a layer


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
        CheckpointError: the metadata makes no sense.
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
    opening = built.prefill_only if built is not None else ()
    if built is None and checkpoint.has_encoder:
        opening = tuple(tensor for tensor in linears if _OPENING.search(tensor.name))
        linears = tuple(tensor for tensor in linears if not _OPENING.search(tensor.name))
    if not linears:
        raise CheckpointError(f"{checkpoint.path} has no weight matrices", hint="it is no language model")
    hidden = checkpoint.number("embedding_length")
    heads = checkpoint.number("attention.head_count", None if checkpoint.config is None else 1)
    head_dim = checkpoint.number("attention.key_length", hidden // max(1, heads))
    head_dim = checkpoint.number("attention.key_length_mla", head_dim)
    kv_heads = checkpoint.number("attention.head_count_kv", heads)
    if checkpoint.architecture == "falcon" and kv_heads > 1:
        kv_heads = heads  # it keeps keys of groups once for each head
    rank, rotated = checkpoint.number("attention.kv_lora_rank", 0), checkpoint.number("rope.dimension_count", 0)
    latent = 0
    attention_width = heads * head_dim
    if rank:  # of a position, all heads keep one vector and what is rotated
        values = checkpoint.number("attention.value_length_mla", checkpoint.number("attention.value_length", head_dim))
        latent = heads * (head_dim - rotated + values) * rank
        kv_heads, head_dim = 1, rank + rotated
    attends = heads > 0 or not _state_numbers(checkpoint)
    layers = checkpoint.number("decoder_block_count", layers)
    if not attends:
        heads = kv_heads = 1
    if min(heads, hidden, head_dim, kv_heads, layers) < 1:
        raise CheckpointError(
            f"{checkpoint.path}: the metadata gives {layers} layers, width {hidden}, {heads} heads, {kv_heads} KV heads,"
            f" head width {head_dim}",
            hint="the file is damaged; get it from another source",
        )
    kv_layers = _kv_layers(checkpoint, layers) if attends else 0
    if built is not None and built.cached:
        cached_heads, cached_numbers = (sum(column) for column in zip(*built.cached, strict=True))
    elif rank:
        cached_heads, cached_numbers = kv_layers, kv_layers * head_dim
    else:
        cached_heads, cached_numbers = _cached(checkpoint, kv_layers, kv_heads, head_dim)
    known = {tensor.name for tensor in (*linears, *opening)} | named
    # Once the model is built, its small tensors are in memory and counted with the process.
    small = 0 if built is not None else sum(4 * t.rows * t.columns for t in tensors.values() if _is_small(t, known))
    return Shape(
        checkpoint=checkpoint,
        linears=linears,
        prefill_only=opening,
        experts=_experts(checkpoint, stacks, built, hidden),
        small_bytes=small,
        layers=layers,
        state_bytes=_state_layers(checkpoint, layers, kv_layers) * 2 * 4 * _state_numbers(checkpoint),
        hidden=hidden,
        feed_forward=max((t.outputs for t in (*linears, *opening) if _is_wide(t)), default=hidden),
        attention_width=attention_width,
        latent_numbers=latent,
        kv_heads=kv_heads,
        head_dim=head_dim,
        cached_heads=cached_heads,
        cached_numbers=cached_numbers,
        context_limit=checkpoint.context_limit(1 << 20),
        single_sequence=checkpoint.has_encoder or (kv_layers < layers if built is None else built.single_sequence),
        has_cache=built is None or built.has_cache,
        scanned=_scanned(checkpoint),
    )


def _kv_layers(checkpoint: Checkpoint, layers: int) -> int:
    """Layers with keys and values: all, but where the header says which have convolutions or a state whose size it gives."""
    by_layer = checkpoint.array("attention.head_count_kv")[:layers]
    if by_layer:
        return sum(1 for count in by_layer if count)
    if not _state_numbers(checkpoint):
        return layers
    types = (checkpoint.config or {}).get("layer_types")
    if isinstance(types, list):
        return sum(1 for kind in types if kind not in _STATES)
    usual = 4 if checkpoint.architecture == "qwen3next" else 1
    return layers // max(1, checkpoint.number("full_attention_interval", usual))


def _scanned(checkpoint: Checkpoint) -> Scan | None:
    """Of Mamba's second kind: what the config says, or of files, which say no chunk, what transformers takes."""
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
    """Layers that keep a state: those without keys, but for such as are an MLP and nothing else."""
    widths = checkpoint.array("feed_forward_length")[:layers]
    kept = checkpoint.array("attention.head_count_kv")[:layers]
    if 0 not in widths or len(kept) != len(widths):
        return layers - kv_layers
    return sum(1 for width, heads in zip(widths, kept, strict=True) if not width and not heads)


_STATES = ("linear_attention", "conv", "mamba")


def _state_numbers(checkpoint: Checkpoint) -> int:
    """Numbers that one layer of linear attention keeps of a sequence: a matrix for each head."""
    if checkpoint.get("ssm.inner_size") is None:
        return 0
    return checkpoint.number("ssm.inner_size") * checkpoint.number("ssm.state_size", 1)


def _cached(checkpoint: Checkpoint, kv_layers: int, kv_heads: int, head_dim: int) -> tuple[int, int]:
    """How many heads keep keys and values, and how many numbers of one position: layers may differ, and share theirs."""
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
    """The last layers, which look at keys and values of others."""
    return checkpoint.number("attention.shared_kv_layers", 0)


def _linears(checkpoint: Checkpoint, others: set[str]) -> tuple[Tensor, ...]:
    """By the header alone: the matrices that are neither tables nor others, which are experts or of no use."""
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
    """What makes keys and values of layers that look at those of others, or chooses positions: files hold it, and nobody reads
    it."""
    first = checkpoint.layers - _shared(checkpoint)
    found = (re.match(r"^blk\.(\d+)\.attn_[kv](_norm)?\.weight$", name) for name in checkpoint.tensors)
    unused = {match[0] for match in found if match is not None and int(match[1]) >= first}
    return unused | {name for name in checkpoint.tensors if name.startswith("blk.") and ".indexer." in name}


def _is_small(tensor: Tensor, known: set[str]) -> bool:
    return tensor.name not in known and not _TABLE.search(tensor.name)


def _is_wide(tensor: Tensor) -> bool:
    return not _HEAD.search(tensor.name) and not _TABLE.search(tensor.name)


# Names of GGUF files and those of Hugging Face's models.
_HEAD = re.compile(r"^output\.weight|(^|\.)(lm_head|embed_out|unembed|output_projection)\.weight")
_TOKEN_TABLE = re.compile(
    r"^token_embd\.weight|(^|\.)(embed_tokens|tokens_embed|embed|wte|word_embeddings|embed_in|embeddings|tok_embeddings)\.weight|"
    r"^(\w+\.)?shared\.weight|^transformer\.w\.weight"
)
_TABLE = re.compile(
    r"^((per_layer_)?token_embd|position_embd|token_types)\.weight|(?<!un)embed(?!_out)|(^|\.)(wte|wpe|tokens_embed|positions_embed)\.|"
    r"^(\w+\.)?shared\.weight|^transformer\.w\.weight|attn_rel_b\.|relative_attention_bias\.|^final_logits_bias$"
)
# Encoders, and the keys and values that decoders make of their results.
_OPENING = re.compile(
    r"^enc\.|\.cross_attn_[kv]\.|(^|\.)encoder\.|\.(EncDecAttention|encoder_attn|cross_attn)\.(k|v|key|value)(_proj)?\."
)
_LATENT = re.compile(r"\.attn_[kv]_b\.weight$")  # of every head one after another
_EXPERTS = re.compile(
    r"^(blk\.\d+)\.ffn_(?:\w+_exps|\w+\.\d+)\.weight$|^(.*(?<!shared_)experts)\.(?:(?:expert_)?\d+\.|mlp\.)?\w+(?:\.weight)?$"
)
_OF_STATES = re.compile(r"\.(ssm_(a|d|norm|conv1d)|shortconv\.conv)(\.weight)?$")  # columns, groups and kernels
_OF_ATTENTION = re.compile(r"attention\.experts\.")  # JetMoe's, which are all computed


def is_linear(tensor: Tensor) -> bool:
    """Whether a tensor is multiplied in every pass, by its name and shape: a matrix, and not a table of embeddings."""
    plain = (
        len(tensor.shape) == 2
        or tensor.k_splits > 0
        or _LATENT.search(tensor.name)
        or _OF_ATTENTION.search(tensor.name)
    )
    return bool(plain) and not _TABLE.search(tensor.name) and not _OF_STATES.search(tensor.name)


def expert_tensors(checkpoint: Checkpoint) -> dict[str, list[Tensor]]:
    """The matrices of routed experts, by layer; empty where the header counts no experts."""
    found: dict[str, list[Tensor]] = {}
    count = checkpoint.number("expert_count", 0)
    for tensor in checkpoint.tensors.values() if count else ():
        match = _EXPERTS.match(tensor.name)
        if _OF_ATTENTION.search(tensor.name):
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
        slices = [part for experts in built.experts for one in experts for part in one]
        for part in slices:
            weights[part.tensor.type] = weights.get(part.tensor.type, 0) + part.rows * part.tensor.inputs
        used = [(part.tensor, _slice_bytes(part)) for part in slices]
        slot = max(sum(_paged(_slice_bytes(part)) for part in one) for experts in built.experts for one in experts)
    else:
        layers = len(stacks)
        for tensor in (tensor for layer in stacks.values() for tensor in layer):
            weights[tensor.type] = weights.get(tensor.type, 0) + tensor.rows * tensor.columns
        used = [(tensor, tensor.nbytes) for layer in stacks.values() for tensor in layer]
        slot = max(sum(tensor.nbytes for tensor in layer) // count + 3 * 2 * _PAGE_BYTES for layer in stacks.values())
    chosen = checkpoint.number("expert_used_count", min(count, 2))
    return Experts(
        layers=layers,
        count=count,
        per_token=min(count, chosen),
        nbytes=sum(nbytes for _, nbytes in used),
        read_share=stored_share(checkpoint, used),
        slot_bytes=slot,
        hidden=hidden,
        width=sum(weights.values()) // (3 * layers * count * hidden) or 1,
        weights=weights,
    )


def _decoding_core_s(tensor: Tensor) -> float:
    if tensor.type == "BF16" and not tensor.k_splits:
        return tensor.rows * tensor.columns / _UNPACKED_EXPONENTS_PER_S
    return tensor.rows * tensor.columns / _DECODED_WEIGHTS_PER_S.get(tensor.type, _DECODED_OTHERS_PER_S)


# Weights that one core decodes per second, by what they become (docs/benchmarks.md); types not named are only transposed.
_DECODED_WEIGHTS_PER_S = {"F16": 0.5e9, "Q4_0": 2e9, "Q4_1": 1.2e9, "Q8_0": 2.5e9, "MXFP4": 3e9}
_DECODED_OTHERS_PER_S = 1.3e9
_UNPACKED_EXPONENTS_PER_S = 0.6e9  # of packed folders, in the readers of a run; alone it is twice as fast


def _slice_bytes(part: Slice) -> int:
    return part.tensor.nbytes if part.tensor.k_splits else part.rows * part.tensor.row_bytes


def _paged(nbytes: int) -> int:
    return -(-nbytes // _PAGE_BYTES) * _PAGE_BYTES + _PAGE_BYTES
