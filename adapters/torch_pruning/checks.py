"""Check by gradients that consumers read units where the dependency graph says.

torch-pruning follows positions through splits, concatenations and reshapes by rules with gaps: for a channel shuffle, a
padded channel axis, a concatenation with the model's input, or the halves of a chunk used in another order, it reports
positions that look sound and are wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nns_plugin.models.hooks import Hook, hooked
from nns_plugin.models.inputs import map_tensors, run_model
from nns_plugin.models.layers import (
    Convolution,
    broadcast_to_activation,
    by_channel,
    channel_axis,
    is_depthwise,
    is_norm_over_units,
)
from nns_plugin.units import Port, UnitGroup

MIXERS = (Convolution, nn.Linear, nn.Bilinear, nn.Embedding, nn.MultiheadAttention, nn.RNNBase)


def misread(model: nn.Module, inputs: Any, groups: Sequence[UnitGroup]) -> dict[str, str]:
    """Groups whose units reach a consumer at other positions than its port says.

    The graph of gradients is cut behind every layer that mixes its inputs, so that a consumer's input depends on
    producers only through operations within a group. Each unit gets a random code. If the ports are right and nothing
    mixes units, the gradient of all consumers' inputs, weighted by the codes of the units at each position, equals the
    plain gradient times the code of the producer's position. Where something does mix units (attention, a norm written
    by hand), a weaker check remains: a unit that reaches a consumer must reach the positions that its port lists there,
    and no position that no port of its group lists.

    Args:
        model: The model, in evaluation mode and with gradients enabled.
        inputs: Example inputs that it runs on.
        groups: The groups to check; those without consumers are skipped.

    Returns:
        The reason for each group that fails, by name.
    """
    inputs = map_tensors(inputs, lambda value: value.detach().clone().requires_grad_(value.is_floating_point()))
    with _recorded(model, groups) as flow:
        run_model(model, inputs)
    read = [group for group in groups if group.consumers]
    weights = {name: [0.5 + torch.rand_like(x) for x in flow.reads[name]] for name in flow.reads}
    suspects = [group for group in read if not _follows_codes(flow, weights, read, group)] if read else []
    reasons = {}
    for group in read:
        for port in group.consumers:
            if not _connected(flow, weights, group, port) or (
                group in suspects and not _reaches(flow, weights, group, port)
            ):
                reasons[group.name] = f"{port.name!r} does not read its units where torch-pruning says"
    for group in read:
        for port in group.consumers:
            if group.name not in reasons and _reads_inputs(flow, port, inputs):
                reasons[group.name] = f"{port.name!r} reads the model's input at the same positions"
    return reasons


@dataclass
class _Flow:
    """The inputs and outputs of modules in one forward, call by call."""

    modules: Mapping[str, nn.Module]
    reads: dict[str, list[Tensor]] = field(default_factory=dict)
    writes: dict[str, list[Tensor]] = field(default_factory=dict)
    coded: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def length(self, name: str, x: Tensor) -> int:
        """Number of positions of an activation of a module."""
        return x.shape[channel_axis(self.modules[name])]

    def scaled(self, name: str, x: Tensor, factors: Tensor) -> Tensor:
        """An activation of a module times a factor for each position."""
        return x * broadcast_to_activation(self.modules[name], factors.to(x), x.dim())

    def by_channel(self, name: str, activation: Tensor) -> Tensor:
        """``[positions, samples]`` of an activation of a module, or of its gradient."""
        return by_channel(self.modules[name], activation)


def _follows_codes(
    flow: _Flow, weights: Mapping[str, list[Tensor]], groups: Sequence[UnitGroup], group: UnitGroup
) -> bool:
    if not flow.coded:
        _code(flow, weights, groups)
    for port in group.producers:
        for leaf in flow.writes.get(port.name, []):
            codes = _codes(group)[port.unit].to(leaf.device)[:, None]
            plain, weighted = (flow.by_channel(port.name, value)[port.index] for value in flow.coded[id(leaf)])
            slack = 1e-3 * plain.abs() + 1e-6 * plain.abs().amax()
            if bool(((weighted - codes * plain).abs() > slack).any()):
                return False
    return True


def _code(flow: _Flow, weights: Mapping[str, list[Tensor]], groups: Sequence[UnitGroup]) -> None:
    """Gradients of all consumers' inputs, plain and weighted by codes, for all groups at once."""
    plain, weighted = torch.zeros(()), torch.zeros(())
    for name, reads in flow.reads.items():
        for x, weight in zip(reads, weights[name], strict=True):
            codes = 3 + torch.rand(flow.length(name, x))  # of positions that no group owns
            for group in groups:
                for port in group.consumers:
                    if port.name == name:
                        codes[port.index] = _codes(group)[port.unit]
            products = x * weight
            plain = plain.to(x.device) + products.sum()
            weighted = weighted.to(x.device) + flow.scaled(name, products, codes).sum()
    leaves = [leaf for calls in flow.writes.values() for leaf in calls]
    for leaf, *gradients in zip(leaves, _gradients(plain, leaves), _gradients(weighted, leaves), strict=True):
        flow.coded[id(leaf)] = (gradients[0], gradients[1])


def _codes(group: UnitGroup) -> Tensor:
    """Distinct codes in [1, 2) for the units of a group; the same on each call."""
    return 1 + torch.randperm(group.size, generator=torch.Generator().manual_seed(group.size)) / group.size


