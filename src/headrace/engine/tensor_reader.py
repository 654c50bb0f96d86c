"""Reads tensors that no stream delivers: small ones completely, embedding tables by their rows."""

from typing import Any

import numpy as np
import torch

from headrace.checkpoint import Tensor
from headrace.engine.plain_dtypes import plain_values
from headrace.errors import UnsupportedError
from headrace.kernels.backend import Backend
from headrace.stream import Arena
from headrace.stream.arena import aligned
from headrace.stream.virtual import FileSet

MAX_CACHED_ROW_BYTES = 4 << 20  # max bytes of cached embedding rows


class TensorReader:
    """Small tensors and single rows of a checkpoint, dequantised. The latest embedding rows stay cached."""

    def __init__(self, files: FileSet, kernels: Backend):
        self._files = files
        self._kernels = kernels
        self._scratch = Arena(1 << 20)
        # Cached embedding rows, the latest last.
        self._rows_read: dict[tuple[str, int], np.ndarray[Any, np.dtype[np.uint8]]] = {}
        self._rows_read_bytes = 0

    def whole(self, tensor: Tensor) -> torch.Tensor:
        """A small tensor, read completely, in its shape: fp32, or integers as stored."""
        data = self._read(tensor.path, tensor.offset, tensor.nbytes)
        if tensor.k_splits:
            plain = self._to_plain(tensor, data).view(tensor.k_splits, tensor.outputs, tensor.columns)
            return plain.transpose(0, 1).reshape(tensor.outputs, tensor.inputs)
        return self._to_plain(tensor, data).view(tensor.shape)

    def rows(self, tensor: Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Rows of an embedding table, (tokens, columns) in fp32: one short read each."""
        unknown = [token for token in token_ids.tolist() if not 0 <= token < tensor.rows]
        if unknown:
            raise UnsupportedError(
                f"token {unknown[0]} is beyond the {tensor.rows} rows of `{tensor.name}`",
                hint="the tokenizer is of another model",
            )
        packed = np.concatenate([self._row(tensor, token) for token in token_ids.tolist()])
        return self._to_plain(tensor, packed).view(-1, tensor.columns).float()

    def _row(self, tensor: Tensor, index: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """One packed row of an embedding table. The latest rows stay cached: most words of a text recur."""
        row = self._rows_read.pop((tensor.name, index), None)
        if row is None:
            row = self._read(tensor.path, tensor.offset + index * tensor.row_bytes, tensor.row_bytes)
            self._rows_read_bytes += row.nbytes
        self._rows_read[tensor.name, index] = row
        while self._rows_read_bytes > MAX_CACHED_ROW_BYTES:
            self._rows_read_bytes -= self._rows_read.pop(next(iter(self._rows_read))).nbytes
        return row

    def _to_plain(self, tensor: Tensor, data: np.ndarray[Any, np.dtype[np.uint8]]) -> torch.Tensor:
        plain = plain_values(tensor.type, data)
        if plain is not None:
            return plain
        rows = len(data) // tensor.row_bytes
        return self._kernels.unpack(tensor.type, data.ctypes.data, rows, tensor.columns).clone()

    def _read(self, path: str, offset: int, nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        start, length = aligned(offset, nbytes)
        scratch = self._scratch if length <= self._scratch.nbytes else Arena(length)
        self._files[path].read(start, scratch.view[:length], offset + nbytes - start)
        return np.frombuffer(scratch.view[offset - start : offset - start + nbytes], np.uint8).copy()
