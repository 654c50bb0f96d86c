"""Write a model of any size with random Q4_K and Q6_K weights and a real tokenizer: for speed, not for text.

    python benchmarks/synthetic.py OUT.gguf --like TOKENIZER.gguf --layers 32 --hidden 4096 --ff 14336 --heads 32     # 8B, 5 GB
    python benchmarks/synthetic.py OUT.gguf --like TOKENIZER.gguf --layers 80 --hidden 8192 --ff 28672 --heads 64     # 70B, 42 GB
    python benchmarks/synthetic.py OUT.gguf --like TOKENIZER.gguf --layers 48 --hidden 2048 --heads 32 --kv-heads 4 \\
        --head-dim 128 --experts 128 --per-token 8 --expert-ff 768 --skew 0.5                                   # 30B-A3B, 18 GB

As in llama.cpp's Q4_K_M files, the values' projections, every second down projection and the head are Q6_K. With --experts
the architecture is qwen3moe. Its routing must depend on the token as in a trained model, which it does because

- the embeddings have deviation 1, and the layers' outputs stay of the same size: the experts add with gain 1, attention, which
  tokens of one context have in common, with gain 0.1;
- a router's row e is a_e times a random unit vector u_e, so that its logit for a state x of length sqrt(hidden) is
  normal with deviation a_e. An expert is chosen when its logit is among the largest, that is, above a threshold near 1. Its
  probability is p_e = P(N(0, 1) > 1 / a_e). So a_e = 1 / Q(1 - p_e), Q the normal quantile, gives it any frequency below 1/2;
- p_e = min(0.45, c / rank^S), with c such that the p_e add up to --per-token, and the ranks permuted anew in each layer.

The last lines printed are the frequencies of a simulation with random states, first layer, most frequent expert first.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

Q4_K, Q6_K, F32 = GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q6_K, GGMLQuantizationType.F32
BLOCK, BLOCK_BYTES = 256, {Q4_K: 144, Q6_K: 210}
UNIT_DEVIATION = {Q4_K: 168.3, Q6_K: 1366.0}  # deviation of random weights in a block with scale 1
CHUNK_BLOCKS = 1 << 19  # blocks drawn at a time: at most 110 MB
MOST_FREQUENT = 0.45  # max frequency of an expert; a logit with mean 0 is above a threshold at most half the time
ATTENTION_GAIN = 0.1
SIMULATED_STATES = 4000


@dataclass(frozen=True, kw_only=True)
class Model:
    layers: int
    hidden: int
    ff: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int  # 0: a llama
    per_token: int
    expert_ff: int
    skew: float

    @property
    def architecture(self) -> str:
        return "qwen3moe" if self.experts else "llama"


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A packed tensor; `deviation` is that of its weights, None for the llama's usual scale."""

    name: str
    shape: tuple[int, ...]  # slowest first
    type: GGMLQuantizationType
    deviation: float | None = None


def matrices(model: Model, vocab: int) -> Iterator[Matrix]:
    """Every packed tensor, in file order."""
    hidden, width, kv = model.hidden, model.heads * model.head_dim, model.kv_heads * model.head_dim

    def matrix(name: str, *shape: int, kind: GGMLQuantizationType = Q4_K, gain: float = 1.0) -> Matrix:
        deviation = gain / shape[-1] ** 0.5 if model.experts else None
        return Matrix(name=f"{name}.weight", shape=shape, type=kind, deviation=deviation)

    yield matrix("token_embd", vocab, hidden, gain=hidden**0.5)
    for i in range(model.layers):
        often = Q6_K if i % 2 else Q4_K
        yield matrix(f"blk.{i}.attn_q", width, hidden)
        yield matrix(f"blk.{i}.attn_k", kv, hidden)
        yield matrix(f"blk.{i}.attn_v", kv, hidden, kind=often if model.experts else Q6_K)
        yield matrix(f"blk.{i}.attn_output", hidden, width, gain=ATTENTION_GAIN)
        if model.experts:
            yield matrix(f"blk.{i}.ffn_gate_exps", model.experts, model.expert_ff, hidden)
            yield matrix(f"blk.{i}.ffn_up_exps", model.experts, model.expert_ff, hidden)
            yield matrix(f"blk.{i}.ffn_down_exps", model.experts, hidden, model.expert_ff, kind=often)
        else:
            yield matrix(f"blk.{i}.ffn_gate", model.ff, hidden)
            yield matrix(f"blk.{i}.ffn_up", model.ff, hidden)
            yield matrix(f"blk.{i}.ffn_down", hidden, model.ff, kind=often)
    yield matrix("output", vocab, hidden, kind=Q6_K)


