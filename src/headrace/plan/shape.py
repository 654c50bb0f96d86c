"""What the plan needs to know of a model: its matrices, its widths, its layers."""

from dataclasses import dataclass

from headrace.checkpoint import Checkpoint, Tensor
from headrace.checkpoint.architectures import check_architecture
from headrace.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a model. `linears` are the matrices that every pass multiplies, a tied head included."""

    checkpoint: Checkpoint
    linears: tuple[Tensor, ...]
    small_bytes: int
    layers: int
    hidden: int
    feed_forward: int
    attention_width: int
    kv_heads: int
    head_dim: int
    context_limit: int

    @property
    def weights_bytes(self) -> int:
        """Bytes of what every pass multiplies."""
        return sum(tensor.nbytes for tensor in self.linears)

    def kv_bytes_per_token(self, bits: int) -> int:
        """Keys and values of one position in all layers; in 8 bits each head has a scale beside them."""
        head = 2 * self.head_dim if bits == 16 else self.head_dim + 2
        return 2 * self.layers * self.kv_heads * head

    @property
    def page_slack_bytes(self) -> int:
        """What pinned rows may take beside their own bytes, because reads begin and end at pages."""
        return 2 * 4096 * len(self.linears)

    @property
    def weights(self) -> dict[str, int]:
        """Weights that every pass multiplies, by type."""
        counts: dict[str, int] = {}
        for tensor in self.linears:
            counts[tensor.type] = counts.get(tensor.type, 0) + tensor.rows * tensor.columns
        return counts


def shape_of(checkpoint: Checkpoint) -> Shape:
    """Read the sizes from a header.

    Raises:
        UnsupportedError: the architecture does not run.
        CheckpointError: the metadata makes no sense.
    """
    check_architecture(checkpoint.architecture, checkpoint.number("expert_count", 0), checkpoint.path)
    tensors = checkpoint.tensors
    linears = [t for t in tensors.values() if is_linear(t)]
    if "output.weight" not in tensors:
        if "token_embd.weight" not in tensors:
            raise CheckpointError(
                f"{checkpoint.path} has no tensor `token_embd.weight`", hint="it is no language model"
            )
        linears.append(tensors["token_embd.weight"])  # tied: gathered by row and multiplied as the head
    if not linears:
        raise CheckpointError(f"{checkpoint.path} has no weight matrices", hint="it is no language model")
    names = {tensor.name for tensor in linears} | {"token_embd.weight"}
    heads = checkpoint.number("attention.head_count")
    hidden = checkpoint.number("embedding_length")
    head_dim = checkpoint.number("attention.key_length", hidden // max(1, heads))
    kv_heads = checkpoint.number("attention.head_count_kv", heads)
    layers = checkpoint.number("block_count")
    if min(heads, hidden, head_dim, kv_heads, layers) < 1:
        raise CheckpointError(
            f"{checkpoint.path}: the metadata gives {layers} layers, width {hidden}, {heads} heads, {kv_heads} KV heads,"
            f" head width {head_dim}",
            hint="the file is damaged; get it from another source",
        )
    return Shape(
        checkpoint=checkpoint,
        linears=tuple(linears),
        small_bytes=sum(t.rows * t.columns * 4 for t in tensors.values() if t.name not in names),
        layers=layers,
        hidden=hidden,
        feed_forward=max((t.rows for t in linears if ".ffn_" in t.name), default=hidden),
        attention_width=heads * head_dim,
        kv_heads=kv_heads,
        head_dim=head_dim,
        context_limit=checkpoint.number("context_length", 1 << 20),
    )


def is_linear(tensor: Tensor) -> bool:
    """Whether a tensor is multiplied in every pass: a matrix, and not a table of embeddings."""
    tables = ("token_embd.weight", "position_embd.weight", "token_types.weight")
    return len(tensor.shape) == 2 and tensor.name not in tables
