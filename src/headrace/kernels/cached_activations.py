"""Activations in another format, made once for all slices that multiply them."""

import weakref

import torch


class CachedActivations:
    """Activations in another format, made once for all slices that multiply them."""

    def __init__(self) -> None:
        self._source: weakref.ref[torch.Tensor] | None = None
        self._first = 0
        self._buffer = torch.empty(0)
        self.value = self._buffer
        self.scale: torch.Tensor | None = None  # (rows, 1): factors that rows were divided by; None: all 1

    def are_of(self, x: torch.Tensor, first: int) -> bool:
        """True if these are the rows of x from `first` on."""
        return self._source is not None and self._source() is x and self._first == first

    def reserve(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """A buffer for `elements`, the same as the last time if it is large enough."""
        if self._buffer.numel() < elements:
            self._source, self.value = None, torch.empty(0)
            self._buffer = torch.empty(elements, dtype=dtype)
        return self._buffer[:elements]

    def keep(self, x: torch.Tensor, first: int, value: torch.Tensor) -> None:
        """Remember the source of these rows."""
        self._source, self._first, self.value = weakref.ref(x), first, value