def _reaches(flow: _Flow, weights: Mapping[str, list[Tensor]], group: UnitGroup, port: Port) -> bool:
    """Whether every unit that reaches a consumer reaches the positions that its port lists, and no unlisted one.

    Units are told apart by the binary digits of their numbers: two that are confused differ in a digit.
    """
    leaves = _leaves(flow, group)
    claimed = torch.zeros(group.size, dtype=torch.bool)
    claimed[port.unit] = True
    silent = _silent_units(flow, group, port)

    def arrives(chosen: Tensor, outside: bool = False) -> list[tuple[Tensor, Tensor]]:
        """The unit of each position of each producer, and whether it reaches the positions of the chosen units."""
        total = _read(flow, weights, port, port.index[chosen[port.unit]], outside)
        found = zip(leaves, _gradients(total, [leaf for _, leaf in leaves]), strict=True)
        return [
            (producer.unit, (flow.by_channel(name, gradient)[producer.index] != 0).any(1).cpu())
            for (name, _), gradient in found
            for producer in group.producers
            if producer.name == name
        ]

    everyone = torch.ones(group.size, dtype=torch.bool)
    if any(bool(reached.any()) for _, reached in arrives(everyone, outside=True)):
        return False
    somewhere = arrives(everyone)
    if any(bool((reached & ~claimed[unit]).any()) for unit, reached in somewhere):
        return False
    for digit in range(group.size.bit_length()):
        chosen = ((torch.arange(group.size) + 1) >> digit & 1).bool()
        for (unit, reached), (_, arrived) in zip(somewhere, arrives(chosen), strict=True):
            if bool((reached & chosen[unit] & ~silent[unit] & ~arrived).any()):
                return False
    return True


def _connected(flow: _Flow, weights: Mapping[str, list[Tensor]], group: UnitGroup, port: Port) -> bool:
    """Whether any unit reaches a consumer; true if the consumer reads only constants from all of them."""
    gradients = _gradients(_read(flow, weights, port, port.index, False), [leaf for _, leaf in _leaves(flow, group)])
    return any(bool(each.any()) for each in gradients) or bool(_silent_units(flow, group, port)[port.unit].all())


def _leaves(flow: _Flow, group: UnitGroup) -> list[tuple[str, Tensor]]:
    return [(name, leaf) for name in {port.name for port in group.producers} for leaf in flow.writes.get(name, [])]


def _silent_units(flow: _Flow, group: UnitGroup, port: Port) -> Tensor:
    """``[U]`` bool: units that a consumer reads as a constant, such as behind a ReLU that is never active."""
    silent = torch.ones(group.size, dtype=torch.bool)
    for x in flow.reads.get(port.name, []):
        values = flow.by_channel(port.name, x.detach())[port.index]
        constant = (values == values[:, :1]).all(1) if values.shape[1] > 1 else (values == 0).all(1)
        silent[port.unit[~constant.cpu()]] = False
    return silent


def _read(flow: _Flow, weights: Mapping[str, list[Tensor]], port: Port, positions: Tensor, outside: bool) -> Tensor:
    """Weighted sum of a consumer's input at some positions, or at all positions but these."""
    total = torch.zeros(())
    for x, weight in zip(flow.reads.get(port.name, []), weights.get(port.name, []), strict=True):
        mask = torch.full((flow.length(port.name, x),), float(outside))
        mask[positions] = float(not outside)
        total = total.to(x.device) + flow.scaled(port.name, x * weight, mask).sum()
    return total


def _reads_inputs(flow: _Flow, port: Port, inputs: Any) -> bool:
    """Whether an input of the model, as wide as a consumer's input, is added to it."""
    values = (
        inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, (tuple, list)) else [inputs]
    )
    axis = channel_axis(flow.modules[port.name])
    for x in flow.reads.get(port.name, []):
        tensors = [value for value in values if isinstance(value, Tensor) and value.requires_grad]
        alike = [value for value in tensors if value.dim() == x.dim() and value.shape[axis] == x.shape[axis]]
        if any(bool(gradient.any()) for gradient in _gradients(x.movedim(axis, 0)[port.index].sum(), alike)):
            return True
    return False


def _gradients(total: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    if not total.requires_grad or not leaves:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(total, list(leaves), retain_graph=True, allow_unused=True)
    return [torch.zeros_like(leaf) if value is None else value for leaf, value in zip(leaves, found, strict=True)]


@contextmanager
def _recorded(model: nn.Module, groups: Sequence[UnitGroup]) -> Iterator[_Flow]:
    """Record consumers' inputs, and cut the graph of gradients behind every layer that mixes its inputs."""
    modules = dict(model.named_modules())
    flow = _Flow(modules)
    consumers = {port.name for group in groups for port in group.consumers}
    hooks: list[Hook] = []
    for name, module in modules.items():
        if name in consumers:
            hooks.append((module, "input", partial(_read_input, flow, name)))
        if is_norm_over_units(module):
            hooks.append((module, "output", _straight_through))
        if isinstance(module, MIXERS) and not is_depthwise(module):
            hooks.append((module, "output", partial(_detached, flow, name)))
    with hooked(*hooks):
        yield flow


def _straight_through(x: Tensor, output: Tensor) -> Tensor:
    """A norm over channels with its own values, but the gradients of the identity: it does not move positions."""
    return output.detach() + (x - x.detach())


def _read_input(flow: _Flow, name: str, x: Any) -> None:
    if isinstance(x, Tensor) and x.is_floating_point():
        flow.reads.setdefault(name, []).append(x.clone())  # later operations may work in place


def _detached(flow: _Flow, name: str, x: Any, output: Any) -> Any:
    first = output[0] if isinstance(output, tuple) else output

    def detached(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        leaf = value.detach().requires_grad_()
        if value is first:
            flow.writes.setdefault(name, []).append(leaf)
        return leaf.clone()

    return map_tensors(output, detached)
