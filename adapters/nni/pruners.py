"""The built-in criteria as NNI pruners, used where NNI's own would be."""

from __future__ import annotations

from typing import Any

import torch
from nni.compression.base.target_space import PruningTargetSpace
from torch import Tensor, nn

from nns_plugin.adapters.nni.block_metrics import block_means
from nns_plugin.adapters.nni.criterion_pruner import CriterionPruner
from nns_plugin.adapters.nni.wrappers import held_masks, plain_copy
from nns_plugin.adapters.torch_pruning.traced_units import TracedUnits
from nns_plugin.compensation.least_squares import RIDGE
from nns_plugin.criteria.contract import Criterion, needs_of
from nns_plugin.criteria.distinctiveness import Distinctiveness, Mode, Vectors
from nns_plugin.criteria.mean_weight import MeanWeight, Weights
from nns_plugin.criteria.semantic import Contrast, Measure, Semantic
from nns_plugin.criteria.switcher import Switcher
from nns_plugin.criteria.wsf import WSF, Reduction
from nns_plugin.errors import PruningError
from nns_plugin.models.inputs import device_of
from nns_plugin.statistics.angles import Center
from nns_plugin.statistics.statistics import Statistics
from nns_plugin.switcher.network import SwitcherNetwork
from nns_plugin.switcher.scaling_factors import ScalingFactors
from nns_plugin.synapses.significance import significance
from nns_plugin.synapses.snapshot import WeightSnapshot


class SemanticPruner(CriterionPruner):
    """How active units are on the labels to keep, as an NNI pruner.

    ``sparse_threshold`` is the zeta of the source: units that are less active, relative to the most active unit of
    their layer, are masked.

    Args:
        *arguments: As for NNI's pruners; see :class:`CriterionPruner`.
        measure: ``"mean"`` or ``"frequency"``.
        contrast: ``None`` or ``"rest"``.
        **options: Options of :class:`CriterionPruner`; ``labels`` are the labels to keep, all of them by default.

    Source:
        See :class:`nns_plugin.criteria.Semantic`.
    """

    _needs = needs_of(Semantic)

    def __init__(
        self, *arguments: Any, measure: Measure = "mean", contrast: Contrast | None = None, **options: Any
    ) -> None:
        self._measure: Measure = measure
        self._contrast: Contrast | None = contrast
        super().__init__(*arguments, **options)

    def _criterion(self, model: nn.Module, statistics: Statistics | None) -> Criterion:
        assert statistics is not None
        return Semantic(statistics, self._labels, self._measure, self._contrast)


class DistinctivenessPruner(CriterionPruner):
    """How distinct units are from the others, as an NNI pruner.

    Args:
        *arguments: As for NNI's pruners; see :class:`CriterionPruner`.
        mode: ``"pairwise"`` or ``"span"``.
        center: ``None``, a number or ``"mean"``, for ``"pairwise"``.
        vectors: ``"activations"`` or ``"weights"``, for ``"pairwise"``.
        ridge: For ``"span"``.
        **options: Options of :class:`CriterionPruner`; statistics need Gram matrices.

    Source:
        See :class:`nns_plugin.criteria.Distinctiveness`.
    """

    _needs = needs_of(Distinctiveness)

    def __init__(
        self,
        *arguments: Any,
        mode: Mode = "pairwise",
        center: Center = None,
        vectors: Vectors = "activations",
        ridge: float = RIDGE,
        **options: Any,
    ) -> None:
        self._how = (mode, center, vectors, ridge)
        super().__init__(*arguments, **options)

    def _criterion(self, model: nn.Module, statistics: Statistics | None) -> Criterion:
        assert statistics is not None
        return Distinctiveness(statistics, model, *self._how)


class MeanWeightPruner(CriterionPruner):
    """Units' sums of incoming weights, as an NNI pruner.

    Args:
        *arguments: As for NNI's pruners; see :class:`CriterionPruner`.
        weights: Sum of ``"magnitudes"`` or of ``"values"``.
        **options: Options of :class:`CriterionPruner`.

    Source:
        See :class:`nns_plugin.criteria.MeanWeight`.
    """

    def __init__(self, *arguments: Any, weights: Weights = "magnitudes", **options: Any) -> None:
        self._weights: Weights = weights
        super().__init__(*arguments, **options)

    def _criterion(self, model: nn.Module, statistics: Statistics | None) -> Criterion:
        return MeanWeight(model, self._weights)


class WSFPruner(CriterionPruner):
    """How far training moved units' synapses, or single weights, as an NNI pruner.

    Args:
        *arguments: As for NNI's pruners; see :class:`CriterionPruner`.
        snapshot: The model's weights before training, or at any earlier checkpoint.
        reduction: Over the producers and consumers of a unit: ``"mean"``, ``"sum"``, ``"max"`` or ``"first"``.
        single_weights: Whether the default granularity is single weights, as with NNI's ``LevelPruner``. A
            ``granularity`` that splits units, such as ``[1, 1]`` in a linear layer, asks for them as well.
        **options: Options of :class:`CriterionPruner`.

    Source:
        See :class:`nns_plugin.criteria.WSF` and :func:`nns_plugin.synapses.significance.significance`.
    """

    def __init__(
        self,
        *arguments: Any,
        snapshot: WeightSnapshot,
        reduction: Reduction = "mean",
        single_weights: bool = False,
        **options: Any,
    ) -> None:
        self._snapshot, self._reduction = snapshot, reduction
        self._single_weights = single_weights
        super().__init__(*arguments, **options)

    def _trace(self, model: nn.Module, example_inputs: Any) -> TracedUnits:
        self._snapshot.movement(model)  # refuses another architecture, before anything changes
        return super()._trace(model, example_inputs)

    def _criterion(self, model: nn.Module, statistics: Statistics | None) -> Criterion:
        return WSF(model, self._snapshot, self._reduction)

    def _weight_metric(self, name: str, space: PruningTargetSpace) -> Tensor:
        moved = significance(plain_copy(self.bound_model), self._snapshot)
        if name not in moved or space._target_name != "weight":
            raise PruningError(
                f"{space._target_name!r} of {name!r} has no synapses, so none can be masked alone; use the default "
                "granularity, or exclude it"
            )
        there = held_masks(self.bound_model)[name]["weight"].broadcast_to(moved[name].shape).bool()
        return block_means(moved[name].masked_fill(~there, -1.0), space, device_of(self.bound_model))

    def _set_default_sparse_granularity(self, target_space: PruningTargetSpace) -> str | None:
        return None if self._single_weights else super()._set_default_sparse_granularity(target_space)


class SwitcherPruner(CriterionPruner):
    """Units' scaling factors, as an NNI pruner.

    ``sparse_threshold`` is the lowest factor that stays.

    Args:
        *arguments: As for NNI's pruners; see :class:`CriterionPruner`.
        factors: The factors of a switcher network for the model; or the network itself, which then computes them anew
            whenever masks are made.
        **options: Options of :class:`CriterionPruner`.

    Source:
        See :class:`nns_plugin.criteria.Switcher`.
    """

    def __init__(self, *arguments: Any, factors: ScalingFactors | SwitcherNetwork, **options: Any) -> None:
        self._factors = factors
        super().__init__(*arguments, **options)

    def _criterion(self, model: nn.Module, statistics: Statistics | None) -> Criterion:
        if isinstance(self._factors, ScalingFactors):
            return Switcher(self._factors)
        with torch.no_grad():
            return Switcher(self._factors(model))
