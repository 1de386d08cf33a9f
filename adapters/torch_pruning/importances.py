"""Criteria as torch-pruning importances: pass one as ``importance=`` to any of its pruners."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch_pruning as tp
from torch import Tensor, nn

from nns_plugin.adapters.torch_pruning.criterion_importance import CriterionImportance, FollowedModel
from nns_plugin.adapters.torch_pruning.followed_snapshot import FollowedSnapshot
from nns_plugin.adapters.torch_pruning.followed_statistics import FollowedStatistics
from nns_plugin.adapters.torch_pruning.groups import unit_groups
from nns_plugin.adapters.torch_pruning.installation import add_classes, remove_classes
from nns_plugin.compensation.least_squares import RIDGE
from nns_plugin.criteria.distinctiveness import Distinctiveness, Mode, Vectors
from nns_plugin.criteria.mean_weight import MeanWeight, Weights
from nns_plugin.criteria.semantic import Contrast, Measure, Semantic
from nns_plugin.criteria.switcher import Switcher
from nns_plugin.criteria.wsf import WSF, Reduction
from nns_plugin.statistics.calibration import calibrate
from nns_plugin.statistics.macs import layer_macs, unit_macs
from nns_plugin.statistics.sensitivity import output_sensitivity
from nns_plugin.statistics.statistics import Statistics
from nns_plugin.switcher.scaling_factors import ScalingFactors
from nns_plugin.synapses.snapshot import WeightSnapshot


class DistinctivenessImportance(CriterionImportance):
    """How distinct units are from the others, as a torch-pruning importance.

    Args:
        statistics: Collected with ``gram=True``; labels are not needed.
        mode: ``"pairwise"`` or ``"span"``.
        center: ``None``, a number or ``"mean"``, for ``"pairwise"``.
        vectors: ``"activations"`` or ``"weights"``, for ``"pairwise"``.
        ridge: For ``"span"``.
        sensitivity: For ``"span"``; of one state of the model, so not for iterative pruning.
        cost: For ``"span"``.

    Raises:
        CriterionError: If an option is unknown, or the statistics have no Gram matrices.

    Source:
        See :class:`nns_plugin.criteria.Distinctiveness`.
    """

    criterion_type = Distinctiveness

    def __init__(
        self,
        statistics: Statistics,
        mode: Mode = "pairwise",
        center: float | Literal["mean"] | None = None,
        vectors: Vectors = "activations",
        ridge: float = RIDGE,
        sensitivity: Mapping[str, Tensor] | None = None,
        cost: Mapping[str, float] | None = None,
    ) -> None:
        # The pruner's model takes the place of the identity when the first group comes.
        criterion = Distinctiveness(statistics, nn.Identity(), mode, center, vectors, ridge, sensitivity, cost)
        super().__init__(criterion, {"statistics": FollowedStatistics(statistics), "model": FollowedModel()})

    @classmethod
    def for_macs(
        cls,
        model: nn.Module,
        example_inputs: Any,
        loader: Iterable[Any],
        statistics: Statistics | None = None,
        ridge: float = RIDGE,
        calibration_options: Mapping[str, Any] | None = None,
    ) -> DistinctivenessImportance:
        """Span scores for ``global_pruning=True``: how much removal moves the model's outputs, per MAC that it saves.

        Measures the sensitivity of the model's outputs, which needs gradients but no labels, and the MACs that a unit
        of each group costs. Both belong to the model as it is: for one step, not for iterative pruning.

        Args:
            model: The model to prune.
            example_inputs: As for torch-pruning.
            loader: Re-iterable; yields ``(inputs, labels)`` or ``inputs``.
            statistics: Statistics of the model, with ``gram=True``; collected from the loader by default.
            ridge: See the class.
            calibration_options: Options of :func:`nns_plugin.calibrate`, where statistics are collected.
        """
        if statistics is None:
            statistics = calibrate(
                model, loader, unit_groups(model, example_inputs), gram=True, **(calibration_options or {})
            )
        groups = statistics.groups
        sensitivity = output_sensitivity(model, loader, groups)
        cost = unit_macs(model, groups, layer_macs(model, example_inputs))
        return cls(statistics, "span", ridge=ridge, sensitivity=sensitivity, cost=cost)


class MeanWeightImportance(CriterionImportance):
    """Units' sums of incoming weights, as a torch-pruning importance.

    Args:
        weights: Sum of ``"magnitudes"`` or of ``"values"``.

    Raises:
        CriterionError: If ``weights`` is unknown.

    Source:
        See :class:`nns_plugin.criteria.MeanWeight`.
    """

    criterion_type = MeanWeight

    def __init__(self, weights: Weights = "magnitudes") -> None:
        super().__init__(MeanWeight(nn.Identity(), weights), {"model": FollowedModel()})


class SemanticImportance(CriterionImportance):
    """How active units are on the labels to keep, as a torch-pruning importance.

    Args:
        statistics: Labelled statistics from :func:`nns_plugin.calibrate`.
        labels: The labels to keep, by index or name; all of them by default.
        measure: ``"mean"`` or ``"frequency"``.
        contrast: ``None`` or ``"rest"``.

    Raises:
        LabelError: If a label is unknown or was never seen.
        CriterionError: If an option is unknown.

    Source:
        See :class:`nns_plugin.criteria.Semantic`.

    Example:
        >>> import torch, torch_pruning as tp
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> loader = [(torch.randn(16, 4), torch.arange(16) % 3)]
        >>> importance = SemanticImportance.from_loader(model, torch.randn(2, 4), loader, labels=[0, 2])
        >>> pruner = tp.pruner.BasePruner(
        ...     model, torch.randn(2, 4), importance=importance, pruning_ratio=0.5, ignored_layers=[model[2]]
        ... )
        >>> pruner.step()
        >>> model[0].out_features
        4
    """

    criterion_type = Semantic

    def __init__(
        self,
        statistics: Statistics,
        labels: Sequence[int | str] | None = None,
        measure: Measure = "mean",
        contrast: Contrast | None = None,
    ) -> None:
        criterion = Semantic(statistics, labels, measure, contrast)
        super().__init__(criterion, {"statistics": FollowedStatistics(statistics)})


class WSFImportance(CriterionImportance):
    """How far training moved units' synapses, as a torch-pruning importance.

    The snapshot follows what torch-pruning removes; training in between does not matter.

    Args:
        snapshot: The model's weights before training, or at any earlier checkpoint.
        reduction: Over a unit's producers and consumers: ``"mean"``, ``"sum"``, ``"max"`` or ``"first"``.

    Raises:
        CriterionError: If the reduction is unknown.

    Source:
        See :class:`nns_plugin.criteria.WSF`.
    """

    criterion_type = WSF

    def __init__(self, snapshot: WeightSnapshot, reduction: Reduction = "mean") -> None:
        self._snapshot = FollowedSnapshot(snapshot)
        criterion = WSF(nn.Identity(), snapshot, reduction)
        super().__init__(criterion, {"model": FollowedModel(), "snapshot": self._snapshot})

    @property
    def snapshot(self) -> WeightSnapshot:
        """The snapshot as wide as the model is now, such as for :func:`nns_plugin.synapses.significance.significance`.

        Raises:
            SnapshotError: If units were removed in a way that the pruning history does not list.
        """
        return self._snapshot.latest()


class SwitcherImportance(CriterionImportance):
    """Units' scaling factors, as a torch-pruning importance.

    Args:
        factors: What :class:`nns_plugin.switcher.network.SwitcherNetwork` gives for the model. They do not follow
            removals: for iterative pruning, get new factors from the switcher; a group with other units is an error.

    Source:
        See :class:`nns_plugin.criteria.Switcher`.
    """

    criterion_type = Switcher

    def __init__(self, factors: ScalingFactors) -> None:
        super().__init__(Switcher(factors))


IMPORTANCES: dict[str, type[CriterionImportance]] = {
    "DistinctivenessImportance": DistinctivenessImportance,
    "MeanWeightImportance": MeanWeightImportance,
    "SemanticImportance": SemanticImportance,
    "SwitcherImportance": SwitcherImportance,
    "WSFImportance": WSFImportance,
}


def install() -> None:
    """Add our importances to ``torch_pruning.importance``, for tools that look them up by name there.

    Raises:
        CriterionError: If something else has one of the names already; nothing is added then.
    """
    add_classes(tp.importance, "torch_pruning.importance", IMPORTANCES)


def uninstall() -> None:
    """Undo :func:`install`; does nothing if it was not called."""
    remove_classes(tp.importance, IMPORTANCES)
