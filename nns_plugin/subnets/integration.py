"""Integration: several subnets of one parent become one."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nns_plugin.compensation.options import Compensation
from nns_plugin.criteria import build, find, needs_of, score_groups
from nns_plugin.environment import versions
from nns_plugin.errors import SubnetError
from nns_plugin.labels import LabelSet
from nns_plugin.models.inputs import device_of, inputs_like
from nns_plugin.selection import keep_by_threshold
from nns_plugin.statistics.statistics import Statistics
from nns_plugin.subnets.extraction import Choice, Preparation, Prepared
from nns_plugin.subnets.steps import carry_out, prepare
from nns_plugin.subnets.subnet import Subnet


def integrate(
    subnets: Sequence[Subnet],
    parent: nn.Module,
    statistics: Statistics | None = None,
    *,
    loader: Iterable[Any] | None = None,
    validation: Iterable[Any] | None = None,
    budget: int | None = None,
    example_inputs: Any = None,
    progress: bool = False,
) -> Subnet:
    """Combine several subnets into one for all their labels: the union of their units, in any order.

    The weights are the parent's: a weight between a unit of one subnet and a unit of another is in neither file.
    Compensation and head are computed again for the union, so that the result equals an extraction for the union of the
    label sets wherever the criterion's scores of a union are the maximum over its labels (``semantic`` at one zeta).

    Args:
        subnets: Subnets of one parent, extracted with the same criterion, compensation and kind of head.
        parent: Their parent; left as it is.
        statistics: Statistics of the parent, for compensation; collected from the loader by default.
        loader: Re-iterable; yields ``(inputs, labels)``. Needed by an open head, by ``refit``, and in place of
            statistics.
        validation: Yields ``(inputs, labels)``; needed by heads that were calibrated.
        budget: Maximum number of units to keep, over all pruned groups. The units that the criterion scores lowest for
            all labels together are dropped first, but each group keeps its best unit. All stay by default.
        example_inputs: Inputs that the parent can run on; made up by default.
        progress: Whether to show progress bars.

    Returns:
        The integrated subnet.

    Raises:
        SubnetError: If there are no subnets, if they are of different parents, were extracted differently or by angles,
            if the model is not their parent, or if the budget is too small or there are no scores for it.
        PruningError: If the compensation or the head needs a loader, and there is none.

    Warns:
        RetrainedWarning: If subnets were trained after extraction: the parent's weights replace theirs.

    Source:
        "NNS: Neural network surgery", integration of subnets.
    """
    first = _alike(subnets)
    first._check_parent(parent)
    if first.provenance.calibrated and validation is None:
        raise SubnetError("the subnets' heads were calibrated on validation data; pass validation")
    if any(subnet.provenance.training for subnet in subnets):
        warnings.warn(
            "some subnets were trained after extraction: their union has the parent's weights; train it again",
            RetrainedWarning,
            stacklevel=2,
        )
    names = first.labels.names
    labels = LabelSet.of(names, sorted({names[label] for subnet in subnets for label in subnet.labels.indices}))
    kept, scores = united(subnets)
    how = Compensation(**first.provenance.compensation)
    needs_scores = budget is not None and needs_of(find(first.provenance.criterion)).gram
    prepared = prepare(
        parent,
        inputs_like(first.inputs, device_of(parent)) if example_inputs is None else example_inputs,
        loader,
        labels,
        Preparation(
            head=first.provenance.head,
            gram=how.method != "none" or needs_scores,
            ignored_layers=first.provenance.ignored_layers,
        ),
        statistics=statistics,
        progress=progress,
    )
    if budget is not None:
        scores = _scored_together(first, prepared) or scores
        kept = within_budget(kept, scores, budget)
    extraction = carry_out(
        prepared,
        Choice(kept, scores),
        how,
        loader,
        validation=validation if first.provenance.calibrated else None,
        progress=progress,
    )
    provenance = replace(
        first.provenance,
        versions=versions(),
        selection=_selection(subnets, budget),
        training={},
        trials=(),
    )
    return Subnet.of(extraction, provenance)


class RetrainedWarning(UserWarning):
    """Integration discards the training of subnets."""


def _scored_together(first: Subnet, prepared: Prepared) -> dict[str, Tensor]:
    """The subnets' criterion's scores for all labels together; empty if it needs more evidence than there is."""
    criterion = find(first.provenance.criterion)
    evidence = {"statistics": prepared.statistics, "model": prepared.model}
    if not set(needs_of(criterion).requires) <= set(evidence):
        return {}
    return score_groups(build(criterion, evidence, first.provenance.options, prepared.labels.indices), prepared.groups)


def united(subnets: Sequence[Subnet]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The units and scores of a union.

    Returns:
        For each group that is pruned in all subnets the kept units, ``[k]`` int64 ascending, and for each of them that
        is scored in all subnets the highest scores, ``[U]`` float64, -inf for units that none kept.
    """
    kept, scores = {}, {}
    for name, size in subnets[0].sizes.items():
        if not all(name in subnet.kept for subnet in subnets):
            continue  # whole in one of them
        best = torch.full((size,), -torch.inf, dtype=torch.float64)
        there = torch.zeros(size, dtype=torch.bool)
        for subnet in subnets:
            units = subnet.kept[name]
            there[units] = True
            best[units] = torch.maximum(best[units], subnet.scores.get(name, best[units]))
        kept[name] = there.nonzero().flatten()
        if all(name in subnet.scores for subnet in subnets):
            scores[name] = best
    zeta = {subnet.provenance.selection.get("zeta") for subnet in subnets}
    rounded = {subnet.provenance.selection.get("round_to", 1) for subnet in subnets}
    if len(zeta) == 1 and None not in zeta and rounded == {1}:
        # A group where no unit reaches zeta keeps its best one; in the union another label's units may reach it.
        finite = {name: value.clamp_min(torch.finfo(torch.float64).min) for name, value in scores.items()}
        kept |= keep_by_threshold(finite, float(zeta.pop() or 0))
    return kept, scores


