"""Statistics: mergeable sums about what units did on calibration data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from nns_plugin.errors import StaleStatisticsError, StatisticsError
from nns_plugin.models.fingerprint import difference, fingerprint
from nns_plugin.models.layers import Layout
from nns_plugin.units import Port, UnitGroup, check_port, narrow_groups, removed_positions

Key = tuple[str, str]  # side ("in" or "out") and module name


@dataclass(frozen=True, eq=False)
class Record:
    """Sums about one observed axis; L labels (one row if the data is unlabelled), C channels, S slots.

    Attributes:
        layout: How positions were pooled.
        inputs: ``[L]`` int64, number of inputs.
        samples: ``[L]`` int64, number of (input, position) pairs; a pooled channel has
            ``layout.positions_per_channel`` times as many.
        total: ``[L, C]`` float64, sum of activations.
        magnitude: ``[L, C]`` float64, sum of absolute activations.
        square: ``[L, C]`` float64, sum of squared activations.
        active: ``[L, S]`` int64, inputs for which any position of the slot exceeds the threshold.
        gram: ``None``, or ``[G, C / G + 1, C / G + 1]`` float64: for each of the G groups in which the channels are
            read (1 but for grouped convolutions) the Gram matrix of its channels and a constant 1, which stands last,
            over inputs and positions, the zero positions of a padded convolution included.
    """

    layout: Layout
    inputs: Tensor
    samples: Tensor
    total: Tensor
    magnitude: Tensor
    square: Tensor
    active: Tensor
    gram: Tensor | None = None

    @classmethod
    def empty(cls, layout: Layout, labels: int, gram_groups: int = 0, device: torch.device | None = None) -> Record:
        """A record of nothing."""
        shape = (labels, layout.slot.numel())
        return cls(
            layout,
            torch.zeros(labels, dtype=torch.int64, device=device),
            torch.zeros(labels, dtype=torch.int64, device=device),
            torch.zeros(shape, dtype=torch.float64, device=device),
            torch.zeros(shape, dtype=torch.float64, device=device),
            torch.zeros(shape, dtype=torch.float64, device=device),
            torch.zeros(labels, layout.slots, dtype=torch.int64, device=device),
            _empty_gram(layout, gram_groups).to(device) if gram_groups else None,
        )

    def sums(self) -> dict[str, Tensor]:
        """Everything that merges by addition, by name."""
        named = {name: getattr(self, name) for name in SUMS}
        return named if self.gram is None else {**named, "gram": self.gram}

    def cpu(self) -> Record:
        """The record on the CPU, where statistics live."""
        return Record(self.layout, **{name: value.cpu() for name, value in self.sums().items()})

    def merge(self, other: Record) -> Record:
        """The record of both calibrations together.

        Raises:
            StatisticsError: If the two records were not collected alike.
        """
        mine, theirs = self.sums(), other.sums()
        if mine.keys() != theirs.keys() or any(mine[name].shape != theirs[name].shape for name in mine):
            raise StatisticsError(
                f"records hold {_shapes(mine)} and {_shapes(theirs)}; only records of the same model, groups and "
                "labels can be merged"
            )
        return Record(self.layout, **{name: mine[name] + theirs[name] for name in mine})

    def narrow(self, kept_positions: Tensor) -> Record:
        """The record after only ``kept_positions`` (int64, ascending) of the axis are left."""
        channels = self.layout.channel[kept_positions].unique()
        slots = self.layout.slot[channels].unique()
        layout = self.layout.narrow(kept_positions)
        gram = self.gram
        if gram is not None:
            gram = _narrow_gram(gram, channels)
        return replace(
            self,
            layout=layout,
            total=self.total[:, channels],
            magnitude=self.magnitude[:, channels],
            square=self.square[:, channels],
            active=self.active[:, slots],
            gram=gram,
        )


SUMS = ("inputs", "samples", "total", "magnitude", "square", "active")


@dataclass(frozen=True, eq=False)
class Statistics:
    """What :func:`nns_plugin.calibrate` returns: collect once, prune for any label set, ratio and criterion.

    Attributes:
        records: One record per observed axis, keyed by side and module name.
        groups: The unit groups that the records were collected for.
        labels: Names of the labels, or ``None`` if the data carried none.
        threshold: A position is active where it exceeds this.
        fingerprint: Of the model's weights, see :func:`nns_plugin.models.fingerprint.fingerprint`.
    """

    records: Mapping[Key, Record]
    groups: tuple[UnitGroup, ...]
    labels: tuple[str, ...] | None
    threshold: float
    fingerprint: Mapping[str, str]

    def record(self, group: UnitGroup, port: Port) -> Record | None:
        """The record that a port of a group is observed by, or ``None`` if it was not observed."""
        return self.records.get((group.side, port.name))

    def observed(self, group: UnitGroup) -> bool:
        """Whether a group is one of those that the statistics were collected for.

        Raises:
            StaleStatisticsError: If a group of that name is, but its units or ports were others.
        """
        known = next((known for known in self.groups if known.name == group.name), None)
        if known is None:
            return False
        mine, theirs = ({port.name: port for port in each.ports} for each in (known, group))
        alike = known.size == group.size and known.side == group.side and mine.keys() == theirs.keys()
        if not alike or not all(_same_port(mine[name], theirs[name]) for name in mine):
            raise StaleStatisticsError(
                f"group {group.name!r} has {group.size} units at {', '.join(theirs)}, but the statistics were "
                f"collected for {known.size} at {', '.join(mine)}, or for other positions there; calibrate again"
            )
        return True

    def differ_from(self, model: nn.Module) -> str:
        """What of a model's weights is not as it was at calibration, in words; empty for narrowed statistics, too."""
        return difference(self.fingerprint, fingerprint(model)) if self.fingerprint else ""

    def merge(self, other: Statistics) -> Statistics:
        """The statistics of both calibrations together, whatever their order.

        Raises:
            StatisticsError: If they belong to different models, groups, labels or thresholds, or were narrowed.
        """
        if not self.fingerprint or not other.fingerprint:
            raise StatisticsError(
                "narrowed statistics cannot be merged, their units may differ: merge first, then narrow"
            )
        differs = difference(self.fingerprint, other.fingerprint)
        if differs:
            raise StatisticsError(f"statistics of different weights cannot be merged: {differs}")
        if (
            self.labels != other.labels
            or self.threshold != other.threshold
            or self.records.keys() != other.records.keys()
        ):
            raise StatisticsError(
                f"statistics cannot be merged: labels {self.labels} and {other.labels}, thresholds {self.threshold} "
                f"and {other.threshold}, {len(self.records)} and {len(other.records)} records; they must be equal"
            )
        for key, record in self.records.items():
            if not record.layout.same(other.records[key].layout):
                raise StatisticsError(f"statistics cannot be merged: the units of {key[1]!r} differ")
        merged = {key: record.merge(other.records[key]) for key, record in self.records.items()}
        return replace(self, records=merged)

    def narrow(self, kept: Mapping[str, Tensor]) -> Statistics:
        """The statistics after units have been removed; the fingerprint is dropped, since weights changed shape.

        Args:
            kept: For each pruned group's name the kept units, ``[k]`` int64 ascending; other groups keep all.

        Returns:
            Statistics of the smaller model; exact for everything that the removal itself does not change.

        Raises:
            StatisticsError: If a group is unknown or a unit out of range.
        """
        sizes = {group.name: group.size for group in self.groups}
        for name, units in kept.items():
            if name not in sizes:
                raise StatisticsError(f"no group {name!r} in these statistics; they have {', '.join(sizes)}")
            ascending = units.numel() > 0 and bool((units.diff() > 0).all())
            if not ascending or int(units[0]) < 0 or int(units[-1]) >= sizes[name]:
                raise StatisticsError(f"kept units of group {name!r} must be some of 0..{sizes[name] - 1}, ascending")
        removed = removed_positions(self.groups, kept)
        records = {}
        for key, record in self.records.items():
            stays = torch.ones(record.layout.channel.numel(), dtype=torch.bool)
            if key in removed:
                stays[removed[key]] = False
            records[key] = record.narrow(stays.nonzero().flatten())
        return replace(self, records=records, groups=narrow_groups(self.groups, kept), fingerprint={})

    def all_reduce(self) -> Statistics:
        """The sums of all processes of the default ``torch.distributed`` group, in every process."""
        records = {}
        for key, record in self.records.items():
            sums = {name: distributed_sum(value) for name, value in record.sums().items()}
            records[key] = Record(record.layout, **sums)
        return replace(self, records=records)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file with a JSON header; never pickle. See :meth:`load`."""
        from nns_plugin.statistics.file import save

        save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> Statistics:
        """Read what :meth:`save` wrote.

        Args:
            path: The file.
            model: If given, the model that the statistics must belong to.

        Raises:
            StatisticsError: If the file is missing, damaged or foreign, or belongs to another model.
        """
        from nns_plugin.statistics.file import load

        return load(Path(path), model)


def distributed_sum(value: Tensor) -> Tensor:
    """The sum of a CPU tensor over all processes of the default ``torch.distributed`` group, on the CPU."""
    on_gpu = "nccl" in torch.distributed.get_backend()
    summed = value.to("cuda" if on_gpu else "cpu", copy=True)
    torch.distributed.all_reduce(summed)
    return summed.cpu()


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


def _same_port(one: Port, other: Port) -> bool:
    return torch.equal(one.index, other.index) and torch.equal(one.unit, other.unit)


def _number_by_appearance(values: Tensor) -> Tensor:
    """Distinct values ``[n]`` numbered 0, 1, ... in the order in which they first appear."""
    distinct, number = values.unique(return_inverse=True)
    place = torch.arange(values.numel())
    first = torch.full((distinct.numel(),), values.numel()).scatter_reduce_(0, number, place, "amin")
    return first.argsort().argsort()[number]


def _empty_gram(layout: Layout, groups: int) -> Tensor:
    size = layout.slot.numel() // groups + 1
    return torch.zeros(groups, size, size, dtype=torch.float64)


def _narrow_gram(gram: Tensor, channels: Tensor) -> Tensor:
    """Sub-matrices of the kept channels (equally many in each group) and the constant, which stands last."""
    size = gram.shape[-1] - 1
    parts = []
    for number, matrix in enumerate(gram):
        local = channels[channels // size == number] - number * size
        basis = torch.cat([local, torch.tensor([size])])
        parts.append(matrix[basis][:, basis])
    return torch.stack(parts)


def _shapes(sums: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name}{list(value.shape)}" for name, value in sums.items())
