"""Count the weights that remain when switches turn units off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nns_plugin.models.layers import axis_length, channel_groups, weight_of
from nns_plugin.switcher.switches import Switch
from nns_plugin.synapses.masks import synapse_layers
from nns_plugin.units import Port


@dataclass(frozen=True, eq=False)
class _LayerWeights:
    """A layer's weights: each of its groups has one kernel between each of its in- and out-positions."""

    groups: int
    kernel: int
    read: int
    written: int
    consumers: tuple[tuple[str, Port], ...]
    producers: tuple[tuple[str, Port], ...]


class WeightCount:
    """Counts the weights of linear and convolutional layers, without biases, that remain without some units.

    Args:
        model: Not changed.
        switches: The units and positions that can be turned off.
    """

    def __init__(self, model: nn.Module, switches: Sequence[Switch]) -> None:
        consumers = [(switch.name, port) for switch in switches for port in switch.consumers]
        producers = [(switch.name, port) for switch in switches for port in switch.producers]
        self._layers = []
        for name, module in synapse_layers(model).items():
            groups = channel_groups(module)
            read, written = (axis_length(module, side, name) for side in ("in", "out"))
            self._layers.append(
                _LayerWeights(
                    groups,
                    weight_of(module).numel() * groups // (read * written),
                    read,
                    written,
                    tuple(pair for pair in consumers if pair[1].name == name),
                    tuple(pair for pair in producers if pair[1].name == name),
                )
            )
        self.total = sum(layer.kernel * layer.read * layer.written // layer.groups for layer in self._layers)

    def left(self, on: Mapping[str, Tensor]) -> int:
        """Count the weights between units that are on.

        Args:
            on: By name of the switch, ``[size]`` bool.
        """
        total = 0
        for layer in self._layers:
            sides = []
            for length, ports in ((layer.read, layer.consumers), (layer.written, layer.producers)):
                kept = torch.ones(length, dtype=torch.bool)
                for name, port in ports:
                    kept[port.index] &= on[name][port.unit]
                sides.append(kept.reshape(layer.groups, -1).sum(1))
            total += layer.kernel * int((sides[0] * sides[1]).sum())
        return total

    def removed(self, on: Mapping[str, Tensor]) -> float:
        """Return the share of the weights that are removed."""
        return 1 - self.left(on) / max(self.total, 1)

    def offset(self, levels: Mapping[str, Tensor], budget: float) -> float:
        """Return the smallest offset that, subtracted from all levels, leaves so few above 0 that the budget is met.

        The strongest unit of each switch stays on whatever the offset.

        Args:
            levels: By name of the switch, ``[size]``.
            budget: Minimum share of the weights to remove.
        """
        values = {name: level.detach().double().cpu() for name, level in levels.items()}

        def on(offset: float) -> dict[str, Tensor]:
            found = {name: value > offset for name, value in values.items()}
            for name, mask in found.items():
                mask[values[name].argmax()] = True
            return found

        if self.removed(on(0.0)) >= budget:
            return 0.0
        steps = torch.cat(list(values.values())).unique()
        steps = steps[steps > 0]
        low, high = 0, max(len(steps) - 1, 0)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.removed(on(float(steps[middle]))) >= budget else (middle + 1, high)
        return float(steps[low]) if len(steps) else 0.0
