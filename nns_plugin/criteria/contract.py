"""The contract of a criterion: what it declares, how it is built, and what its scores must be."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from nns_plugin.errors import CriterionError
from nns_plugin.units import UnitGroup


@runtime_checkable
class Criterion(Protocol):
    """Statistics or weights in, one score per unit out; higher means keep.

    A criterion is built from evidence and options, and is then a function of a unit group. Its class declares the
    evidence; only ``requires`` is mandatory.

    Attributes:
        requires: Constructor arguments that must be given: ``"statistics"``, ``"model"``, ``"snapshot"``, ...
        optional: ``tuple[str, ...]``: constructor arguments that are passed where they are known, such as
            ``"sensitivity"`` and ``"cost"``; none by default.
        accepts_labels: ``bool``: whether the constructor takes the label set as ``labels``; false by default.
        needs_gram: ``bool``: whether the statistics must have Gram matrices; false by default.
    """

    requires: ClassVar[tuple[str, ...]]

    def __call__(self, group: UnitGroup) -> Tensor | None:
        """Scores ``[U]`` of the group's units, or ``None`` if something is missing that this group's scores need."""
        ...


@dataclass(frozen=True)
class Needs:
    """What a criterion class declares; see :class:`Criterion`.

    Attributes:
        requires: Constructor arguments that must be given.
        optional: Constructor arguments that are passed where they are known.
        labels: Whether the constructor takes the label set.
        gram: Whether the statistics must have Gram matrices.
    """

    requires: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    labels: bool = False
    gram: bool = False


def needs_of(criterion: type[Any]) -> Needs:
    """What a criterion class declares, with the defaults filled in.

    Raises:
        CriterionError: If the class does not declare ``requires``, a tuple of names.

    Example:
        >>> from nns_plugin.criteria.semantic import Semantic
        >>> needs_of(Semantic)
        Needs(requires=('statistics',), optional=(), labels=True, gram=False)
    """
    requires = getattr(criterion, "requires", None)
    if not isinstance(requires, tuple) or not all(isinstance(name, str) for name in requires):
        raise CriterionError(
            f"{criterion.__name__} has no attribute 'requires', a tuple of names such as ('statistics',)"
        )
    return Needs(
        requires,
        tuple(getattr(criterion, "optional", ())),
        bool(getattr(criterion, "accepts_labels", False)),
        bool(getattr(criterion, "needs_gram", False)),
    )


def options_of(criterion: type[Any]) -> tuple[str, ...]:
    """Names of a criterion's options: its constructor arguments that are neither evidence nor the label set.

    Example:
        >>> from nns_plugin.criteria.semantic import Semantic
        >>> options_of(Semantic)
        ('measure', 'contrast')
    """
    needs = needs_of(criterion)
    evidence = {*needs.requires, *needs.optional, "labels"}
    return tuple(name for name in inspect.signature(criterion).parameters if name not in evidence)


def build(
    criterion: type[Any],
    evidence: Mapping[str, Any],
    options: Mapping[str, Any],
    labels: Sequence[int | str] | None = None,
) -> Criterion:
    """Build a criterion from the available evidence.

    Args:
        criterion: The class.
        evidence: At least what it requires, by name; it receives what it declares.
        options: Its options, by name.
        labels: The label set, for a criterion that takes one.
    """
    needs = needs_of(criterion)
    arguments = {name: evidence[name] for name in needs.requires}
    arguments |= {name: evidence[name] for name in needs.optional if name in evidence}
    arguments |= options
    if needs.labels:
        arguments["labels"] = labels
    built: Criterion = criterion(**arguments)
    return built


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
            f"{name} cannot score group {group.name!r}: missing inputs; none of its {group.size} units is removed",
            UnscoredGroupWarning,
            stacklevel=2,
        )
        return None
    if not isinstance(scores, Tensor) or scores.shape != (group.size,) or scores.is_complex():
        found = f"{scores.dtype}{list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise CriterionError(
            f"{name} returned {found} for group {group.name!r}; expected a vector of {group.size} scores, one per unit"
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
