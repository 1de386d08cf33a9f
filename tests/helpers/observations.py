"""Layers that are observed in known ways, their sums by brute force, and statistics to merge and save."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import zoo
from torch import Tensor, nn

from nns_plugin import Statistics, calibrate
from nns_plugin.criteria.semantic import by_channel, by_slot
from nns_plugin.units import Port, UnitGroup

LABELS = 3


class Observed(nn.Module):
    """A layer behind a function ``prepare`` of the inputs, so that a test knows its activations."""

    def __init__(self, layer: nn.Module, prepare: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.producer, self.layer, self.prepare = nn.Linear(1, 1), layer, prepare

    def forward(self, x: Tensor) -> Any:
        return self.layer(self.prepare(x))


def consumer(units: list[list[int]]) -> tuple[UnitGroup, ...]:
    """A group whose units are read by ``layer`` at the given positions."""
    return (zoo.unit_group("producer", zoo.Expected({"producer": zoo.one_each(len(units))}, {"layer": units})),)


def brute_force(
    samples: list[np.ndarray], labels: list[int], units: list[list[int]], threshold: float
) -> dict[str, Any]:
    """The sums of units, one number at a time.

    Args:
        samples: For each input ``[S, positions]``, the layer's input by sample.
        labels: The label of each input.
        units: Positions of each unit.
        threshold: A position is active where it exceeds this.
    """
    shape = (LABELS, len(units))
    sums = {name: np.zeros(shape) for name in ("total", "magnitude", "square", "active", "count")}
    inputs, rows = np.zeros(LABELS), np.zeros(LABELS)
    for values, label in zip(samples, labels, strict=True):
        inputs[label] += 1
        rows[label] += len(values)
        for unit, positions in enumerate(units):
            mine = values[:, positions].astype(np.float64)
            sums["total"][label, unit] += mine.sum()
            sums["magnitude"][label, unit] += abs(mine).sum()
            sums["square"][label, unit] += (mine**2).sum()
            sums["active"][label, unit] += (mine > threshold).any()
            sums["count"][label, unit] += mine.size
    return {**sums, "inputs": inputs, "samples": rows}


def found(statistics: Statistics, group: UnitGroup, port: Port) -> dict[str, np.ndarray]:
    """The sums of a port by unit, as the criteria see them."""
    record = statistics.record(group, port)
    assert record is not None
    positions = by_channel(record.layout.positions_per_channel.double()[None], record, port, group.size)
    sums = {
        name: by_channel(getattr(record, name), record, port, group.size) for name in ("total", "magnitude", "square")
    }
    sums["active"] = by_slot(record.active.double(), record, port, group.size)
    sums["count"] = record.samples.double()[:, None] * positions
    return {name: value.numpy() for name, value in {**sums, "inputs": record.inputs, "samples": record.samples}.items()}


def compare(actual: dict[str, np.ndarray], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=2e-6, err_msg=name)


def quarters(*shape: int) -> Tensor:
    """Small multiples of 1/4, negative ones too: their sums are exact in any precision and order."""
    return torch.randint(-9, 10, shape) / 4


def maps(values: np.ndarray) -> np.ndarray:
    """``[C, ...]`` to ``[P, C]``."""
    return values.reshape(values.shape[0], -1).T


def rows(values: np.ndarray) -> np.ndarray:
    """``[..., F]`` to ``[P, F]``."""
    return values.reshape(-1, values.shape[-1])


@dataclass(frozen=True)
class Reading:
    """One way to read activations."""

    layer: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of one input
    units: list[list[int]]
    samples: Callable[[np.ndarray], np.ndarray]  # one input, without the batch, to [S, positions]
    prepare: Callable[[Tensor], Tensor] = lambda x: x


READINGS = {
    "linear": Reading(lambda: nn.Linear(5, 3), (5,), zoo.one_each(5), rows),
    "linear, some units": Reading(lambda: nn.Linear(5, 3), (5,), [[3], [1]], rows),
    "linear behind a flatten": Reading(
        lambda: nn.Linear(24, 3), (4, 2, 3), zoo.blocks(4, 6), lambda x: x.reshape(1, -1), lambda x: x.flatten(1)
    ),
    "part of a flatten": Reading(
        lambda: nn.Linear(24, 3),
        (4, 2, 3),
        [list(range(6, 12)), list(range(18, 24))],
        lambda x: x.reshape(1, -1),
        lambda x: x.flatten(1),
    ),
    "linear on sequences": Reading(lambda: nn.Linear(5, 3), (7, 5), zoo.one_each(5), rows),
    "linear on grids": Reading(lambda: nn.Linear(5, 3), (2, 3, 5), zoo.one_each(5), rows),
    "pooled on sequences": Reading(lambda: nn.Linear(6, 3), (4, 6), zoo.blocks(2, 3), rows),
    "conv1d": Reading(lambda: nn.Conv1d(3, 2, 2), (3, 6), zoo.one_each(3), maps),
    "conv2d": Reading(lambda: nn.Conv2d(3, 2, 2, padding=1), (3, 4, 5), zoo.one_each(3), maps),
    "conv3d": Reading(lambda: nn.Conv3d(3, 2, 2), (3, 2, 3, 4), zoo.one_each(3), maps),
    "transposed conv1d": Reading(lambda: nn.ConvTranspose1d(3, 2, 2), (3, 6), zoo.one_each(3), maps),
    "transposed conv2d": Reading(lambda: nn.ConvTranspose2d(3, 2, 2), (3, 4, 5), zoo.one_each(3), maps),
    "transposed conv3d": Reading(lambda: nn.ConvTranspose3d(3, 2, 2), (3, 2, 3, 4), zoo.one_each(3), maps),
    "grouped conv": Reading(lambda: nn.Conv2d(6, 4, 1, groups=2), (6, 2, 2), zoo.strided(3, 2), maps),
    "pairs of channels": Reading(lambda: nn.Conv2d(6, 3, 1), (6, 2, 2), [[0, 1], [2, 3], [4, 5]], maps),
    "cat[x, x]": Reading(
        lambda: nn.Linear(8, 3),
        (4,),
        zoo.strided(4, 2),
        lambda x: np.concatenate([x, x])[None],
        lambda x: torch.cat([x, x], 1),
    ),
    "cat[x, -x] of maps": Reading(
        lambda: nn.Conv2d(4, 3, 1),
        (2, 2, 2),
        zoo.strided(2, 2),
        lambda x: maps(np.concatenate([x, -x])),
        lambda x: torch.cat([x, -x], 1),
    ),
    "one unit of two positions": Reading(lambda: nn.Linear(2, 3), (2,), [[0, 1]], rows),
    "windows": Reading(lambda: nn.Linear(3, 3), (4, 3), zoo.one_each(3), rows, lambda x: x.reshape(-1, 3)),
    "windows of maps": Reading(
        lambda: nn.Conv2d(2, 3, 1),
        (3, 2, 4, 4),
        zoo.one_each(2),
        lambda x: np.concatenate([maps(w) for w in x]),
        lambda x: x.flatten(0, 1),
    ),
    "lstm": Reading(lambda: nn.LSTM(4, 3, batch_first=True), (5, 4), zoo.one_each(4), rows),
    "lstm, time first": Reading(lambda: nn.LSTM(4, 3), (5, 4), zoo.one_each(4), rows, lambda x: x.transpose(0, 1)),
    "half precision": Reading(lambda: nn.Linear(5, 3).bfloat16(), (5,), zoo.one_each(5), rows, lambda x: x.bfloat16()),
    "double precision": Reading(lambda: nn.Linear(5, 3).double(), (5,), zoo.one_each(5), rows, lambda x: x.double()),
}

CONV = READINGS["conv2d"]
DATA = (
    torch.randint(-9, 10, (12, *CONV.shape), generator=torch.Generator().manual_seed(1)) / 4,
    torch.arange(12) % LABELS,
)
MODEL = Observed(CONV.layer())
GROUPS = consumer(CONV.units)


def collect(order: list[int], cuts: list[int]) -> Statistics:
    """Statistics of the inputs in an order, cut into batches."""
    edges = [0, *sorted(set(cuts)), len(order)]
    batches = [order[start:stop] for start, stop in pairwise(edges) if stop > start]
    return calibrate(MODEL, [(DATA[0][batch], DATA[1][batch]) for batch in batches], GROUPS, labels=LABELS)


def assert_same(left: Statistics, right: Statistics, exact: bool = True) -> None:
    assert left.records.keys() == right.records.keys()
    assert (left.labels, left.threshold, left.fingerprint) == (right.labels, right.threshold, right.fingerprint)
    for key, record in left.records.items():
        assert record.layout.same(right.records[key].layout)
        for name, value in record.sums().items():
            other = right.records[key].sums()[name]
            assert value.dtype == other.dtype
            if exact and name != "square":
                assert torch.equal(value, other), f"{name} of {key}"
            np.testing.assert_allclose(value, other, rtol=1e-6, atol=1e-9, err_msg=f"{name} of {key}")
