"""Any criterion as a torch-pruning importance."""

from __future__ import annotations

import dataclasses
import warnings

import torch
import torch_pruning as tp
from torch import Tensor

from nns_plugin.adapters.torch_pruning.followed_statistics import FollowedStatistics
from nns_plugin.adapters.torch_pruning.groups import UnusableGroupWarning, writes_output
from nns_plugin.adapters.torch_pruning.norms import MisprunedNormWarning, misprunable_norms
from nns_plugin.adapters.torch_pruning.traced_group import trace_group
from nns_plugin.criteria.contract import Criterion, score
from nns_plugin.criteria.ties import separate_ties
from nns_plugin.errors import GroupError
from nns_plugin.models.inputs import device_of
from nns_plugin.statistics.statistics import Statistics


class CriterionImportance(tp.importance.Importance):
    """Any criterion as a torch-pruning importance.

    Equal scores are told apart by the smallest steps that single precision knows, lower units above higher ones,
    because global pruning removes everything at or under its threshold.
    """

    def __init__(self, criterion: Criterion, followed: FollowedStatistics | None = None) -> None:
        self._criterion = criterion
        self._followed = followed
        self._ordinals: dict[str, int] = {}

    @torch.no_grad()
    def __call__(self, group: tp.dependency.Group) -> Tensor | None:
        """Scores of a full group, one a root position, float64.

        Returns:
            The scores, or ``None`` (after a warning that names the group) if the group is malformed, writes the
            model's output, or cannot be scored by the criterion. torch-pruning leaves such a group alone.

        Raises:
            StaleStatisticsError: If the model has changed in a way that the statistics cannot follow.
            CriterionError: If the criterion breaks the score contract.
        """
        try:
            traced = trace_group(group)
        except GroupError as error:
            warnings.warn(f"left alone: {error}", UnusableGroupWarning, stacklevel=2)
            return None
        if writes_output(group):
            warnings.warn(
                f"left alone: group {traced.group.name!r} writes the model's output; list it in ignored_layers",
                UnusableGroupWarning,
                stacklevel=2,
            )
            return None
        for name, fault in misprunable_norms(group).items():
            warnings.warn(
                f"norm {name!r}: torch-pruning's own step {fault}; pass customized_pruners=norm_pruners() to the "
                "pruner, or use compensated_step",
                MisprunedNormWarning,
                stacklevel=2,
            )
        scores = score(self._current(group), traced.group)
        if self._followed is not None:
            self._followed.saw(group, traced)
        if scores is None:
            return None
        ordinal = self._ordinals.setdefault(traced.group.name, len(self._ordinals))
        separated = separate_ties(scores, ordinal)[traced.unit_of_root]
        device = device_of(group._DG.model)  # where the host's regularisers multiply weights with them
        return separated if device.type == "mps" else separated.to(device)

    def follow(self, graph: tp.DependencyGraph, statistics: Statistics) -> None:
        """Go on with statistics that somebody else has kept in step with the graph's model."""
        if self._followed is not None:
            self._followed.accept(graph, statistics)

    def _current(self, group: tp.dependency.Group) -> Criterion:
        if self._followed is None:
            return self._criterion
        statistics = self._followed.current(group._DG)
        found = {"statistics": statistics, "model": group._DG.model}
        changed = {name: found[name] for name in self._criterion.requires if name in found}
        if any(getattr(self._criterion, name) is not value for name, value in changed.items()):
            self._criterion = dataclasses.replace(self._criterion, **changed)  # type: ignore[type-var]
        return self._criterion