def within_budget(kept: dict[str, Tensor], scores: dict[str, Tensor], budget: int) -> dict[str, Tensor]:
    """Drop the lowest-scored units of all groups together until no more than ``budget`` are left."""
    missing = sorted(set(kept) - set(scores))
    if missing:
        raise SubnetError(f"a budget needs scores, and the units of {', '.join(missing)} have none")
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < len(kept):
        raise SubnetError(f"the budget is {budget!r} units; expected at least {len(kept)}, one for each pruned group")
    owners = torch.cat([torch.full((units.numel(),), place) for place, units in enumerate(kept.values())])
    values = torch.cat([scores[name][units] for name, units in kept.items()])
    stays = torch.zeros(values.numel(), dtype=torch.bool)
    for place in range(len(kept)):
        mine = (owners == place).nonzero().flatten()
        stays[mine[values[mine].argmax()]] = True
    others = (~stays).nonzero().flatten()
    order = others[values[others].argsort(descending=True, stable=True)]
    stays[order[: budget - len(kept)]] = True
    return {name: units[stays[owners == place]] for place, (name, units) in enumerate(kept.items())}


def _alike(subnets: Sequence[Subnet]) -> Subnet:
    """The first subnet, after a check that all can be integrated."""
    if not isinstance(subnets, Sequence) or not all(isinstance(subnet, Subnet) for subnet in subnets):
        raise SubnetError("subnets must be a list of Subnet")
    if not subnets:
        raise SubnetError("there are no subnets to integrate; pass at least one")
    first = subnets[0]
    if any("angle" in subnet.provenance.selection for subnet in subnets):
        raise SubnetError("subnets that were selected by angles cannot be integrated: which units merge is not stored")
    for place, subnet in enumerate(subnets[1:], 1):
        for what in ("parent", "criterion", "options", "compensation", "head", "calibrated", "ignored_layers"):
            left, right = (getattr(each.provenance, what) for each in (first, subnet))
            if left != right:
                raise SubnetError(
                    f"subnet {place} has {what} {right!r}, subnet 0 {left!r}: only subnets that were extracted alike "
                    "from one parent can be integrated"
                )
        if subnet.labels.names != first.labels.names:
            raise SubnetError(f"subnet {place} has other label names than subnet 0")
        for name in set(subnet.sizes) & set(first.sizes):
            if subnet.sizes[name] != first.sizes[name]:
                raise SubnetError(
                    f"subnet {place} has {subnet.sizes[name]} units in {name!r}, subnet 0 {first.sizes[name]}"
                )
    return first


def _selection(subnets: Sequence[Subnet], budget: int | None) -> dict[str, Any]:
    """What decided how many units stay: one zeta for all, or the union of the subnets' selections."""
    selections = [dict(subnet.provenance.selection) for subnet in subnets]
    one = selections[0]
    same_zeta = all(each == one for each in selections) and "zeta" in one and one.get("round_to", 1) == 1
    found = one if same_zeta or len(subnets) == 1 else {"union": selections}
    return found if budget is None else {**found, "budget": budget}
