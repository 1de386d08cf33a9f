"""Statistics against a brute force in NumPy; merging, narrowing, saving and reducing them."""

from __future__ import annotations

import json
import os
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from nns_plugin import Statistics, calibrate
from nns_plugin.criteria.semantic import by_channel, by_slot
from nns_plugin.errors import StatisticsError
from nns_plugin.models.layers import Layout
from nns_plugin.statistics.records import Record
from nns_plugin.units import Port, UnitGroup

LABELS = 3


class Observed(nn.Module):
    """A layer that works on what ``prepare`` makes of the inputs, so that a test knows the activations."""

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
    """What units did, one number at a time.

    Args:
        samples: For each input ``[S, positions]``: what the layer read, sample by sample.
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


@pytest.mark.parametrize("threshold", [0.0, 1.5, -1.0])
@pytest.mark.parametrize("name", READINGS)
def test_statistics_equal_the_brute_force(name: str, threshold: float) -> None:
    reading = READINGS[name]
    x = quarters(11, *reading.shape)
    x[:4] = x[:4].abs()  # one batch without negative values: it takes another path
    labels = torch.tensor([0, 2, 2, 0, 2, 0, 0, 2, 2, 2, 0])  # label 1 never occurs
    loader = [(x[:4], labels[:4]), (x[4:5], labels[4:5]), (x[5:], labels[5:])]
    groups = consumer(reading.units)
    statistics = calibrate(
        Observed(reading.layer(), reading.prepare), loader, groups, labels=LABELS, threshold=threshold
    )
    expected = brute_force([reading.samples(one) for one in x.numpy()], labels.tolist(), reading.units, threshold)
    compare(found(statistics, groups[0], groups[0].consumers[0]), expected)
    assert statistics.threshold == threshold


def test_hand_made_numbers() -> None:
    """Two units, three inputs, numbers in the head."""
    x = torch.tensor([[1.0, -2.0], [3.0, 0.0], [-4.0, 5.0]])
    groups = consumer(zoo.one_each(2))
    record = calibrate(Observed(nn.Linear(2, 2)), [(x, torch.tensor([0, 0, 1]))], groups, labels=["a", "b"]).records[
        "in", "layer"
    ]
    assert record.inputs.tolist() == [2, 1]
    assert record.samples.tolist() == [2, 1]
    assert record.total.tolist() == [[4, -2], [-4, 5]]
    assert record.magnitude.tolist() == [[4, 2], [4, 5]]
    assert [[round(value, 4) for value in row] for row in record.square.tolist()] == [[10, 4], [16, 25]]
    assert record.active.tolist() == [[2, 0], [0, 1]]
    assert record.gram is None
    assert (record.total.dtype, record.active.dtype) == (torch.float64, torch.int64)


def test_a_flattened_consumer_is_pooled_by_channel() -> None:
    """Memory is one number a channel, not one a position; what no group owns is a channel by itself."""
    x = quarters(6, 4, 2, 3)
    groups = consumer([list(range(6, 12)), list(range(18, 24))])  # channels 1 and 3 of 4
    model = Observed(nn.Linear(24, 3), lambda x: x.flatten(1))
    record = calibrate(model, [(x, torch.arange(6) % 3)], groups).records["in", "layer"]
    assert record.layout.positions_per_channel.tolist() == [1] * 6 + [6] + [1] * 6 + [6]
    assert record.total.shape == (3, 14)
    np.testing.assert_allclose(record.total.sum(0)[[6, 13]], x.sum((0, 2, 3))[[1, 3]])


def test_unlabelled_inputs_have_one_row() -> None:
    x = quarters(6, 5)
    groups = consumer(zoo.one_each(5))
    for item in (x, [x], (x,), (x, None)):
        statistics = calibrate(Observed(nn.Linear(5, 3)), [item], groups)
        assert statistics.labels is None
        record = statistics.records["in", "layer"]
        np.testing.assert_allclose(record.total.numpy(), x.double().numpy().sum(0)[None])
        assert record.inputs.tolist() == [6]


class Siblings(nn.Module):
    """Several layers read one tensor; one reads it after it was changed in place, one reads another axis of it."""

    def __init__(self) -> None:
        super().__init__()
        self.producer = nn.Linear(1, 1)
        self.one, self.two, self.late = nn.Linear(4, 2), nn.Linear(4, 3), nn.Linear(4, 2)
        self.across = nn.Conv1d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        out = self.one(x).sum((1, 2)) + self.two(x).sum((1, 2)) + self.across(x).sum((1, 2))
        x += 1
        return out + self.late(x).sum((1, 2))


def test_readers_of_one_tensor() -> None:
    """They agree; but a later version of the tensor, and another axis of it, are something else."""
    x = quarters(6, 4, 4)
    names = ("one", "two", "late", "across")
    groups = tuple(UnitGroup("producer", 4, (), (Port(name, torch.arange(4), torch.arange(4)),)) for name in names)
    records = calibrate(Siblings(), [(x, torch.arange(6) % 3)], groups, labels=3).records
    by_label = [x[torch.arange(6) % 3 == label].double() for label in range(3)]
    for name, change, axis in (("one", 0, 2), ("two", 0, 2), ("late", 1, 2), ("across", 0, 1)):
        expected = torch.stack([(part + change).sum([d for d in (0, 1, 2) if d != axis]) for part in by_label])
        np.testing.assert_allclose(records["in", name].total.numpy(), expected.numpy(), err_msg=name)


class Reused(nn.Module):
    """One layer, called twice a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.producer, self.layer = nn.Linear(1, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.layer(2 * x)


def test_a_reused_module_counts_every_call() -> None:
    x = quarters(6, 4)
    groups, labels = consumer(zoo.one_each(4)), torch.arange(6) % 3
    statistics = calibrate(Reused(), [(x, labels)], groups)
    twice = [np.stack([one]) for one in x.numpy()] + [np.stack([2 * one]) for one in x.numpy()]
    compare(
        found(statistics, groups[0], groups[0].consumers[0]),
        brute_force(twice, labels.tolist() * 2, zoo.one_each(4), 0.0),
    )


class Pair(nn.Module):
    """Two inputs, by position or by name."""

    def __init__(self) -> None:
        super().__init__()
        self.producer, self.layer = nn.Linear(1, 1), nn.Linear(4, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.layer(input=left - 2 * right)


@pytest.mark.parametrize("kind", [tuple, list, dict])
def test_models_with_several_inputs(kind: type) -> None:
    left, right, labels = quarters(6, 4), quarters(6, 4), torch.arange(6) % 3
    inputs = {"right": right, "left": left} if kind is dict else kind([left, right])
    groups = consumer(zoo.one_each(4))
    statistics = calibrate(Pair(), [(inputs, labels)], groups)
    expected = brute_force(list((left - 2 * right).numpy()[:, None]), labels.tolist(), zoo.one_each(4), 0.0)
    compare(found(statistics, groups[0], groups[0].consumers[0]), expected)


def test_units_that_nothing_reads_are_observed_where_they_are_written() -> None:
    x = quarters(6, 3, 4, 5)
    layer = nn.Conv2d(3, 2, 1)
    groups = (UnitGroup("layer", 2, (Port("layer", torch.arange(2), torch.arange(2)),), ()),)
    statistics = calibrate(Observed(layer), [(x, torch.arange(6) % 3)], groups, labels=3)
    out = layer(x).detach().numpy()
    expected = brute_force([maps(one) for one in out], [0, 1, 2] * 2, zoo.one_each(2), 0.0)
    actual = found(statistics, groups[0], groups[0].producers[0])
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_is_observed_at_its_output(batch_first: bool) -> None:
    layer = nn.MultiheadAttention(4, 2, batch_first=batch_first)

    class Attending(Observed):
        def forward(self, x: Tensor) -> Tensor:
            x = x if batch_first else x.transpose(0, 1)
            out = self.layer(x, x, x)[0]
            return out if batch_first else out.transpose(0, 1)

    x, model = quarters(6, 5, 4), Attending(layer)
    groups = (UnitGroup("layer", 4, (Port("layer", torch.arange(4), torch.arange(4)),), ()),)
    statistics = calibrate(model, [(x, torch.arange(6) % 3)], groups, labels=3)
    expected = brute_force(list(model.eval()(x).detach().numpy()), [0, 1, 2] * 2, zoo.one_each(4), 0.0)
    actual = found(statistics, groups[0], groups[0].producers[0])
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


# --- merging -------------------------------------------------------------------------------------------------------

CONV = READINGS["conv2d"]
DATA = (
    torch.randint(-9, 10, (12, *CONV.shape), generator=torch.Generator().manual_seed(1)) / 4,
    torch.arange(12) % LABELS,
)
MODEL = Observed(CONV.layer())
GROUPS = consumer(CONV.units)


def collect(order: list[int], extractions: list[int]) -> Statistics:
    """Statistics of the inputs in an order, cut into batches."""
    edges = [0, *sorted(set(extractions)), len(order)]
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


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(st.permutations(range(12)), st.lists(st.integers(1, 11), max_size=5), st.integers(1, 11))
def test_batches_order_and_merging_do_not_matter(order: list[int], extractions: list[int], split: int) -> None:
    whole = collect(list(range(12)), [])
    assert_same(collect(order, extractions), whole)
    first, second = collect(order[:split], extractions), collect(order[split:], [])
    assert_same(first.merge(second), whole)
    assert_same(second.merge(first), whole)


def test_merging_leaves_both_as_they_were() -> None:
    first, second = collect([0, 1, 2], []), collect([3, 4, 5], [])
    before = first.records["in", "layer"].total.clone()
    first.merge(second)
    assert torch.equal(first.records["in", "layer"].total, before)


def test_what_does_not_belong_together_is_not_merged() -> None:
    x, labels = quarters(6, 5), torch.arange(6) % 3
    model, groups = Observed(nn.Linear(5, 3)), consumer(zoo.one_each(5))
    mine = calibrate(model, [(x, labels)], groups, labels=3)
    others = {
        "labels": calibrate(model, [(x, labels)], groups, labels=["a", "b", "c"]),
        "labels .* None": calibrate(model, [x], groups),
        "thresholds 0.0 and 1.0": calibrate(model, [(x, labels)], groups, labels=3, threshold=1.0),
        "the units of 'layer' differ": calibrate(model, [(x, labels)], consumer([[0, 1], [2, 3]]), labels=3),
        "'layer.weight' has other values": calibrate(Observed(nn.Linear(5, 3)), [(x, labels)], groups, labels=3),
        "'layer.weight' is 4x5 instead of 3x5": calibrate(Observed(nn.Linear(5, 4)), [(x, labels)], groups, labels=3),
        "1 and 0 records": Statistics({}, mine.groups, mine.labels, 0.0, mine.fingerprint),
    }
    for message, other in others.items():
        with pytest.raises(StatisticsError, match=message):
            mine.merge(other)


def test_narrowed_statistics_of_different_subnets_are_not_merged() -> None:
    """They have equal shapes, but the units are others."""
    whole = collect(list(range(12)), [])
    first, second = whole.narrow({"producer": torch.tensor([0, 1])}), whole.narrow({"producer": torch.tensor([1, 2])})
    with pytest.raises(StatisticsError, match="narrow"):
        first.merge(second)


# --- narrowing -----------------------------------------------------------------------------------------------------


def test_narrow_by_hand() -> None:
    """A consumer that pools two groups: one loses a channel in the middle, the other moves down."""
    x = quarters(6, 4, 2, 3)
    group, other = (
        consumer([list(range(6)), list(range(6, 12))])[0],
        consumer([list(range(12, 18)), list(range(18, 24))])[0],
    )
    other = UnitGroup("other", 2, (), other.consumers)
    model = Observed(nn.Linear(24, 3), lambda x: x.flatten(1))
    statistics = calibrate(model, [(x, torch.arange(6) % 3)], (group, other))
    narrowed = statistics.narrow({"producer": torch.tensor([1])})
    record = narrowed.records["in", "layer"]
    assert record.layout.channel.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    np.testing.assert_allclose(record.total.sum(0), x.sum((0, 2, 3))[1:])
    assert record.active.shape == (3, 3)
    assert [group.size for group in narrowed.groups] == [1, 2]
    assert narrowed.groups[1].consumers[0].index.tolist() == list(range(6, 18))
    assert narrowed.fingerprint == {}, "the weights are others now"


@pytest.mark.parametrize("name", [name for name, reading in READINGS.items() if len(reading.units) > 1])
def test_narrowing_keeps_the_sums_of_the_kept_units(name: str) -> None:
    reading = READINGS[name]
    x, labels = quarters(11, *reading.shape), torch.arange(11) % LABELS
    groups = consumer(reading.units)
    whole = calibrate(Observed(reading.layer(), reading.prepare), [(x, labels)], groups, labels=LABELS)
    kept = list(range(1, len(reading.units)))
    narrowed = whole.narrow({"producer": torch.tensor(kept)})
    expected = brute_force([reading.samples(one) for one in x.numpy()], labels.tolist(), reading.units, 0.0)
    expected = {key: value[:, kept] if value.ndim == 2 else value for key, value in expected.items()}
    compare(found(narrowed, narrowed.groups[0], narrowed.groups[0].consumers[0]), expected)


def test_narrowing_keeps_the_rows_and_columns_of_a_gram_matrix() -> None:
    layout = Layout(torch.arange(4), torch.arange(4))
    gram = torch.arange(25.0).reshape(1, 5, 5).double()
    record = Record.empty(layout, 1)
    record = Record(**{**vars(record), "gram": gram})
    narrowed = record.narrow(torch.tensor([1, 3])).gram
    assert narrowed is not None
    assert narrowed.tolist() == [[[6, 8, 9], [16, 18, 19], [21, 23, 24]]], "units 1 and 3 and the constant"
    assert record.merge(record).gram is not None
    assert torch.equal(record.merge(record).sums()["gram"], 2 * gram)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"nobody": [0]}, "no group 'nobody' in these statistics; they have producer"),
        ({"producer": [0, 3]}, r"kept units of group 'producer' must be .*0\.\.2"),
        ({"producer": [-1]}, r"kept units of group 'producer' must be .*0\.\.2"),
        ({"producer": []}, "kept units of group 'producer' must be"),
        ({"producer": [2, 0]}, "kept units of group 'producer' must be"),
        ({"producer": [1, 1]}, "kept units of group 'producer' must be"),
    ],
)
def test_impossible_narrowing_is_refused(kept: dict[str, list[int]], message: str) -> None:
    with pytest.raises(StatisticsError, match=message):
        collect([0, 1, 2], []).narrow({name: torch.tensor(units, dtype=torch.int64) for name, units in kept.items()})


