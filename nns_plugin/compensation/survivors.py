"""Survivors: which kept unit replaces which removed one after a selection by angles, and the same for channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nns_plugin.compensation.least_squares import Merge
from nns_plugin.selection import AngleSelection
from nns_plugin.statistics.angles import Center
from nns_plugin.statistics.statistics import Statistics
from nns_plugin.units import Port, UnitGroup


@dataclass(frozen=True, eq=False)
class Survivors:
    """Which channel takes over from which at one consumer, and how.

    Attributes:
        channel: ``[C]`` int64, the channel that replaces each of the consumer's channels; -1 for none.
        merge: See :func:`nns_plugin.compensation.least_squares.merging`.
        center: Subtracted from the channels' values.
    """

    channel: Tensor
    merge: Merge
    center: Center


def survivors_of(
    statistics: Statistics,
    groups: Sequence[UnitGroup],
    selections: Mapping[str, AngleSelection],
    merge: Merge,
    center: Center,
) -> dict[str, Survivors]:
    """Survivors of every observed consumer.

    Args:
        statistics: Statistics of the model that is going to be pruned.
        groups: The groups that were selected from.
        selections: By name of the group.
        merge: How survivors take over.
        center: Subtracted from the channels' values.
    """
    channels: dict[str, Tensor] = {}
    for group in groups:
        for port in group.consumers if group.name in selections else ():
            record = statistics.records.get(("in", port.name))
            if record is not None:
                known = channels.setdefault(port.name, torch.arange(record.layout.slot.numel()))
                _stand_in(known, port, record.layout.channel, selections[group.name].survivor)
    return {name: Survivors(channel, merge, center) for name, channel in channels.items()}


def _stand_in(known: Tensor, port: Port, channel_of_position: Tensor, survivor: Tensor) -> None:
    """Write into ``known`` ``[C]`` which channel replaces which: the one of equal rank among those of the two units."""
    pairs = torch.stack([port.unit, channel_of_position[port.index]], 1).unique(dim=0)
    unit, channel = pairs[:, 0].contiguous(), pairs[:, 1]
    rank = torch.arange(unit.numel()) - torch.searchsorted(unit, unit)
    table = torch.full((survivor.numel(), int(rank.max()) + 1), -1)
    table[unit, rank] = channel
    heir = survivor[unit]
    known[channel] = torch.where(heir >= 0, table[heir.clamp_min(0), rank], -1)
