"""Switches: the units, input features and flattened positions of a model that get one scaling factor each."""

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
    """Units get no factor because they cannot be scaled where they are read."""


@dataclass(frozen=True, eq=False)
class Switch:
    """Units or positions that get one factor each.

    Attributes:
        name: Name of the unit group, or ``"inputs of "`` and the name of the layer whose input positions they are.
        size: Their number.
        consumers: In-positions of linear and convolutional layers at which the factors act.
        producers: Out-positions that write them; empty for input positions of a layer.
        positions: Total number of in-positions of each consumer's layer; empty to skip that check.
    """

    name: str
    size: int
    consumers: tuple[Port, ...]
    producers: tuple[Port, ...] = ()
    positions: tuple[int, ...] = ()


def inputs_of(name: str) -> str:
    """Return the name of the switch for the single input positions of a linear layer."""
    return f"inputs of {name}"


def find_switches(
    model: nn.Module,
    example_inputs: Any,
    layers: Iterable[str] | None = None,
    *,
    backend: Backend | None = None,
) -> tuple[Switch, ...]:
    """Find what in a model can get scaling factors.

    These are the units of every group that linear and convolutional layers read, the input features of linear layers
    that read the model's input, and, where a linear layer reads flattened maps, single positions in addition to units.

    Args:
        model: Not changed.
        example_inputs: Inputs that it can run on.
        layers: Names of layers; only what these read is scaled. All linear and convolutional layers by default.
        backend: Traces the model; torch-pruning by default.

    Raises:
        PruningError: If the inputs of a named layer cannot be scaled, or nothing can be scaled.

    Warns:
        UnswitchedWarning: If units are left out because another kind of layer, or a layer that is not chosen, also
            reads them.
    """
    scalable = {name for name in synapse_layers(model) if owns_weight(model, name)}
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
            f"the units of {', '.join(left_out)} get no factor: they are also read by something that is not a linear "
            "or convolutional layer with a weight of its own, or that is not chosen",
            UnswitchedWarning,
            stacklevel=2,
        )
    single = _features(model, example_inputs) + _flattened(model, groups)
    found += [_positions(model, name) for name in dict.fromkeys(single) if name in chosen]
    if not found:
        raise PruningError(
            "there is nothing to scale: no chosen layer reads a unit, an input feature or a flattened position"
        )
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
    """Return the linear layers that read one of the model's inputs, flattened or not."""
    # Random inputs: the examples may be all zeros, which would match every layer that reads zeros.
    inputs = inputs_like(kinds_of(example_inputs), device_of(model))
    features = [value for value in tensors_of(inputs) if value.dim() > 1 and value.is_floating_point()]
    found = {module for value in features for module, _, _ in input_consumers(model, inputs, value)}
    return [name for name, module in model.named_modules() if module in found and isinstance(module, nn.Linear)]


def _flattened(model: nn.Module, groups: Sequence[UnitGroup]) -> list[str]:
    """Return the linear layers that read several positions of a unit."""
    ports = [port for group in groups for port in group.consumers]
    return [
        port.name
        for port in ports
        if isinstance(model.get_submodule(port.name), nn.Linear) and port.index.numel() > port.unit.unique().numel()
    ]


def _positions(model: nn.Module, name: str) -> Switch:
    places = torch.arange(weight_of(model.get_submodule(name)).shape[1])
    return Switch(inputs_of(name), places.numel(), (Port(name, places, places),), (), (places.numel(),))
