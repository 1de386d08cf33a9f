"""torch-pruning as a backend: it traces models and removes units for the core."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from nns_plugin.adapters.torch_pruning.graph import TracedGraph, build_graph
from nns_plugin.adapters.torch_pruning.groups import (
    UnusableGroupWarning,
    graph_groups,
    output_layers,
    resolve_layers,
    sound_groups,
)
from nns_plugin.adapters.torch_pruning.removals import PrunableGraph, removals_of
from nns_plugin.compensation.compensated import compensated_removal
from nns_plugin.compensation.options import Compensation
from nns_plugin.compensation.survivors import Survivors
from nns_plugin.statistics.statistics import Statistics
from nns_plugin.units import UnitGroup


class TorchPruningBackend:
    """A model traced by torch-pruning; see :class:`nns_plugin.backends.TracedModel`."""

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        self._model = model
        self._graph = build_graph(model, example_inputs)

    @property
    def model(self) -> nn.Module:
        """See the protocol."""
        return self._model

    @property
    def graph(self) -> TracedGraph:
        """The host's graph of the model."""
        return self._graph

    @property
    def history(self) -> Sequence[tuple[str, bool, list[int]]]:
        """See the protocol."""
        return list(self._graph.pruning_history())

    @functools.cached_property
    def heads(self) -> tuple[str, ...]:
        """See the protocol."""
        with warnings.catch_warnings():  # groups() names what is left out
            warnings.simplefilter("ignore", UnusableGroupWarning)
            return output_layers(self._graph)

    def groups(self, ignored_layers: Sequence[str] = (), *, checked: bool = True) -> tuple[UnitGroup, ...]:
        """See the protocol."""
        ignored = resolve_layers(self._graph.model, ignored_layers)
        if checked:
            return graph_groups(self._graph, ignored)
        with warnings.catch_warnings():  # whoever extracted the subnet was warned
            warnings.simplefilter("ignore", UnusableGroupWarning)
            return sound_groups(self._graph, ignored)

    def keep(self, groups: Sequence[UnitGroup], kept: Mapping[str, Tensor]) -> None:
        """See the protocol."""
        prunable = PrunableGraph(self._graph)
        with prunable.restored_on_failure():
            for removal in removals_of(self._graph, groups, kept):
                prunable.carry_out(removal)

    def keep_and_compensate(
        self,
        groups: Sequence[UnitGroup],
        kept: Mapping[str, Tensor],
        statistics: Statistics,
        how: Compensation,
        loader: Iterable[Any] | None,
        survivors: Mapping[str, Survivors] | None = None,
        progress: bool = False,
    ) -> None:
        """See the protocol."""
        removals = removals_of(self._graph, groups, kept)
        compensated_removal(
            PrunableGraph(self._graph), removals, statistics, how, loader, survivors=survivors, progress=progress
        )
