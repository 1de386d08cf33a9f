"""The score contract, checked in one place for every criterion."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from nns_plugin.errors import CriterionError
from nns_plugin.units import UnitGroup


@runtime_checkable
class Criterion(Protocol):
    """Statistics or weights in, one score per unit out; higher means keep.

    A criterion is built from what it needs (``requires`` names it: ``"statistics"``, ``"model"``, ...) and from
    its options, and is then a function of a unit group.
    """

    requires: ClassVar[tuple[str, ...]]

    def __call__(self, group: UnitGroup) -> Tensor | None:
        """Scores ``[U]`` of the group's units, or ``None`` if the criterion has not what it needs for the group."""
        ...


class UnscoredGroupWarning(UserWarning):
    """A group was left out because it could not be scored."""


def score(criterion: Criterion, group: UnitGroup) -> Tensor | None:
    """Scores of one group, checked against the contract.

    Args:
        criterion: The criterion.
        group: The group to score.

    Returns:
        ``[U]`` float64 on the CPU, or ``None`` (after a warning that names the group) if the criterion cannot
        score it.

    Raises:
        CriterionError: If the scores are not one finite number per unit.
    """
    scores = criterion(group)
    name = type(criterion).__name__
    if scores is None:
        warnings.warn(
            f"{name} has not what it needs to score group {group.name!r}; none of its {group.size} units is removed",
            UnscoredGroupWarning,
            stacklevel=2,
        )
        return None
    if not isinstance(scores, Tensor) or scores.shape != (group.size,) or scores.is_complex():
        found = f"{scores.dtype}{list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise CriterionError(
            f"{name} returned {found} for group {group.name!r}; expected a vector of {group.size} scores, one a unit"
        )
    scores = scores.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(scores).all()):
        unit = int((~torch.isfinite(scores)).nonzero()[0])
        raise CriterionError(
            f"{name} scored unit {unit} of group {group.name!r} {float(scores[unit])}; scores must be finite"
        )
    return scores


def score_groups(criterion: Criterion, groups: Sequence[UnitGroup]) -> dict[str, Tensor]:
    """Scores of every group that the criterion can score, by group name."""
    scores = {group.name: score(criterion, group) for group in groups}
    return {name: value for name, value in scores.items() if value is not None}
