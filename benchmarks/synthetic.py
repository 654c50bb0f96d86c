"""Write a llama of any size with random Q4_K and Q6_K weights and a real tokenizer: for speed, not for text.

    python benchmarks/synthetic.py OUT.gguf --like TOKENIZER.gguf --layers 32 --hidden 4096 --ff 14336 --heads 32     # 8B, 5 GB
    python benchmarks/synthetic.py OUT.gguf --like TOKENIZER.gguf --layers 80 --hidden 8192 --ff 28672 --heads 64     # 70B, 42 GB

As in llama.cpp's Q4_K_M files, the values' projections, every second down projection and the head are Q6_K.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

Q4_K, Q6_K = GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q6_K
BLOCK, BLOCK_BYTES = 256, {Q4_K: 144, Q6_K: 210}
KV_HEADS = 8


def shapes(
    layers: int, hidden: int, ff: int, heads: int, vocab: int
) -> Iterator[tuple[str, int, int, GGMLQuantizationType]]:
    """(name, rows, columns, type) of every matrix, in file order."""
    kv = hidden // heads * KV_HEADS
    yield "token_embd.weight", vocab, hidden, Q4_K
    for i in range(layers):
        yield f"blk.{i}.attn_q.weight", hidden, hidden, Q4_K
        yield f"blk.{i}.attn_k.weight", kv, hidden, Q4_K
        yield f"blk.{i}.attn_v.weight", kv, hidden, Q6_K
        yield f"blk.{i}.attn_output.weight", hidden, hidden, Q4_K
        yield f"blk.{i}.ffn_gate.weight", ff, hidden, Q4_K
        yield f"blk.{i}.ffn_up.weight", ff, hidden, Q4_K
        yield f"blk.{i}.ffn_down.weight", hidden, ff, Q6_K if i % 2 else Q4_K
    yield "output.weight", vocab, hidden, Q6_K


def blocks(rows: int, columns: int, kind: GGMLQuantizationType, random: np.random.Generator) -> np.ndarray:
    """Random packed rows with small, finite scales."""
    packed = random.integers(0, 256, (rows * columns // BLOCK, BLOCK_BYTES[kind]), np.uint8)
    if kind == Q4_K:
        packed[:, 0:4] = np.array([8e-4, 6e-3], np.float16).view(np.uint8)  # scale and minimum
    else:
        packed[:, 208:210] = np.array([2e-5], np.float16).view(np.uint8)
    return packed.reshape(rows, -1)


def write(out: Path, like: Path, layers: int, hidden: int, ff: int, heads: int) -> None:
    """Write the file, a matrix at a time."""
    reader, writer = GGUFReader(like), GGUFWriter(out, "llama")
    for key, field in reader.fields.items():
        if not key.startswith("tokenizer."):
            continue
        if field.types[0] == GGUFValueType.ARRAY:
            writer.add_array(key, field.contents())
        else:
            writer.add_key_value(key, field.contents(), field.types[0])
    writer.add_block_count(layers)
    writer.add_context_length(32768)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ff)
    writer.add_head_count(heads)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    norms = [f"blk.{i}.{name}.weight" for i in range(layers) for name in ("attn_norm", "ffn_norm")] + [
        "output_norm.weight"
    ]
    matrices = list(shapes(layers, hidden, ff, heads, len(reader.fields["tokenizer.ggml.tokens"].data)))
    for name in norms:
        writer.add_tensor_info(name, (hidden,), np.dtype(np.float32), hidden * 4)
    for name, rows, columns, kind in matrices:
        size = columns // BLOCK * BLOCK_BYTES[kind]
        writer.add_tensor_info(name, (rows, size), np.dtype(np.uint8), rows * size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _ in norms:
        writer.write_tensor_data(np.ones(hidden, np.float32))
    random = np.random.default_rng(0)
    for _, rows, columns, kind in matrices:
        writer.write_tensor_data(blocks(rows, columns, kind, random))
    writer.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--like", type=Path, required=True, help="a GGUF whose tokenizer is copied")
    for option, default in (("layers", 32), ("hidden", 4096), ("ff", 14336), ("heads", 32)):
        parser.add_argument(f"--{option}", type=int, default=default)
    write(**vars(parser.parse_args()))
