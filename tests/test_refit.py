"""Refit: layers laid out as matrix products, and regression against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nns_plugin.refit import LeastSquares, output_matrix, set_weight_matrix, unfolded, weight_matrix

LAYERS = [
    (nn.Linear(5, 3), (7, 4, 5)),
    (nn.Conv1d(4, 6, 3, padding=1, stride=2, groups=2), (3, 4, 11)),
    (nn.Conv2d(4, 6, 3, padding=2, dilation=2), (3, 4, 9, 8)),
    (nn.Conv2d(4, 6, 4, padding="same", padding_mode="reflect"), (3, 4, 9, 8)),
    (nn.Conv3d(4, 6, (3, 2, 1), padding=1, stride=(1, 2, 1)), (3, 4, 5, 6, 4)),
    (nn.ConvTranspose1d(4, 6, 3, stride=3, dilation=2), (3, 4, 5)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (3, 4, 5, 6)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda value: type(value).__name__)
def test_a_layer_is_a_matrix_product(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    with torch.no_grad():
        weights = weight_matrix(layer)
        expected = output_matrix(layer, layer(x))
        bias = layer.bias.reshape(weights.shape[0], -1, 1)
        torch.testing.assert_close(weights @ unfolded(layer, x) + bias, expected, atol=1e-5, rtol=1e-5)
        before = layer.weight.clone()
        set_weight_matrix(layer, weights)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("constant", [True, False])
def test_regression_is_numpys(constant: bool) -> None:
    x, y = torch.randn(1, 6, 50, dtype=torch.float64), torch.randn(1, 3, 50, dtype=torch.float64)
    sums = LeastSquares.empty(1, 6, 3)
    for part in range(0, 50, 10):
        sums.add(x[:, :, part : part + 10], y[:, :, part : part + 10])
    solution = sums.solve(torch.zeros(1, 3, 7), constant, ridge=1e-12)[0].numpy()
    design = np.concatenate([x[0].numpy(), np.ones((1, 50))])[: 7 if constant else 6].T
    expected = np.linalg.lstsq(design, y[0].numpy().T, rcond=None)[0].T
    np.testing.assert_allclose(solution[:, : design.shape[1]], expected, atol=1e-6)
    error = ((y[0].numpy() - expected @ design.T) ** 2).sum()
    assert sums.error(torch.from_numpy(solution)[None]) == pytest.approx(error)


def test_a_strong_ridge_gives_back_the_prior() -> None:
    sums = LeastSquares.empty(1, 4, 2)
    sums.add(torch.randn(1, 4, 30), torch.randn(1, 2, 30))
    prior = torch.randn(1, 2, 5, dtype=torch.float64)
    torch.testing.assert_close(sums.solve(prior, True, ridge=1e9)[:, :, :4], prior[:, :, :4], atol=1e-5, rtol=1e-5)


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    sums = LeastSquares.empty(1, 4, 2)
    sums.add(torch.zeros(1, 4, 30), torch.ones(1, 2, 30))
    solution: Tensor = sums.solve(torch.zeros(1, 2, 5, dtype=torch.float64), True, ridge=1e-4)
    assert bool(torch.isfinite(solution).all())
    torch.testing.assert_close(solution[0, :, 4], torch.ones(2, dtype=torch.float64))
