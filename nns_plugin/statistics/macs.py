"""MACs: the cost of a unit, from the multiply-accumulate operations of its producers and consumers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nns_plugin.models.hooks import Hook, hooked
from nns_plugin.models.inputs import device_of, run_model, to_device
from nns_plugin.models.layers import (
    TransposedConvolution,
    axis_length,
    channel_axis,
    is_linear_or_convolution,
    weight_of,
)
from nns_plugin.models.preserve import preserved
from nns_plugin.units import UnitGroup, role_ports


def layer_macs(model: nn.Module, example_inputs: Any) -> dict[str, int]:
    """MACs of every linear and convolutional layer for the example inputs.

    Args:
        model: The model; left exactly as it was.
        example_inputs: A tensor, or a tuple or mapping of tensors.

    Returns:
        By name of the layer, summed over all its calls; without layers that do not run.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(32, 5))
        >>> layer_macs(model, torch.zeros(1, 3, 4, 4))
        {'0': 864, '2': 160}
    """
    counts: dict[str, int] = {}

    def count(name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        # Each input of a transposed convolution, each output of any other layer meets the rest of the weight.
        values = x if isinstance(module, TransposedConvolution) else output
        counts[name] = (
            counts.get(name, 0) + values.numel() * weight_of(module).numel() // values.shape[channel_axis(module)]
        )

    hooks: list[Hook] = [
        (module, "output", partial(count, name, module))
        for name, module in model.named_modules()
        if is_linear_or_convolution(module)
    ]
    with hooked(*hooks), preserved(model), torch.no_grad():
        model.eval()
        run_model(model, to_device(example_inputs, device_of(model)))
    return counts


def unit_macs(model: nn.Module, groups: Sequence[UnitGroup], macs: Mapping[str, int]) -> dict[str, float]:
    """MACs that removing one unit of each group saves, on average over its units.

    Args:
        model: The model.
        groups: Its groups.
        macs: MACs of its layers, from :func:`layer_macs`.

    Returns:
        By name of the group: the sum over its producers and consumers of their MACs times the share of their positions
        that one unit takes.
    """
    costs = {}
    for group in groups:
        cost = 0.0
        for role, port in role_ports(group):
            length = axis_length(model.get_submodule(port.name), role, port.name)
            cost += macs.get(port.name, 0) * port.index.numel() / length / group.size
        costs[group.name] = cost
    return costs
