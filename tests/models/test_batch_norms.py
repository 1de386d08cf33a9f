"""BN recalibration against the mean and variance of the data."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nns_plugin.errors import CalibrationError
from nns_plugin.models.batch_norms import recalibrate_batch_norms


def test_statistics_become_those_of_the_data_and_dropout_stays_off() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3), nn.Linear(3, 2))
    model[1].eval()
    flags = [module.training for module in model.modules()]
    data = torch.randn(64, 3) * torch.tensor([1.0, 2.0, 3.0]) + 5
    state = torch.get_rng_state()
    recalibrate_batch_norms(model, [(data, torch.zeros(64, dtype=torch.int64))])
    torch.testing.assert_close(model[1].running_mean, data.mean(0))
    torch.testing.assert_close(model[1].running_var, data.var(0))
    assert [module.training for module in model.modules()] == flags
    assert model[1].momentum == 0.1
    assert torch.equal(torch.get_rng_state(), state)


def test_models_with_several_inputs() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return self.norm(left + right)

    model, left, right = Sum(), torch.randn(32, 2), torch.randn(32, 2)
    recalibrate_batch_norms(model, [((left, right), torch.zeros(32, dtype=torch.int64))])
    torch.testing.assert_close(model.norm.running_mean, (left + right).mean(0))
    recalibrate_batch_norms(model, [[{"left": 2 * left, "right": right}]])
    torch.testing.assert_close(model.norm.running_mean, (2 * left + right).mean(0))


def test_an_empty_loader_changes_nothing() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    model[0].running_mean.fill_(7)
    with pytest.raises(CalibrationError, match="yielded no inputs"):
        recalibrate_batch_norms(model, [])
    assert model[0].running_mean.tolist() == [7, 7, 7]
