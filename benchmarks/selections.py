"""Importances to compare: torch-pruning's own and ours, each measured once on the dense model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from nns_plugin.adapters.torch_pruning import count_macs

HESSIAN_INPUTS = 256
# No layer loses more, under any importance: some would disconnect the network.
MAX_RATIO = 0.95
BISECTIONS = 12


class Remembered(tp.importance.Importance):
    """Scores of another importance for the dense model, measured once: the same for every copy that is pruned."""

    def __init__(self, importance: Any, model: nn.Module, example: Tensor, whole: list[str]) -> None:
        pruner = host_pruner(model, example, importance, 0.5, whole, across=False)
        groups = pruner.DG.get_all_groups(
            ignored_layers=pruner.ignored_layers, root_module_types=pruner.root_module_types
        )
        self._known = {_root(group): importance(group) for group in groups}

    def __call__(self, group: tp.dependency.Group) -> Tensor | None:
        return self._known[_root(group)]


def _root(group: tp.dependency.Group) -> str:
    return str(group._DG._module2name[group[0].dep.target.module])


def host_importances(model: nn.Module, inputs: Tensor, labels: Tensor) -> dict[str, Any]:
    """torch-pruning's importances, with the gradients that some need from labelled inputs, for one model."""
    chosen: dict[str, Any] = {
        "random": tp.importance.RandomImportance(),
        "L1": tp.importance.MagnitudeImportance(p=1),
        "L2": tp.importance.MagnitudeImportance(p=2),
        "LAMP": tp.importance.LAMPImportance(p=2),
        "Taylor": tp.importance.TaylorImportance(),
        "Hessian": tp.importance.HessianImportance(),
    }
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        chosen["BN scale"] = tp.importance.BNScaleImportance()
    chosen["Hessian"].zero_grad()
    for image, label in zip(inputs[:HESSIAN_INPUTS], labels[:HESSIAN_INPUTS], strict=True):
        model.zero_grad()
        nn.functional.cross_entropy(model(image[None]), label[None]).backward()
        chosen["Hessian"].accumulate_grad(model)
    model.zero_grad()
    for part, answer in zip(inputs.split(256), labels.split(256), strict=True):  # TaylorImportance reads .grad
        (nn.functional.cross_entropy(model(part), answer, reduction="sum") / len(inputs)).backward()
    return chosen


def host_pruner(
    model: nn.Module, example: Tensor, importance: Any, ratio: float, whole: list[str], across: bool
) -> tp.pruner.BasePruner:
    """A pruner of torch-pruning that removes a share of each group, or of all groups together."""
    return tp.pruner.BasePruner(
        model,
        example,
        importance=importance,
        pruning_ratio=ratio,
        global_pruning=across,
        max_pruning_ratio=MAX_RATIO,
        ignored_layers=[model.get_submodule(name) for name in whole],
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
        channel_groups={},
    )


def maker(
    importance: Any, source: nn.Module, example: Tensor, whole: list[str], across: bool
) -> Callable[[nn.Module, float], tp.pruner.BasePruner]:
    """What makes a pruner for a copy of the dense model at a ratio, with the scores that the source has.

    Args:
        importance: Of torch-pruning or ours.
        source: The dense model that the importance was made for; holds the gradients that some importances read.
        example: One input.
        whole: Layers that stay whole.
        across: Whether the units of all groups are ranked together.
    """
    scores = Remembered(importance, source, example, whole)
    return lambda model, ratio: host_pruner(model, example, scores, ratio, whole, across)


def ratio_for(speed_up: float, make: Callable[[nn.Module, float], Any], model: nn.Module, example: Tensor) -> float:
    """The ratio with which a pruner's step reaches a given reduction of MACs, by bisection."""
    dense, _ = count_macs(model, example)
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        ratio = (low + high) / 2
        smaller = copy.deepcopy(model)
        make(smaller, ratio).step()
        macs, _ = count_macs(smaller, example)
        low, high = (ratio, high) if dense / macs < speed_up else (low, ratio)
    return (low + high) / 2


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Percent of the inputs that are answered right."""
    right = sum(
        int((model(part).argmax(1) == answer).sum())
        for part, answer in zip(inputs.split(500), labels.split(500), strict=True)
    )
    return 100 * right / len(labels)
