"""Statistics that follow a model through torch-pruning's removals, and are never silently stale."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from nns_plugin.adapters.torch_pruning.groups import groups_again
from nns_plugin.adapters.torch_pruning.traced_group import TracedGroup
from nns_plugin.errors import StaleStatisticsError
from nns_plugin.models.layers import axis_length
from nns_plugin.statistics.calibration import calibrate
from nns_plugin.statistics.statistics import Statistics
from nns_plugin.units import UnitGroup

ADVICE = "calibrate again, or use an importance that was built with from_loader, which does so by itself"


@dataclass(frozen=True, eq=False)
class Recalibration:
    """Collects statistics anew.

    Attributes:
        loader: Re-iterable; yields ``(inputs, labels)`` or ``inputs``.
        groups: The groups of the model as it was first.
        options: Options of :func:`nns_plugin.calibrate`.
    """

    loader: Iterable[Any]
    groups: Sequence[UnitGroup]
    options: Mapping[str, Any]

    def statistics_of(self, model: nn.Module) -> Statistics:
        """Statistics of the model as it was first."""
        return calibrate(model, self.loader, self.groups, **self.options)

    def again(self, graph: tp.DependencyGraph) -> Statistics:
        """Statistics of the graph's model as it is now."""
        return calibrate(graph.model, self.loader, groups_again(graph, self.groups), **self.options)


class FollowedStatistics:
    """Statistics that follow a model through torch-pruning's removals.

    Before a group is scored, :meth:`current` checks whether the statistics still describe the model. If units were
    removed, the statistics are collected again (with a ``recalibration``) or narrowed by the graph's pruning history.
    If anything else changed (weights were trained, or the history does not explain the removals), they are collected
    again or a :class:`StaleStatisticsError` is raised.

    Training is detected by the version counters of parameters and buffers, which optimisers, batch norms and
    ``load_state_dict`` advance; writing to a parameter's ``.data`` is not detected.
    """

    _graph: weakref.ref[Any] | None
    _seen: int
    _marks: list[tuple[weakref.ref[Any], int]]
    _roots: dict[tuple[str, bool], tuple[str, list[int]]]

    def __init__(self, statistics: Statistics, recalibration: Recalibration | None = None) -> None:
        self._statistics = statistics
        self._recalibration = recalibration
        self._forget()

    @property
    def latest(self) -> Statistics:
        """The statistics as they were last brought up to date."""
        return self._statistics

    def current(self, graph: tp.DependencyGraph) -> Statistics:
        """The statistics of the graph's model as it is now.

        Raises:
            StaleStatisticsError: If they cannot be brought up to date.
        """
        if self._graph is None or self._graph() is not graph:
            self._begin(graph)
        elif self._changed(graph):
            self._update(graph)
        return self._statistics

    def accept(self, graph: tp.DependencyGraph, statistics: Statistics) -> None:
        """Go on with these statistics; the caller guarantees that they describe the graph's model as it is now."""
        self._statistics = statistics
        self._mark(graph)

    def saw(self, host_group: tp.dependency.Group, traced: TracedGroup) -> None:
        """Remember how a group's root numbers its units; the pruning history lists root positions."""
        graph = host_group._DG
        root = host_group[0].dep
        key = (str(graph._module2name[root.target.module]), graph.is_out_channel_pruning_fn(root.handler))
        self._roots[key] = (traced.group.name, traced.unit_of_root.tolist())

    def _begin(self, graph: tp.DependencyGraph) -> None:
        former = None if self._graph is None else self._graph()
        if former is not None and former.model is graph.model and self._changed(former):
            self._update(former)  # another pruner takes over; the former one's history explains the removals
        try:
            self._statistics.check_current(graph.model, advice=ADVICE)
        except StaleStatisticsError:
            if self._recalibration is None:
                raise
            self._statistics = self._recalibration.again(graph)
        if not self._statistics.fingerprint:  # narrowed: they do not record which weights they belong to
            if misfit := self._misfit(graph):
                self._again(graph, f"the statistics do not fit the model: {misfit}")
            elif self._marks and self._written(graph.model):
                self._again(graph, "weights have changed since an earlier pruner scored it")
        self._mark(graph)

    def _changed(self, graph: tp.DependencyGraph) -> bool:
        if len(graph.pruning_history()) != self._seen:
            return True
        return self._written(graph.model)

    def _update(self, graph: tp.DependencyGraph) -> None:
        if self._recalibration is not None:
            self._statistics = self._recalibration.again(graph)
        elif self._trained(graph):
            self._again(graph, "weights have changed since the statistics were collected")
        else:
            kept = kept_by_history(graph.pruning_history()[self._seen :], self._statistics.groups, self._roots)
            self._statistics = self._statistics.narrow(kept)
            if misfit := self._misfit(graph):
                self._again(graph, f"the model lost units that its pruning history does not list: {misfit}")
        self._mark(graph)

    def _written(self, model: nn.Module) -> bool:
        """Whether a parameter or buffer was written to or replaced."""
        tensors = _state(model)
        return len(tensors) != len(self._marks) or any(
            mark() is not tensor or version != tensor._version
            for tensor, (mark, version) in zip(tensors, self._marks, strict=True)
        )

    def _trained(self, graph: tp.DependencyGraph) -> bool:
        """Whether a parameter or buffer was written to; removals replace them by tensors of version 0."""
        known = {id(tensor): version for mark, version in self._marks if (tensor := mark()) is not None}
        return any(tensor._version != known.get(id(tensor), 0) for tensor in _state(graph.model))

    def _misfit(self, graph: tp.DependencyGraph) -> str:
        """The first observed axis whose length differs from its record; empty if all fit."""
        modules = dict(graph.model.named_modules())
        for (side, name), record in self._statistics.records.items():
            covered = record.layout.channel.numel()
            if name not in modules:
                return f"module {name!r} is missing"
            if (length := axis_length(modules[name], side, name)) != covered:
                return f"{name!r} has {length} positions, the statistics cover {covered}"
        return ""

    def _again(self, graph: tp.DependencyGraph, reason: str) -> None:
        if self._recalibration is None:
            raise StaleStatisticsError(f"{reason}; {ADVICE}")
        self._statistics = self._recalibration.again(graph)

    def _mark(self, graph: tp.DependencyGraph) -> None:
        self._graph = weakref.ref(graph)
        self._seen = len(graph.pruning_history())
        self._marks = [(weakref.ref(tensor), tensor._version) for tensor in _state(graph.model)]
        self._roots = {}

    def _forget(self) -> None:
        self._graph = None
        self._seen = 0
        self._marks = []
        self._roots = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_statistics": self._statistics, "_recalibration": self._recalibration}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


