"""Removals through torch-pruning: planned before anything changes, carried out one by one, undone on failure."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch_pruning as tp
from torch import Tensor, nn

from nns_plugin.adapters.torch_pruning.groups import UnusableGroupWarning
from nns_plugin.adapters.torch_pruning.norms import MisprunedNormWarning, prune_group, unseen_norms
from nns_plugin.adapters.torch_pruning.traced_group import trace_group
from nns_plugin.adapters.torch_pruning.unit_removal import remove_units
from nns_plugin.compensation.removals import Removal
from nns_plugin.errors import GroupError, PruningError
from nns_plugin.models.layers import is_batch_norm
from nns_plugin.units import UnitGroup, complement

R = TypeVar("R", bound=Removal)


@dataclass(frozen=True, eq=False)
class HostRemoval(Removal):
    """A removal in torch-pruning's own terms.

    Attributes:
        host: The root module, its pruning function and the root's positions that go.
    """

    host: tuple[nn.Module, Any, list[int]]


class PrunableGraph:
    """A model in torch-pruning's hands; see :class:`nns_plugin.compensation.removals.PrunableModel`."""

    def __init__(self, graph: tp.DependencyGraph) -> None:
        self._graph = graph

    @property
    def model(self) -> nn.Module:
        """See the protocol."""
        model: nn.Module = self._graph.model
        return model

    def carry_out(self, removal: Removal) -> None:
        """See the protocol."""
        graph = self._graph
        if isinstance(removal, HostRemoval):  # built anew: positions on a concatenation move with each removal
            prune_group(graph.get_pruning_group(*removal.host))
        elif removal.group is not None:
            remove_units(graph, removal.group, removal.units)

    def restored_on_failure(self) -> AbstractContextManager[None]:
        """See the protocol."""
        return _restored_on_failure(self._graph)

    def following_norm(self, name: str) -> str | None:
        """See the protocol."""
        node = self._graph.module2node.get(self.model.get_submodule(name))
        outputs = [] if node is None else node.outputs
        if len(outputs) != 1 or not is_batch_norm(outputs[0].module):
            return None
        norm = outputs[0].module
        if norm.running_mean is None or len(outputs[0].inputs) != 1:
            return None
        names: dict[nn.Module, str] = {module: name for name, module in self.model.named_modules()}
        return names[norm]


def planned_removals(pruner: tp.pruner.BasePruner) -> list[HostRemoval]:
    """The removals of the pruner's next step, in the order of the groups' first producers; nothing is removed yet.

    Raises:
        PruningError: If the model has norms that the pruner does not see, and whose width would not follow.
    """
    graph = pruner.DG
    if names := unseen_norms(graph):
        raise PruningError(
            f"torch-pruning does not see RMSNorm {names[0]!r}, which has no weight, so its normalized_shape would not "
            "follow removals; pass customized_pruners=norm_pruners() to the pruner"
        )
    removals = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MisprunedNormWarning)  # prune_group handles them
        host_groups = list(pruner.step(interactive=True))
    for host_group in host_groups:
        dep, positions = host_group[0]
        root, handler = dep.target.module, dep.handler
        is_out = graph.is_out_channel_pruning_fn(handler)
        length = graph.get_out_channels(root) if is_out else graph.get_in_channels(root)
        host = (root, handler, list(positions))
        try:
            traced = trace_group(graph.get_pruning_group(root, handler, list(range(length))))
        except GroupError as error:
            warnings.warn(f"removed without compensation: {error}", UnusableGroupWarning, stacklevel=3)
            removals.append(HostRemoval(None, torch.tensor([]), host))
            continue
        units = traced.unit_of_root[torch.tensor(positions, dtype=torch.int64)].unique()
        removals.append(HostRemoval(traced.group, units, host))
    return _in_forward_order(graph, removals)


def removals_of(graph: tp.DependencyGraph, groups: Sequence[UnitGroup], kept: Mapping[str, Tensor]) -> list[Removal]:
    """The removals that leave each named group its given units, in the order of planned removals."""
    removals = [
        Removal(group, gone)
        for group in groups
        if group.name in kept and (gone := complement(group.size, kept[group.name])).numel()
    ]
    return _in_forward_order(graph, removals)


def _in_forward_order(graph: tp.DependencyGraph, removals: Sequence[R]) -> list[R]:
    """Removals in the order of their groups' first producers in the model; those without a group come first."""
    order = {name: place for place, (name, _) in enumerate(graph.model.named_modules())}
    return sorted(removals, key=lambda removal: order[removal.group.name] if removal.group else -1)


@contextmanager
def _restored_on_failure(graph: tp.DependencyGraph) -> Iterator[None]:
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
