"""Selection: scores in, kept units out."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from nns_plugin.errors import SelectionError


def keep_by_ratio(
    scores: Mapping[str, Tensor], ratio: float, *, round_to: int = 1, across_groups: bool = False
) -> dict[str, Tensor]:
    """Remove the given share of units, lowest scores first.

    Args:
        scores: For each group ``[U]`` scores.
        ratio: Share of units to remove, in [0, 1).
        round_to: Keep a multiple of this many units in each group, rounding up where the group is large enough.
        across_groups: Rank the units of all groups together instead of removing the share from each group.

    Returns:
        For each group the kept units, ``[k]`` int64 ascending, at least one. Of equal scores, lower units stay.

    Raises:
        SelectionError: If the ratio is outside [0, 1), the rounding is no positive integer or a score is not finite.

    Example:
        >>> keep_by_ratio({"conv": torch.tensor([0.1, 0.9, 0.5, 0.3])}, 0.5)
        {'conv': tensor([1, 2])}
    """
    if not 0 <= ratio < 1:
        raise SelectionError(f"ratio is {ratio}; it must be in [0, 1), the share of units to remove")
    _check(scores, round_to)
    counts = {name: value.numel() - _share(value.numel(), ratio) for name, value in scores.items()}
    if across_groups and scores:
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
        For each group the kept units, ``[k]`` int64 ascending; the best unit stays even where none reaches zeta.

    Raises:
        SelectionError: If zeta or a score is not finite, or the rounding is no positive integer.

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


def _check(scores: Mapping[str, Tensor], round_to: int) -> None:
    if not isinstance(round_to, int) or round_to < 1:
        raise SelectionError(f"round_to is {round_to}; it must be a positive integer")
    for name, value in scores.items():
        if not bool(torch.isfinite(value).all()):
            raise SelectionError(f"scores of group {name!r} are not all finite; units cannot be ranked by them")


def _share(count: int, ratio: float) -> int:
    # Rounded first: 10 * (1 - 0.7) is 3.0000000000000004, and int() of the complement would keep one too few.
    return int(round(count * ratio, 9))


def _rounded(kept: int, size: int, round_to: int) -> int:
    return min(size, math.ceil(max(kept, 1) / round_to) * round_to)


def _best(scores: Tensor, count: int) -> Tensor:
    order = torch.argsort(scores, descending=True, stable=True)
    return order[:count].sort().values
