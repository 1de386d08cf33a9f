"""Distinctiveness: the angle of a unit's activation vector to another unit's, or to the span of all kept units."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from nns_plugin.compensation.least_squares import RIDGE
from nns_plugin.criteria.elimination import Consumer, greedy_errors, output_energy
from nns_plugin.criteria.incoming_weights import incoming_weights
from nns_plugin.errors import CriterionError, StaleStatisticsError
from nns_plugin.models.layers import channel_groups, consumer_matrices
from nns_plugin.selection import AngleRule, AngleSelection, keep_by_angle
from nns_plugin.statistics.angles import Center, angles, centred, check_center, silent
from nns_plugin.statistics.records import Record
from nns_plugin.statistics.statistics import Statistics
from nns_plugin.units import Port, UnitGroup

Mode = Literal["pairwise", "span"]
Vectors = Literal["activations", "weights"]


def greedy_angles(degrees: Tensor, silent: Tensor | None = None) -> Tensor:
    """Score units by the angle to the nearest remaining unit, at their turn in greedy removal.

    The pair with the smallest ``min(angle, 180 - angle)`` is taken next, and its later unit goes.

    Args:
        degrees: ``[U, U]`` from :func:`angles`.
        silent: ``[U]`` bool, units whose vectors are 0: they go first, at 0.

    Returns:
        ``[U]`` degrees in [0, 90]; the last remaining unit has 90.
    """
    if silent is not None and bool(silent.any()):
        active = (~silent).nonzero().flatten()
        scores = torch.zeros(degrees.shape[0], dtype=degrees.dtype)
        if active.numel():
            scores[active] = greedy_angles(degrees[active][:, active])
        return scores
    distance = torch.minimum(degrees, 180 - degrees).clone()
    distance.fill_diagonal_(torch.inf)
    size = distance.shape[0]
    scores = torch.full((size,), 90.0, dtype=distance.dtype)
    nearest, partner = distance.min(1)
    for _ in range(size - 1):
        first = int(nearest.argmin())
        gone = max(first, int(partner[first]))
        scores[gone] = nearest[first]
        distance[gone] = torch.inf
        distance[:, gone] = torch.inf
        nearest[gone] = torch.inf
        lost = (partner == gone).nonzero().flatten()
        lost = lost[lost != gone]
        nearest[lost], partner[lost] = distance[lost].min(1)
    return scores


@dataclass(frozen=True, eq=False)
class Distinctiveness:
    """Criterion: how distinct a unit is from the others; units that others can stand in for go first.

    Attributes:
        statistics: Collected with ``gram=True``; labels are not needed.
        model: The model, whose weights determine what consumers do with the units.
        mode: ``"pairwise"`` scores the angle to the nearest remaining unit, in degrees (Gedeon).
            ``"span"`` scores the cumulative output error of the consumers in greedy elimination, after optimal
            compensation by all remaining units and the constant, relative to each consumer's output energy.
        center: For ``"pairwise"``: ``None``, a number subtracted from all activations (0.5 for sigmoid units) or
            ``"mean"`` for each unit's own mean.
        vectors: For ``"pairwise"``: ``"activations"``, or ``"weights"`` for the incoming weights.
        ridge: For ``"span"``: added to the diagonals of the Gram matrices, relative to their means.
        sensitivity: For ``"span"``, from :func:`nns_plugin.statistics.sensitivity.output_sensitivity`: errors are
            weighted by the geometric mean of their share of the consumer's output energy and their effect on the
            model's outputs.
        cost: For ``"span"``, by group name: the cost of one unit, such as MACs from
            :func:`nns_plugin.statistics.macs.unit_macs`; scores are errors per cost, for global pruning.

    Raises:
        CriterionError: If an option is unknown, the statistics have no Gram matrices, or a group has no cost.
        StaleStatisticsError: If sensitivities or weights belong to another state of the model.

    Source:
        Gedeon, "Indicators of hidden neuron functionality: the weight matrix versus neuron behaviour", 1995, for
        ``"pairwise"``; ``"span"`` is its generalisation from one other unit to all.
    """

    statistics: Statistics
    model: nn.Module
    mode: Mode = "pairwise"
    center: Center = None
    vectors: Vectors = "activations"
    ridge: float = RIDGE
    sensitivity: Mapping[str, Tensor] | None = None
    cost: Mapping[str, float] | None = None

    requires: ClassVar[tuple[str, ...]] = ("statistics", "model")
    optional: ClassVar[tuple[str, ...]] = ("sensitivity", "cost")
    needs_gram: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, kind in (("mode", Mode), ("vectors", Vectors)):
            if getattr(self, name) not in get_args(kind):
                raise CriterionError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(get_args(kind))}"
                )
        check_center(self.center)
        if not self.ridge > 0:
            raise CriterionError(f"ridge is {self.ridge}; it must be positive")
        reads_weights = self.mode == "pairwise" and self.vectors == "weights"
        if not reads_weights and all(record.gram is None for record in self.statistics.records.values()):
            raise CriterionError("these statistics have no Gram matrices; calibrate with gram=True")

    def __call__(self, group: UnitGroup) -> Tensor | None:
        """Scores ``[U]``; ``None`` if the group has no Gram matrix or, for ``"span"``, no consumer."""
        if self.mode == "span":
            return self._span(group)
        inner = self._products(group)
        return None if inner is None else greedy_angles(angles(inner), silent(inner))

    def degrees(self, group: UnitGroup) -> Tensor | None:
        """Angles ``[U, U]`` between the units' vectors, the basis of :meth:`select`.

        ``None`` if the group has no Gram matrix, or no incoming weights.
        """
        inner = self._products(group)
        return None if inner is None else angles(inner)

    def select(self, groups: Iterable[UnitGroup], rule: AngleRule) -> dict[str, AngleSelection]:
        """The units that an angle rule leaves of each group that has angles, by name."""
        angles_of = {group.name: self.degrees(group) for group in groups}
        return {name: keep_by_angle(degrees, rule) for name, degrees in angles_of.items() if degrees is not None}

    def _products(self, group: UnitGroup) -> Tensor | None:
        return self._incoming(group) if self.vectors == "weights" else self._activations(group)

    def _span(self, group: UnitGroup) -> Tensor | None:
        if not group.consumers or not self.statistics.observed(group):
            return None
        consumers: list[Consumer] = []
        for port in group.consumers:
            record = self.statistics.record(group, port)
            module = self.model.get_submodule(port.name)
            known = None if self.sensitivity is None else self.sensitivity.get(port.name)
            if record is None or record.gram is None or (found := consumers_of(module, record, port, known)) is None:
                return None
            consumers += found
        errors = greedy_errors(_joined(consumers), group.size, self.ridge)
        if self.cost is None:
            return errors
        cost = self.cost.get(group.name)
        if cost is None or not 0 < cost < torch.inf:
            raise CriterionError(f"the cost of group {group.name!r} is {cost}; expected a positive number")
        return errors / cost

    def _activations(self, group: UnitGroup) -> Tensor | None:
        if not self.statistics.observed(group):
            return None
        inner = torch.zeros(group.size, group.size, dtype=torch.float64)
        for port in group.ports:
            record = self.statistics.record(group, port)
            if record is None or record.gram is None:
                return None
            inner += unit_products(record, port, group.size, self.center)
        return inner

    def _incoming(self, group: UnitGroup) -> Tensor | None:
        vectors = incoming_weights(self.model, group)
        return None if vectors is None else sum((v @ v.T for v in vectors), torch.zeros(()).double())


def consumers_of(
    module: nn.Module, record: Record, port: Port, sensitivity: Tensor | None = None
) -> list[Consumer] | None:
    """One consumer of the units of a port, once per channel group; ``None`` if its weights or Gram matrix are unknown.

    Args:
        module: The consumer.
        record: The statistics of its input.
        port: The positions of the units in its input.
        sensitivity: ``[O]`` mean squared gradient of the model's outputs with respect to its outputs.

    Raises:
        StaleStatisticsError: If the weights have another shape than the record.
    """
    matrices = consumer_matrices(module, record.layout)
    if matrices is None or record.gram is None:
        return None
    groups = channel_groups(module)
    if sum(matrix.shape[2] for matrix in matrices) != record.layout.slot.numel():
        raise StaleStatisticsError(f"the weights of {port.name!r} do not fit its statistics; calibrate again")
    owner = torch.full((record.layout.slot.numel(),), -1, dtype=torch.int64)
    owner[record.layout.channel[port.index]] = port.unit
    flat = [matrix.flatten(0, 1) for matrix in matrices]
    energies = [matrix.T @ matrix for matrix in flat]
    total = sum(output_energy(record.gram[number], energy) for number, energy in enumerate(energies))
    factor = 1 / total if total > 0 else 0.0
    if sensitivity is not None:
        if sensitivity.numel() != sum(matrix.shape[0] for matrix in matrices):
            raise StaleStatisticsError(
                f"the sensitivity of {port.name!r} covers {sensitivity.numel()} outputs, but the layer has "
                f"{sum(matrix.shape[0] for matrix in matrices)}; measure it again"
            )
        # The geometric mean of err / total and s err / n, for n inputs.
        factor = (factor / float(record.inputs.sum())) ** 0.5
        rows = [
            part.double().sqrt().repeat_interleave(matrix.shape[1])
            for part, matrix in zip(sensitivity.chunk(groups), matrices, strict=True)
        ]
        energies = [(matrix.T * row) @ matrix for matrix, row in zip(flat, rows, strict=True)]
    consumers = []
    for number, block in enumerate(owner.chunk(groups)):
        own = (block >= 0).nonzero().flatten()
        if own.numel():
            basis = torch.cat([own, torch.tensor([block.numel()])])
            gram = record.gram[number][basis][:, basis]
            consumers.append(Consumer(gram, energies[number][own][:, own], block[own], factor))
    return consumers


def unit_products(record: Record, port: Port, size: int, center: Center) -> Tensor:
    """Inner products ``[U, U]`` of the units' activations at one port; a unit of several channels joins them."""
    assert record.gram is not None
    channel = record.layout.channel[port.index]
    count = float(record.samples.sum()) * float(record.layout.positions_per_channel[0])
    total = record.total.sum(0)
    result = torch.zeros(size, size, dtype=torch.float64)
    groups = record.gram.shape[0]
    length = total.numel() // groups
    pairs = torch.stack([channel, port.unit], 1).unique(dim=0)
    order = pairs[:, 1].argsort(stable=True)
    channel, unit = pairs[order, 0], pairs[order, 1]
    rank = torch.arange(unit.numel()) - torch.searchsorted(unit, unit)  # which of its unit's channels
    for place in rank.unique().tolist():
        for number in range(groups):
            chosen = (rank == place) & (channel // length == number)
            local = channel[chosen] - number * length
            product = centred(record.gram[number][local][:, local], total[channel[chosen]], count, center)
            result[unit[chosen][:, None], unit[chosen]] += product
    return result


def _joined(consumers: list[Consumer]) -> list[Consumer]:
    """Consumers with equal Gram matrices (of one tensor) as one, so that it is inverted once."""
    joined: list[Consumer] = []
    for consumer in consumers:
        energy = consumer.weight * consumer.energy
        for place, known in enumerate(joined):
            if torch.equal(known.unit, consumer.unit) and torch.equal(known.gram, consumer.gram):
                joined[place] = Consumer(known.gram, known.energy + energy, known.unit, 1.0)
                break
        else:
            joined.append(Consumer(consumer.gram, energy, consumer.unit, 1.0))
    return joined
