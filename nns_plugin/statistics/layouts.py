"""Layouts of observed axes: which positions are pooled, according to the unit groups."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nns_plugin.models.layers import Layout
from nns_plugin.statistics.records import Key
from nns_plugin.units import UnitGroup, check_port


def layout_of(groups: Sequence[UnitGroup], key: Key, axis_length: int, pool: bool) -> Layout:
    """The layout of one observed axis.

    Args:
        groups: All groups of the model.
        key: Side and module name of the axis.
        axis_length: Number of positions.
        pool: Whether runs of adjacent positions of one unit are one channel (a Linear behind a flatten).

    Returns:
        The layout; positions that no group owns are channels and slots of their own.

    Raises:
        GroupError: If a group's positions are out of range.
    """
    side, name = key
    owner = torch.full((axis_length,), -1, dtype=torch.int64)
    offset = 0
    for group in groups:
        for port in group.consumers if side == "in" else group.producers:
            if port.name == name:
                check_port(port, group.size, axis_length)
                owner[port.index] = port.unit + offset
        offset += group.size
    free = owner < 0
    owner[free] = offset + torch.arange(int(free.sum()))
    channel = torch.arange(axis_length)
    if pool:
        starts = torch.ones(axis_length, dtype=torch.bool)
        starts[1:] = owner[1:] != owner[:-1]
        channel = starts.cumsum(0) - 1
    owners = torch.full((int(channel.max()) + 1,), -1, dtype=torch.int64)
    owners[channel] = owner
    return Layout(channel, _number_by_appearance(owners))


def _number_by_appearance(values: Tensor) -> Tensor:
    """Distinct values ``[n]`` numbered 0, 1, ... in the order in which they first appear."""
    distinct, number = values.unique(return_inverse=True)
    place = torch.arange(values.numel())
    first = torch.full((distinct.numel(),), values.numel()).scatter_reduce_(0, number, place, "amin")
    return first.argsort().argsort()[number]
