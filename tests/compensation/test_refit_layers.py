"""Refit: layers laid out as matrix products, and regression against NumPy."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nns_plugin.compensation.gram import RegressionSums
from nns_plugin.compensation.refit import Refitting
from nns_plugin.errors import CalibrationError


@pytest.mark.parametrize("constant", [True, False])
def test_regression_is_numpys(constant: bool) -> None:
    x, y = torch.randn(1, 6, 50, dtype=torch.float64), torch.randn(1, 3, 50, dtype=torch.float64)
    sums = RegressionSums.empty(1, 6, 3)
    for part in range(0, 50, 10):
        sums.add(x[:, :, part : part + 10], y[:, :, part : part + 10])
    solution = sums.solve(torch.zeros(1, 3, 7), constant, ridge=1e-12)[0].numpy()
    design = np.concatenate([x[0].numpy(), np.ones((1, 50))])[: 7 if constant else 6].T
    expected = np.linalg.lstsq(design, y[0].numpy().T, rcond=None)[0].T
    np.testing.assert_allclose(solution[:, : design.shape[1]], expected, atol=1e-6)


def test_a_strong_ridge_gives_back_the_prior() -> None:
    sums = RegressionSums.empty(1, 4, 2)
    sums.add(torch.randn(1, 4, 30), torch.randn(1, 2, 30))
    prior = torch.randn(1, 2, 5, dtype=torch.float64)
    torch.testing.assert_close(sums.solve(prior, True, ridge=1e9)[:, :, :4], prior[:, :, :4], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("noise", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize(("rank", "offset"), [(8, 0.0), (3, 0.0), (8, 1e4)])
def test_the_solution_never_errs_more_than_the_prior(rank: int, offset: float, noise: float) -> None:
    """Also where the prior is perfect, inputs depend on each other, or a constant drowns them."""
    torch.manual_seed(0)
    x = (torch.randn(20, rank) @ torch.randn(rank, 8) + offset).T[None]
    prior = torch.randn(1, 3, 9, dtype=torch.float64)
    y = prior[:, :, :8].float() @ x + prior[:, :, 8:].float() + noise * torch.randn(1, 3, 20)
    sums = RegressionSums.empty(1, 8, 3)
    sums.add(x, y)
    design = torch.cat([x.double(), torch.ones(1, 1, 20)], 1)
    solution = sums.solve(prior, True, ridge=1e-4)
    errors = [float((y - weights @ design).square().sum()) for weights in (solution, prior)]
    assert errors[0] <= errors[1] + 1e-8 * float(y.double().square().sum())


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    sums = RegressionSums.empty(1, 4, 2)
    sums.add(torch.zeros(1, 4, 30), torch.ones(1, 2, 30))
    solution: Tensor = sums.solve(torch.zeros(1, 2, 5, dtype=torch.float64), True, ridge=1e-4)
    assert bool(torch.isfinite(solution).all())
    torch.testing.assert_close(solution[0, :, 4], torch.ones(2, dtype=torch.float64))


class Block(nn.Module):
    """A residual block whose skip connection has weights of its own."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.skip = nn.Conv2d(3, 4, 1)
        self.conv = nn.Conv2d(3, 4, 1, bias=not norm)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        return (self.norm(self.conv(x)) + self.skip(x)).relu()


@pytest.mark.parametrize("norm", [True, False])
def test_what_is_repeated_is_the_sum_with_the_skip_connection(norm: bool) -> None:
    torch.manual_seed(0)
    dense = Block(norm)
    for _ in range(3):
        dense(torch.randn(64, 3, 5, 5))  # running statistics
    dense.eval()
    model = copy.deepcopy(dense)
    x = torch.randn(16, 3, 5, 5)
    with torch.no_grad():
        model.skip.weight[0] = 0.0  # what went wrong beside the layer
        if norm:
            dense.norm.weight.uniform_(-2, 2)
            model.norm.load_state_dict(dense.norm.state_dict())
            model.norm.running_var.mul_(1.7)  # as a recalibration might leave it
            model.norm.running_mean.add_(0.3)
        Refitting(dense, model, [x[:8], x[8:]], ridge=1e-9).refit("conv", "norm" if norm else None, None)
        inputs = x.relu().transpose(0, 1).flatten(1).double().numpy()
        total = (dense.norm(dense.conv(x.relu())) + dense.skip(x.relu())).transpose(0, 1).flatten(1).double().numpy()
        beside = model.skip(x.relu()).transpose(0, 1).flatten(1).double().numpy()
        found = model.norm(model.conv(x.relu())).transpose(0, 1).flatten(1).double().numpy()
    design = np.concatenate([inputs, np.ones((1, inputs.shape[1]))]).T
    best = design @ np.linalg.lstsq(design, (total - beside).T, rcond=None)[0]
    np.testing.assert_allclose(found, best.T, atol=2e-4)


@pytest.mark.parametrize("factor", [0.0, 1e-6])
def test_a_channel_that_the_norm_switches_off_makes_up_for_nothing(factor: float) -> None:
    """Its layer goes on repeating its own outputs; to fill the gap beside it, its weights would have to explode."""
    torch.manual_seed(0)
    dense = Block(True).eval()
    with torch.no_grad():
        dense.norm.weight[1] = factor
    model = copy.deepcopy(dense)
    with torch.no_grad():
        model.skip.weight.zero_()
        Refitting(dense, model, [torch.randn(8, 3, 5, 5)], ridge=1e-4).refit("conv", "norm", None)
    torch.testing.assert_close(model.conv.weight[1], dense.conv.weight[1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(model.conv.weight[0], dense.conv.weight[0], atol=0.1)


def test_an_empty_loader_is_an_error() -> None:
    model = Block(False).eval()
    with pytest.raises(CalibrationError, match="yielded no inputs"):
        Refitting(copy.deepcopy(model), model, [], ridge=1e-4).refit("conv", None, None)
