"""Structural removal of units through a dependency graph, checked before anything changes."""

from __future__ import annotations

import torch
import torch_pruning as tp
from torch import Tensor

from nns_plugin.adapters.torch_pruning.norms import prune_group
from nns_plugin.adapters.torch_pruning.traced_group import (
    owns,
    ports_of,
)
from nns_plugin.errors import PruningError
from nns_plugin.models.layers import axis_length
from nns_plugin.units import UnitGroup, complement, role_ports


def remove_units(graph: tp.DependencyGraph, group: UnitGroup, units: Tensor) -> None:
    """Remove units of one group from the graph's model.

    Args:
        graph: Dependency graph of the model, up to date with all earlier removals.
        group: The group as it is now, see :func:`nns_plugin.units.narrow_groups`; removals from other groups do not
            affect it.
        units: ``[k]`` int64 units to remove.

    Raises:
        PruningError: If torch-pruning would remove something else, or would leave a layer empty; the model is then
            unchanged.
    """
    units = units.unique()
    if units.numel() == 0:
        return
    if int(units[0]) < 0 or int(units[-1]) >= group.size:
        raise PruningError(
            f"units {units.tolist()} of group {group.name!r} cannot be removed, it has {group.size} units"
        )
    model, parts = graph.model, _parts(group, units)
    host_groups = [_removal(graph, group, part) for part in parts]
    for role, port in role_ports(group):
        axis = axis_length(model.get_submodule(port.name), role, port.name)
        if port.index.numel() > axis:
            raise PruningError(
                f"group {group.name!r} has {port.index.numel()} positions at {port.name!r}, which has {axis} now; "
                "narrow the group after each removal, or trace the model again"
            )
        if port.positions(units).numel() == axis:
            raise PruningError(
                f"removing {units.numel()} units of group {group.name!r} would leave {port.name!r} empty"
            )
    prune_group(host_groups[0])
    gone = parts[0]
    for part in parts[1:]:
        left = complement(group.size, gone)
        prune_group(_removal(graph, group.narrow(left), torch.searchsorted(left, part)))
        gone = torch.cat([gone, part])


def _parts(group: UnitGroup, units: Tensor) -> list[Tensor]:
    """The units in parts that one producer each writes, if no producer writes all (branches of a concatenation)."""
    if any(bool(torch.isin(units, port.unit).all()) for port in group.producers):
        return [units]
    parts = []
    for port in group.producers:
        mine = torch.isin(units, port.unit)
        if bool(mine.any()):
            parts.append(units[mine])
            units = units[~mine]
    return parts


def _removal(graph: tp.DependencyGraph, group: UnitGroup, units: Tensor) -> tp.dependency.Group:
    """The host's group that removes the units of one producer, checked."""
    ports = [port for port in group.producers if bool(torch.isin(units, port.unit).all())]
    try:
        # On a layer that several groups share, positions may have moved since the group was found.
        port = max(ports, key=lambda port: owns(graph, port))
        module = graph.model.get_submodule(port.name)
        pruner = graph.get_pruner_of_module(module)
        host_group = graph.get_pruning_group(module, pruner.prune_out_channels, port.positions(units).tolist())
        found = {
            (role, port.name): port.index.sort().values for item in host_group for role, port in ports_of(graph, item)
        }
    except (AttributeError, ValueError) as error:
        raise PruningError(
            f"units of group {group.name!r} cannot be removed, the model is no longer the one that was traced: {error}"
        ) from error
    expected = {(role, port.name): port.positions(units) for role, port in role_ports(group)}
    for (role, name), positions in expected.items():
        there = found.get((role, name), positions[:0])
        # Removals from other groups may have moved the positions on a shared layer, but not changed their number.
        if there.numel() != positions.numel():
            raise PruningError(
                f"removing {units.numel()} units of group {group.name!r} should take {positions.numel()} positions of "
                f"{name!r}, but torch-pruning would take {there.numel()}; trace the model again"
            )
    if not graph.check_pruning_group(host_group):
        raise PruningError(f"removing {units.numel()} units of group {group.name!r} would leave a layer empty")
    return host_group
