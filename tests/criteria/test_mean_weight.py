"""Mean weights: units by the sum of what writes them, synapses by their layer's mean."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nns_plugin import Port, UnitGroup
from nns_plugin.criteria import MeanWeight, score_groups
from nns_plugin.criteria.incoming_weights import incoming_weights
from nns_plugin.errors import CriterionError, PruningError
from nns_plugin.synapses.mean_weight import over_mean, prune_under_mean


def group_of(*names: str, size: int, index: list[int] | None = None, unit: list[int] | None = None) -> UnitGroup:
    positions = torch.arange(size) if index is None else torch.tensor(index)
    units = torch.arange(size) if unit is None else torch.tensor(unit)
    return UnitGroup(names[0], size, producers=tuple(Port(name, positions, units) for name in names), consumers=())


def test_filters_by_their_sum_against_the_mean() -> None:
    layer = nn.Conv2d(2, 3, 1, bias=True)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -3.0], [0.5, 0.5], [2.0, 2.0]])[:, :, None, None])
        layer.bias.fill_(100.0)  # no synapse
    model, group = nn.Sequential(layer), group_of("0", size=3)
    # sums of magnitudes 4, 1, 4 (mean 3); of values -2, 1, 4 (mean magnitude 7/3)
    torch.testing.assert_close(MeanWeight(model)(group), torch.tensor([4.0, 1.0, 4.0]).double() / 3)
    torch.testing.assert_close(MeanWeight(model, "values")(group), torch.tensor([-2.0, 1.0, 4.0]).double() * 3 / 7)


def test_weights_that_are_not_a_number_are_not_scored_as_zero() -> None:
    model = nn.Sequential(nn.Linear(2, 3))
    with torch.no_grad():
        model[0].weight[1, 0] = torch.nan
    with pytest.raises(CriterionError, match="scores must be finite"):
        score_groups(MeanWeight(model), [group_of("0", size=3)])


def test_all_writers_of_a_stream_count() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(1, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
        model[1].weight.copy_(torch.tensor([[-1.0], [4.0]]))
    torch.testing.assert_close(MeanWeight(model)(group_of("0", "1", size=2)), torch.tensor([3.0, 5.0]).double() / 4)


def test_weights_of_zero_score_zero() -> None:
    model = nn.Sequential(nn.Linear(2, 3))
    nn.init.zeros_(model[0].weight)
    assert MeanWeight(model)(group_of("0", size=3)).tolist() == [0.0, 0.0, 0.0]


def test_a_producer_without_weights_gives_no_scores() -> None:
    assert MeanWeight(nn.Sequential(nn.LSTM(2, 3)))(group_of("0", size=3)) is None


def test_unknown_weights_are_refused() -> None:
    with pytest.raises(CriterionError, match="'squares'; it must be one of magnitudes, values"):
        MeanWeight(nn.Sequential(), "squares")


@pytest.mark.parametrize("groups", [1, 2])
def test_incoming_weights_of_a_transposed_convolution_are_those_its_outputs_move_with(groups: int) -> None:
    layer = nn.ConvTranspose2d(4, 6, 2, groups=groups)
    found = incoming_weights(nn.Sequential(layer), group_of("0", size=6))[0]
    for channel in range(6):
        layer.zero_grad()
        layer(torch.ones(1, 4, 1, 1))[0, channel].sum().backward()
        # Every weight that the channel's output depends on, and no other.
        touched = layer.weight.detach()[layer.weight.grad != 0]
        torch.testing.assert_close(found[channel].sort().values, touched.double().sort().values)


def test_a_unit_of_several_positions_has_them_all() -> None:
    layer = nn.Linear(1, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0], [2.0], [3.0], [4.0]]))
    group = group_of("0", size=2, index=[0, 1, 2, 3], unit=[0, 1, 0, 1])
    assert incoming_weights(nn.Sequential(layer), group)[0].tolist() == [[1.0, 3.0], [2.0, 4.0]]


def test_producers_side_by_side_write_their_own_units() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(1, 4))
    with torch.no_grad():
        for layer, value in zip(model, (1.0, 2.0, 0.5), strict=True):
            layer.weight.fill_(value)
    half = torch.arange(2)
    ports = Port("0", half, half), Port("1", half, half + 2), Port("2", torch.arange(4), torch.arange(4))
    found = incoming_weights(model, UnitGroup("2", 4, producers=ports, consumers=()))
    assert found[0].tolist() == [[1.0, 1.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    assert found[1].tolist() == [[0.0, 0.0], [0.0, 0.0], [2.0, 2.0], [2.0, 2.0]]
    assert found[2].tolist() == [[0.5]] * 4
    uneven = Port("2", torch.arange(4), torch.tensor([0, 0, 0, 1]))
    assert incoming_weights(model, UnitGroup("2", 2, producers=(uneven,), consumers=())) is None


def test_synapses_under_the_mean_are_masked_and_stay_masked() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -4.0], [0.5, 3.0]]))  # mean magnitude 2.125
    assert prune_under_mean(model, ["0"]) == {"0": 2}
    assert model[0].weight.tolist() == [[0.0, -4.0], [0.0, 3.0]]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        model(torch.randn(8, 2)).square().sum().backward()
        optimizer.step()
    model(torch.zeros(1, 2))
    assert model[0].weight[:, 0].abs().sum() == 0
    model[0].weight_orig.data.copy_(torch.tensor([[9.0, -4.0], [9.0, 3.0]]))
    assert prune_under_mean(model, ["0"]) == {"0": 1}  # the mean of what is left, 3.5
    assert model[0].weight_mask.tolist() == [[0.0, 1.0], [0.0, 0.0]]


def test_equal_magnitudes_all_stay() -> None:
    assert over_mean(torch.full((3, 7), 0.1)).all()
    assert not over_mean(torch.ones(2, 2), torch.zeros(2, 2)).any()


@pytest.mark.parametrize(("name", "message"), [("1", "is a ReLU"), ("9", "no module '9'")])
def test_what_is_no_linear_layer_is_refused_and_nothing_is_masked(name: str, message: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(PruningError, match=message):
        prune_under_mean(model, ["0", name])
    assert not hasattr(model[0], "weight_mask")
