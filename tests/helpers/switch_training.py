"""A small problem for the tests of switched training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nns_plugin.switcher.network import SwitcherNetwork
from nns_plugin.switcher.options import SwitchedTrainingOptions
from nns_plugin.switcher.training import Switched, train_switched
from nns_plugin.switcher.turns import Loss


def task(seed: int = 0, dropout: float = 0.0) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 6, generator=generator)
    y = (x[:, 0] + x[:, 1] ** 2 > 1).long() + (x[:, 2] > 0.5).long()
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(6, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(16, 8),
        nn.ReLU(),
        nn.Linear(8, 3),
    )
    return model, [(x[start : start + 12], y[start : start + 12]) for start in range(0, 60, 12)]


def trained(
    model: nn.Module,
    loader: Any,
    switcher: SwitcherNetwork,
    loss: Loss = nn.functional.cross_entropy,
    optimizer: torch.optim.Optimizer | None = None,
    switcher_optimizer: torch.optim.Optimizer | None = None,
    validation: Any = None,
    **options: Any,
) -> Switched:
    """Train with small turns for two epochs, unless the options say otherwise."""
    return train_switched(
        model,
        loader,
        loss,
        switcher,
        optimizer=optimizer or torch.optim.SGD(model.parameters(), 0.05, momentum=0.9),
        switcher_optimizer=switcher_optimizer,
        validation=validation,
        options=SwitchedTrainingOptions(**{"epochs": 2, "task_steps": 2, **options}),
    )


def same_state(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(value, right.state_dict()[name]) for name, value in left.state_dict().items())