def _state(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def kept_by_history(
    history: Sequence[Sequence[Any]],
    groups: Sequence[UnitGroup],
    roots: dict[tuple[str, bool], tuple[str, list[int]]],
) -> dict[str, Tensor]:
    """Which units are left after the removals of a pruning history.

    Args:
        history: Entries ``[root name, is out, removed root positions]`` of torch-pruning, oldest first.
        groups: The groups before the removals.
        roots: For each root its group's name and the unit of each of its positions before the removals.

    Returns:
        For each pruned group the kept units, ``[k]`` int64 ascending.

    Raises:
        StaleStatisticsError: If an entry's root is unknown or its positions make no sense: ``group.prune(idxs)``
            is recorded twice, the second time with all positions.
    """
    sizes = {group.name: group.size for group in groups}
    left = {key: list(units) for key, (_, units) in roots.items()}
    removed: dict[str, set[int]] = {}
    for name, is_out, positions in history:
        key = (name, bool(is_out))
        if key not in left:
            raise StaleStatisticsError(f"units of {name!r} were removed, which were never scored; {ADVICE}")
        gone = set(positions)
        if not gone <= set(range(len(left[key]))) or len(gone) == len(left[key]):
            raise StaleStatisticsError(f"the pruning history of {name!r} cannot be followed; {ADVICE}")
        units = {left[key][position] for position in gone}
        left[key] = [unit for position, unit in enumerate(left[key]) if position not in gone]
        if units & set(left[key]):
            raise StaleStatisticsError(f"some units of {name!r} were removed in part; {ADVICE}")
        removed.setdefault(roots[key][0], set()).update(units)
    return {
        name: torch.tensor([unit for unit in range(sizes[name]) if unit not in units])
        for name, units in removed.items()
    }
