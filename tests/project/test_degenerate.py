"""Degenerate activations: dead and constant units, one-unit groups, fewer inputs than units, singular Gram matrices."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytestmark = pytest.mark.host("torch_pruning")
tp = pytest.importorskip("torch_pruning")

from nns_plugin import Statistics, calibrate  # noqa: E402
from nns_plugin.adapters.torch_pruning import DistinctivenessImportance, compensated_step  # noqa: E402
from nns_plugin.adapters.torch_pruning.groups import unit_groups  # noqa: E402
from nns_plugin.compensation.compensated import CompensationWarning  # noqa: E402
from nns_plugin.criteria import Distinctiveness, score  # noqa: E402

DEAD, CONSTANT = 2, 5


def degenerate() -> nn.Sequential:
    """Unit 2 is always 0, unit 5 always 3, unit 7 nearly repeats unit 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        model[0].weight[[DEAD, CONSTANT]] = 0.0
        model[0].bias[DEAD], model[0].bias[CONSTANT] = -1.0, 3.0
        model[0].weight[7], model[0].bias[7] = model[0].weight[0] * (1 + 1e-7), model[0].bias[0]
    return model


def observed(model: nn.Module, inputs: Tensor) -> Statistics:
    return calibrate(model, [inputs], unit_groups(model, inputs[:2], ["2"]), gram=True)


SETTINGS: list[dict[str, Any]] = [
    {"mode": "span"},
    {"mode": "pairwise"},
    {"mode": "pairwise", "center": "mean"},
    {"mode": "pairwise", "center": 0.5},
    {"mode": "pairwise", "vectors": "weights"},
]


@pytest.mark.parametrize("count", [200, 3, 1])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_scores_are_finite(settings: dict[str, Any], count: int) -> None:
    model = degenerate()
    statistics = observed(model, torch.randn(count, 4))
    scores = score(Distinctiveness(statistics, model, **settings), statistics.groups[0])
    assert scores is not None
    assert torch.isfinite(scores).all()
    assert (scores >= 0).all()


def test_what_costs_nothing_goes_first() -> None:
    """The dead unit, the constant one (the bias takes it over) and one of the pair; nothing else is as low."""
    model = degenerate()
    statistics = observed(model, torch.randn(200, 4))
    scores = Distinctiveness(statistics, model, "span")(statistics.groups[0])
    lowest = set(scores.argsort()[:3].tolist())
    assert {DEAD, CONSTANT} < lowest
    assert len(lowest & {0, 7}) == 1
    assert float(scores.sort().values[2]) < 1e-6 < float(scores.sort().values[3])


@pytest.mark.parametrize("center", [None, "mean"])
def test_dead_units_are_the_least_distinctive(center: Any) -> None:
    model = degenerate()
    statistics = observed(model, torch.randn(200, 4))
    scores = Distinctiveness(statistics, model, "pairwise", center)(statistics.groups[0])
    assert float(scores[DEAD]) == 0.0
    assert float(scores.sort().values[-1]) == 90.0


@pytest.mark.parametrize("count", [200, 3])
@pytest.mark.parametrize("method", ["refit", "least_squares", "merge", "mean", "none"])
@pytest.mark.parametrize("ratio", [3 / 8, 7 / 8])
def test_steps_leave_finite_models(method: str, count: int, ratio: float) -> None:
    model, inputs = degenerate(), torch.randn(count, 4)
    before = model(inputs).detach()
    statistics = observed(model, inputs)
    pruned = copy.deepcopy(model)
    pruner = tp.pruner.BasePruner(
        pruned,
        inputs[:2],
        importance=DistinctivenessImportance(statistics, mode="span"),
        pruning_ratio=ratio,
        ignored_layers=[pruned[2]],
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
        channel_groups={},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompensationWarning)
        compensated_step(pruner, statistics, method, [inputs])
    assert all(bool(torch.isfinite(value).all()) for value in pruned.state_dict().values())
    if method in ("refit", "least_squares") and (ratio < 0.5 or count == 3):
        # Three that cost nothing; and three inputs are three equations, which four numbers can always fulfil.
        tolerance = 1e-4 if ratio < 0.5 else float(before.std())
        assert (pruned(inputs) - before).abs().max() < tolerance


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_group_of_one_unit(settings: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(4, 1), nn.ReLU(), nn.Linear(1, 3))
    statistics = observed(model, torch.randn(20, 4))
    scores = score(Distinctiveness(statistics, model, **settings), statistics.groups[0])
    assert scores is not None
    assert scores.shape == (1,)
    assert torch.isfinite(scores).all()


def test_everything_dead() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(-1)
    statistics = observed(model, torch.randn(20, 4))
    for settings in SETTINGS:
        scores = score(Distinctiveness(statistics, model, **settings), statistics.groups[0])
        assert scores is not None
        assert torch.isfinite(scores).all()
