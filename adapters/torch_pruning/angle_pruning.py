"""Pruning by angles: remove one unit of each pair that does the same, and one or both of each pair that cancels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor, nn

from nns_plugin.adapters.torch_pruning.graph import build_graph
from nns_plugin.adapters.torch_pruning.removals import PrunableGraph, removals_of
from nns_plugin.compensation.compensated import compensated_removal
from nns_plugin.compensation.least_squares import Merge
from nns_plugin.compensation.options import Compensation
from nns_plugin.compensation.survivors import survivors_of
from nns_plugin.criteria.distinctiveness import Distinctiveness, Vectors
from nns_plugin.errors import PruningError
from nns_plugin.selection import AngleRule
from nns_plugin.statistics.angles import Center
from nns_plugin.statistics.statistics import Statistics


@dataclass(frozen=True)
class AngleOptions:
    """How angles are measured, in which groups, and how survivors take over.

    Attributes:
        vectors: ``"activations"``, or ``"weights"`` for the incoming weights.
        center: Subtracted from the activations: ``None``, a number (0.5 for sigmoid units) or ``"mean"``.
        merge: How a survivor takes over: ``"none"``, ``"add"`` (the removed unit's outgoing weights are added to its
            own) or ``"scaled"`` (exact for a pair whose centred vectors are parallel).
        groups: Names of the groups to prune; all of the statistics' by default.
        recalibrate_batch_norms: Whether to recalibrate batch norms, where there is a loader.

    Raises:
        PruningError: If ``merge`` is unknown, or ``groups`` is a string.
    """

    vectors: Vectors = "activations"
    center: Center = None
    merge: Merge = "scaled"
    groups: Sequence[str] | None = None
    recalibrate_batch_norms: bool = True

    def __post_init__(self) -> None:
        if self.merge not in get_args(Merge):
            raise PruningError(f"merge is {self.merge!r}; it must be one of {', '.join(get_args(Merge))}")
        if isinstance(self.groups, str):
            raise PruningError(f"groups is {self.groups!r}; expected a list of names")


@dataclass(frozen=True, eq=False)
class AnglePruning:
    """The result of pruning by angles.

    Attributes:
        kept: The kept units of each group, ``[k]`` int64, by name; groups without angles are left out.
        removed: Number of removed units.
        pairs: Number of pairs that lost a unit.
        statistics: Statistics of the pruned model, narrowed.
    """

    kept: Mapping[str, Tensor]
    removed: int
    pairs: int
    statistics: Statistics


def prune_by_angle(
    model: nn.Module,
    example_inputs: Any,
    statistics: Statistics,
    rule: AngleRule = AngleRule(),  # noqa: B008, it is frozen
    options: AngleOptions = AngleOptions(),
    *,
    loader: Iterable[Any] | None = None,
) -> AnglePruning:
    """Remove redundant units by the angles between their vectors, and merge them into those that stay.

    Args:
        model: Pruned in place.
        example_inputs: As for torch-pruning.
        statistics: Statistics of the model, with ``gram=True``.
        rule: Decides which pairs are redundant.
        options: How angles are measured, in which groups, and how survivors take over.
        loader: Yields ``(inputs, labels)`` or ``inputs``; with one, batch norms are recalibrated.

    Raises:
        PruningError: If the statistics have no group of a given name.
        StaleStatisticsError: If the statistics do not belong to the model.

    Source:
        Gedeon, "Indicators of hidden neuron functionality: the weight matrix versus neuron behaviour", 1995: of
        activations, both of a pair that cancels, ``"add"``.

    Example:
        >>> import torch
        >>> from nns_plugin import calibrate
        >>> from nns_plugin.adapters.torch_pruning import unit_groups
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Sigmoid(), torch.nn.Linear(3, 2))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0]]))
        >>> _ = model[0].bias.data.zero_()
        >>> x = torch.randn(100, 2)
        >>> statistics = calibrate(model, [x], unit_groups(model, x[:2], [model[2]]), gram=True)
        >>> prune_by_angle(model, x[:2], statistics, options=AngleOptions(center=0.5)).kept
        {'0': tensor([0, 2])}
    """
    names = [group.name for group in statistics.groups]
    if any(name not in names for name in options.groups or ()):
        raise PruningError(f"groups is {options.groups!r}; expected a list of names among {', '.join(names)}")
    statistics.check_current(model)
    criterion = Distinctiveness(statistics, model, "pairwise", options.center, options.vectors)
    chosen = [group for group in statistics.groups if options.groups is None or group.name in options.groups]
    selections = criterion.select(chosen, rule)
    kept = {name: selection.kept for name, selection in selections.items()}
    graph = build_graph(model, example_inputs)
    narrowed = compensated_removal(
        PrunableGraph(graph),
        removals_of(graph, chosen, kept),
        statistics,
        Compensation("merge", recalibrate_batch_norms=options.recalibrate_batch_norms),
        loader,
        survivors=survivors_of(statistics, chosen, selections, options.merge, options.center),
    )
    removed = sum(group.size - kept[group.name].numel() for group in chosen if group.name in kept)
    return AnglePruning(kept, removed, sum(selection.pairs for selection in selections.values()), narrowed)
