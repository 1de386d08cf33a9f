"""Small models, data and pruners for the tests of NNI's adapter."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nns_plugin.adapters import nni as ours
from nns_plugin.adapters.nni import MeanWeightPruner, with_dependency_groups
from nns_plugin.switcher.scaling_factors import ScalingFactors
from nns_plugin.switcher.switches import find_switches
from nns_plugin.synapses.snapshot import WeightSnapshot

KINDS = ["Conv2d", "Linear", "ConvTranspose2d"]


class Simple(nn.Module):
    """Two convolutions whose sum is normed and read by linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 12, 3), nn.Conv2d(8, 12, 3)
        self.bn = nn.BatchNorm2d(12)
        self.fc1, self.fc2 = nn.Linear(12 * 4, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv1(x))
        x = torch.relu(self.bn(self.conv2(x) + self.conv3(x)))
        x = nn.functional.max_pool2d(x, 2).flatten(1)
        return self.fc2(torch.relu(self.fc1(x)))


IMAGES = torch.zeros(24, 1, 8, 8).normal_(generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(24) % 3
BATCHES = [(IMAGES[:12], LABELS[:12]), (IMAGES[12:], LABELS[12:])]
CONFIG = [{"op_types": ["Conv2d", "Linear"], "exclude_op_names": ["fc2"], "sparse_ratio": 0.75}]


def simple(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Simple()


def moved_snapshot(model: nn.Module) -> WeightSnapshot:
    """A snapshot of other weights, from which these have moved."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in other.parameters():
            value.add_(torch.randn(value.shape, generator=generator))
    return WeightSnapshot(other)


def random_factors(model: nn.Module, inputs: Any) -> ScalingFactors:
    generator = torch.Generator().manual_seed(6)
    switches = find_switches(model, inputs)
    return ScalingFactors(switches, {switch.name: torch.rand(switch.size, generator=generator) for switch in switches})


def pruner_for(
    criterion: str, model: nn.Module, config: Any, inputs: Any, batches: Any, count: int = 3, **options: Any
) -> ours.CriterionPruner:
    data = {"calibration": batches, "calibration_options": {"labels": count}}
    found: dict[str, tuple[type[ours.CriterionPruner], dict[str, Any]]] = {
        "semantic": (ours.SemanticPruner, {**data, "labels": [0, 2]}),
        "distinctiveness": (ours.DistinctivenessPruner, {**data, "mode": "span"}),
        "mean_weight": (ours.MeanWeightPruner, {}),
        "switcher": (ours.SwitcherPruner, {}),
        "wsf": (ours.WSFPruner, {}),
    }
    kind, given = found[criterion]
    if criterion == "wsf":
        given["snapshot"] = moved_snapshot(model)
    if criterion == "switcher":
        given["factors"] = random_factors(model, inputs)
    return kind(model, config, example_inputs=inputs, **{**given, **options})


def unwrapped(pruner: Any) -> nn.Module:
    pruner.unwrap_model()
    model: nn.Module = pruner.bound_model
    return model


def mean_weights(layer: nn.Module) -> np.ndarray:
    sums = layer.weight.detach().double().abs().flatten(1).sum(1).numpy()
    return sums / sums.mean()


def masks_of(config: Any, model: nn.Module, **options: Any) -> dict[str, dict[str, Tensor]]:
    pruner = ours.MeanWeightPruner(model, config, example_inputs=IMAGES[:2], **options)
    masks = pruner.generate_masks()
    pruner.unwrap_model()
    return masks


def lively(model: nn.Module) -> nn.Module:
    """Give norms shifts, scales and statistics other than 0 and 1, so that masked units would show."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            with torch.no_grad():
                module.weight.uniform_(0.5, 2, generator=generator)
                module.bias.normal_(generator=generator)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return model


def made(zoo: Any, case: str, count: int = 5) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return lively(zoo.CASES[case].make().eval()), zoo.CASES[case].inputs(count)


def masked(
    model: nn.Module, inputs: Any, ratio: float = 0.5, grouped: bool = True, kind: type[Any] = MeanWeightPruner
) -> tuple[dict[str, Any], Tensor]:
    """Masks of a pruner, and the outputs of the model inside NNI's wrappers."""
    config: Any = [{"op_types": KINDS, "exclude_op_names": ["head"], "sparse_ratio": ratio}]
    if grouped:
        config = with_dependency_groups(config, model, inputs)
    options = {"example_inputs": inputs} if kind is MeanWeightPruner else {}
    pruner = kind(model, config, **options)
    _, masks = pruner.compress()
    with torch.no_grad():
        outputs = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    pruner.unwrap_model()
    return masks, outputs


def run(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
        return found
