"""Where the pieces of a packed weight belong in the matrix that they are unpacked to."""

from collections.abc import Callable, Sequence

import torch

from headrace.kernels.piece import Piece


def unpack_pieces(
    unpack: Callable[[str, int, int, int], torch.Tensor],
    pieces: Sequence[tuple[int, Piece]],
    outputs: Sequence[torch.Tensor],
) -> None:
    """For every (i, piece), fill its part of `outputs[i]` (rows, columns) by `unpack` (type, address, rows, columns)."""
    for i, piece in pieces:
        if piece.slab_rows:
            width = piece.slab_columns
            for number, slab in enumerate(piece.slabs(), piece.first // piece.slab_rows):
                outputs[i][:, number * width : (number + 1) * width] = unpack(slab.type, slab.address, slab.rows, width)
        else:
            plain = unpack(piece.type, piece.address, piece.rows, outputs[i].shape[1])
            outputs[i][piece.first : piece.first + piece.rows] = plain
