"""Choosing units: build the criterion from evidence, score all groups, select by ratio, zeta, angle or masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nns_plugin.compensation.survivors import survivors_of
from nns_plugin.criteria.contract import build, needs_of, score_groups
from nns_plugin.errors import CriterionError, LabelError, RecipeError, SelectionError
from nns_plugin.selection import AngleRule, keep_by_ratio, keep_by_threshold
from nns_plugin.statistics.macs import layer_macs, unit_macs
from nns_plugin.statistics.sensitivity import output_sensitivity
from nns_plugin.subnets.extraction import Choice, Prepared
from nns_plugin.subnets.options import RATIO, ExtractionOptions

Loader = Any


def build_criterion(
    options: ExtractionOptions, prepared: Prepared, loader: Loader, known: Mapping[str, Any], progress: bool = False
) -> Any:
    """The criterion of an extraction.

    Args:
        options: They name it.
        prepared: The model that is scored, and its statistics.
        loader: Yields ``(inputs, labels)``, for evidence that has to be collected.
        known: Evidence that replaces or adds to that of the prepared model.
        progress: Whether to show progress bars.

    Raises:
        RecipeError: If the criterion refuses its options.
    """
    model, groups = prepared.model, prepared.statistics.groups
    evidence = {"statistics": prepared.statistics, "model": model}
    wanted = needs_of(options.criterion_class).optional  # costly, so only where they change something
    if "sensitivity" in wanted and (options.global_pruning or options.labels is not None):
        evidence["sensitivity"] = output_sensitivity(model, loader, groups, progress=progress)
    if "cost" in wanted and options.global_pruning:
        evidence["cost"] = unit_macs(model, groups, layer_macs(model, prepared.example_inputs))
    chosen = None if options.labels is None else prepared.labels.indices
    try:
        return build(options.criterion_class, {**evidence, **known}, options.effective_criterion_options, chosen)
    except (CriterionError, TypeError, ValueError) as error:
        if isinstance(error, LabelError):
            raise
        raise RecipeError(f"criterion.options: {' '.join(str(error).split())}") from error


@dataclass(frozen=True, eq=False)
class Chooser:
    """Chooses units of a prepared model by their scores.

    Attributes:
        options: What decides how many units stay.
        prepared: The model; left as it is.
        scores: For each group's name ``[U]`` float64.
    """

    options: ExtractionOptions
    prepared: Prepared
    scores: Mapping[str, Tensor]

    @classmethod
    def of(cls, options: ExtractionOptions, prepared: Prepared, criterion: Any) -> Chooser:
        """Score all groups by a criterion."""
        return cls(options, prepared, score_groups(criterion, prepared.groups))

    def by_ratio(self, ratio: float, round_to: int | None = None) -> Choice:
        """Keep all but a share of the units, in multiples of ``round_to``; as in the options by default."""
        if self.options.framework == "nni":
            return self._by_masks([{"sparse_ratio": ratio}])
        multiple = self.options.round_to if round_to is None else round_to
        kept = keep_by_ratio(self.scores, ratio, round_to=multiple, global_pruning=self.options.global_pruning)
        return Choice(kept, self.scores)

    def fixed(self) -> Choice:
        """Keep what the options say without a search: by config list, zeta or ratio.

        Raises:
            SelectionError: If a config list masks no complete unit.
        """
        options = self.options
        if options.config_list is not None:
            found = self._by_masks(options.config_list)
            sizes = {group.name: group.size for group in self.prepared.groups}
            if all(units.numel() == sizes[name] for name, units in found.kept.items()):
                raise SelectionError(
                    "the config list masks no complete unit, so nothing is removed; raise its sparsity"
                )
            return found
        if options.zeta is None:
            return self.by_ratio(RATIO if options.ratio is None else options.ratio)
        if options.framework == "nni":
            return self._by_masks([{"sparse_threshold": options.zeta}])
        return Choice(keep_by_threshold(self.scores, options.zeta, round_to=options.round_to), self.scores)

    def _by_masks(self, config_list: Sequence[Mapping[str, Any]]) -> Choice:
        """Keep what NNI's masks leave; configs that name no layers apply to all producers."""
        from nns_plugin.adapters.nni.backend import kept_by_masks  # needs the extra nni

        model, groups = self.prepared.model, self.prepared.groups
        producers = [port.name for group in groups if group.name in self.scores for port in group.producers]
        named = [
            {"op_names": list(dict.fromkeys(producers)), **config}
            if not {"op_names", "op_types", "op_names_re"} & config.keys()
            else config
            for config in config_list
        ]
        return Choice(kept_by_masks(model, self.prepared.example_inputs, groups, self.scores, named), self.scores)


def by_angle(options: ExtractionOptions, prepared: Prepared, criterion: Any) -> Choice:
    """Keep one unit of each similar or complementary pair, and name who takes over from whom."""
    angle = options.angle
    if angle is None:
        raise RecipeError("angle: found nothing; it is required")
    rule = AngleRule(angle.similar, angle.complementary, angle.complement)
    selections = criterion.select(prepared.groups, rule)
    survivors = survivors_of(prepared.statistics, prepared.groups, selections, angle.merge, criterion.center)
    return Choice({name: selection.kept for name, selection in selections.items()}, survivors=survivors)
