"""The units of a traced model, with the layers that pass them on: norms, depthwise convolutions and others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch_pruning as tp
from torch import Tensor, nn

from nns_plugin.adapters.torch_pruning.graph import TracedGraph
from nns_plugin.adapters.torch_pruning.groups import checked_groups, followed_groups
from nns_plugin.units import Port, UnitGroup


@dataclass(frozen=True, eq=False)
class TracedUnits:
    """The units of a model, collected in one walk over the host's groups.

    Attributes:
        groups: The unit groups.
        carriers: For each group's name the ports where its units lie on out axes: at producers, norms, depthwise
            convolutions and other modules that pass them on, in the order of the host.
        with_parameters: Names of the groups whose units meet a parameter that belongs to no layer: a position
            embedding, a gate.
    """

    groups: tuple[UnitGroup, ...]
    carriers: Mapping[str, tuple[Port, ...]]
    with_parameters: frozenset[str]


def traced_units(graph: TracedGraph) -> TracedUnits:
    """The units of a graph's model."""
    walked = followed_groups(graph)
    groups = checked_groups(graph, tuple(traced.group for _, traced in walked))
    names = {group.name for group in groups}
    found = [(host_group, traced) for host_group, traced in walked if traced.group.name in names]
    return TracedUnits(
        groups,
        {traced.group.name: _carriers(graph, host_group, traced.unit_of_root) for host_group, traced in found},
        frozenset(
            traced.group.name
            for host_group, traced in found
            if any(isinstance(item.dep.target.module, nn.Parameter) for item in host_group)
        ),
    )


def _carriers(graph: TracedGraph, host_group: tp.dependency.Group, unit_of_root: Tensor) -> tuple[Port, ...]:
    ports: dict[str, Port] = {}
    for item in host_group:
        module = item.dep.target.module
        name = graph._module2name.get(module)
        passes = graph.is_out_channel_pruning_fn(item.dep.handler)
        if name is not None and passes and not isinstance(module, nn.Parameter):
            roots = torch.tensor(item.root_idxs, dtype=torch.int64)
            ports[name] = Port(name, torch.tensor(item.idxs, dtype=torch.int64), unit_of_root[roots])
    return tuple(ports.values())