@given(st.sets(st.integers(0, 2), min_size=1), st.data())
@settings(max_examples=20)
def test_narrowing_in_steps_equals_narrowing_at_once(kept: set[int], data: st.DataObject) -> None:
    whole = collect(list(range(12)), [])
    first = torch.tensor(sorted(kept))
    second = torch.tensor(sorted(data.draw(st.sets(st.integers(0, len(kept) - 1), min_size=1))))
    steps = whole.narrow({"producer": first}).narrow({"producer": second})
    assert_same(steps, whole.narrow({"producer": first[second]}))


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    collect(list(range(12)), []).save(tmp_path / "s.safetensors")
    return tmp_path / "s.safetensors"


def test_a_file_gives_back_the_same_statistics(saved: Path) -> None:
    loaded, whole = Statistics.load(saved, MODEL), collect(list(range(12)), [])
    assert_same(loaded, whole)
    for mine, theirs in zip(loaded.groups, whole.groups, strict=True):
        assert (mine.name, mine.size, zoo.by_hand(mine)) == (theirs.name, theirs.size, zoo.by_hand(theirs))
    assert_same(Statistics.load(str(saved)), whole)
    assert_same(loaded.merge(whole), whole.merge(whole))


def test_unlabelled_and_narrowed_statistics_survive_a_file(tmp_path: Path) -> None:
    statistics = calibrate(MODEL, [DATA[0]], GROUPS).narrow({"producer": torch.tensor([0, 2])})
    statistics.save(tmp_path / "s.safetensors")
    loaded = Statistics.load(tmp_path / "s.safetensors")
    assert loaded.labels is None
    assert_same(loaded, statistics)
    with pytest.raises(StatisticsError, match="holds narrowed statistics"):
        Statistics.load(tmp_path / "s.safetensors", MODEL)


