"""The synapses of units: values of the weights that write and read each unit, summed layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nns_plugin.models.layers import by_input, by_output, input_weight_names, is_linear_or_convolution, weight_axis
from nns_plugin.units import Port, UnitGroup, role_ports


def summed_synapses(model: nn.Module, group: UnitGroup, values: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Sum a value of each synapse over the synapses of each unit, for every layer that writes or reads the group.

    Args:
        model: The model to which the group belongs.
        group: Its U units.
        values: By name of the parameter, of its shape; biases are not synapses and are ignored.

    Returns:
        For each producer, then each consumer: the sums ``[U]`` float64 on the CPU, and the units that the layer writes
        or reads, ``[U]`` bool. Layers without a weight of a known kind are left out.
    """
    found = incoming_synapses(model, group, values) + outgoing_synapses(model, group, values)
    return [layer for layer in found if layer is not None]


def incoming_synapses(
    model: nn.Module, group: UnitGroup, values: Mapping[str, Tensor]
) -> list[tuple[Tensor, Tensor] | None]:
    """Return the sums of :func:`summed_synapses` for each producer; ``None`` without a weight of a known kind."""
    found: list[tuple[Tensor, Tensor] | None] = []
    for port in group.producers:
        module = model.get_submodule(port.name)
        weight = None if isinstance(module, nn.RNNBase) else values.get(f"{port.name}.weight")
        found.append(None if weight is None else _by_unit(by_output(module, weight), port, group.size))
    return found


def outgoing_synapses(
    model: nn.Module, group: UnitGroup, values: Mapping[str, Tensor]
) -> list[tuple[Tensor, Tensor] | None]:
    """Return the sums of :func:`summed_synapses` for each consumer; ``None`` without a weight of a known kind."""
    found: list[tuple[Tensor, Tensor] | None] = []
    for port in group.consumers:
        columns = _columns(model.get_submodule(port.name), port.name, values)
        found.append(None if columns is None else _by_unit(columns, port, group.size))
    return found


def _by_unit(positions: Tensor, port: Port, size: int) -> tuple[Tensor, Tensor]:
    """Sum the values ``[positions, D]`` of a port's module by unit."""
    sums = positions.double().cpu().flatten(1).sum(1)[port.index]
    touched = torch.zeros(size, dtype=torch.bool)
    touched[port.unit] = True
    return torch.zeros(size, dtype=torch.float64).index_add(0, port.unit, sums), touched


def _columns(module: nn.Module, name: str, values: Mapping[str, Tensor]) -> Tensor | None:
    """Return the values of the weights that read each in-position, ``[in-positions, D]``."""
    if isinstance(module, nn.RNNBase):
        weights = [values.get(f"{name}.{weight}") for weight in input_weight_names(module)]
        known = [weight for weight in weights if weight is not None]
        return torch.cat(known).T if len(known) == len(weights) else None
    weight = values.get(f"{name}.weight")
    return by_input(module, weight) if weight is not None and is_linear_or_convolution(module) else None


def scores_by_unit(
    model: nn.Module, groups: Sequence[UnitGroup], scores: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Score each synapse by the total of the weakest unit at its ends, so that whole units are pruned together.

    Args:
        model: The model to which the groups belong.
        groups: Its units.
        scores: A score of every synapse, not negative, by name of the layer and of its weight's shape.
        masks: The unmasked synapses by name of the layer, bool; the others do not count.

    Returns:
        Scores in the form of ``scores``. The synapses of one unit differ by a millionth of their own scores; a synapse
        outside all units keeps its own score.
    """
    unmasked = {f"{name}.weight": score.detach().double().cpu() * masks[name] for name, score in scores.items()}
    found = {name: torch.full_like(unmasked[f"{name}.weight"], torch.inf) for name in scores}
    for group in groups:
        total = sum((sums for sums, _ in summed_synapses(model, group, unmasked)), torch.zeros(group.size).double())
        for side, port in role_ports(group):
            axis = weight_axis(model.get_submodule(port.name), side)
            if port.name in found and axis is not None:
                limit = found[port.name].movedim(axis, -1)
                limit[..., port.index] = torch.minimum(limit[..., port.index], total[port.unit].to(limit))
    return {
        name: torch.where(limit.isinf(), unmasked[f"{name}.weight"], limit + 1e-6 * unmasked[f"{name}.weight"])
        for name, limit in found.items()
    }
