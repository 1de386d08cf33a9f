"""Masked models made small, by NNI and by torch-pruning: how far from the masked model, how small, how long it takes.

Half of the units of all layers but the last are masked by their mean weights. Weights are random, batch norms have
statistics, scales and shifts of their own. The masked model is the one inside NNI's wrappers.

torchvision 0.28 is needed for its models; without it, they are left out.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import torch
from data import torchvision_models
from resnet20 import ResNet20
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from nns_plugin.adapters.nni import MeanWeightPruner, speedup, with_dependency_groups
from nns_plugin.errors import NNSError

VISION = {"resnet18": "fc", "vgg11_bn": "classifier.6", "mobilenet_v2": "classifier.1", "densenet121": "classifier"}


class Concat(nn.Module):
    """Two branches side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(3, 24, 1)
        self.norm, self.join, self.head = nn.BatchNorm2d(40), nn.Conv2d(40, 32, 3), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(torch.cat([self.left(x), self.right(x)], 1)))
        return self.head(torch.relu(self.join(x)).mean((2, 3)))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10),
    )  # fmt: skip


def depthwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU6(), nn.Conv2d(32, 32, 3, groups=32),
        nn.BatchNorm2d(32), nn.ReLU6(), nn.Conv2d(32, 64, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def models() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]]:
    """How to make each model, the shape of its inputs, and the name of its head."""
    found: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
        "MLP": (mlp, (2, 784), "4"),
        "LeNet": (lenet, (2, 1, 28, 28), "9"),
        "ResNet-20": (ResNet20, (2, 3, 32, 32), "fc"),
        "concatenation": (Concat, (2, 3, 16, 16), "head"),
        "depthwise": (depthwise, (2, 3, 16, 16), "9"),
    }
    try:
        vision = torchvision_models()
    except ImportError:
        print("torchvision is not installed; its models are left out")
        return found
    for name, head in VISION.items():
        found[name] = (getattr(vision, name), (2, 3, 64, 64), head)
    return found


def lively(model: nn.Module) -> nn.Module:
    """Norms that are no identities, and weights that keep the size of what passes."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.7, 1.3)
            nn.init.normal_(module.bias, 0, 0.3)
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.7, 1.3)
    return model.eval()


def rows(name: str, make: Callable[[], nn.Module], shape: tuple[int, ...], head: str) -> list[tuple[str, ...]]:
    torch.manual_seed(0)
    model, inputs = lively(make()), torch.randn(shape)
    config = [{"op_types": ["Conv2d", "Linear"], "exclude_op_names": [head], "sparse_ratio": 0.5}]
    pruner = MeanWeightPruner(model, with_dependency_groups(config, model, inputs), example_inputs=inputs)
    _, masks = pruner.compress()
    with torch.no_grad():
        masked = model(inputs)
    pruner.unwrap_model()
    before = sum(value.numel() for value in model.parameters())
    found = []
    for backend in ("nni", "torch-pruning"):
        start = time.perf_counter()
        try:
            small = speedup(model, inputs, masks, backend=backend)
        except NNSError as error:
            found.append((name, backend, f"failed: {str(error)[:60]}", "", "", "", ""))
            continue
        seconds = time.perf_counter() - start
        with torch.no_grad():
            outputs = small.model(inputs)
        after = sum(value.numel() for value in small.model.parameters())
        wrapped = f"{float((outputs - masked).abs().max() / masked.abs().max()):.1e}"
        changed = f"{len(small.units.extended)} norms" if small.units.extended else ""
        sizes = f"{before:,} -> {after:,}"
        found.append((name, small.backend, sizes, f"{small.error:.1e}", wrapped, changed, f"{seconds:.1f}"))
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    table = Table(title="half of the units masked; errors relative to the largest output")
    columns = (
        "model",
        "removed by",
        "parameters",
        "error",
        "error against NNI's wrappers",
        "masked besides",
        "seconds",
    )
    for column in columns:
        table.add_column(column)
    for name, (make, shape, head) in models().items():
        for row in rows(name, make, shape, head):
            table.add_row(*row)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
