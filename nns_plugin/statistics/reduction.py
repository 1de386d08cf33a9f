"""Reduce one activation to sums by input and channel, and add them to a record."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nns_plugin.models.layers import Layout
from nns_plugin.statistics.records import Record


class Sums(NamedTuple):
    """What one activation adds to a record, by input: N inputs, C channels, S slots.

    Attributes:
        total: ``[N, C]`` sum of activations.
        magnitude: ``[N, C]`` sum of absolute activations.
        square: ``[N, C]`` sum of squared activations.
        active: ``[N, S]`` bool, whether any position of the slot exceeds the threshold.
        samples: Number of samples per input.
        gram: ``[G, C / G + 1, C / G + 1]`` Gram matrix of each channel group and the constant, or ``None``.
    """

    total: Tensor
    magnitude: Tensor
    square: Tensor
    active: Tensor
    samples: int
    gram: Tensor | None = None


def reduce_activation(rows: Tensor, layout: Layout, size: int, threshold: float, gram_groups: int = 0) -> Sums:
    """Sums of one activation by input and channel.

    Args:
        rows: ``[N * k, positions, P]`` activations.
        layout: How the positions pool to C channels and S slots.
        size: N, number of inputs.
        threshold: A position is active where it exceeds this.
        gram_groups: Channel groups of the Gram matrices; 0 for none.

    Returns:
        The sums; an input has k * P samples.
    """
    rows = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
    total = rows.sum(2)
    square = torch.linalg.vector_norm(rows, dim=2).square()
    peak = rows.amax(2)
    # After a ReLU, the usual case, magnitudes are the activations: the minimum costs less than a second sum.
    magnitude = total if bool(rows.amin() >= 0) else torch.linalg.vector_norm(rows, 1, dim=2)
    sums = [_by_input(value, size).sum(1) for value in (total, square, magnitude)]
    peak = _by_input(peak, size).amax(1)
    channels = layout.slot.numel()
    if channels != layout.channel.numel():
        channel = layout.channel.to(rows.device)
        sums = [value.new_zeros(size, channels).index_add_(1, channel, value) for value in sums]
    if layout.slots != layout.channel.numel():
        slot = layout.slot[layout.channel].to(rows.device).expand(size, -1)
        peak = peak.new_full((size, layout.slots), -torch.inf).scatter_reduce_(1, slot, peak, "amax")
    total, square, magnitude = sums
    gram = activation_gram(rows, layout, gram_groups) if gram_groups else None
    return Sums(total, magnitude, square, peak > threshold, rows.shape[0] // size * rows.shape[2], gram)


def activation_gram(rows: Tensor, layout: Layout, groups: int) -> Tensor:
    """Gram matrices of one activation, over inputs and positions.

    Args:
        rows: ``[N * k, positions, P]`` activations.
        layout: How the positions pool to C channels, all to equally many.
        groups: G, the channel groups that a consumer reads separately.

    Returns:
        ``[G, C / G + 1, C / G + 1]`` float64; the constant 1 stands last. Products are single precision where the
        activations are.
    """
    channels = layout.slot.numel()
    size = channels // groups
    samples = rows.reshape(rows.shape[0], groups, size, -1).permute(1, 2, 0, 3).reshape(groups, size, -1)
    gram = torch.empty(groups, size + 1, size + 1, dtype=torch.float64, device=rows.device)
    gram[:, :size, :size] = torch.bmm(samples, samples.transpose(1, 2))
    gram[:, size, :size] = samples.sum(2)
    gram[:, :size, size] = gram[:, size, :size]
    gram[:, size, size] = samples.shape[2]
    return gram


def add_batch(record: Record, labels: Tensor, sums: Sums, padded: int = 0) -> None:
    """Add the sums of one activation to a record, in place.

    Args:
        record: The record.
        labels: ``[N]`` int64, the label of each input.
        sums: The sums.
        padded: Zero positions that the consumer adds to each input; they enter the Gram matrix as (0, ..., 0, 1).
    """
    labels = labels.to(record.total.device)
    counts = torch.bincount(labels, minlength=record.inputs.numel())
    record.inputs.add_(counts)
    record.samples.add_(counts * sums.samples)
    for name in ("total", "magnitude", "square", "active"):
        goal = getattr(record, name)
        goal.index_add_(0, labels, getattr(sums, name).to(goal.device, goal.dtype))
    if record.gram is not None and sums.gram is not None:
        record.gram.add_(sums.gram.to(record.gram.device))
        record.gram[:, -1, -1] += padded * labels.numel()


def _by_input(value: Tensor, size: int) -> Tensor:
    return value.reshape(size, -1, value.shape[-1])
