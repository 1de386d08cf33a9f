"""Greedy elimination against brute force: every subset's error computed from scratch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from nns_plugin.criteria import elimination
from nns_plugin.criteria.elimination import Consumer, greedy_errors

RIDGE = 1e-6


def brute_force(consumers: list[Consumer], weights: list[Tensor], size: int) -> np.ndarray:
    """The same greedy order, with each error from the normal equations of the units that are left."""

    def error(left: list[int]) -> float:
        total = 0.0
        for consumer, weight in zip(consumers, weights, strict=True):
            gram = consumer.gram.numpy().copy()
            channels = gram.shape[0] - 1
            gram[range(channels), range(channels)] += RIDGE * np.diag(gram)[:channels].mean()
            full = np.concatenate([weight.numpy(), np.zeros((weight.shape[0], 1))], 1)
            kept = [channel for channel in range(channels) if int(consumer.unit[channel]) in left] + [channels]
            cross = full @ gram[:, kept]
            fitted = cross @ np.linalg.inv(gram[np.ix_(kept, kept)])
            total += consumer.weight * (np.trace(full @ gram @ full.T) - np.trace(fitted @ cross.T))
        return total

    left, scores = list(range(size)), np.zeros(size)
    while left:
        errors = [error([other for other in left if other != unit]) for unit in left]
        first = int(np.argmin(errors))
        scores[left.pop(first)] = errors[first]
    return scores


def random_consumer(channels: int, unit: Tensor, weight: float = 1.0) -> tuple[Consumer, Tensor]:
    mixed = torch.randn(200, channels) @ torch.randn(channels, channels)
    x = torch.cat([mixed.relu(), torch.ones(200, 1)], 1).double()
    read = torch.randn(5, channels, dtype=torch.float64)
    return Consumer(x.T @ x, read.T @ read, unit, weight), read


@pytest.mark.parametrize("flush", [3, 64])
@pytest.mark.parametrize(
    "units",
    [
        [torch.arange(12)],
        [torch.arange(12), torch.arange(12)],  # two consumers
        [torch.arange(12) % 6],  # two channels a unit
        [torch.arange(12), torch.arange(12) % 4],
    ],
    ids=["one consumer", "two consumers", "two channels", "mixed"],
)
def test_scores_are_those_of_brute_force(units: list[Tensor], flush: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elimination, "FLUSH", flush)
    pairs = [random_consumer(len(unit), unit, 0.5 + place) for place, unit in enumerate(units)]
    size = max(int(unit.max()) for unit in units) + 1
    consumers, weights = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    expected = brute_force(consumers, weights, size)
    found = greedy_errors(consumers, size, RIDGE).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-7 * expected.max())


def test_duplicates_dead_and_constant_units_go_first_and_for_nothing() -> None:
    x = torch.randn(100, 6, dtype=torch.float64)
    x[:, 1] = x[:, 0]
    x[:, 3] = 0
    x[:, 4] = 2.0  # the constant stands in for it
    full = torch.cat([x, torch.ones(100, 1, dtype=torch.float64)], 1)
    weight = torch.randn(4, 6, dtype=torch.float64)
    scores = greedy_errors([Consumer(full.T @ full, weight.T @ weight, torch.arange(6), 1.0)], 6, RIDGE)
    assert bool(torch.isfinite(scores).all())
    cheap = {3, 4} | ({0} if scores[0] < scores[1] else {1})
    assert set(scores.argsort()[:3].tolist()) == cheap
    assert float(scores[list(cheap)].max()) < 1e-3 * float(scores.max())


def test_fewer_inputs_than_units() -> None:
    x = torch.cat([torch.randn(3, 8), torch.ones(3, 1)], 1).double()
    weight = torch.randn(2, 8, dtype=torch.float64)
    scores = greedy_errors([Consumer(x.T @ x, weight.T @ weight, torch.arange(8), 1.0)], 8, RIDGE)
    assert bool((scores >= 0).all())
    free = scores < 1e-4 * scores.max()
    assert int(free.sum()) == 6, "two units and the constant span what three inputs can hold"
