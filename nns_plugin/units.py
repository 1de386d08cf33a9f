"""Units, ports and unit groups: what can be removed as a whole, and who produces and consumes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nns_plugin.errors import GroupError


@dataclass(frozen=True, eq=False)
class Port:
    """Positions of one module at which it produces or consumes the units of a group.

    A producer counts positions on the module's out axis, a consumer on its in axis. A unit may own several positions (a
    Linear behind a flatten, the groups of a convolution), but every unit that a port mentions owns equally many.

    Attributes:
        name: Name of the module, as in ``model.named_modules()``.
        index: ``[n]`` int64, distinct positions.
        unit: ``[n]`` int64, the unit that owns each position.
    """

    name: str
    index: Tensor
    unit: Tensor

    def positions(self, units: Tensor) -> Tensor:
        """Positions that the given units own on this port, ascending; ``units`` is ``[k]`` int64."""
        return self.index[torch.isin(self.unit, units)].sort().values


@dataclass(frozen=True, eq=False)
class UnitGroup:
    """Units that must be removed consistently at all their ports.

    Attributes:
        name: Name of the first producer in the model that no other group shares; unique among the groups of a model.
        size: Number of units, U.
        producers: Ports that produce the units.
        consumers: Ports that consume them; empty if no module consumes them that can be observed and compensated.
    """

    name: str
    size: int
    producers: tuple[Port, ...]
    consumers: tuple[Port, ...]

    @property
    def ports(self) -> tuple[Port, ...]:
        """The ports at which the units are observed: the consumers, or the producers if there are none."""
        return self.consumers or self.producers

    @property
    def side(self) -> str:
        """``"in"`` if the units are observed at their consumers, ``"out"`` if at their producers."""
        return "in" if self.consumers else "out"

    def narrow(self, kept: Tensor) -> UnitGroup:
        """The group after all units but ``kept`` (``[k]`` int64, ascending) have been removed.

        Every position moves down by the number of removed positions below it *in this group*; positions that
        other groups lose on the same module are not accounted for; see :func:`narrow_groups`.
        """
        return narrow_groups([self], {self.name: kept})[0]


def check_port(port: Port, size: int, axis_length: int | None = None) -> None:
    """Check that a port is well formed.

    Args:
        port: The port to check.
        size: Number of units of its group.
        axis_length: Length of the module axis that the port indexes, if known.

    Raises:
        GroupError: If positions are out of range or not distinct, if units are out of range, or if the units
            that the port mentions do not own equally many positions.
    """
    well_typed = port.index.dtype == port.unit.dtype == torch.int64 and port.index.dim() == 1
    if not well_typed or port.index.shape != port.unit.shape:
        raise GroupError(
            f"port {port.name!r}: index and unit must be int64 vectors of one length, found "
            f"{port.index.dtype}{list(port.index.shape)} and {port.unit.dtype}{list(port.unit.shape)}"
        )
    if port.index.numel() == 0:
        raise GroupError(f"port {port.name!r} has no positions; a port must own at least one")
    low, high = int(port.index.min()), int(port.index.max())
    if low < 0 or (axis_length is not None and high >= axis_length):
        raise GroupError(
            f"port {port.name!r}: positions {low}..{high} are out of range, the axis has {axis_length} positions"
        )
    if port.index.unique().numel() != port.index.numel():
        raise GroupError(f"port {port.name!r}: some position is listed twice; positions must be distinct")
    if int(port.unit.min()) < 0 or int(port.unit.max()) >= size:
        raise GroupError(
            f"port {port.name!r}: units {int(port.unit.min())}..{int(port.unit.max())} are out of range, "
            f"the group has {size} units"
        )
    counts = torch.bincount(port.unit, minlength=size)
    present = counts[counts > 0]
    if int(present.min()) != int(present.max()):
        raise GroupError(
            f"port {port.name!r}: units own between {int(present.min())} and {int(present.max())} positions; "
            "all units must own equally many"
        )


def check_group(group: UnitGroup) -> None:
    """Check that every unit of a group has a producer and, if the group has consumers, a consumer.

    Raises:
        GroupError: If a port is malformed (see :func:`check_port`), two ports claim one position, or a unit is
            incomplete.
    """
    if group.size < 1 or not group.producers:
        raise GroupError(
            f"group {group.name!r} has {group.size} units and {len(group.producers)} producers; "
            "it needs at least one of each"
        )
    for port in (*group.producers, *group.consumers):
        check_port(port, group.size)
    for role, ports in (("written", group.producers), ("read", group.consumers)):
        if not ports:
            continue
        counts = Counter((port.name, place) for port in ports for place in port.index.tolist())
        (name, place), times = counts.most_common(1)[0]
        if times > 1:
            raise GroupError(f"group {group.name!r}: position {place} of {name!r} is {role} twice")
        seen = torch.cat([port.unit for port in ports]).unique().numel()
        if seen != group.size:
            raise GroupError(
                f"group {group.name!r}: only {seen} of its {group.size} units are {role} by "
                f"{', '.join(port.name for port in ports)}; every unit must be"
            )


def complement(size: int, units: Tensor) -> Tensor:
    """Those of ``0..size-1`` that are not among ``units``, ``[k]`` int64 ascending."""
    everything = torch.arange(size)
    return everything[~torch.isin(everything, units)]


def removed_positions(groups: Sequence[UnitGroup], kept: Mapping[str, Tensor]) -> dict[tuple[str, str], Tensor]:
    """Positions that are removed with all but the kept units of some groups.

    Args:
        groups: The groups of one model.
        kept: As for :func:`narrow_groups`.

    Returns:
        For each side (``"in"`` or ``"out"``) and module name the positions, ``[k]`` int64 ascending.
    """
    removed: dict[tuple[str, str], list[Tensor]] = {}
    for group in groups:
        if group.name in kept:
            for side, port in role_ports(group):
                gone = port.index[~torch.isin(port.unit, kept[group.name])]
                removed.setdefault((side, port.name), []).append(gone)
    return {key: torch.cat(parts).sort().values for key, parts in removed.items()}


def narrow_groups(groups: Sequence[UnitGroup], kept: Mapping[str, Tensor]) -> tuple[UnitGroup, ...]:
    """All groups of a model after units have been removed from some of them.

    Several groups may own positions of one module (a concatenation), so positions are renumbered together.

    Args:
        groups: The groups of one model.
        kept: For each narrowed group's name the kept units, ``[k]`` int64 ascending; other groups keep all.

    Returns:
        The narrowed groups, in the same order; unit numbers are renumbered to ``0..k-1``.
    """
    shifts = removed_positions(groups, kept)

    def narrow_port(role: str, port: Port, renumber: Tensor | None) -> Port:
        index, unit = port.index, port.unit
        if renumber is not None:
            stays = renumber[unit] >= 0
            index, unit = index[stays], renumber[unit[stays]]
        gone = shifts.get((role, port.name))
        if gone is not None:
            index = index - torch.searchsorted(gone, index)
        return Port(port.name, index, unit)

    narrowed = []
    for group in groups:
        renumber = None
        if group.name in kept:
            renumber = torch.full((group.size,), -1, dtype=torch.int64)
            renumber[kept[group.name]] = torch.arange(kept[group.name].numel())
        narrowed.append(
            UnitGroup(
                group.name,
                group.size if renumber is None else int(kept[group.name].numel()),
                tuple(narrow_port("out", port, renumber) for port in group.producers),
                tuple(narrow_port("in", port, renumber) for port in group.consumers),
            )
        )
    return tuple(narrowed)


def role_ports(group: UnitGroup) -> list[tuple[str, Port]]:
    """All ports of a group with their sides: ``"out"`` for producers, ``"in"`` for consumers."""
    return [("out", port) for port in group.producers] + [("in", port) for port in group.consumers]
