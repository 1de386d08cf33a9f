"""Statistics are merged, narrowed and checked for staleness."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import zoo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from observations import (
    LABELS,
    READINGS,
    Observed,
    assert_same,
    brute_force,
    collect,
    compare,
    consumer,
    found,
    quarters,
)
from torch import nn

from nns_plugin import Statistics, calibrate
from nns_plugin.errors import StaleStatisticsError, StatisticsError
from nns_plugin.models.layers import Layout
from nns_plugin.statistics.records import Record
from nns_plugin.units import Port, UnitGroup


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(st.permutations(range(12)), st.lists(st.integers(1, 11), max_size=5), st.integers(1, 11))
def test_batches_order_and_merging_do_not_matter(order: list[int], cuts: list[int], split: int) -> None:
    whole = collect(list(range(12)), [])
    assert_same(collect(order, cuts), whole)
    first, second = collect(order[:split], cuts), collect(order[split:], [])
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


def test_statistics_are_stale_once_weights_change() -> None:
    model = Observed(nn.Linear(5, 3))
    statistics = calibrate(model, [quarters(6, 5)], consumer(zoo.one_each(5)))
    statistics.check_current(model)
    with torch.no_grad():
        model.layer.weight[0, 0] += 1
    with pytest.raises(
        StaleStatisticsError,
        match=r"the statistics belong to another state of the model: 'layer.weight' has other values; calibrate again",
    ):
        statistics.check_current(model)
    with pytest.raises(StaleStatisticsError, match=r"^these belong to .*; try this$"):
        statistics.check_current(model, advice="try this", subject="these")
    statistics.narrow({"producer": torch.tensor([0])}).check_current(model)  # records no weights to compare with


def test_groups_that_changed_since_calibration_are_stale() -> None:
    statistics = collect([0, 1, 2], [])
    group = statistics.groups[0]
    assert statistics.observed(group)
    assert not statistics.observed(UnitGroup("other", group.size, group.producers, group.consumers))
    port = group.consumers[0]
    moved = UnitGroup(group.name, group.size, group.producers, (Port(port.name, port.index.flip(0), port.unit),))
    with pytest.raises(StaleStatisticsError, match="group 'producer' has .* calibrate again"):
        statistics.observed(moved)
