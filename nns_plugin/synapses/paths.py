"""Synapse paths: which inputs a sparse network uses, and which synapses lead to each of its outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nns_plugin.backends import Backend, find_backend
from nns_plugin.errors import PruningError
from nns_plugin.models.activations import capture_input
from nns_plugin.models.inputs import device_of, inputs_like, kinds_of
from nns_plugin.models.layers import by_channel, by_output, channel_groups, weight_of
from nns_plugin.models.preserve import copied, preserved
from nns_plugin.synapses.compaction import permanent
from nns_plugin.synapses.masks import synapse_layers
from nns_plugin.units import UnitGroup


def synapse_paths(model: nn.Module, example_inputs: Any, *, backend: Backend | None = None) -> dict[str, Tensor]:
    """Find the synapses that lie on a path from an input to each output.

    A synapse is a weight that is not 0, at any position of a convolution's kernel. A path begins at an input of the
    model: a synapse that only passes on a constant is on no path.

    Args:
        model: A classifier with a single output layer; its weights may be masked by ``torch.nn.utils.prune``.
        example_inputs: Inputs that it can run on.
        backend: Traces the model; torch-pruning by default.

    Returns:
        For each linear and convolutional layer, in order, ``[L, out-positions, in-positions]`` bool: whether the
        synapse is on a path to output l. Layers that are on no path are left out.

    Raises:
        PruningError: If there is not exactly one output layer, a convolution is grouped, or a layer reads outputs of
            other layers that belong to no unit group (behind attention or a recurrent layer): such paths cannot be
            followed.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
        >>> with torch.no_grad():
        ...     _ = model[0].weight.copy_(torch.eye(2)), model[2].weight.copy_(torch.eye(2))
        >>> synapse_paths(model, torch.zeros(1, 2))["0"].nonzero()  # output, unit, input
        tensor([[0, 0, 0],
                [1, 1, 1]])
    """
    sparse = permanent(copied(model))
    traced = (backend or find_backend())(copied(sparse), example_inputs)
    if len(traced.heads) != 1:
        raise PruningError(
            f"the model has {len(traced.heads)} output layers ({', '.join(traced.heads) or 'none'}); expected one"
        )
    reads = {name: _matrix(name, module) for name, module in synapse_layers(sparse).items()}
    head = traced.heads[0]
    if head not in reads:
        raise PruningError(
            f"the output layer {head!r} is a {type(sparse.get_submodule(head)).__name__}; expected a linear or "
            "convolutional layer"
        )
    groups, labels = traced.groups(), reads[head].shape[0]
    ends = {name: torch.zeros(labels, matrix.shape[0], dtype=torch.bool) for name, matrix in reads.items()}
    ends[head] = torch.eye(labels, dtype=torch.bool)
    ends = _spread(ends, reads, groups, backward=True)
    begins = {name: torch.zeros(1, matrix.shape[1], dtype=torch.bool) for name, matrix in reads.items()}
    for name, read in _inputs(groups, begins).items():
        if bool(read.any()):
            _check_source(sparse, name, read, inputs_like(kinds_of(example_inputs), device_of(sparse)))
        begins[name][0, read] = True
    begins = _spread(begins, reads, groups, backward=False)
    found = {name: ends[name][:, :, None] & matrix & begins[name][:, None, :] for name, matrix in reads.items()}
    return {name: paths for name, paths in found.items() if bool(paths.any())}


def _matrix(name: str, module: nn.Module) -> Tensor:
    """Mark the in-positions that each out-position reads, ``[O, I]`` bool."""
    groups = channel_groups(module)
    if groups != 1:
        raise PruningError(
            f"{name!r} reads its channels in {groups} groups; paths can only be followed through ungrouped layers"
        )
    nonzero = by_output(module, weight_of(module).detach().cpu()) != 0
    return nonzero.flatten(2).any(2) if nonzero.dim() > 2 else nonzero


def _inputs(groups: Sequence[UnitGroup], layers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mark the in-positions of each layer that no unit writes, bool: these read the model's inputs."""
    found = {name: torch.ones(positions.shape[1], dtype=torch.bool) for name, positions in layers.items()}
    for group in groups:
        for port in group.consumers:
            if port.name in found:
                found[port.name][port.index] = False
    return found


def _check_source(model: nn.Module, name: str, read: Tensor, inputs: Any) -> None:
    """Reject in-positions that belong to no unit group but still depend on other layers."""
    weights = [
        parameter
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
        if parameter.dim() > 1 and parameter.is_floating_point()
    ]
    with preserved(model), torch.enable_grad():
        for weight in weights:
            weight.requires_grad_(True)
        values = capture_input(model.eval(), name, inputs)
        total = by_channel(model.get_submodule(name), values)[read.to(values.device)].square().sum()
        found = torch.autograd.grad(total, weights, allow_unused=True) if total.requires_grad else ()
    if any(gradient is not None and bool(gradient.any()) for gradient in found):
        raise PruningError(
            f"{name!r} reads outputs of other layers that belong to no unit group (as behind attention or a recurrent "
            "layer): its paths cannot be followed"
        )


def _spread(
    start: dict[str, Tensor], reads: dict[str, Tensor], groups: Sequence[UnitGroup], backward: bool
) -> dict[str, Tensor]:
    """Follow connections from the start positions until nothing new is reached.

    Args:
        start: For each layer ``[L, positions]`` bool: out-positions if backward, in-positions otherwise.
        reads: For each layer, the in-positions that each out-position reads.
        groups: How layers are connected.
        backward: Whether to follow signals against their direction.
    """
    reached = {name: value.clone() for name, value in start.items()}
    labels = next(iter(start.values())).shape[0]
    for _ in range(len(reads) + 1):
        before = sum(int(value.sum()) for value in reached.values())
        for group in groups:
            near, far = (group.consumers, group.producers) if backward else (group.producers, group.consumers)
            units = torch.zeros(labels, group.size)
            for port in near:
                if port.name in reads:
                    matrix = reads[port.name] if backward else reads[port.name].T
                    through = (reached[port.name].float() @ matrix.float())[:, port.index]
                    units.index_add_(1, port.unit, through)
            for port in far:
                if port.name in reads:
                    reached[port.name][:, port.index] |= units[:, port.unit] > 0
        if sum(int(value.sum()) for value in reached.values()) == before:
            break
    return reached