def test_nothing_but_the_file_is_left_and_others_may_read_it(saved: Path) -> None:
    assert [path.name for path in saved.parent.iterdir()] == ["s.safetensors"]
    other = saved.with_name("plain")
    other.write_bytes(b"")
    assert stat.S_IMODE(saved.stat().st_mode) == stat.S_IMODE(other.stat().st_mode), "the same as of any new file"


def test_a_file_can_be_replaced(saved: Path) -> None:
    collect([0], []).save(saved)
    assert int(Statistics.load(saved).records["in", "layer"].inputs.sum()) == 1


def test_a_file_of_another_model_names_what_differs(saved: Path) -> None:
    other = Observed(nn.Conv2d(3, 2, 2, padding=1))
    with pytest.raises(
        StatisticsError,
        match=r"s\.safetensors' belong to another state of the model: .*'layer.weight' has other values",
    ):
        Statistics.load(saved, other)
    with pytest.raises(StatisticsError, match="'layer.weight' is 5x3x2x2 instead of 2x3x2x2"):
        Statistics.load(saved, Observed(nn.Conv2d(3, 5, 2, padding=1)))
    with pytest.raises(StatisticsError, match="'layer.bias' is missing, .* and 1 more"):
        Statistics.load(saved, Observed(nn.Conv2d(3, 2, 2, padding=1, bias=False)))
    calibrate(Observed(nn.Linear(3, 2, bias=False)), [quarters(2, 3)], consumer(zoo.one_each(3))).save(saved)
    with pytest.raises(StatisticsError, match="'layer.bias' is new, "):
        Statistics.load(saved, Observed(nn.Linear(3, 2)))


