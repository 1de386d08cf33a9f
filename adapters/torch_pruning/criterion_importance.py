"""Any criterion as a torch-pruning importance, whose evidence follows the model while units are removed."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol, Self

import torch
import torch_pruning as tp
from torch import Tensor, nn

from nns_plugin.adapters.torch_pruning.followed_statistics import FollowedStatistics, Recalibration
from nns_plugin.adapters.torch_pruning.groups import UnusableGroupWarning, unit_groups, writes_output
from nns_plugin.adapters.torch_pruning.norms import MisprunedNormWarning, misprunable_norms, unseen_norms
from nns_plugin.adapters.torch_pruning.traced_group import TracedGroup, trace_group
from nns_plugin.criteria.contract import Criterion, needs_of, score
from nns_plugin.criteria.ties import separate_ties
from nns_plugin.errors import CriterionError, GroupError
from nns_plugin.models.inputs import device_of
from nns_plugin.statistics.statistics import Statistics


class Evidence(Protocol):
    """What a criterion scores by, kept in step with the model."""

    def current(self, graph: tp.DependencyGraph) -> Any:
        """The evidence about the graph's model as it is now."""
        ...

    def saw(self, host_group: tp.dependency.Group, traced: TracedGroup) -> None:
        """Remember how the positions of a group hang together; the pruning history lists root positions alone."""
        ...


class FollowedModel:
    """The model of whatever graph is scored."""

    def current(self, graph: tp.DependencyGraph) -> nn.Module:
        """See the protocol."""
        model: nn.Module = graph.model
        return model

    def saw(self, host_group: tp.dependency.Group, traced: TracedGroup) -> None:
        """Nothing to remember."""


class CriterionImportance(tp.importance.Importance):
    """Any criterion as a torch-pruning importance.

    Every importance has two constructors: the class itself, which takes the criterion's evidence and options, and
    :meth:`from_loader`. Equal scores are separated by the smallest steps of single precision, lower units above
    higher ones, because global pruning removes everything at or under its threshold.

    Args:
        criterion: The criterion.
        evidence: By name of the criterion's argument, the evidence that follows the model; all else stays as given.

    Attributes:
        criterion_type: In a subclass, the class of its criterion.
    """

    criterion_type: ClassVar[type[Any] | None] = None

    def __init__(self, criterion: Criterion, evidence: Mapping[str, Evidence] | None = None) -> None:
        self._criterion = criterion
        self._evidence = dict(evidence or {})
        self._ordinals: dict[str, int] = {}

    @classmethod
    def from_loader(
        cls,
        model: nn.Module,
        example_inputs: Any,
        loader: Iterable[Any],
        *arguments: Any,
        calibration_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Self:
        """Calibrate now, and again whenever the model has changed.

        A criterion without statistics (``mean_weight``, ``switcher``, ``wsf``) leaves the loader unread, so that all
        importances can be built in the same way.

        Args:
            model: The model to prune.
            example_inputs: As for torch-pruning.
            loader: Re-iterable; yields ``(inputs, labels)`` or ``inputs``.
            *arguments: Arguments of the class, without the statistics.
            calibration_options: Options of :func:`nns_plugin.calibrate`.
            **options: Options of the class, without the statistics.

        Raises:
            CriterionError: If the class names no criterion, or an option is unknown.
            CalibrationError: If the loader cannot be used, or there is nothing to prune.
        """
        if cls.criterion_type is None:
            raise CriterionError(f"{cls.__name__} names no criterion; set criterion_type, or pass it a criterion")
        needs = needs_of(cls.criterion_type)
        observes = "statistics" in needs.requires
        try:
            inspect.signature(cls).bind(*[None] * observes, *arguments, **options)
        except TypeError as error:
            raise CriterionError(
                f"{cls.__name__}.from_loader: {error}; it takes the options of the class, and those of calibrate as "
                "calibration_options"
            ) from error
        if not observes:
            return cls(*arguments, **options)
        settings = {"gram": needs.gram, **(calibration_options or {})}
        recalibration = Recalibration(loader, unit_groups(model, example_inputs), settings)
        statistics = recalibration.statistics_of(model)
        constructor: Any = cls  # a subclass takes its criterion's evidence
        importance: Self = constructor(statistics, *arguments, **options)
        importance._evidence["statistics"] = FollowedStatistics(statistics, recalibration)
        return importance

    @property
    def statistics(self) -> Statistics | None:
        """The statistics that the last scores came from; ``None`` of a criterion that needs none."""
        followed = self._evidence.get("statistics")
        return followed.latest if isinstance(followed, FollowedStatistics) else None

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
        for name in unseen_norms(group._DG):
            warnings.warn(
                f"norm {name!r}: torch-pruning does not see an RMSNorm without weight, and leaves its normalized_shape "
                "as it is; pass customized_pruners=norm_pruners() to the pruner",
                MisprunedNormWarning,
                stacklevel=2,
            )
        scores = score(self._current(group._DG), traced.group)
        for evidence in self._evidence.values():
            evidence.saw(group, traced)
        if scores is None:
            return None
        ordinal = self._ordinals.setdefault(traced.group.name, len(self._ordinals))
        separated = separate_ties(scores, ordinal)[traced.unit_of_root]
        device = device_of(group._DG.model)  # where the host's regularisers multiply weights with them
        return separated if device.type == "mps" else separated.to(device)

    def follow(self, graph: tp.DependencyGraph, statistics: Statistics) -> None:
        """Continue with statistics that the caller has kept in sync with the graph's model."""
        followed = self._evidence.get("statistics")
        if isinstance(followed, FollowedStatistics):
            followed.accept(graph, statistics)

    def _current(self, graph: tp.DependencyGraph) -> Criterion:
        """The criterion, with evidence about the graph's model as it is now."""
        found = {name: evidence.current(graph) for name, evidence in self._evidence.items()}
        if any(getattr(self._criterion, name) is not value for name, value in found.items()):
            self._criterion = dataclasses.replace(self._criterion, **found)  # type: ignore[type-var]
        return self._criterion
