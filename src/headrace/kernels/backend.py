"""What computes: one interface to matmuls, attention and norms on packed weights.

`Kernels` (ggml on the CPU) and `ReferenceKernels` (the reference implementation) implement it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from headrace.kernels.weight_slice import WeightSlice

if TYPE_CHECKING:
    import torch

    from headrace.kernels.expert_mlp import ExpertShapes
    from headrace.kernels.fused_graph import FusedGraph
    from headrace.kernels.matmul import CachedMatmul, ExpertMatmul


class Backend(Protocol):
    """Computes with packed weights. Used by one thread at a time."""

    threads: int
    attends: bool  # `attend` is implemented
    has_expert_mlp: bool  # `expert_mlp` is implemented
    row_invariant: bool  # the result of a decode row does not depend on the number of rows

    def start(self, *, spins: bool, pad_decode_rows_to_tiles: bool) -> None:
        """Set how decode rows are computed, before the first of them.

        Args:
            spins: threads spin between matmuls. Only if nothing is streamed.
            pad_decode_rows_to_tiles: run row-invariant rows through the tile kernel (padded), where there is one.
        """

    def has_tiles(self, type_name: str, columns: int) -> bool:
        """True if prefill rows go through the tile kernel, which is row-invariant."""

    def repack(self, weight_slice: WeightSlice, columns: int, in_place: bool = False) -> WeightSlice:
        """The same slice with a copy in a faster layout, where there is one; `in_place` overwrites it."""

    def matmul(
        self,
        x: "torch.Tensor",
        slices: Sequence[tuple[int, WeightSlice]],
        outputs: Sequence["torch.Tensor"],
        invariant_rows: int | None = None,
        chunks: Sequence[int] = (),
    ) -> None:
        """For every (i, weight_slice), fill `outputs[i][:, first : first + rows]` with x times the slice.

        K-splits of a tensor are whole and come in order; each is added to the sum of those before.

        Args:
            x: fp32 activations, contiguous, (rows, columns).
            slices: packed weights with the columns of x, each with the index of its output. A tuple is
                assumed to come again: a matmul of a single row is cached by its identity.
            outputs: fp32, contiguous, (rows, total rows of the tensor).
            invariant_rows: number of rows, from the first on, computed independently of each other; None: all of them, up
                to `DECODE_MAX_ROWS`.
            chunks: rows of each prompt chunk after the row-invariant rows; a result depends on its own chunk alone. Empty:
                the others are one chunk, or row-invariant up to `DECODE_MAX_ROWS`.
        """

    def matmul_each(self, jobs: Sequence["ExpertMatmul"]) -> None:
        """Multiply experts: as `matmul`, but each slice has its own activations and output."""

    def expert_mlp(
        self,
        x: "torch.Tensor",
        form: "ExpertShapes",
        experts: Sequence[Sequence[int]],
        outputs: Sequence[int],
    ) -> None:
        """Compute experts whose gate is SiLU for one row.

        Args:
            x: fp32, contiguous, (1, columns).
            form: shapes of every expert.
            experts: for each expert the addresses of its gate_up_proj slices, then of its down_proj slices.
            outputs: for each expert the address of a row, in fp32.
        """

    def attend(
        self, query: "torch.Tensor", keys: "torch.Tensor", values: "torch.Tensor", scale: float, out: "torch.Tensor"
    ) -> None:
        """Attention of one row over the positions of one sequence, all in fp32.

        Args:
            query: (query heads, key width).
            keys: (KV heads, positions, key width), each head contiguous.
            values: (KV heads, positions, value width), as the keys.
            scale: scale of the scores.
            out: (query heads, value width), contiguous.
        """

    def rms_norm(self, out: "torch.Tensor", x: "torch.Tensor", weight: "torch.Tensor", eps: float) -> None:
        """Rows of x, each over the root of its mean square, times the weight.

        Args:
            out: fp32, contiguous, (rows, columns); it may be x.
            x: fp32, (rows, columns), the elements of a row contiguous.
            weight: fp32, (columns,).
            eps: added to the mean square.
        """

    def silu(self, out: "torch.Tensor", x: "torch.Tensor") -> None:
        """x / (1 + exp(-x)) for rows as in `rms_norm`."""

    def unpack(self, type_name: str, address: int, rows: int, columns: int) -> "torch.Tensor":
        """Packed rows at an address as fp32 (rows, columns). The result is scratch: valid until the next call."""

    def unpack_all(self, slices: Sequence[tuple[int, WeightSlice]], outputs: Sequence["torch.Tensor"]) -> None:
        """For every (i, weight_slice), fill its rows of `outputs[i]`, fp32 (rows of the tensor, columns), with the weights."""

    def quantise_q8(self, weight: "torch.Tensor") -> tuple[WeightSlice, object]:
        """An fp32 matrix (rows, columns) in 8 bits, or unchanged where its rows are not whole blocks; its memory's owner."""

    def fused_graph(self, operations: int) -> "FusedGraph | None":
        """An empty graph for at most `operations` operations; None: this backend has none. It lives as long as this."""

    def cached_matmul(
        self, x: "torch.Tensor", slices: Sequence[tuple[int, WeightSlice]], outputs: Sequence["torch.Tensor"]
    ) -> "CachedMatmul | None":
        """The cached matmul of one row with these operands, if there is one."""

    def release(self) -> None:
        """Free scratch until the next prefill."""

    def close(self) -> None:
        """Free everything. Safe to call twice."""
