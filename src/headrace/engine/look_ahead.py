"""Which experts the next layers will choose, guessed from this layer's activations before they have gone through it.

What a layer adds to the activations is small beside what they are, so the next layers' routers, given this layer's input,
already name many of the experts that they will choose. How many is counted by rank while the model runs, whether or not
anything is read for it; experts are read ahead only at ranks that have been right often enough.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from headrace.kernels import FEW_ROWS, Kernels, Piece, ReferenceKernels
from headrace.model.packed import PackedExperts, Router

DISTANCE = 2  # layers
# A wrong guess costs a read, a right one hides a read. By distance: two layers ahead only what is nearly sure, since the next
# layer will be asked again.
RIGHT_ENOUGH = (0.6, 0.8)
TRIALS = 96  # guesses at a rank before it is judged


class LookAhead:
    """Guesses for one engine, for the next layer and the one after it, and how often they were right."""

    def __init__(self, layers: Sequence[PackedExperts], per_token: int, kernels: Kernels | ReferenceKernels):
        self._layers = layers
        self._kernels = kernels
        self._right = np.zeros((DISTANCE, per_token))
        self._tried = np.zeros((DISTANCE, per_token))
        self._guesses: dict[tuple[int, int], npt.NDArray[np.int64]] = {}  # by (layer, distance): (rows, ranks)

    def ranks(self, distance: int) -> int:
        """How many of the likeliest experts of each row are read ahead, so many layers before they are asked for."""
        right, tried = self._right[distance - 1], self._tried[distance - 1]
        good = (tried >= TRIALS) & (right >= RIGHT_ENOUGH[distance - 1] * tried)
        return int(good.argmin()) if not good.all() else len(good)

    def judge(self, layer: int, counts: npt.NDArray[np.integer]) -> None:
        """The router of `layer` has chosen: `counts[e]` rows chose expert e."""
        for distance in range(1, DISTANCE + 1):
            guess = self._guesses.pop((layer, distance), None)
            if guess is not None:
                self._right[distance - 1] += (counts[guess] > 0).mean(0)
                self._tried[distance - 1] += 1

    def guess(self, layer: int, hidden: torch.Tensor) -> Iterator[tuple[int, list[int]]]:
        """(layer, experts that are worth reading ahead), the next layer first; (rows, hidden) is the input of `layer`'s."""
        if hidden.shape[0] > FEW_ROWS:
            return
        asked = [
            (distance, router)
            for distance, ahead in enumerate(self._layers[layer + 1 : layer + 1 + DISTANCE], 1)
            if (router := ahead.router) is not None
        ]
        for (distance, router), scores in zip(
            asked, self._scores([router for _, router in asked], hidden), strict=True
        ):
            if router.bias is not None:
                scores += router.bias
            if router.correction is not None:
                scores = scores.sigmoid() + router.correction
            guess = np.argsort(-scores.numpy(), axis=-1)[:, : self._right.shape[1]]
            self._guesses[layer + distance, distance] = guess
            worth = np.unique(guess[:, : self.ranks(distance)])
            worth = worth[worth < self._layers[layer + distance].count]  # the others have no weights
            if len(worth):
                yield layer + distance, worth.tolist()

    def _scores(self, routers: Sequence[Router], hidden: torch.Tensor) -> list[torch.Tensor]:
        """Products with their weights, in one graph: a megabyte each, which two cores fetch sooner than one."""
        found = [hidden.new_empty((len(hidden), len(router.weight))) for router in routers]
        jobs = [
            (hidden, Piece("F32", len(router.weight), router.weight.data_ptr(), 0), scores)
            for router, scores in zip(routers, found, strict=True)
        ]
        self._kernels.multiply_each(jobs, exact=True)
        return found
