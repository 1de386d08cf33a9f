"""Removals: what a step takes out of a model's groups, planned before anything changes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from nns_plugin.adapters.torch_pruning.graph import UnusableGroupWarning, remove_units, trace_group
from nns_plugin.errors import GroupError, StaleStatisticsError
from nns_plugin.models.layers import axis_length
from nns_plugin.statistics.statistics import Statistics
from nns_plugin.units import UnitGroup, complement


@dataclass(frozen=True, eq=False)
class Removal:
    """What goes from one group.

    Attributes:
        group: The unit group; ``None`` if the host's group could not be followed.
        units: ``[k]`` int64, the units that go.
        host: The host's root module, its pruning function and the root's positions that go; ``None`` if the group
            says it all.
    """

    group: UnitGroup | None
    units: Tensor
    host: tuple[nn.Module, Any, list[int]] | None = None

    def carry_out(self, graph: tp.DependencyGraph) -> None:
        """Remove the units from the graph's model."""
        if self.host is not None:  # rebuilt at its turn: positions on a concatenation move with each removal
            trainable = {name: parameter.requires_grad for name, parameter in graph.model.named_parameters()}
            graph.get_pruning_group(*self.host).prune()
            for name, parameter in graph.model.named_parameters():  # the host makes new ones, all trainable
                parameter.requires_grad_(trainable.get(name, parameter.requires_grad))
        elif self.group is not None:
            remove_units(graph, self.group, self.units)


def planned_removals(pruner: tp.pruner.BasePruner) -> list[Removal]:
    """What a step of the pruner removes, in the order of the groups' first producers; nothing is removed yet."""
    graph = pruner.DG
    removals = []
    for host_group in list(pruner.step(interactive=True)):
        dep, positions = host_group[0]
        root, handler = dep.target.module, dep.handler
        is_out = graph.is_out_channel_pruning_fn(handler)
        length = graph.get_out_channels(root) if is_out else graph.get_in_channels(root)
        host = (root, handler, list(positions))
        try:
            traced = trace_group(graph.get_pruning_group(root, handler, list(range(length))))
        except GroupError as error:
            warnings.warn(f"removed without compensation: {error}", UnusableGroupWarning, stacklevel=3)
            removals.append(Removal(None, torch.tensor([]), host))
            continue
        units = traced.unit_of_root[torch.tensor(positions, dtype=torch.int64)].unique()
        removals.append(Removal(traced.group, units, host))
    return in_forward_order(graph, removals)


def removals_of(graph: tp.DependencyGraph, groups: Sequence[UnitGroup], kept: Mapping[str, Tensor]) -> list[Removal]:
    """What has to go so that of each named group the given units are kept, in the order of planned removals."""
    removals = [
        Removal(group, gone)
        for group in groups
        if group.name in kept and (gone := complement(group.size, kept[group.name])).numel()
    ]
    return in_forward_order(graph, removals)


def in_forward_order(graph: tp.DependencyGraph, removals: Sequence[Removal]) -> list[Removal]:
    """Removals in the order of their groups' first producers in the model; those that cannot be followed first."""
    order = {name: place for place, (name, _) in enumerate(graph.model.named_modules())}
    return sorted(removals, key=lambda removal: order[removal.group.name] if removal.group else -1)


def consumers_of(removals: Sequence[Removal]) -> set[str]:
    """Names of all consumers of the groups that lose units."""
    return {port.name for removal in removals if removal.group is not None for port in removal.group.consumers}


def kept_units(removals: Sequence[Removal], statistics: Statistics) -> dict[str, Tensor]:
    """For each observed group that loses units those that stay, ``[k]`` int64."""
    observed = {group.name for group in statistics.groups}
    return {
        removal.group.name: complement(removal.group.size, removal.units)
        for removal in removals
        if removal.group is not None and removal.group.name in observed
    }


def removed_channels(
    graph: tp.DependencyGraph, removals: Sequence[Removal], statistics: Statistics
) -> dict[str, Tensor]:
    """For each observed consumer the channels that go, ``[k]`` int64.

    Raises:
        StaleStatisticsError: If the statistics are of other widths than the groups.
    """
    gone: dict[str, list[Tensor]] = {}
    for removal in removals:
        for port in removal.group.consumers if removal.group is not None else ():
            record = statistics.records.get(("in", port.name))
            if record is not None:
                _check_width(graph, port.name, record.layout.channel.numel())
                positions = port.index[torch.isin(port.unit, removal.units)]
                gone.setdefault(port.name, []).append(record.layout.channel[positions])
    return {name: torch.cat(parts).unique() for name, parts in gone.items()}


def _check_width(graph: tp.DependencyGraph, name: str, observed: int) -> None:
    now = axis_length(graph.model.get_submodule(name), "in", name)
    if now != observed:
        raise StaleStatisticsError(
            f"the statistics of {name!r} cover {observed} positions, but it reads {now} now; calibrate again"
        )


def kept_outputs(dense: nn.Module, removals: Sequence[Removal]) -> dict[str, Tensor]:
    """For each layer that loses outputs, the out-positions that stay, ``[k]`` int64 ascending."""
    gone: dict[str, list[Tensor]] = {}
    for removal in removals:
        for port in removal.group.producers if removal.group is not None else ():
            gone.setdefault(port.name, []).append(port.positions(removal.units))
    return {
        name: complement(axis_length(dense.get_submodule(name), "out", name), torch.cat(parts))
        for name, parts in gone.items()
    }


@contextmanager
def restored_on_failure(graph: tp.DependencyGraph) -> Iterator[None]:
    """After an exception, the graph's model and the graph are as they were."""

    def kept(value: Any) -> Any:
        return value.copy() if isinstance(value, (dict, list)) else value

    modules = {*graph.model.modules(), *graph.module2node}
    states = [(module, {name: kept(value) for name, value in vars(module).items()}) for module in modules]
    tensors = [*graph.model.parameters(), *graph.model.buffers()]
    values = [tensor.detach().clone() for tensor in tensors]
    history = list(graph._pruning_history)
    try:
        yield
    except BaseException:
        for module, state in states:
            vars(module).clear()
            vars(module).update(state)
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)
        graph._pruning_history = history
        raise
