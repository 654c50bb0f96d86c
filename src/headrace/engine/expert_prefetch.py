"""Which experts the next layers will choose, guessed from this layer's activations before they have gone through it.

What a layer adds to the activations is small beside what they are, so the next layers' routers, given this layer's input,
already name many of the experts that they will choose. How many is counted by rank while the model runs, whether or not
anything is read for it; experts are read ahead only at ranks that have been right often enough. For guesses routers in 8
bits are good enough: a quarter of the bytes, which each layer would fetch from memory twice more.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from headrace.kernels import DECODE_MAX_ROWS, Kernels, ReferenceKernels
from headrace.model.packed import PackedExperts, Router

DISTANCE = 2  # layers
# A wrong guess costs a read, a right one hides a read. By distance: two layers ahead only what is nearly sure, since the next
# layer will be asked again.
MIN_ACCURACY = (0.6, 0.8)
TRIALS = 32  # guesses after which the ranks are judged anew


class ExpertPredictor:
    """Guesses for one engine, for the next layer and the one after it, and how often they were hits."""

    def __init__(self, layers: Sequence[PackedExperts], per_token: int, kernels: Kernels | ReferenceKernels):
        self._counts = [layer.count for layer in layers]
        self._kernels = kernels
        self._per_token = per_token
        self._hits = np.zeros((DISTANCE, per_token))
        self._tried = [0] * DISTANCE
        self._ranks = [0] * DISTANCE
        self._predictions: dict[tuple[int, int], npt.NDArray[np.int64]] = {}  # by (layer, distance): (rows, ranks)
        copies = [None if layer.router is None else _Copy(layer.router, kernels) for layer in layers]
        self._asked = [_Asked(copies[layer + 1 : layer + 1 + DISTANCE]) for layer in range(len(layers))]

    def ranks(self, distance: int) -> int:
        """How many of the likeliest experts of each row are read ahead, so many layers before they are asked for."""
        return self._ranks[distance - 1]

    def judge(self, layer: int, counts: npt.NDArray[np.integer]) -> None:
        """The router of `layer` has chosen: `counts[e]` rows chose expert e."""
        for which in range(DISTANCE):
            predicted = self._predictions.pop((layer, which + 1), None)
            if predicted is None:
                continue
            hits = counts[predicted] > 0
            self._hits[which] += hits[0] if len(hits) == 1 else hits.mean(0)
            self._tried[which] += 1
            if self._tried[which] % TRIALS == 0:
                good = self._hits[which] >= MIN_ACCURACY[which] * self._tried[which]
                self._ranks[which] = int(good.argmin()) if not good.all() else len(good)

    def predict(self, layer: int, hidden: torch.Tensor) -> Iterator[tuple[int, list[int]]]:
        """(layer, experts that are worth reading ahead), the next layer first; (rows, hidden) is the input of `layer`'s."""
        asked = self._asked[layer]
        if len(hidden) > DECODE_MAX_ROWS or not asked.routers:
            return
        for distance, scores in asked.scores(hidden, self._kernels):
            predicted = (-scores).argsort(-1)[:, : self._per_token]
            self._predictions[layer + distance, distance] = predicted
            worth = predicted[:, : self._ranks[distance - 1]]
            if not worth.size:
                continue
            found = worth[0].tolist() if len(worth) == 1 else np.unique(worth).tolist()
            count = self._counts[layer + distance]
            yield layer + distance, [expert for expert in found if expert < count]  # the others have no weights


class _Copy:
    """A router to be asked for scores, its weight in 8 bits where there are whole blocks of it."""

    def __init__(self, router: Router, kernels: Kernels | ReferenceKernels):
        self.router = router
        self.count = len(router.weight)
        self.weight_slice, self._owner = kernels.quantise_q8(router.weight)

    def scores(self, products: torch.Tensor) -> npt.NDArray[np.float32]:
        """What the router ranks experts by, given its weight's products."""
        router = self.router
        if router.bias is not None:
            products += router.bias
        if router.correction is not None:
            products = products.sigmoid() + router.correction
        found: npt.NDArray[np.float32] = products.numpy()
        return found


class _Asked:
    """The routers that one layer's activations are given, and where their products go: all of them are one product."""

    def __init__(self, ahead: Sequence[_Copy | None]):
        self.routers = [(distance, copy) for distance, copy in enumerate(ahead, 1) if copy is not None]
        self._pieces = tuple([(i, copy.weight_slice) for i, (_, copy) in enumerate(self.routers)])
        self._of_one_row = self._outputs(1)

    def _outputs(self, rows: int) -> list[torch.Tensor]:
        return [torch.empty((rows, copy.count)) for _, copy in self.routers]

    def scores(
        self, hidden: torch.Tensor, kernels: Kernels | ReferenceKernels
    ) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """(layers ahead, (rows, experts)) for each of them."""
        outputs = self._of_one_row if len(hidden) == 1 else self._outputs(len(hidden))
        kernels.matmul(hidden, self._pieces, outputs, len(hidden))
        for (distance, copy), products in zip(self.routers, outputs, strict=True):
            yield distance, copy.scores(products)
