"""Statistics against a brute force in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import zoo
from observations import (
    LABELS,
    READINGS,
    Observed,
    brute_force,
    compare,
    consumer,
    found,
    maps,
    quarters,
)
from torch import Tensor, nn

from nns_plugin import calibrate
from nns_plugin.units import Port, UnitGroup


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
