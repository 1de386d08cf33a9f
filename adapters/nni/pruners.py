"""Our criteria as NNI pruners, put where NNI's own would be."""

from __future__ import annotations

from typing import Any, Literal

import torch
from nni.compression.base.target_space import PruningTargetSpace
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.utils import Evaluator
from torch import Tensor, nn

from nns_plugin.adapters.nni.criterion_pruner import CriterionPruner
from nns_plugin.adapters.nni.wrappers import held_masks, plain_copy
from nns_plugin.compensation.least_squares import RIDGE
from nns_plugin.criteria.contract import Criterion
from nns_plugin.criteria.distinctiveness import Distinctiveness, Mode, Vectors
from nns_plugin.criteria.mean_weight import MeanWeight, Weights
from nns_plugin.criteria.semantic import Contrast, Measure, Semantic
from nns_plugin.criteria.switcher import Switcher
from nns_plugin.criteria.wsf import WSF, Reduction
from nns_plugin.errors import PruningError
from nns_plugin.statistics.statistics import Statistics
from nns_plugin.switcher.network import SwitcherNetwork
from nns_plugin.switcher.scaling_factors import ScalingFactors
from nns_plugin.synapses.significance import significance
from nns_plugin.synapses.snapshot import WeightSnapshot


class SemanticPruner(CriterionPruner):
    """Label-driven activity of units, as an NNI pruner.

    ``sparse_threshold`` is the zeta of the source: units that are less active than that, relative to the most active
    unit of their layer, go.

    Args:
        measure: ``"mean"`` or ``"frequency"``.
        contrast: ``None`` or ``"rest"``.
        **options: Of :class:`CriterionPruner`; ``labels`` are the labels to keep, all of them by default.

    Source:
        See :class:`nns_plugin.criteria.Semantic`.
    """

    _observes = True
    _labelled = True

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict[str, Any]],
        evaluator: Evaluator | None = None,
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
        *,
        measure: Measure = "mean",
        contrast: Contrast | None = None,
        **options: Any,
    ) -> None:
        self._measure: Measure = measure
        self._contrast: Contrast | None = contrast
        super().__init__(model, config_list, evaluator, existed_wrappers, **options)

    def _criterion(self, model: nn.Module, statistics: Statistics | None) -> Criterion:
        assert statistics is not None
        return Semantic(statistics, self._labels, self._measure, self._contrast)


class DistinctivenessPruner(CriterionPruner):
    """Units that others can stand in for go first, as an NNI pruner.

    Args:
        mode: ``"pairwise"`` or ``"span"``.
        center: ``None``, a number or ``"mean"``, for ``"pairwise"``.
        vectors: ``"activations"`` or ``"weights"``, for ``"pairwise"``.
        ridge: For ``"span"``.
        **options: Of :class:`CriterionPruner`; statistics need Gram matrices.

    Source:
        See :class:`nns_plugin.criteria.Distinctiveness`.
    """

    _observes = True
    _gram = True

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict[str, Any]],
        evaluator: Evaluator | None = None,
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
        *,
        mode: Mode = "pairwise",
        center: float | Literal["mean"] | None = None,
        vectors: Vectors = "activations",
        ridge: float = RIDGE,
        **options: Any,
    ) -> None:
        self._how = (mode, center, vectors, ridge)
        super().__init__(model, config_list, evaluator, existed_wrappers, **options)

    def _criterion(self, model: nn.Module, statistics: Statistics | None) -> Criterion:
        assert statistics is not None
        return Distinctiveness(statistics, model, *self._how)


class MeanWeightPruner(CriterionPruner):
    """Units whose incoming weights sum up to little go first, as an NNI pruner.

    Args:
        weights: Sum of ``"magnitudes"`` or of ``"values"``.
        **options: Of :class:`CriterionPruner`.

    Source:
        See :class:`nns_plugin.criteria.MeanWeight`.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict[str, Any]],
        evaluator: Evaluator | None = None,
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
        *,
        weights: Weights = "magnitudes",
        **options: Any,
    ) -> None:
        self._weights: Weights = weights
        super().__init__(model, config_list, evaluator, existed_wrappers, **options)

    def _criterion(self, model: nn.Module, statistics: Statistics | None) -> Criterion:
        return MeanWeight(model, self._weights)


class WSFPruner(CriterionPruner):
    """Units, or single weights, that training hardly moved go first, as an NNI pruner.

    Args:
        snapshot: The model's weights before training, or at any earlier checkpoint.
        reduction: Over the layers that write and read a unit: ``"mean"``, ``"sum"``, ``"max"`` or ``"first"``.
        single_weights: Whether the default granularity is single weights, as with NNI's ``LevelPruner``. A
            ``granularity`` that splits units, such as ``[1, 1]`` in a linear layer, asks for them as well.
        **options: Of :class:`CriterionPruner`.

    Source:
        See :class:`nns_plugin.criteria.WSF` and :func:`nns_plugin.synapses.significance.significance`.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict[str, Any]],
        evaluator: Evaluator | None = None,
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
        *,
        snapshot: WeightSnapshot,
        reduction: Reduction = "mean",
        single_weights: bool = False,
        **options: Any,
    ) -> None:
        self._snapshot, self._reduction = snapshot, reduction
        self._single_weights = single_weights
        snapshot.movement(model)  # refuses another architecture, before anything changes
        super().__init__(model, config_list, evaluator, existed_wrappers, **options)

    def _criterion(self, model: nn.Module, statistics: Statistics | None) -> Criterion:
        return WSF(model, self._snapshot, self._reduction)

    def _weight_metric(self, name: str, space: PruningTargetSpace) -> Tensor:
        moved = significance(plain_copy(self.bound_model), self._snapshot)
        if name not in moved or space._target_name != "weight":
            raise PruningError(f"{space._target_name!r} of {name!r} has no synapses, so that none can be masked alone")
        there = held_masks(self.bound_model)[name]["weight"].broadcast_to(moved[name].shape).bool()
        return self._shrunk(moved[name].masked_fill(~there, -1.0), space)

    def _set_default_sparse_granularity(self, target_space: PruningTargetSpace) -> str | None:
        return None if self._single_weights else super()._set_default_sparse_granularity(target_space)


class SwitcherPruner(CriterionPruner):
    """Units with the lowest factors go first, as an NNI pruner; ``sparse_threshold`` is the least factor that stays.

    Args:
        factors: What a switcher network gives for the model; or the network itself, which is then asked again whenever
            masks are made.
        **options: Of :class:`CriterionPruner`.

    Source:
        See :class:`nns_plugin.criteria.Switcher`.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict[str, Any]],
        evaluator: Evaluator | None = None,
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
        *,
        factors: ScalingFactors | SwitcherNetwork,
        **options: Any,
    ) -> None:
        self._factors = factors
        super().__init__(model, config_list, evaluator, existed_wrappers, **options)

    def _criterion(self, model: nn.Module, statistics: Statistics | None) -> Criterion:
        if isinstance(self._factors, ScalingFactors):
            return Switcher(self._factors)
        with torch.no_grad():
            return Switcher(self._factors(model))
