"""Selection: scores in, kept units out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from nns_plugin.errors import SelectionError

Complement = Literal["one", "both"]


def keep_by_ratio(
    scores: Mapping[str, Tensor], ratio: float, *, round_to: int = 1, global_pruning: bool = False
) -> dict[str, Tensor]:
    """Remove the given share of units, lowest scores first.

    Args:
        scores: For each group ``[U]`` scores.
        ratio: Share of units to remove, in [0, 1).
        round_to: Keep a multiple of this many units in each group, rounded up where the group is large enough.
        global_pruning: Rank the units of all groups together instead of removing the share from each group.

    Returns:
        For each group the kept units, ``[k]`` int64 ascending, at least one. Of equal scores, lower units stay.

    Raises:
        SelectionError: If the ratio is outside [0, 1), the rounding is not a positive integer or a score is not finite.

    Example:
        >>> keep_by_ratio({"conv": torch.tensor([0.1, 0.9, 0.5, 0.3])}, 0.5)
        {'conv': tensor([1, 2])}
    """
    if not 0 <= ratio < 1:
        raise SelectionError(f"ratio is {ratio}; it must be in [0, 1), the share of units to remove")
    _check(scores, round_to)
    counts = {name: value.numel() - _share(value.numel(), ratio) for name, value in scores.items()}
    if global_pruning and scores:
        owners = torch.cat([torch.full((value.numel(),), i) for i, value in enumerate(scores.values())])
        joined = torch.cat(list(scores.values()))
        kept = _best(joined, joined.numel() - _share(joined.numel(), ratio))
        counts = dict(zip(scores, torch.bincount(owners[kept], minlength=len(scores)).tolist(), strict=True))
    return {name: _best(value, _rounded(counts[name], value.numel(), round_to)) for name, value in scores.items()}


def keep_by_threshold(scores: Mapping[str, Tensor], zeta: float, *, round_to: int = 1) -> dict[str, Tensor]:
    """Keep the units that score at least zeta: eq. 1 of "NNS: Neural network surgery" for semantic scores.

    Args:
        scores: For each group ``[U]`` scores.
        zeta: The threshold.
        round_to: Keep a multiple of this many units in each group, adding the best of the others.

    Returns:
        For each group the kept units, ``[k]`` int64 ascending; the best unit stays even if none reaches zeta.

    Raises:
        SelectionError: If zeta or a score is not finite, or the rounding is not a positive integer.

    Example:
        >>> keep_by_threshold({"conv": torch.tensor([0.1, 1.0, 0.5, 0.4])}, 0.4)
        {'conv': tensor([1, 2, 3])}
    """
    if not math.isfinite(zeta):
        raise SelectionError(f"zeta is {zeta}; it must be a finite number")
    _check(scores, round_to)
    return {
        name: _best(value, _rounded(int((value >= zeta).sum()), value.numel(), round_to))
        for name, value in scores.items()
    }


@dataclass(frozen=True)
class AngleRule:
    """Which pairs of units are redundant, by the angle between their vectors.

    Attributes:
        similar: Angle in degrees below which two units do the same: the later one goes.
        complementary: Angle in degrees above which two units cancel each other; 180 for none.
        complement: Which units of a pair that cancels are removed: ``"one"`` (the later one) or ``"both"``.

    Raises:
        SelectionError: If an angle is outside its range, or ``complement`` is unknown.

    Source:
        Gedeon, "Indicators of hidden neuron functionality: the weight matrix versus neuron behaviour", 1995: 15 and
        165 degrees, both units of a pair that cancels.
    """

    similar: float = 15.0
    complementary: float = 165.0
    complement: Complement = "one"

    def __post_init__(self) -> None:
        if not 0 <= self.similar <= self.complementary <= 180:
            raise SelectionError(
                f"similar is {self.similar} and complementary {self.complementary} degrees; expected "
                "0 <= similar <= complementary <= 180"
            )
        if self.complement not in get_args(Complement):
            raise SelectionError(f"complement is {self.complement!r}; it must be one of one, both")


@dataclass(frozen=True, eq=False)
class AngleSelection:
    """The units that an angle rule leaves of a group of U units.

    Attributes:
        kept: ``[k]`` int64 ascending.
        survivor: ``[U]`` int64: for each unit the one that stays in its place, itself if it is kept, and -1 if
            none does.
        pairs: Number of pairs that were acted on.
    """

    kept: Tensor
    survivor: Tensor
    pairs: int


def keep_by_angle(degrees: Tensor, rule: AngleRule = AngleRule()) -> AngleSelection:
    """Remove one unit of each pair that does the same, and one or both of each pair that cancels.

    Pairs are taken in the order (0, 1), (0, 2), ..., (1, 2), ...; if one of a pair is gone already, the other stays,
    and two that cancel stay if nothing else would be left.

    Args:
        degrees: ``[U, U]`` angles, from :func:`nns_plugin.statistics.angles.angles`.
        rule: Which pairs are redundant.

    Returns:
        The kept units, at least one, and which of them stay in place of the others.

    Raises:
        SelectionError: If the angles are not a square matrix of finite numbers.

    Example:
        >>> degrees = torch.tensor([[0.0, 10.0, 170.0], [10.0, 0.0, 175.0], [170.0, 175.0, 0.0]])
        >>> keep_by_angle(degrees).survivor
        tensor([0, 0, 0])
    """
    if degrees.dim() != 2 or degrees.shape[0] != degrees.shape[1] or not bool(torch.isfinite(degrees).all()):
        raise SelectionError(f"the angles are {list(degrees.shape)}; expected a square matrix of finite numbers")
    size = degrees.shape[0]
    similar, opposite = degrees < rule.similar, degrees > rule.complementary
    survivor = torch.arange(size)
    alive = torch.ones(size, dtype=torch.bool)
    pairs = 0
    for unit in range(size):
        if not alive[unit]:
            continue
        later = alive.clone()
        later[: unit + 1] = False
        cancelled = (opposite[unit] & later).nonzero().flatten()
        same = similar[unit] & later
        if rule.complement == "one":
            same |= opposite[unit] & later
        elif cancelled.numel():
            same[int(cancelled[0]) :] = False  # after that pair the unit is gone
            if int(alive.sum()) - int(same.sum()) > 2:
                both = torch.tensor([unit, int(cancelled[0])])
                alive[both], survivor[both] = False, -1
                pairs += 1
            else:
                same = similar[unit] & later
        alive[same] = False
        survivor[same] = unit
        pairs += int(same.sum())
    gone = survivor[survivor] < 0  # their survivor went later, together with its complement
    survivor[(survivor >= 0) & gone] = -1
    return AngleSelection(alive.nonzero().flatten(), survivor, pairs)


def _check(scores: Mapping[str, Tensor], round_to: int) -> None:
    if not isinstance(round_to, int) or round_to < 1:
        raise SelectionError(f"round_to is {round_to}; it must be a positive integer")
    for name, value in scores.items():
        if not bool(torch.isfinite(value).all()):
            raise SelectionError(f"scores of group {name!r} are not all finite; they cannot rank units")


def _share(count: int, ratio: float) -> int:
    # Rounded first: 10 * (1 - 0.7) is 3.0000000000000004, and int() of the complement would keep one too few.
    return int(round(count * ratio, 9))


def _rounded(kept: int, size: int, round_to: int) -> int:
    return min(size, math.ceil(max(kept, 1) / round_to) * round_to)


def _best(scores: Tensor, count: int) -> Tensor:
    order = torch.argsort(scores, descending=True, stable=True)
    return order[:count].sort().values
