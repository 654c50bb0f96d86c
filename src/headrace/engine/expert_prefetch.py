"""Expert prefetch: the next layers' experts are predicted from this layer's input, before the layer runs.

A layer changes the activations only a little. So the next layers' routers, given this layer's input, already name many of
the experts that they will choose. Accuracy is counted by rank while the model runs, with or without prefetch. Experts are
prefetched only at ranks with enough accuracy. For predictions, routers in 8 bits are good enough. That is a quarter
of the bytes, and every router is read two more times in a pass.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from headrace.kernels import DECODE_MAX_ROWS, Backend
from headrace.model.packed import PackedExperts, Router

DISTANCE = 2  # max layers between prediction and predicted layer
# Min accuracy by distance: a miss costs a read, a hit hides one. At distance 2 it is higher: the next layer predicts these
# experts again.
MIN_ACCURACY = (0.6, 0.8)
TRIALS = 32  # predictions after which the ranks are judged anew


class ExpertPredictor:
    """Predicts experts of the next layer and the one after it, and counts the hits."""

    def __init__(self, layers: Sequence[PackedExperts], per_token: int, kernels: Backend):
        self._counts = [layer.count for layer in layers]
        self._kernels = kernels
        self._per_token = per_token
        self._hits = np.zeros((DISTANCE, per_token))
        self._tried = [0] * DISTANCE
        self._ranks = [0] * DISTANCE
        self._predictions: dict[tuple[int, int], npt.NDArray[np.int64]] = {}  # by (layer, distance): (rows, ranks)
        copies = [None if layer.router is None else _RouterCopy(layer.router, kernels) for layer in layers]
        self._next_routers = [_NextRouters(copies[layer + 1 : layer + 1 + DISTANCE]) for layer in range(len(layers))]

    def ranks(self, distance: int) -> int:
        """Number of each row's likeliest experts that are prefetched `distance` layers ahead."""
        return self._ranks[distance - 1]

    def judge(self, layer: int, counts: npt.NDArray[np.integer]) -> None:
        """Count the hits after the router of `layer` has chosen: `counts[e]` rows chose expert e."""
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
        """(layer, experts worth prefetching), the next layer first; `hidden` is the input of `layer`, (rows, hidden)."""
        next_routers = self._next_routers[layer]
        if len(hidden) > DECODE_MAX_ROWS or not next_routers.routers:
            return
        for distance, scores in next_routers.scores(hidden, self._kernels):
            predicted = (-scores).argsort(-1)[:, : self._per_token]
            self._predictions[layer + distance, distance] = predicted
            worth = predicted[:, : self._ranks[distance - 1]]
            if not worth.size:
                continue
            found = worth[0].tolist() if len(worth) == 1 else np.unique(worth).tolist()
            count = self._counts[layer + distance]
            yield layer + distance, [expert for expert in found if expert < count]  # the others have no weights


class _RouterCopy:
    """A router for predictions, its weight in 8 bits if that consists of whole blocks."""

    def __init__(self, router: Router, kernels: Backend):
        self.router = router
        self.count = len(router.weight)
        self.weight_slice, self._owner = kernels.quantise_q8(router.weight)

    def scores(self, logits: torch.Tensor) -> npt.NDArray[np.float32]:
        """Scores by which the router ranks experts, from its logits."""
        router = self.router
        if router.bias is not None:
            logits += router.bias
        if router.correction is not None:
            logits = logits.sigmoid() + router.correction
        found: npt.NDArray[np.float32] = logits.numpy()
        return found


class _NextRouters:
    """The routers that one layer's activations are given, and their output buffers: one matmul for all of them."""

    def __init__(self, ahead: Sequence[_RouterCopy | None]):
        self.routers = [(distance, copy) for distance, copy in enumerate(ahead, 1) if copy is not None]
        self._slices = tuple([(i, copy.weight_slice) for i, (_, copy) in enumerate(self.routers)])
        self._of_one_row = self._outputs(1)

    def _outputs(self, rows: int) -> list[torch.Tensor]:
        return [torch.empty((rows, copy.count)) for _, copy in self.routers]

    def scores(self, hidden: torch.Tensor, kernels: Backend) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """(layers ahead, (rows, experts)) for each router."""
        outputs = self._of_one_row if len(hidden) == 1 else self._outputs(len(hidden))
        kernels.matmul(hidden, self._slices, outputs, len(hidden))
        for (distance, copy), logits in zip(self.routers, outputs, strict=True):
            yield distance, copy.scores(logits)
