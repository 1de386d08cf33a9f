"""A weight snapshot that follows a model through torch-pruning's removals."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from nns_plugin.adapters.torch_pruning.traced_group import TracedGroup
from nns_plugin.errors import SnapshotError
from nns_plugin.models.preserve import copied
from nns_plugin.synapses.snapshot import WeightSnapshot, named_weights

Slice = tuple[str, Callable[..., Any], list[int], list[int]]  # module, pruning function, its positions, the root's


class FollowedSnapshot:
    """A weight snapshot that loses the units that the model loses.

    A twin of the model holds the snapshot's weights. The removals in the pruning history are applied to the twin by the
    host's own functions, layer by layer; training in between does not matter.
    """

    def __init__(self, snapshot: WeightSnapshot) -> None:
        self._snapshot = snapshot
        self._graph: weakref.ref[Any] | None = None
        self._twin: nn.Module | None = None
        self._seen = 0
        self._slices: dict[tuple[str, bool], list[Slice]] = {}

    def current(self, graph: tp.DependencyGraph) -> WeightSnapshot:
        """The snapshot of the graph's model as wide as it is now.

        Raises:
            SnapshotError: If the snapshot is of another architecture, or units were removed in a way that the history
                does not list.
        """
        former = None if self._graph is None else self._graph()
        if former is not None and len(former.pruning_history()) != self._seen:
            self._narrow(former)
        now = named_weights(graph.model)
        self._snapshot.check(now)
        if former is not graph:
            self._graph = weakref.ref(graph)
            self._twin = None
        self._seen = len(graph.pruning_history())
        return self._snapshot

    def latest(self) -> WeightSnapshot:
        """The snapshot of the model that was scored last, as wide as that is now; before any scoring, the given one.

        Raises:
            SnapshotError: See :meth:`current`.
        """
        graph = None if self._graph is None else self._graph()
        return self._snapshot if graph is None else self.current(graph)

    def saw(self, host_group: tp.dependency.Group, traced: TracedGroup) -> None:
        """Remember how the positions of a full group hang together; the pruning history lists root positions alone."""
        graph = host_group._DG
        if self._twin is None:
            self._twin = self._snapshot.restored(copied(graph.model).cpu())
        root = host_group[0].dep
        key = (str(graph._module2name[root.target.module]), graph.is_out_channel_pruning_fn(root.handler))
        self._slices[key] = [
            (str(graph._module2name[item.dep.target.module]), item.dep.handler, list(item.idxs), list(item.root_idxs))
            for item in host_group
            if item.dep.target.module in graph._module2name and not isinstance(item.dep.target.module, nn.Parameter)
        ]

    def _narrow(self, graph: tp.DependencyGraph) -> None:
        """Remove from the twin the units that the graph's model has lost since the groups were seen."""
        twin = self._twin
        if twin is None:
            raise SnapshotError("units were removed before any group was scored: the weight snapshot cannot follow")
        left: dict[tuple[str, bool], list[int]] = {}
        for name, is_out, positions in graph.pruning_history()[self._seen :]:
            key = (name, bool(is_out))
            if key not in self._slices:
                raise SnapshotError(f"units of {name!r} were removed, which were never scored: take a new snapshot")
            stays = left.setdefault(key, sorted({root for _, _, _, roots in self._slices[key] for root in roots}))
            if not set(positions) <= set(range(len(stays))):
                raise SnapshotError(f"the pruning history of {name!r} cannot be followed: take a new snapshot")
            left[key] = [root for place, root in enumerate(stays) if place not in set(positions)]
        gone: dict[tuple[str, Callable[..., Any]], set[int]] = {}
        for key, stays in left.items():
            for module, function, positions, roots in self._slices[key]:
                lost = {position for position, root in zip(positions, roots, strict=True) if root not in set(stays)}
                gone.setdefault((module, function), set()).update(lost)
        modules = dict(twin.named_modules())
        with torch.no_grad():
            for (name, function), lost in gone.items():
                if lost and name in modules:
                    function(modules[name], sorted(lost))
        self._snapshot = WeightSnapshot(twin)
        self._slices = {}
        self._twin = None

    def __getstate__(self) -> dict[str, Any]:
        return {"snapshot": self._snapshot}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["snapshot"])  # type: ignore[misc]
