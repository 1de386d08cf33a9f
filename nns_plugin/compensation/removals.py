"""Removals: which units leave each group, which positions each layer loses, and what carries a removal out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from nns_plugin.errors import StaleStatisticsError
from nns_plugin.models.layers import axis_length
from nns_plugin.statistics.statistics import Statistics
from nns_plugin.units import UnitGroup, complement


@dataclass(frozen=True, eq=False)
class Removal:
    """The units that one group loses.

    Attributes:
        group: The unit group; ``None`` if the backend can remove its units but not say which they are.
        units: ``[k]`` int64, the removed units.
    """

    group: UnitGroup | None
    units: Tensor


class PrunableModel(Protocol):
    """What compensation needs of a backend: to carry removals out, and the batch norm behind a layer."""

    @property
    def model(self) -> nn.Module:
        """The model, changed in place."""
        ...

    def carry_out(self, removal: Removal) -> None:
        """Remove the units of one group from the model."""
        ...

    def restored_on_failure(self) -> AbstractContextManager[None]:
        """After an exception inside, the model and all that the backend knows of it are as they were."""
        ...

    def following_norm(self, name: str) -> str | None:
        """The batch norm that alone reads a layer's output, reads nothing else and has a running mean; by name."""
        ...


def consumers_of(removals: Sequence[Removal]) -> set[str]:
    """Names of all consumers of the groups that lose units."""
    return {port.name for removal in removals if removal.group is not None for port in removal.group.consumers}


def kept_units(removals: Sequence[Removal], statistics: Statistics) -> dict[str, Tensor]:
    """The units that stay, ``[k]`` int64, of each observed group that loses units."""
    observed = {group.name for group in statistics.groups}
    return {
        removal.group.name: complement(removal.group.size, removal.units)
        for removal in removals
        if removal.group is not None and removal.group.name in observed
    }


def removed_channels(model: nn.Module, removals: Sequence[Removal], statistics: Statistics) -> dict[str, Tensor]:
    """The channels that each observed consumer loses, ``[k]`` int64.

    Raises:
        StaleStatisticsError: If the statistics are of other widths than the model.
    """
    gone: dict[str, list[Tensor]] = {}
    for removal in removals:
        for port in removal.group.consumers if removal.group is not None else ():
            record = statistics.records.get(("in", port.name))
            if record is not None:
                _check_width(model, port.name, record.layout.channel.numel())
                positions = port.index[torch.isin(port.unit, removal.units)]
                gone.setdefault(port.name, []).append(record.layout.channel[positions])
    return {name: torch.cat(parts).unique() for name, parts in gone.items()}


def _check_width(model: nn.Module, name: str, observed: int) -> None:
    now = axis_length(model.get_submodule(name), "in", name)
    if now != observed:
        raise StaleStatisticsError(
            f"the statistics of {name!r} cover {observed} positions, but it reads {now} now; calibrate again"
        )


def kept_outputs(dense: nn.Module, removals: Sequence[Removal]) -> dict[str, Tensor]:
    """The out-positions that stay, ``[k]`` int64 ascending, of each layer that loses outputs."""
    gone: dict[str, list[Tensor]] = {}
    for removal in removals:
        for port in removal.group.producers if removal.group is not None else ():
            gone.setdefault(port.name, []).append(port.positions(removal.units))
    return {
        name: complement(axis_length(dense.get_submodule(name), "out", name), torch.cat(parts))
        for name, parts in gone.items()
    }
