"""Angles between units' activation vectors, from their inner products alone."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from nns_plugin.errors import CriterionError

Center = float | Literal["mean"] | None


def angles(inner: Tensor) -> Tensor:
    """Angles between vectors, from their inner products.

    Args:
        inner: ``[U, U]`` inner products.

    Returns:
        ``[U, U]`` degrees in [0, 180]: 0 on the diagonal and between two zero vectors, 90 between a zero vector and
        any other.

    Source:
        Gedeon, "Indicators of hidden neuron functionality: the weight matrix versus neuron behaviour", 1995.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-2.0, 0.0]])
        >>> angles(x @ x.T)
        tensor([[  0.,  45., 180.],
                [ 45.,   0., 135.],
                [180., 135.,   0.]])
    """
    zero = silent(inner)
    safe = torch.where(zero, 1.0, inner.diagonal().clamp_min(0).sqrt())
    degrees = torch.rad2deg(torch.arccos((inner / safe / safe[:, None]).clamp(-1, 1)))
    degrees = torch.where(zero ^ zero[:, None], 90.0, degrees)
    degrees = torch.where(zero & zero[:, None], 0.0, degrees)
    return degrees.fill_diagonal_(0.0)


def silent(inner: Tensor) -> Tensor:
    """Which vectors are 0 up to rounding, ``[U]`` bool, from their inner products ``[U, U]``."""
    norm = inner.diagonal().clamp_min(0).sqrt()
    return norm <= 1e-9 * norm.max().clamp_min(torch.finfo(inner.dtype).tiny)


def centred(gram: Tensor, total: Tensor, count: float, center: Center) -> Tensor:
    """Inner products of centred vectors, from those of the vectors themselves.

    Args:
        gram: ``[C, C]`` inner products.
        total: ``[C]`` sums of the vectors' entries.
        count: Number of entries.
        center: ``None`` for none, a number, or ``"mean"`` for each vector's own mean.

    Returns:
        ``[C, C]``: ``<u - c_u, v - c_v> = <u, v> - c_v sum(u) - c_u sum(v) + n c_u c_v``.
    """
    if center is None:
        return gram
    offset = offsets(total, count, center)
    cross = offset[:, None] * total
    return gram - cross - cross.T + count * offset[:, None] * offset


def offsets(total: Tensor, count: float, center: Center) -> Tensor:
    """The offset that a center subtracts from each vector, ``[C]``, from the vectors' sums ``[C]`` and their length."""
    if center is None:
        return torch.zeros_like(total)
    return total / count if center == "mean" else torch.full_like(total, float(center))


def check_center(center: object) -> None:
    """Check a center.

    Raises:
        CriterionError: If it is neither ``None``, a finite number nor ``"mean"``.
    """
    number = isinstance(center, (int, float)) and not isinstance(center, bool) and math.isfinite(center)
    if center not in (None, "mean") and not number:
        raise CriterionError(f"center is {center!r}; it must be None, a finite number or 'mean'")
