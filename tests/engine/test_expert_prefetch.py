"""Predictions of the next layers' experts: hits where the routers agree, prefetch only after enough hits."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from headrace.engine.expert_prefetch import DISTANCE, TRIALS, ExpertPredictor
from headrace.kernels import Kernels
from headrace.model.packed import Router

EXPERTS, CHOSEN = 16, 3


@pytest.fixture
def kernels() -> Iterator[Kernels]:
    made = Kernels(2)
    yield made
    made.close()


def layers_of(count: int, hidden: int, identities: int = 0) -> list[Any]:
    """Layers whose routers are all the same."""
    torch.manual_seed(0)
    linear = nn.Linear(hidden, EXPERTS, bias=False)
    linear.weight.requires_grad_(False)
    return [SimpleNamespace(count=EXPERTS - identities, router=Router(linear, linear)) for _ in range(count)]


def counted(scores: torch.Tensor) -> np.ndarray:
    chosen = scores.topk(CHOSEN).indices.reshape(-1)
    return np.bincount(chosen.numpy(), minlength=EXPERTS)


@pytest.mark.parametrize("hidden", [64, 48])  # whole blocks of 8 bits, and not
@pytest.mark.parametrize("rows", [1, 3])
def test_experts_are_prefetched_once_their_rank_has_had_hits(kernels: Kernels, hidden: int, rows: int) -> None:
    layers = layers_of(4, hidden)
    predictor = ExpertPredictor(layers, CHOSEN, kernels)
    for _ in range(TRIALS // 2):
        x = torch.randn(rows, hidden)
        for layer in range(len(layers)):
            predictor.judge(layer, counted(x @ layers[layer].router.weight.T))
            predicted = dict(predictor.predict(layer, x))
            ahead = {layer + distance for distance in range(1, DISTANCE + 1) if predictor.ranks(distance)}
            assert set(predicted) == {one for one in ahead if one < len(layers)}
    assert predictor.ranks(1) == CHOSEN  # the same activations, the same routers
    x = torch.randn(rows, hidden)
    chosen = np.flatnonzero(counted(x @ layers[1].router.weight.T))
    predicted = dict(predictor.predict(0, x))
    assert len(set(predicted[1]) & set(chosen)) >= len(chosen) - rows  # but for choices that were close


def test_ranks_that_mostly_missed_are_not_prefetched(kernels: Kernels) -> None:
    layers = layers_of(3, 64)
    predictor = ExpertPredictor(layers, CHOSEN, kernels)
    never = np.zeros(EXPERTS, np.int64)
    for _ in range(2 * TRIALS):
        x = torch.randn(1, 64)
        for layer in range(len(layers)):
            predictor.judge(layer, never)
            assert not dict(predictor.predict(layer, x))


def test_experts_without_weights_are_not_read(kernels: Kernels) -> None:
    layers = layers_of(2, 64, identities=EXPERTS)
    predictor = ExpertPredictor(layers, CHOSEN, kernels)
    predictor._ranks[:] = [CHOSEN] * DISTANCE
    assert dict(predictor.predict(0, torch.randn(1, 64))) == {1: []}
