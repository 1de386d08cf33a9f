"""Models and factors shared by the tests of the switcher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nns_plugin import Port
from nns_plugin.models.inputs import run_model
from nns_plugin.switcher.network import SwitcherNetwork
from nns_plugin.switcher.row_network import SwitcherArchitecture
from nns_plugin.switcher.scaling_factors import ScalingFactors
from nns_plugin.switcher.switches import Switch


def perceptron(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))


class Flat(nn.Module):
    """Convolutions, then a flatten and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 2)
        self.wide, self.head = nn.Linear(5 * 4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = nn.functional.max_pool2d(torch.relu(self.second(x)), 2)
        return self.head(torch.relu(self.wide(x.flatten(1))))


IMAGES = torch.zeros(2, 2, 7, 7).normal_(generator=torch.Generator().manual_seed(3))
ROWS = torch.zeros(4, 6).normal_(generator=torch.Generator().manual_seed(4))


def random_factors(switches: tuple[Switch, ...], seed: int, off: float = 0.4) -> ScalingFactors:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for switch in switches:
        values = 2 * torch.rand(switch.size, generator=generator)
        values[torch.rand(switch.size, generator=generator) < off] = 0
        values[0] = 1.5
        found[switch.name] = values
    return ScalingFactors(switches, found)


def scaled_by_hooks(model: nn.Module, factors: ScalingFactors, inputs: Any) -> Any:
    """Run the model with the inputs of its layers multiplied unit by unit; no weight is changed."""
    handles = []
    for switch in factors.switches:
        for port in switch.consumers:
            layer = model.get_submodule(port.name)

            def multiply(
                module: nn.Module, args: tuple[Tensor, ...], port: Port = port, name: str = switch.name
            ) -> Any:
                columns = torch.ones(args[0].shape[-1 if isinstance(module, nn.Linear) else 1])
                for position, unit in zip(port.index.tolist(), port.unit.tolist(), strict=True):
                    columns[position] = factors[name][unit]
                shape = [1, -1, *[1] * (args[0].dim() - 2)]
                return (args[0] * (columns if isinstance(module, nn.Linear) else columns.reshape(shape)),)

            handles.append(layer.register_forward_pre_hook(multiply))
    try:
        with torch.no_grad():
            return run_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()


def switcher_for(
    model: nn.Module,
    inputs: Tensor,
    channels: int = 2,
    depth: int = 2,
    budget: float | None = None,
    **options: Any,
) -> SwitcherNetwork:
    torch.manual_seed(7)
    architecture = SwitcherArchitecture(channels, depth, width=8)
    return SwitcherNetwork(model, inputs, architecture=architecture, budget=budget, **options)
