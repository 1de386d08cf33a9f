"""Sensitivity against explicit Jacobians, and MACs against torch-pruning's count and hand-computed ones."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nns_plugin import Port, UnitGroup, calibrate
from nns_plugin.criteria import Distinctiveness
from nns_plugin.errors import CalibrationError, CriterionError, StaleStatisticsError
from nns_plugin.statistics.macs import layer_macs, unit_macs
from nns_plugin.statistics.sensitivity import output_sensitivity


def group(producer: str, consumers: list[str], size: int) -> UnitGroup:
    units = torch.arange(size)
    ports = tuple(Port(name, units, units) for name in consumers)
    return UnitGroup(producer, size, producers=(Port(producer, units, units),), consumers=ports)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_sensitivity_is_the_mean_squared_jacobian(frozen: bool, inplace: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(inplace), nn.Conv2d(3, 2, 1), nn.ReLU(inplace), nn.Flatten())
    model.append(nn.Linear(8, 4))
    model.requires_grad_(not frozen)
    x = torch.randn(6, 1, 2, 2)
    groups = [group("0", ["2"], 3)]
    found = output_sensitivity(model, [x[:2], x[2:]], groups, probes=4000)["2"]

    def rest(z: Tensor) -> Tensor:
        return model[5](z.relu().flatten(1))

    squares = torch.zeros(2)
    with torch.no_grad():
        reached = model[2](model[0](x).relu())
    for z in reached:
        jacobian = torch.autograd.functional.jacobian(rest, z[None])  # [1, 4, 1, 2, 2, 2]
        squares += jacobian.square().sum((0, 1, 2)).mean((1, 2)) / len(x)
    torch.testing.assert_close(found, squares.double(), rtol=0.1, atol=1e-3)


def test_the_last_layer_moves_its_output_one_to_one() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5))
    assert output_sensitivity(model, [torch.randn(7, 3)], [group("0", ["2"], 4)])["2"].tolist() == [1.0] * 5


def test_the_model_is_left_as_it_was_and_the_estimate_repeats() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].weight.grad = torch.ones(4, 3)
    inputs, groups = torch.randn(5, 3), [group("0", ["3"], 4)]
    state, random = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    first, second = (output_sensitivity(model, [inputs], groups) for _ in range(2))
    assert torch.equal(first["3"], second["3"])
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model[0].weight.grad.eq(1).all()
    assert model[3].weight.grad is None
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(random, torch.random.get_rng_state())


def test_a_reader_that_no_output_depends_on_has_none() -> None:
    class Blind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.seen, self.unseen = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            self.unseen(x)
            return self.seen(x)

    found = output_sensitivity(Blind(), [torch.randn(5, 3)], [group("first", ["seen", "unseen"], 4)])
    assert found["unseen"].tolist() == [0.0, 0.0]


def test_without_data_or_gradients_there_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(CalibrationError, match="yielded no inputs"):
        output_sensitivity(model, [], [group("0", ["2"], 4)])

    class Answer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.argmax(1)

    with pytest.raises(CalibrationError, match="no output of the model has a gradient"):
        output_sensitivity(nn.Sequential(*model, Answer()), [torch.randn(5, 3)], [group("0", ["2"], 4)])


LAYERS = [
    (nn.Linear(5, 7, bias=False), (1, 5), 35),
    (nn.Linear(5, 7, bias=False), (1, 3, 5), 105),
    (nn.Conv2d(3, 8, 3, bias=False), (1, 3, 6, 6), 8 * 27 * 16),
    (nn.Conv2d(4, 8, 3, groups=2, stride=2, padding=1, bias=False), (1, 4, 6, 6), 8 * 18 * 9),
    (nn.ConvTranspose2d(4, 6, 2, stride=2, bias=False), (1, 4, 3, 3), 4 * 6 * 4 * 9),
]


@pytest.mark.parametrize(("layer", "shape", "expected"), LAYERS, ids=lambda value: type(value).__name__)
def test_macs_of_a_layer(layer: nn.Module, shape: tuple[int, ...], expected: int) -> None:
    assert layer_macs(nn.Sequential(layer), torch.randn(shape)) == {"0": expected}


def test_a_unit_costs_its_share_of_the_layers_that_produce_and_consume_it() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(32, 5))
    channels = torch.arange(32) // 4
    ports = (Port("0", torch.arange(8), torch.arange(8)),), (Port("2", torch.arange(32), channels),)
    groups = [UnitGroup("0", 8, producers=ports[0], consumers=ports[1])]
    macs = layer_macs(model, torch.randn(1, 3, 2, 2))
    assert macs == {"0": 3 * 8 * 4, "2": 160}
    assert unit_macs(model, groups, macs) == {"0": 3 * 4 + 160 / 8}


def test_errors_count_by_relative_size_and_by_what_they_move_and_per_cost() -> None:
    """Against NumPy's least squares: the last unit of two goes at the cost of all, the first at its own."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4))
    x, groups = torch.randn(50, 3), [group("0", ["2"], 2)]
    statistics = calibrate(model, [x], groups, gram=True)
    sensitivity = {"2": torch.tensor([0.5, 0.0, 2.0])}
    scores = Distinctiveness(statistics, model, mode="span", ridge=1e-12, sensitivity=sensitivity, cost={"0": 4.0})(
        groups[0]
    )
    hidden = model[:2](x).detach().double().numpy()
    weight = model[2].weight.detach().double().numpy()
    energy = ((hidden @ weight.T) ** 2).sum()
    factors = np.sqrt(sensitivity["2"].double().numpy() / (energy * 50))
    alone = []
    for unit in range(2):
        design = np.stack([hidden[:, 1 - unit], np.ones(50)], 1)
        rest = hidden[:, unit] - design @ np.linalg.lstsq(design, hidden[:, unit], rcond=None)[0]
        alone.append((factors * (rest**2).sum() * weight[:, unit] ** 2).sum() / 4)
    assert float(scores.min()) == pytest.approx(min(alone), rel=1e-6)
    assert int(scores.argmin()) == int(np.argmin(alone))


@pytest.mark.parametrize("cost", [{}, {"0": 0.0}, {"0": float("nan")}])
def test_a_group_without_a_cost_is_an_error(cost: dict[str, float]) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 3))
    groups = [group("0", ["2"], 2)]
    statistics = calibrate(model, [torch.randn(9, 3)], groups, gram=True)
    with pytest.raises(CriterionError, match="cost of group '0' is"):
        Distinctiveness(statistics, model, mode="span", cost=cost)(groups[0])


def test_a_sensitivity_of_another_width_is_stale() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 3))
    groups = [group("0", ["2"], 2)]
    statistics = calibrate(model, [torch.randn(9, 3)], groups, gram=True)
    with pytest.raises(StaleStatisticsError, match="'2' covers 5 outputs, but the layer has 3"):
        Distinctiveness(statistics, model, mode="span", sensitivity={"2": torch.ones(5)})(groups[0])


def test_recurrent_readers_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LSTM(4, 2))
    assert output_sensitivity(model, [torch.randn(5, 3)], [group("0", ["1"], 4)]) == {}
