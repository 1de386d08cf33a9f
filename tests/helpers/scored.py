"""What torch-pruning should remove by semantic scores: models with loaders, eq. 1 by hand, and which units are left."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import zoo
from torch import nn

from nns_plugin import UnitGroup


def setting(case: str, count: int = 24) -> tuple[nn.Module, Any, list[Any], tuple[UnitGroup, ...]]:
    """A model, example inputs, a loader, and the unit groups written by hand."""
    torch.manual_seed(3)
    return zoo.CASES[case].make().eval(), zoo.CASES[case].inputs(2), zoo.labelled(case, count), zoo.groups_of(case)


def by_hand(model: nn.Module, loader: list[Any], group: UnitGroup, chosen: list[int]) -> np.ndarray:
    """Eq. 1 with hooks and NumPy of its own: maximum over consumers and labels of x / beta."""
    expected = zoo.by_hand(group)
    seen: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in expected.consumers}
    labels = np.zeros(0)
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen[name].append((args[0].numpy().copy(), labels))
        )
        for name in expected.consumers
    ]
    with torch.no_grad():
        for inputs, batch_labels in loader:
            labels = batch_labels.numpy()
            model(inputs)
    for hook in hooks:
        hook.remove()
    scores = np.zeros(group.size)
    for name, positions in expected.consumers.items():
        conv = isinstance(model.get_submodule(name), nn.modules.conv._ConvNd)
        x = np.zeros((len(chosen), group.size))
        for row, label in enumerate(chosen):
            rows = np.concatenate([activation[of == label] for activation, of in seen[name]])
            rows = np.moveaxis(rows, 1, -1) if conv else rows
            x[row] = [np.abs(rows[..., p]).mean() if p else 0.0 for p in positions]
        beta = x.max(1, keepdims=True)
        scores = np.maximum(scores, (x / np.where(beta > 0, beta, 1)).max(0))
    return scores


def kept_units(dense: nn.Module, pruned: nn.Module, group: UnitGroup) -> list[int]:
    """Which units are left, told by the weights of the group's own producer: each row is unlike any other."""
    producer = next(port for port in group.producers if port.name == group.name)
    before, after = dense.get_submodule(group.name), pruned.get_submodule(group.name)
    left = {round(value, 6) for value in after.bias.tolist()}
    rows = [round(value, 6) in left for value in before.bias.tolist()]
    units = {int(unit): rows[int(index)] for index, unit in zip(producer.index, producer.unit, strict=True)}
    return [unit for unit, stays in sorted(units.items()) if stays]


def lowest(scores: np.ndarray, count: int) -> list[int]:
    """The units that stay when so many of the lowest go; of equal ones the last goes."""
    order = sorted(range(len(scores)), key=lambda unit: (-scores[unit], unit))
    return sorted(order[: len(scores) - count])
