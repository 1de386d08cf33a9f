"""Importances inside torch-pruning's own pruners: the units that score lowest go."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from nns_plugin import calibrate
from nns_plugin.criteria import Semantic

pytestmark = pytest.mark.host("torch_pruning")
tp = pytest.importorskip("torch_pruning")

import zoo  # noqa: E402
from scored import by_hand, kept_units, lowest, setting  # noqa: E402

from nns_plugin.adapters.torch_pruning import (  # noqa: E402
    CriterionImportance,
    SemanticImportance,
)
from nns_plugin.adapters.torch_pruning.groups import unit_groups  # noqa: E402

fresh = zoo.fresh_arguments
PRUNERS = ("BasePruner", "MagnitudePruner", "MetaPruner", "GroupNormPruner", "BNScalePruner", "GrowingRegPruner")
TOPOLOGIES = ("mlp", "conv_norm", "grouped", "depthwise", "residual", "concat", "twice", "transposed", "shared")


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("case", TOPOLOGIES)
def test_local_pruning_removes_the_lowest(case: str, pruner: str) -> None:
    model, inputs, loader, groups = setting(case)
    dense, chosen = deepcopy(model), [0, 2]
    statistics = calibrate(model, loader, unit_groups(model, inputs))
    importance = SemanticImportance(statistics, chosen)
    made = getattr(tp.pruner, pruner)(
        model, inputs, importance=importance, pruning_ratio=0.5, ignored_layers=[model.head], **fresh()
    )
    made.step()
    for group in groups:
        scores = by_hand(dense, loader, group, chosen)
        count = group.size - int(group.size * 0.5)
        assert kept_units(dense, model, group) == lowest(scores, count), group.name
    assert model(inputs).shape == dense(inputs).shape


@pytest.mark.parametrize("isomorphic", [False, True])
@pytest.mark.parametrize("case", TOPOLOGIES)
@pytest.mark.parametrize("ratio", [0.3, 0.6])
def test_global_pruning_removes_the_lowest_of_all(case: str, isomorphic: bool, ratio: float) -> None:
    model, inputs, loader, groups = setting(case)
    dense, chosen = deepcopy(model), [1]
    importance = SemanticImportance.from_loader(model, inputs, loader, chosen)
    pruner = tp.pruner.BasePruner(
        model, inputs, importance=importance, global_pruning=True, isomorphic=isomorphic, pruning_ratio=ratio,
        ignored_layers=[model.head], **fresh(),
    )  # fmt: skip
    pruner.step()
    assert model(inputs).shape == dense(inputs).shape
    left = {group.name: kept_units(dense, model, group) for group in groups}
    scores = {group.name: by_hand(dense, loader, group, chosen) for group in groups}
    # A group that would lose everything is left whole by the host.
    pruned = [group for group in groups if len(left[group.name]) < group.size]
    if not isomorphic:
        total = sum(group.size for group in groups)
        gone = [s for name, kept in left.items() for unit, s in enumerate(scores[name]) if unit not in kept]
        stays = [s for group in pruned for unit, s in enumerate(scores[group.name]) if unit in left[group.name]]
        assert not gone or not stays or max(gone) <= min(stays) + 1e-5
        if len(pruned) == len(groups):
            assert len(gone) == total - int(total * (1 - ratio))
    for group in pruned:
        count = group.size - len(left[group.name])
        assert left[group.name] == lowest(scores[group.name], count), group.name


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_ties_lose_no_more_than_their_share(ratio: float, scale: float) -> None:
    """Every score is 1, or every score is 0: torch-pruning's threshold would take all of them."""
    model = nn.Sequential(nn.Linear(4, 32), nn.Linear(32, 16), nn.Linear(16, 24), nn.Linear(24, 3))
    for layer in model:
        nn.init.constant_(layer.weight, 0.1 * scale)
        nn.init.constant_(layer.bias, scale)
    loader = [(torch.ones(6, 4), torch.arange(6) % 3)]
    importance = SemanticImportance.from_loader(model, torch.ones(2, 4), loader, [0])
    tp.pruner.BasePruner(
        model, torch.ones(2, 4), importance=importance, global_pruning=True, pruning_ratio=ratio,
        ignored_layers=[model[3]], **fresh(),
    ).step()  # fmt: skip
    assert sum(layer.out_features for layer in model[:3]) == int(72 * (1 - ratio))
    assert all(layer.out_features >= 24 * (1 - ratio) / 3 for layer in model[:3]), "spread over the groups"


