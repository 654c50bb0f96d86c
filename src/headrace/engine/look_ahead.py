"""Which experts the next layer will choose, guessed from this layer's activations before they have gone through it.

What a layer adds to the activations is small beside what they are, so the next layer's router, given this layer's input,
already names many of the experts that it will choose. How many is counted by rank while the model runs, whether or not
anything is read for it; experts are read ahead only at ranks that have been right often enough.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import linear

from headrace.kernels import FEW_ROWS
from headrace.model.packed import PackedExperts

# A wrong guess costs a read, a right one hides a read: at this share of right ones it paid in every run that was measured.
RIGHT_ENOUGH = 0.6
TRIALS = 96  # guesses at a rank before it is judged


class LookAhead:
    """Guesses for one engine, and how often they were right."""

    def __init__(self, layers: Sequence[PackedExperts], per_token: int):
        self._layers = layers
        self._right = np.zeros(per_token)
        self._tried = np.zeros(per_token)
        self._guess: tuple[int, npt.NDArray[np.int64]] | None = None  # (layer, (rows, ranks))

    @property
    def ranks(self) -> int:
        """How many of the likeliest experts of each row are read ahead."""
        good = (self._tried >= TRIALS) & (self._right >= RIGHT_ENOUGH * self._tried)
        return int(good.argmin()) if not good.all() else len(good)

    @property
    def precision(self) -> list[float]:
        """Share of right guesses by rank."""
        return [float(share) for share in self._right / np.maximum(1, self._tried)]

    def judge(self, layer: int, counts: npt.NDArray[np.integer]) -> None:
        """The router of `layer` has chosen: `counts[e]` rows chose expert e."""
        if self._guess is not None and self._guess[0] == layer:
            self._right += (counts[self._guess[1]] > 0).mean(0)
            self._tried += 1
        self._guess = None

    def guess(self, layer: int, hidden: torch.Tensor) -> list[int]:
        """Experts of the layer after `layer` that are worth reading ahead; (rows, hidden) is the input of its experts."""
        following = layer + 1
        if following >= len(self._layers) or hidden.shape[0] > FEW_ROWS:
            return []
        router = self._layers[following].router
        if router is None:
            return []
        scores = linear(hidden, router.weight, router.bias)
        if router.correction is not None:
            scores = scores.sigmoid() + router.correction
        guess = scores.topk(len(self._right), -1).indices.numpy()
        self._guess = following, guess
        return np.unique(guess[:, : self.ranks]).tolist()  # type: ignore[no-any-return]
