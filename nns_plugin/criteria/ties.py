"""Ties between scores, broken by steps too small to change any other order."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def separate_ties(scores: Tensor, ordinal: int = 0) -> Tensor:
    """Separate equal scores, within a group and between groups, keeping the order of different ones.

    Args:
        scores: ``[U]`` float64.
        ordinal: Number of the group, below 4096: groups with different numbers get different scores.

    Returns:
        ``[U]`` float64, all different. Equal scores are spread evenly over two steps of single precision, the last
        unit lowest, so that a global threshold takes the same share of tied units from every group, large or small;
        groups are a few steps of double precision apart, which survive averaging. Scores closer to 0 than 1e-30
        count as 0.

    Example:
        >>> separate_ties(torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64)).tolist()
        [1.000000079471647, 1.0, 2.0]
    """
    between, floor = 4, int(np.float64(1e-30).view(np.int64))
    values = scores.numpy()
    # The bits of a double, read as an integer, are in the order of the doubles.
    rank = np.maximum(np.abs(values).view(np.int64) - floor, 0) * np.sign(values).astype(np.int64)
    order = np.lexsort((-np.arange(rank.size), rank))
    steps = np.arange(rank.size) * (1 << 16) // rank.size * (1 << 14)  # distinct for up to 65536 units
    raised = np.empty_like(rank)
    raised[order] = np.maximum.accumulate(rank[order] - steps) + steps + between * ordinal
    separated = np.where(raised == 0, 0.0, np.copysign((np.abs(raised) + floor).view(np.float64), raised))
    return torch.from_numpy(separated)
