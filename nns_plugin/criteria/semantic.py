"""Semantic: the activity of a unit on the labels that a subnet must keep."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from nns_plugin.errors import CriterionError, LabelError, StaleStatisticsError
from nns_plugin.labels import resolve_label
from nns_plugin.statistics.records import Record
from nns_plugin.statistics.statistics import Statistics
from nns_plugin.units import Port, UnitGroup

Measure = Literal["mean", "frequency"]
Contrast = Literal["rest"]


def relative_activity(activity: Tensor) -> Tensor:
    """Activity relative to the most active unit of the layer, eq. 1 of the source.

    ``s[l, u] = x[l, u] / beta[l]`` with ``beta[l] = max over u of x[l, u]``; keeping ``s >= zeta`` is the rule
    ``x >= zeta * beta``.

    Args:
        activity: ``[L, U]`` activity x of each unit on each label, not negative.

    Returns:
        ``[L, U]`` scores in [0, 1]; 0 in rows where no unit is active.

    Source:
        Emadi and Davardoust, "NNS: Neural network surgery", eq. 1.

    Example:
        >>> relative_activity(torch.tensor([[1.0, 4.0, 2.0], [0.0, 0.0, 0.0]]))
        tensor([[0.2500, 1.0000, 0.5000],
                [0.0000, 0.0000, 0.0000]])
    """
    beta = activity.amax(dim=1, keepdim=True)
    return torch.where(beta > 0, activity / beta.clamp_min(torch.finfo(activity.dtype).tiny), 0.0)


def contrast_to_rest(total: Tensor, square: Tensor, samples: Tensor, chosen: Tensor) -> Tensor:
    """Distance of a unit's mean on the chosen labels from its mean on the rest, in pooled standard deviations.

    ``|m1 - m2| / sqrt(((n1 - 1) v1 + (n2 - 1) v2) / (n1 + n2 - 2))`` (Cohen's d).

    Args:
        total: ``[L, U]`` sum of activations.
        square: ``[L, U]`` sum of squared activations.
        samples: ``[L, U]`` number of samples.
        chosen: ``[L]`` bool, the labels of the set.

    Returns:
        ``[U]`` scores, not negative; 0 where a unit is constant everywhere.

    Example:
        >>> one, rest = torch.tensor([1.0, 3.0]), torch.tensor([5.0, 7.0])
        >>> total = torch.stack([one.sum(), rest.sum()])[:, None]
        >>> square = torch.stack([one.square().sum(), rest.square().sum()])[:, None]
        >>> contrast_to_rest(total, square, torch.full((2, 1), 2.0), torch.tensor([True, False]))
        tensor([2.8284])
    """
    sides = []
    for rows in (chosen, ~chosen):
        n = samples[rows].sum(0).clamp_min(1)
        mean = total[rows].sum(0) / n
        deviation = (square[rows].sum(0) - n * mean.square()).clamp_min(0)  # sum of squared deviations
        sides.append((n, mean, deviation))
    (n1, mean1, deviation1), (n2, mean2, deviation2) = sides
    pooled = ((deviation1 + deviation2) / (n1 + n2 - 2).clamp_min(1)).sqrt()
    gap = (mean1 - mean2).abs()
    # A unit that is constant on each side but differs separates perfectly: the floor keeps its score finite.
    floor = 1e-6 * torch.maximum(mean1.abs(), mean2.abs())
    return torch.where(gap > 0, gap / torch.maximum(pooled, floor).clamp_min(torch.finfo(total.dtype).tiny), 0.0)


@dataclass(frozen=True, eq=False)
class Semantic:
    """Criterion: how active a unit is on the labels to keep.

    The score of a unit is the maximum, over the labels of the set and over the unit's consumers, of its activity
    relative to the most active unit there. Keeping ``score >= zeta`` gives exactly the union of the
    subnets of the single labels.

    Attributes:
        statistics: Labelled statistics.
        labels: The labels to keep, by index or name; all of them by default.
        measure: ``"mean"``: mean activation magnitude over the inputs of a label and positions.
            ``"frequency"``: share of the label's inputs for which the unit is active.
        contrast: ``"rest"`` scores the distance between the label set and all other labels instead, in pooled
            standard deviations.

    Raises:
        LabelError: If the statistics carry no labels, or a label is unknown or was never seen.
        CriterionError: If an option is unknown.

    Source:
        Emadi and Davardoust, "NNS: Neural network surgery", section 3.1 and eq. 1.
    """

    statistics: Statistics
    labels: Sequence[int | str] | None = None
    measure: Measure = "mean"
    contrast: Contrast | None = None

    requires: ClassVar[tuple[str, ...]] = ("statistics",)
    accepts_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.measure not in get_args(Measure):
            raise CriterionError(f"measure is {self.measure!r}; it must be one of {', '.join(get_args(Measure))}")
        if self.contrast not in (None, *get_args(Contrast)):
            raise CriterionError(f"contrast is {self.contrast!r}; it must be None or 'rest'")
        chosen = self._chosen
        inputs = next(iter(self.statistics.records.values())).inputs
        for label in chosen.nonzero().flatten().tolist():
            if not int(inputs[label]):
                name = (self.statistics.labels or ())[label]
                raise LabelError(f"label {name!r} was never seen during calibration; add inputs with it to the loader")
        if self.contrast == "rest" and not int(inputs[~chosen].sum()):
            raise LabelError("contrast='rest' needs inputs of other labels than the chosen ones; there are none")

    def __call__(self, group: UnitGroup) -> Tensor | None:
        """Scores ``[U]``; ``None`` if the group was not observed during calibration."""
        if not self.statistics.observed(group):
            return None
        scores = []
        for port in group.ports:
            record = self.statistics.record(group, port)
            if record is not None:
                scores.append(self._at_port(record, port, group.size))
        return torch.stack(scores).amax(0) if scores else None

    @functools.cached_property
    def _chosen(self) -> Tensor:
        names = self.statistics.labels
        if names is None:
            raise LabelError("these statistics carry no labels; calibrate with a loader of (inputs, labels)")
        if isinstance(self.labels, str) or not (self.labels is None or isinstance(self.labels, Iterable)):
            raise LabelError(f"labels is {self.labels!r}; it must be a list of labels, by index or name")
        indices = range(len(names)) if self.labels is None else [resolve_label(label, names) for label in self.labels]
        if not indices:
            raise LabelError("labels is empty; name at least one label to keep")
        chosen = torch.zeros(len(names), dtype=torch.bool)
        chosen[list(indices)] = True
        return chosen

    def _at_port(self, record: Record, port: Port, size: int) -> Tensor:
        chosen = self._chosen
        read = torch.zeros(size, dtype=torch.bool)
        read[port.unit] = True
        if self.measure == "frequency":
            total = square = by_slot(record.active.double(), record, port, size)
            samples = record.inputs.double()[:, None].expand_as(total)
        else:
            positions = by_channel(record.layout.positions_per_channel.double()[None], record, port, size)
            samples = record.samples.double()[:, None] * positions
            square = by_channel(record.square, record, port, size)
            total = by_channel(record.total if self.contrast else record.magnitude, record, port, size)
        if self.contrast:
            return torch.where(read, contrast_to_rest(total, square, samples, chosen), 0.0)
        return relative_activity(total[chosen] / samples[chosen].clamp_min(1)).amax(0)


def by_channel(values: Tensor, record: Record, port: Port, size: int) -> Tensor:
    """Sums of a record's channels ``[L, C]`` by unit of a port, ``[L, U]``; 0 for units the port does not own."""
    channel = _check(record, port).layout.channel[port.index]
    owner = torch.full((record.layout.slot.numel(),), -1, dtype=torch.int64)
    owner[channel] = port.unit
    owned = owner >= 0
    return values.new_zeros(values.shape[0], size).index_add_(1, owner[owned], values[:, owned])


def by_slot(values: Tensor, record: Record, port: Port, size: int) -> Tensor:
    """Values of a record's slots ``[L, S]`` by unit of a port, ``[L, U]``; 0 for units the port does not own."""
    slot = _check(record, port).layout.slot[record.layout.channel[port.index]]
    result = values.new_zeros(values.shape[0], size)
    result[:, port.unit] = values[:, slot]
    return result


def _check(record: Record, port: Port) -> Record:
    if int(port.index.max()) >= record.layout.channel.numel():
        raise StaleStatisticsError(
            f"statistics of {port.name!r} cover {record.layout.channel.numel()} positions, but a unit stands at "
            f"position {int(port.index.max())}; calibrate again"
        )
    return record
