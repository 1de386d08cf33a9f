"""Small networks and problems for the tests of the search for a minimal network."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from nns_plugin.synapses.masks import synapse_mask
from nns_plugin.synapses.minimal import MinimalNetwork, minimal_network
from nns_plugin.synapses.options import MinimalNetworkOptions
from nns_plugin.synapses.search import Evaluate, Scores
from nns_plugin.synapses.snapshot import WeightSnapshot

INPUTS = torch.zeros(1, 4)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def mask_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([synapse_mask(layer).flatten() for layer in model if isinstance(layer, nn.Linear)])


def needing(positions: list[int]) -> Callable[[nn.Module], float]:
    """Return 1 for networks that have all of these synapses, 0 for others."""
    return lambda model: float(mask_of(model)[positions].all())


def idle(model: nn.Module) -> None:
    """Training that changes nothing."""


def by_magnitude(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weights_of(layer).abs() for name, layer in model.named_children() if isinstance(layer, nn.Linear)}


def weights_of(layer: nn.Module) -> torch.Tensor:
    return getattr(layer, "weight_orig", layer.weight).detach()


def searched(
    model: nn.Module,
    evaluate: Evaluate,
    snapshot: WeightSnapshot | None = None,
    scores: Scores | None = by_magnitude,
    **options: Any,
) -> MinimalNetwork:
    given = MinimalNetworkOptions(**options)
    return minimal_network(model, snapshot, idle, evaluate, example_inputs=INPUTS, scores=scores, options=given)


def task(seed: int = 0) -> tuple[nn.Module, WeightSnapshot, Callable[[nn.Module], None], Callable[[nn.Module], float]]:
    """A small problem with randomness from three generators."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 4, generator=generator)
    y = (x[:, 0] * x[:, 1] > 0).long()
    model = net(seed)
    before = WeightSnapshot(model)

    def train(model: nn.Module) -> None:
        optimizer = torch.optim.SGD(model.parameters(), 0.5 + random.random() / 10, momentum=0.9)
        for _ in range(30):
            rows = torch.from_numpy(np.random.permutation(200)[:100])
            noise = 0.01 * torch.randn(100, 4)
            loss = nn.functional.cross_entropy(model(x[rows] + noise), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def evaluate(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model(x).argmax(1) == y).double().mean())

    with torch.random.fork_rng():
        random.seed(0)
        np.random.seed(0)
        train(model)
    return model, before, train, evaluate


def same(left: MinimalNetwork, right: MinimalNetwork) -> bool:
    states = left.masked.state_dict(), right.masked.state_dict()
    return left.steps == right.steps and all(torch.equal(value, states[1][name]) for name, value in states[0].items())
