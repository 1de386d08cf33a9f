"""NNI as the host of a job: its masks choose the units, and its speed-up removes them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nns_plugin.adapters.nni.criterion_pruner import CriterionPruner
from nns_plugin.adapters.nni.dependency_groups import grouped_configs
from nns_plugin.adapters.nni.mask_resolution import resolve_masks
from nns_plugin.adapters.nni.masks import masked_copy, silencing_masks
from nns_plugin.adapters.nni.nni_removal import graft, outputs_of, removed_by_nni
from nns_plugin.adapters.nni.wrappers import check_config_list
from nns_plugin.adapters.torch_pruning.backend import TorchPruningBackend
from nns_plugin.adapters.torch_pruning.graph import build_graph
from nns_plugin.adapters.torch_pruning.traced_units import TracedUnits, traced_units
from nns_plugin.compensation.options import Compensation
from nns_plugin.compensation.survivors import Survivors
from nns_plugin.criteria.contract import Criterion
from nns_plugin.models.batch_norms import recalibrate_batch_norms
from nns_plugin.models.preserve import copied
from nns_plugin.statistics.statistics import Statistics
from nns_plugin.units import UnitGroup

TOLERANCE = 1e-5


class NNIFallbackWarning(UserWarning):
    """NNI could not remove units; torch-pruning did."""


class NNIBackend(TorchPruningBackend):
    """A model whose units NNI removes where it can; see :class:`nns_plugin.backends.TracedModel`.

    Groups and compensation are those of torch-pruning: NNI has neither.
    """

    def keep(self, groups: Sequence[UnitGroup], kept: Mapping[str, Tensor]) -> None:
        """See the protocol."""
        off = {g.name: ~torch.isin(torch.arange(g.size), kept[g.name]) for g in groups if g.name in kept}
        if not any(bool(units.any()) for units in off.values()):
            return
        inputs = self.graph.example_inputs
        masks = silencing_masks(self.model, {group.name: group.producers for group in groups}, off)
        planned = resolve_masks(self.model, traced_units(self.graph), masks)
        masked = masked_copy(self.model, planned.masks)
        removal = removed_by_nni(masked, inputs, planned, outputs_of(masked, inputs), TOLERANCE)
        if removal.model is None:
            warnings.warn(
                f"torch-pruning removed the units, NNI did not: {removal.reason}", NNIFallbackWarning, stacklevel=2
            )
            super().keep(groups, kept)
            return
        graft(self.model, removal.model)

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
        if how.method != "none":
            super().keep_and_compensate(groups, kept, statistics, how, loader, survivors, progress)
            return
        how.check(loader)
        self.keep(groups, kept)
        if how.recalibrate_batch_norms and loader is not None:
            with torch.no_grad():
                recalibrate_batch_norms(self.model, loader)


def kept_by_masks(
    model: nn.Module,
    example_inputs: Any,
    groups: Sequence[UnitGroup],
    scores: Mapping[str, Tensor],
    config_list: Sequence[Mapping[str, Any]],
) -> dict[str, Tensor]:
    """Return the units that stay if NNI masks layers by scores, following a config list.

    Args:
        model: Left as it is.
        example_inputs: Inputs that it can run on.
        groups: Its units.
        scores: For each group's name ``[U]``.
        config_list: NNI's; dependency groups are filled in.

    Returns:
        For each scored group ``[k]`` int64 ascending.

    Raises:
        PruningError: If the list is wrong, selects nothing or would empty a layer.
    """
    check_config_list(model, config_list)
    twin = copied(model)
    units = traced_units(build_graph(twin, example_inputs))
    configs = grouped_configs(config_list, twin, units)
    pruner = _ScoredPruner(twin, configs, example_inputs=example_inputs, scores=scores, units=units)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    planned = resolve_masks(twin, units, masks)
    scored = [group for group in groups if group.name in scores]
    return {group.name: planned.kept.get(group.name, torch.arange(group.size)) for group in scored}


class _ScoredPruner(CriterionPruner):
    """A pruner of a model that is traced and scored already."""

    def __init__(self, *arguments: Any, scores: Mapping[str, Tensor], units: TracedUnits, **options: Any) -> None:
        self._known, self._traced = _Known(scores), units
        super().__init__(*arguments, **options)

    def _trace(self, model: nn.Module, example_inputs: Any) -> TracedUnits:
        return self._traced

    def _criterion_now(self) -> Criterion:
        return self._known


class _Known:
    """Scores by name of the group."""

    requires: ClassVar[tuple[str, ...]] = ("scores",)

    def __init__(self, scores: Mapping[str, Tensor]) -> None:
        self._scores = scores

    def __call__(self, group: UnitGroup) -> Tensor | None:
        return self._scores.get(group.name)
