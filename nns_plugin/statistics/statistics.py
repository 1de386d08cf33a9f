"""Statistics: mergeable sums about what units did on calibration data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from nns_plugin.errors import StaleStatisticsError, StatisticsError
from nns_plugin.models.fingerprint import difference, fingerprint
from nns_plugin.statistics.distributed import distributed_sum
from nns_plugin.statistics.file import Content, read_statistics, write_statistics
from nns_plugin.statistics.records import Key, Record
from nns_plugin.units import Port, UnitGroup, narrow_groups, removed_positions


@dataclass(frozen=True, eq=False)
class Statistics:
    """The result of :func:`nns_plugin.calibrate`: calibrate once, then prune for any label set, ratio and criterion.

    Attributes:
        records: One record per observed axis, keyed by side and module name.
        groups: The unit groups that the records were collected for.
        labels: Names of the labels, or ``None`` if the data had none.
        threshold: A position is active where it exceeds this.
        fingerprint: Fingerprint of the model's weights, see :func:`nns_plugin.models.fingerprint.fingerprint`.
    """

    records: Mapping[Key, Record]
    groups: tuple[UnitGroup, ...]
    labels: tuple[str, ...] | None
    threshold: float
    fingerprint: Mapping[str, str]

    def record(self, group: UnitGroup, port: Port) -> Record | None:
        """The record of a port of a group, or ``None`` if it was not observed."""
        return self.records.get((group.side, port.name))

    def observed(self, group: UnitGroup) -> bool:
        """Whether the statistics were collected for a group.

        Raises:
            StaleStatisticsError: If they were collected for a group of that name with other units or ports.
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

    def digest(self) -> int:
        """A number, not negative, that two statistics share if their sums may be added."""
        layouts = [
            (key, record.layout.channel.tolist(), record.layout.slot.tolist()) for key, record in self.records.items()
        ]
        collected = (sorted(self.fingerprint.items()), self.labels, self.threshold, layouts)
        return int.from_bytes(hashlib.blake2b(repr(collected).encode(), digest_size=7).digest(), "big")

    def differ_from(self, model: nn.Module) -> str:
        """How a model's weights differ from those at calibration, in words; empty for narrowed statistics, too."""
        return difference(self.fingerprint, fingerprint(model)) if self.fingerprint else ""

    def check_current(
        self, model: nn.Module, *, advice: str = "calibrate again", subject: str = "the statistics"
    ) -> None:
        """Check that a model is in the state that the statistics were collected in; narrowed ones pass.

        Args:
            model: The model.
            advice: What the message advises.
            subject: What the message calls the statistics, in the plural.

        Raises:
            StaleStatisticsError: If its weights differ.
        """
        differs = self.differ_from(model)
        if differs:
            raise StaleStatisticsError(f"{subject} belong to another state of the model: {differs}; {advice}")

    def merge(self, other: Statistics) -> Statistics:
        """The statistics of both calibrations combined; the order does not matter.

        Raises:
            StatisticsError: If they belong to different models, groups, labels or thresholds, or were narrowed.
        """
        if not self.fingerprint or not other.fingerprint:
            raise StatisticsError(
                "narrowed statistics cannot be merged, since their units may differ; merge first, then narrow"
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
            Statistics of the smaller model; exact for all activations that the removal does not change.

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
        """Write one safetensors file with a JSON header, never pickle, atomically. See :meth:`load`."""
        content = Content(self.records, self.groups, self.labels, self.threshold, self.fingerprint)
        write_statistics(Path(path), content)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> Statistics:
        """Read a file of :meth:`save`.

        Args:
            path: The file.
            model: If given, the model that the statistics must belong to.

        Raises:
            StatisticsError: If the file is missing, damaged or foreign, or belongs to another model or state of it.
        """
        statistics = cls(*read_statistics(Path(path)))
        if model is not None:
            if not statistics.fingerprint:
                raise StatisticsError(
                    f"{str(path)!r} holds narrowed statistics, which record no weights to compare with a model; load "
                    "them without a model, or calibrate again"
                )
            statistics.check_current(
                model,
                advice="calibrate again, or load the weights that they were collected with",
                subject=f"the statistics in {str(path)!r}",
            )
        return statistics


def _same_port(one: Port, other: Port) -> bool:
    return torch.equal(one.index, other.index) and torch.equal(one.unit, other.unit)
