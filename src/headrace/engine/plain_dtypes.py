"""Small tensors of types that no kernel multiplies: counts, masks, and values in double precision."""

from typing import Any

import numpy as np
import torch

_WHOLE = {
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32,
    "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


def plain_values(type_name: str, data: np.ndarray[Any, np.dtype[np.uint8]]) -> torch.Tensor | None:
    """The values in these bytes, in one dimension; None for the types that kernels unpack.

    Integers become int64: the multipliers of a hash are larger than fp32 can tell apart.
    """
    if type_name in _WHOLE:
        return torch.from_numpy(data.view(_WHOLE[type_name]).astype(np.int64))
    if type_name == "F64":
        return torch.from_numpy(data.view(np.float64).astype(np.float32))
    if type_name in ("F8_E4M3", "F8_E5M2"):
        return torch.from_numpy(data).view(torch.float8_e4m3fn if type_name == "F8_E4M3" else torch.float8_e5m2).float()
    return None