def small(model: Model, random: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor in F32: norms of ones, and the routers."""
    for i in range(model.layers):
        yield f"blk.{i}.attn_norm.weight", np.ones(model.hidden, np.float32)
        yield f"blk.{i}.ffn_norm.weight", np.ones(model.hidden, np.float32)
        if model.experts:
            yield f"blk.{i}.attn_q_norm.weight", np.ones(model.head_dim, np.float32)
            yield f"blk.{i}.attn_k_norm.weight", np.ones(model.head_dim, np.float32)
            yield f"blk.{i}.ffn_gate_inp.weight", router(model, random)
    yield "output_norm.weight", np.ones(model.hidden, np.float32)


def router(model: Model, random: np.random.Generator) -> np.ndarray:
    """Router rows, made as described at the top of this file."""
    rows = random.standard_normal((model.experts, model.hidden))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    wanted = random.permutation(frequencies(model.experts, model.per_token, model.skew))
    scales = np.array([1 / NormalDist().inv_cdf(1 - p) for p in wanted])
    scaled: np.ndarray = (rows * scales[:, None]).astype(np.float32)
    return scaled


def frequencies(experts: int, per_token: int, skew: float) -> np.ndarray:
    """Routing probability of each rank; they add up to `per_token`."""
    if per_token > MOST_FREQUENT * experts:
        raise SystemExit(f"Error: {per_token} of {experts} experts per token are more than {MOST_FREQUENT:.0%}")
    shares = np.arange(1, experts + 1) ** -skew
    capped = 0
    while True:
        rest = shares[capped:] * (per_token - MOST_FREQUENT * capped) / shares[capped:].sum()
        if rest[0] <= MOST_FREQUENT:
            return np.concatenate([np.full(capped, MOST_FREQUENT), rest])
        capped += 1


def measured(router_rows: np.ndarray, per_token: int, random: np.random.Generator) -> np.ndarray:
    """Routing frequencies of the experts for random normed states, most frequent first."""
    states = random.standard_normal((SIMULATED_STATES, router_rows.shape[1]))
    states /= np.sqrt(np.mean(states**2, axis=1, keepdims=True))
    chosen = np.argpartition(-(states @ router_rows.T), per_token, axis=1)[:, :per_token]
    counts = np.bincount(chosen.ravel(), minlength=len(router_rows))
    return np.sort(counts)[::-1] / SIMULATED_STATES


def blocks(count: int, kind: GGMLQuantizationType, deviation: float | None, random: np.random.Generator) -> np.ndarray:
    """Random packed blocks with small, finite scales."""
    packed = random.integers(0, 256, (count, BLOCK_BYTES[kind]), np.uint8)
    if kind == Q4_K:
        scale = 8e-4 if deviation is None else deviation / UNIT_DEVIATION[kind]
        packed[:, 0:4] = np.array([scale, 7.5 * scale], np.float16).view(np.uint8)  # scale and minimum
        # The minimum of each 32 weights matches their scale: their mean is 0 and rows have no common direction.
        packed[:, 8:12] = packed[:, 4:8]
        packed[:, 12:16] = (packed[:, 12:16] & 15) * 17
    else:
        scale = 2e-5 if deviation is None else deviation / UNIT_DEVIATION[kind]
        packed[:, 208:210] = np.array([scale], np.float16).view(np.uint8)
    return packed


def add_metadata(writer: GGUFWriter, reader: GGUFReader, model: Model) -> None:
    for key, field in reader.fields.items():
        if not key.startswith("tokenizer."):
            continue
        if field.types[0] == GGUFValueType.ARRAY:
            writer.add_array(key, field.contents())
        else:
            writer.add_key_value(key, field.contents(), field.types[0])
    writer.add_block_count(model.layers)
    writer.add_context_length(32768)
    writer.add_embedding_length(model.hidden)
    writer.add_feed_forward_length(model.ff)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    if not model.experts:
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(500000.0)
        return
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1000000.0)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_expert_count(model.experts)
    writer.add_expert_used_count(model.per_token)
    writer.add_expert_feed_forward_length(model.expert_ff)


def write(out: Path, like: Path, model: Model) -> None:
    """Write the file, a chunk of a matrix at a time."""
    reader, writer = GGUFReader(like), GGUFWriter(out, model.architecture)
    add_metadata(writer, reader, model)
    random = np.random.default_rng(0)
    smalls = list(small(model, np.random.default_rng(1)))
    packed = list(matrices(model, len(reader.fields["tokenizer.ggml.tokens"].data)))
    for name, values in smalls:
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    for matrix in packed:
        shape = (*matrix.shape[:-1], matrix.shape[-1] // BLOCK * BLOCK_BYTES[matrix.type])
        writer.add_tensor_info(matrix.name, shape, np.dtype(np.uint8), int(np.prod(shape)), raw_dtype=matrix.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, values in smalls:
        writer.write_tensor_data(values)
    for matrix in packed:
        write_packed(writer, matrix, random)
    writer.close()


def write_packed(writer: GGUFWriter, matrix: Matrix, random: np.random.Generator) -> None:
    """Append a tensor's blocks and its padding, without ever holding the whole tensor."""
    assert writer.fout is not None
    file = writer.fout[0]
    count = int(np.prod(matrix.shape)) // BLOCK
    writer.write_padding(file, file.tell())
    for start in range(0, count, CHUNK_BLOCKS):
        some = blocks(min(CHUNK_BLOCKS, count - start), matrix.type, matrix.deviation, random)
        some.tofile(file)
    writer.write_padding(file, count * BLOCK_BYTES[matrix.type])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--like", type=Path, required=True, help="a GGUF whose tokenizer is copied")
    for option, default in (("layers", 32), ("hidden", 4096), ("ff", 14336), ("heads", 32), ("kv-heads", 8)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--head-dim", type=int, help="default: hidden / heads")
    parser.add_argument("--experts", type=int, default=0, help="experts per layer; 0 writes a llama")
    parser.add_argument("--per-token", type=int, default=8, help="experts that a token uses")
    parser.add_argument("--expert-ff", type=int, default=768)
    parser.add_argument("--skew", type=float, default=0.5, help="exponent of the experts' frequencies by rank")
    options = vars(parser.parse_args())
    out, like = options.pop("out"), options.pop("like")
    options["head_dim"] = options["head_dim"] or options["hidden"] // options["heads"]
    model = Model(**options)
    write(out, like, model)
    if model.experts:
        found = measured(router(model, np.random.default_rng(1)), model.per_token, np.random.default_rng(2))
        for rank, wanted in enumerate(frequencies(model.experts, model.per_token, model.skew)):
            if rank + 1 in (1, 2, 4, 8, 16, 32, 64, model.experts):
                print(f"expert {rank + 1}: {found[rank]:.3f} of the tokens, {wanted:.3f} wanted")


if __name__ == "__main__":
    main()
