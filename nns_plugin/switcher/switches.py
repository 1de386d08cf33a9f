"""Switches: units, input features and flattened positions that get one factor each, and the weights that it scales."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nns_plugin.backends import Backend, find_backend
from nns_plugin.errors import PruningError
from nns_plugin.models.inputs import device_of, inputs_like, kinds_of, tensors_of
from nns_plugin.models.layers import axis_length, is_linear_or_convolution, weight_key, weight_of
from nns_plugin.models.preserve import copied
from nns_plugin.synapses.input_selection import input_consumers
from nns_plugin.synapses.masks import synapse_layers
from nns_plugin.units import Port, UnitGroup


class UnswitchedWarning(UserWarning):
    """Units that cannot be scaled where they are read get no factor."""


@dataclass(frozen=True, eq=False)
class Switch:
    """Things that get a factor each.

    Attributes:
        name: That of the unit group; or ``"inputs of "`` and the name of the layer whose input positions they are.
        size: How many there are.
        consumers: In-positions of linear and convolutional layers at which the factors act.
        producers: Out-positions that write them; none for inputs of a layer.
        positions: How many in-positions the layer of each consumer has in all; none if that is not to be checked.
    """

    name: str
    size: int
    consumers: tuple[Port, ...]
    producers: tuple[Port, ...] = ()
    positions: tuple[int, ...] = ()


def inputs_of(name: str) -> str:
    """Name of the switch for the single input positions of a linear layer."""
    return f"inputs of {name}"


def find_switches(
    model: nn.Module,
    example_inputs: Any,
    layers: Iterable[str] | None = None,
    *,
    backend: Backend | None = None,
) -> tuple[Switch, ...]:
    """What in a model can get factors.

    The units of every group that linear and convolutional layers read; the input features of linear layers that read
    the model's input; and, where a linear layer reads flattened maps, the single positions beside the units.

    Args:
        model: Left as it is.
        example_inputs: Inputs that it can run on.
        layers: Names of layers; only what these read is scaled. All linear and convolutional layers by default.
        backend: Traces the model; torch-pruning by default.

    Raises:
        PruningError: If a named layer is none whose inputs can be scaled, or nothing can be scaled.

    Warns:
        UnswitchedWarning: If units are left out because something else reads them as well: a layer of another kind, or
            one that is not chosen.
    """
    there = synapse_layers(model)
    scalable = {name for name in there if owns_weight(model, name)}
    chosen = scalable if layers is None else set(layers)
    if chosen - scalable:
        raise PruningError(
            f"the inputs of {', '.join(sorted(chosen - scalable))} cannot be scaled; name linear or convolutional "
            "layers whose weight is a parameter of their own, neither tied nor masked"
        )
    groups = (backend or find_backend())(copied(model), example_inputs).groups()
    switches = [_of_group(model, group) for group in groups if group.consumers]
    read = {switch.name: {port.name for port in switch.consumers} for switch in switches}
    found = [switch for switch in switches if read[switch.name] <= chosen]
    left_out = [name for name, by in read.items() if not by <= chosen and (by & chosen or not by <= scalable)]
    if left_out:
        warnings.warn(
            f"the units of {', '.join(left_out)} get no factor: something that is no linear or convolutional layer "
            "with a weight of its own, or is not chosen, reads them",
            UnswitchedWarning,
            stacklevel=2,
        )
    single = _features(model, example_inputs) + _flattened(model, groups)
    found += [_positions(model, name) for name in dict.fromkeys(single) if name in chosen]
    if not found:
        raise PruningError("there is nothing to scale; no unit, input feature or flattened position is read by a layer")
    return tuple(found)


def owns_weight(model: nn.Module, name: str) -> bool:
    """Whether a layer's weight is a parameter of that layer alone: neither tied nor masked nor computed."""
    weight = model.get_submodule(name)._parameters.get("weight")
    same = [other for other, value in model.named_parameters(remove_duplicate=False) if value is weight]
    return weight is not None and same == [weight_key(name)]


def _of_group(model: nn.Module, group: UnitGroup) -> Switch:
    ports = [(model.get_submodule(port.name), port) for port in group.consumers]
    known = all(is_linear_or_convolution(layer) for layer, _ in ports)
    positions = tuple(axis_length(layer, "in", port.name) for layer, port in ports) if known else ()
    return Switch(group.name, group.size, group.consumers, group.producers, positions)


def _features(model: nn.Module, example_inputs: Any) -> list[str]:
    """Linear layers that read one of the model's inputs, or flatten it."""
    inputs = inputs_like(kinds_of(example_inputs), device_of(model))  # examples may be zeros, which all look alike
    features = [value for value in tensors_of(inputs) if value.dim() > 1 and value.is_floating_point()]
    found = {module for value in features for module, _, _ in input_consumers(model, inputs, value)}
    return [name for name, module in model.named_modules() if module in found and isinstance(module, nn.Linear)]


def _flattened(model: nn.Module, groups: Sequence[UnitGroup]) -> list[str]:
    """Linear layers that read several positions of a unit."""
    ports = [port for group in groups for port in group.consumers]
    return [
        port.name
        for port in ports
        if isinstance(model.get_submodule(port.name), nn.Linear) and port.index.numel() > port.unit.unique().numel()
    ]


def _positions(model: nn.Module, name: str) -> Switch:
    places = torch.arange(weight_of(model.get_submodule(name)).shape[1])
    return Switch(inputs_of(name), places.numel(), (Port(name, places, places),), (), (places.numel(),))
