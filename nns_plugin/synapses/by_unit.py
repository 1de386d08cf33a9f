"""The synapses of units: values of the weights that write and that read each unit, summed layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nns_plugin.models.layers import by_input, by_output, input_weight_names, is_linear_or_convolution, weight_axis
from nns_plugin.units import Port, UnitGroup, role_ports


def summed_synapses(model: nn.Module, group: UnitGroup, values: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Sums of a value of each synapse over those of each unit, for every layer that writes or reads the group.

    Args:
        model: The model that the group belongs to.
        group: Its U units.
        values: By name of the parameter, of its shape; biases are no synapses and are not looked at.

    Returns:
        For each producer, then each consumer: the sums ``[U]`` float64 on the CPU, and which units the layer touches,
        ``[U]`` bool. Layers that have no weight of a known form are left out.
    """
    found = incoming_synapses(model, group, values) + outgoing_synapses(model, group, values)
    return [layer for layer in found if layer is not None]


def incoming_synapses(
    model: nn.Module, group: UnitGroup, values: Mapping[str, Tensor]
) -> list[tuple[Tensor, Tensor] | None]:
    """The same for each producer; ``None`` where it has no weight of a known form."""
    found: list[tuple[Tensor, Tensor] | None] = []
    for port in group.producers:
        module = model.get_submodule(port.name)
        weight = None if isinstance(module, nn.RNNBase) else values.get(f"{port.name}.weight")
        found.append(None if weight is None else _by_unit(by_output(module, weight), port, group.size))
    return found


def outgoing_synapses(
    model: nn.Module, group: UnitGroup, values: Mapping[str, Tensor]
) -> list[tuple[Tensor, Tensor] | None]:
    """The same for each consumer; ``None`` where it has no weight of a known form."""
    found: list[tuple[Tensor, Tensor] | None] = []
    for port in group.consumers:
        columns = _columns(model.get_submodule(port.name), port.name, values)
        found.append(None if columns is None else _by_unit(columns, port, group.size))
    return found


def _by_unit(positions: Tensor, port: Port, size: int) -> tuple[Tensor, Tensor]:
    """Values ``[positions, D]`` of a port's module, summed by unit."""
    sums = positions.double().cpu().flatten(1).sum(1)[port.index]
    touched = torch.zeros(size, dtype=torch.bool)
    touched[port.unit] = True
    return torch.zeros(size, dtype=torch.float64).index_add(0, port.unit, sums), touched


def _columns(module: nn.Module, name: str, values: Mapping[str, Tensor]) -> Tensor | None:
    """Values of the weights that read each in-position, ``[in-positions, D]``."""
    if isinstance(module, nn.RNNBase):
        weights = [values.get(f"{name}.{weight}") for weight in input_weight_names(module)]
        known = [weight for weight in weights if weight is not None]
        return torch.cat(known).T if len(known) == len(weights) else None
    weight = values.get(f"{name}.weight")
    return by_input(module, weight) if weight is not None and is_linear_or_convolution(module) else None


def scores_by_unit(
    model: nn.Module, groups: Sequence[UnitGroup], scores: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Let each synapse count for what the weakest unit at its ends counts in total, so that whole units go together.

    Args:
        model: The model that the groups belong to.
        groups: Its units.
        scores: For each layer's name a score of every synapse, not negative, of its weight's shape.
        masks: For each layer's name which synapses are there, bool; the others do not count.

    Returns:
        As ``scores``. Synapses of one unit differ by a millionth of their own scores; one that no unit writes or reads
        keeps its own.
    """
    there = {f"{name}.weight": score.detach().double().cpu() * masks[name] for name, score in scores.items()}
    found = {name: torch.full_like(there[f"{name}.weight"], torch.inf) for name in scores}
    for group in groups:
        total = sum((sums for sums, _ in summed_synapses(model, group, there)), torch.zeros(group.size).double())
        for side, port in role_ports(group):
            axis = weight_axis(model.get_submodule(port.name), side)
            if port.name in found and axis is not None:
                limit = found[port.name].movedim(axis, -1)
                limit[..., port.index] = torch.minimum(limit[..., port.index], total[port.unit].to(limit))
    return {
        name: torch.where(limit.isinf(), there[f"{name}.weight"], limit + 1e-6 * there[f"{name}.weight"])
        for name, limit in found.items()
    }
