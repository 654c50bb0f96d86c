"""Headers of llamas of any size, without a file, and profiles of machines to plan them for."""

from collections.abc import Mapping
from dataclasses import replace
from math import prod

from headrace.checkpoint import Checkpoint, Tensor
from headrace.plan import guessed_profile

BLOCKS = {"F32": (1, 4), "F16": (1, 2), "Q8_0": (32, 34), "Q6_K": (256, 210), "Q4_K": (256, 144)}
NO_FILE = "/nonexistent/model.gguf"  # so that the profile's slowest disk counts


def tensor(name: str, shape: tuple[int, ...], kind: str = "F32") -> Tensor:
    weights, size = BLOCKS[kind]
    return Tensor(name=name, shape=shape, type=kind, path=NO_FILE, offset=0, nbytes=prod(shape) // weights * size)


def model(
    *,
    layers: int = 32,
    heads: int = 32,
    head_dim: int = 128,
    feed_forward: int = 14336,
    kv_heads: int = 8,
    vocab: int = 128_256,
    kind: str = "Q4_K",
    tied: bool = False,
    context: int = 8192,
    metadata: Mapping[str, object] | None = None,
    without: tuple[str, ...] = (),
) -> Checkpoint:
    """The header of a llama, by default with 8 billion weights."""
    hidden, kv_width = heads * head_dim, kv_heads * head_dim
    tensors = [tensor("token_embd.weight", (vocab, hidden), kind), tensor("output_norm.weight", (hidden,))]
    tensors += [] if tied else [tensor("output.weight", (vocab, hidden), kind)]
    for layer in range(layers):
        shapes = {
            "attn_q": (hidden, hidden),
            "attn_k": (kv_width, hidden),
            "attn_v": (kv_width, hidden),
            "attn_output": (hidden, hidden),
            "ffn_gate": (feed_forward, hidden),
            "ffn_up": (feed_forward, hidden),
            "ffn_down": (hidden, feed_forward),
        }
        tensors += [tensor(f"blk.{layer}.{name}.weight", shape, kind) for name, shape in shapes.items()]
        tensors += [tensor(f"blk.{layer}.{name}_norm.weight", (hidden,)) for name in ("attn", "ffn")]
    values = {
        "general.architecture": "llama",
        "llama.block_count": layers,
        "llama.embedding_length": hidden,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": kv_heads,
        "llama.context_length": context,
        **(metadata or {}),
    }
    return Checkpoint(
        path=NO_FILE,
        paths=(NO_FILE,),
        metadata={key: value for key, value in values.items() if value is not None and key not in without},  # type: ignore[misc]
        tensors={one.name: one for one in tensors if one.name not in without},
    )


MEASURED = replace(
    guessed_profile(),
    source="measured 2025-01-01",
    disk_bytes_per_s={"1": 1.5e9, "2": 4e9},
    repacked_weights_per_s={},
    kernel_weights_per_s={
        "Q4_K": {"1": 30e9, "4": 9e9, "16": 3e9},
        "Q8_0": {"1": 25e9, "4": 9e9, "16": 3e9},
        "F16": {"1": 10e9, "4": 6e9, "16": 2e9},
    },
    bf16_flop_per_s={"32": 400e9, "512": 900e9},
    layer_s=150e-6,
)
FAST_DISK = replace(MEASURED, disk_bytes_per_s={"1": 1e12})
SLOW_DISK = replace(MEASURED, disk_bytes_per_s={"1": 1e8})