def test_ties_in_grouped_convolutions() -> None:
    """The host averages over three groups before it compares."""
    model = nn.Sequential(nn.Conv2d(2, 12, 1), nn.Conv2d(12, 12, 1, groups=3), nn.Conv2d(12, 8, 1), nn.Conv2d(8, 3, 1))
    for layer in model:
        nn.init.constant_(layer.weight, 0.1)
        nn.init.constant_(layer.bias, 0.7)
    loader = [(torch.ones(6, 2, 2, 2), torch.arange(6) % 3)]
    example = torch.ones(2, 2, 2, 2)
    statistics = calibrate(model, loader, unit_groups(model, example), labels=3)
    importance = SemanticImportance(statistics, [0])
    tp.pruner.BasePruner(
        model,
        example,
        importance=importance,
        global_pruning=True,
        pruning_ratio=0.5,
        ignored_layers=[model[3]],
        **fresh(),
    ).step()
    units = model[0].out_channels // 3 + model[1].out_channels // 3 + model[2].out_channels
    assert units == (4 + 4 + 8) // 2
    assert model(example).shape == (2, 3, 2, 2)


@pytest.mark.parametrize("round_to", [2, 4])
@pytest.mark.parametrize("global_pruning", [False, True])
def test_rounding(round_to: int, global_pruning: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3))
    dense, loader = deepcopy(model), [(torch.randn(24, 4), torch.arange(24) % 3)]
    groups = unit_groups(model, torch.randn(2, 4))
    importance = SemanticImportance(calibrate(model, loader, groups), [1, 2])
    tp.pruner.BasePruner(
        model, torch.randn(2, 4), importance=importance, global_pruning=global_pruning, pruning_ratio=0.4,
        round_to=round_to, ignored_layers=[model[4]], **fresh(),
    ).step()  # fmt: skip
    for group in groups:
        left = kept_units(dense, model, group)
        assert len(left) % round_to == 0
        assert left == lowest(by_hand(dense, loader, group, [1, 2]), group.size - len(left))


@pytest.mark.parametrize(
    "options", [{"measure": "frequency"}, {"contrast": "rest", "labels": [0]}, {"labels": ["1"]}, {"labels": None}]
)
def test_options_reach_the_criterion(options: dict[str, Any]) -> None:
    model, inputs, loader, _ = setting("mlp")
    statistics = calibrate(model, loader, unit_groups(model, inputs))
    importances = (
        CriterionImportance(Semantic(statistics, **options)),
        SemanticImportance(statistics, **options),
        SemanticImportance.from_loader(model, inputs, loader, **options),
        SemanticImportance(statistics),
    )
    graph = tp.DependencyGraph().build_dependency(model, inputs, verbose=False)
    for group in graph.get_all_groups(ignored_layers=[model.head]):
        expected, plain, collected, default = (importance(group) for importance in importances)
        assert torch.equal(plain, expected)
        assert torch.equal(collected, expected)
        assert torch.equal(default, expected) == (options == {"labels": None})


def test_calibration_options_reach_the_calibration() -> None:
    model, inputs, loader, _ = setting("mlp")
    importance = SemanticImportance.from_loader(model, inputs, loader, calibration_options={"threshold": 0.25})
    assert importance.statistics is not None
    assert importance.statistics.threshold == 0.25