def test_a_missing_or_foreign_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StatisticsError, match="there is no file .*nowhere"):
        Statistics.load(tmp_path / "nowhere")
    with pytest.raises(StatisticsError, match="damaged or not a safetensors file"):
        Statistics.load(tmp_path)
    save_file({"weight": torch.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(
        StatisticsError,
        match="weights.safetensors' is a file of another kind: its format is None, expected 'nns-plugin statistics 1'",
    ):
        Statistics.load(tmp_path / "weights.safetensors")
    torch.save({"a": 1}, tmp_path / "pickle.pt")
    with pytest.raises(StatisticsError, match="pickle.pt' is damaged or not a safetensors file"):
        Statistics.load(tmp_path / "pickle.pt")
    save_file({"weight": torch.zeros(2)}, tmp_path / "old", metadata={"format": "nns-plugin statistics 0"})
    with pytest.raises(StatisticsError, match="its format is 'nns-plugin statistics 0', expected"):
        Statistics.load(tmp_path / "old")


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Change the header of a safetensors file: its own part and ours."""
    header, data = parts(path)
    ours = json.loads(header["__metadata__"]["nns"])
    change(header, ours)
    if "nns" in header["__metadata__"]:
        header["__metadata__"]["nns"] = json.dumps(ours)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


DAMAGES: dict[str, Callable[[dict[str, Any], dict[str, Any]], Any]] = {
    "no header of ours": lambda header, ours: header["__metadata__"].pop("nns"),
    "no groups": lambda header, ours: ours.pop("groups"),
    "a renamed sum": lambda header, ours: header.update({"record.0.sum": header.pop("record.0.total")}),
    "too many records": lambda header, ours: ours["records"].append(["in", "other"]),
    "a record without a side": lambda header, ours: ours["records"][0].pop(),
    "labels that do not fit": lambda header, ours: ours.update(labels=["a", "b"]),
    "labels of unlabelled sums": lambda header, ours: ours.update(labels=None),
    "a size that does not fit": lambda header, ours: ours["groups"][0].update(size=2),
    "a size that is none": lambda header, ours: ours["groups"][0].update(size="many"),
    "groups that are none": lambda header, ours: ours.update(groups=7),
    "a threshold that is none": lambda header, ours: ours.update(threshold="low"),
    "no fingerprint": lambda header, ours: ours.update(fingerprint=None),
    "another shape": lambda header, ours: header["record.0.total"].update(shape=[1, 9]),
    "another type": lambda header, ours: header["record.0.total"].update(dtype="I64"),
    "a side that is none": lambda header, ours: ours["records"][0].__setitem__(0, "up"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_header_is_refused(saved: Path, damage: str) -> None:
    rewrite(saved, DAMAGES[damage])
    with pytest.raises(StatisticsError, match=r"s\.safetensors' is damaged"):
        Statistics.load(saved)


def test_channels_out_of_range_are_refused(saved: Path) -> None:
    header, data = parts(saved)
    start, stop = header["record.0.channel"]["data_offsets"]
    damaged = data[:start] + struct.pack("<q", 99) + data[start + 8 : stop] + data[stop:]
    text = json.dumps(header).encode()
    saved.write_bytes(struct.pack("<Q", len(text)) + text + damaged)
    with pytest.raises(StatisticsError, match="is damaged"):
        Statistics.load(saved)


def test_truncated_files_are_refused(saved: Path) -> None:
    content = saved.read_bytes()
    for length in [*range(0, 40), *range(40, len(content), 97), len(content) - 1]:
        saved.write_bytes(content[:length])
        with pytest.raises(StatisticsError):
            Statistics.load(saved)


@given(st.binary(max_size=200))
@settings(max_examples=50)
def test_garbage_is_refused(content: bytes) -> None:
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"nns-garbage-{os.getpid()}"
    path.write_bytes(content)
    try:
        with pytest.raises(StatisticsError):
            Statistics.load(path)
    finally:
        path.unlink()


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = collect([0, 1], [])
    with pytest.raises(StatisticsError, match="cannot write .*no/s.safetensors"):
        statistics.save(tmp_path / "no" / "s.safetensors")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StatisticsError, match="cannot write .*folder"):
        statistics.save(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]

    def full(*args: Any, **kwargs: Any) -> None:
        Path(args[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    statistics.save(tmp_path / "s.safetensors")
    good = (tmp_path / "s.safetensors").read_bytes()
    monkeypatch.setattr("nns_plugin.files.save_file", full)
    with pytest.raises(StatisticsError, match="cannot write .*s.safetensors.*No space left"):
        statistics.save(tmp_path / "s.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "s.safetensors"]
    assert (tmp_path / "s.safetensors").read_bytes() == good, "the old file is whole"


# --- several processes ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    """Two processes run every scenario of distributed_worker.py; their answers by scenario."""
    folder = tmp_path_factory.mktemp("processes")
    worker = Path(__file__).parents[1] / "helpers" / "distributed_worker.py"
    running = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    answers = []
    for process in running:
        try:
            output, _ = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            pytest.fail("a process hangs, waiting for the other one's sums")
        finally:
            if process.poll() is None:
                for other in running:
                    other.kill()
                    other.communicate()
        assert process.returncode == 0, output
        answers.append(json.loads(output.splitlines()[-1]))
    return folder, answers


def test_two_processes_have_the_sums_of_both(processes: tuple[Path, list[dict[str, str]]]) -> None:
    folder, answers = processes
    assert [answer["whole"] for answer in answers] == ["ok", "ok"]
    whole = Statistics.load(folder / "whole.safetensors")
    for rank in range(2):
        shared = Statistics.load(folder / f"rank{rank}.safetensors")
        assert_same(shared, whole)
    assert int(whole.records["in", "layer"].inputs.sum()) == 20


ELSEWHERE = "CalibrationError: calibration failed in 1 of 2 processes"
UNEQUAL = "CalibrationError: the processes calibrate different models, groups or labels"


@pytest.mark.parametrize(
    ("scenario", "first", "second"),
    [
        ("empty", ELSEWHERE, "CalibrationError: the loader yielded no inputs"),
        ("nan", ELSEWHERE, "CalibrationError: module 'layer' has NaN"),
        ("raises", ELSEWHERE, "RuntimeError: from the loader"),
        ("no groups", ELSEWHERE, "CalibrationError: there are no unit groups"),
        ("other weights", UNEQUAL, UNEQUAL),
        ("unlabelled", UNEQUAL, UNEQUAL),
        ("both", "CalibrationError: the loader yielded no inputs", "CalibrationError: the loader yielded no inputs"),
    ],
)
def test_no_process_waits_for_one_that_failed(
    processes: tuple[Path, list[dict[str, str]]], scenario: str, first: str, second: str
) -> None:
    for answer, expected in zip(processes[1], (first, second), strict=True):
        assert answer[scenario].startswith(expected)


def test_processes_go_on_after_a_failure(processes: tuple[Path, list[dict[str, str]]]) -> None:
    assert [answer["again"] for answer in processes[1]] == ["ok", "ok"]
