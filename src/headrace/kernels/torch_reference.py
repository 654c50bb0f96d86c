"""The slow twin: the same products through the `gguf` package's own dequantisation and torch, nothing shared with ggml."""

import ctypes

import gguf
import numpy as np
import torch


def unpack(type_name: str, address: int, rows: int, columns: int) -> torch.Tensor:
    """Packed rows at an address as a new fp32 tensor of shape (rows, columns)."""
    kind = gguf.GGMLQuantizationType[type_name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    row_bytes = columns // block * size
    packed = np.frombuffer((ctypes.c_uint8 * (rows * row_bytes)).from_address(address), np.uint8)
    plain = gguf.dequantize(packed.reshape(rows, row_bytes), kind)
    return torch.from_numpy(np.array(plain, np.float32).reshape(rows, columns))


def multiply(x: torch.Tensor, type_name: str, address: int, weight_rows: int) -> torch.Tensor:
    """x (rows, columns) times packed weights (weight_rows, columns) at an address: (rows, weight_rows) in fp32."""
    return x.float() @ unpack(type_name, address, weight_rows, x.shape[1]).T
