"""Importances: their constructors, their scores, and their names in torch_pruning.importance."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from copy import deepcopy
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from nns_plugin import UnitGroup, calibrate
from nns_plugin.criteria import UnscoredGroupWarning
from nns_plugin.errors import CalibrationError, CriterionError, LabelError

pytestmark = pytest.mark.host("torch_pruning")
tp = pytest.importorskip("torch_pruning")

import zoo  # noqa: E402
from scored import by_hand, kept_units, lowest, setting  # noqa: E402

from nns_plugin.adapters import torch_pruning  # noqa: E402
from nns_plugin.adapters.torch_pruning import (  # noqa: E402
    CriterionImportance,
    MeanWeightImportance,
    SemanticImportance,
    count_macs,
    install,
    uninstall,
)
from nns_plugin.adapters.torch_pruning.groups import unit_groups  # noqa: E402
from nns_plugin.switcher.scaling_factors import ScalingFactors  # noqa: E402
from nns_plugin.switcher.switches import Switch  # noqa: E402
from nns_plugin.synapses.snapshot import WeightSnapshot  # noqa: E402

fresh = zoo.fresh_arguments
PRUNERS = ("BasePruner", "MagnitudePruner", "MetaPruner", "GroupNormPruner", "BNScalePruner", "GrowingRegPruner")


def random_factors(model: nn.Module, groups: tuple[UnitGroup, ...]) -> ScalingFactors:
    switches = [Switch(group.name, group.size, group.consumers, group.producers) for group in groups]
    return ScalingFactors(switches, {group.name: torch.rand(group.size) for group in groups})


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", ["Distinctiveness", "MeanWeight", "Semantic", "Switcher", "WSF"])
def test_every_importance_has_the_same_two_constructors(name: str, steps: int) -> None:
    """Built from a loader, it scores like the criterion whose evidence was collected from the model as it is."""
    model, inputs, loader, groups = setting("conv_norm")
    if name == "Switcher" and steps > 1:
        pytest.skip("factors do not follow removals")
    evidence: dict[str, Any] = {}
    if name == "WSF":
        evidence["snapshot"] = WeightSnapshot(setting("conv_norm")[0])
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter))
    if name == "Switcher":
        evidence["factors"] = random_factors(model, groups)
    cls = getattr(torch_pruning, f"{name}Importance")
    importance, pruners = cls.from_loader(model, inputs, loader, **evidence), []
    for step in range(steps):
        if name in ("Distinctiveness", "Semantic"):
            statistics = calibrate(model, loader, unit_groups(model, inputs), gram=True)
            evidence["statistics"] = statistics
        elif name == "WSF" and step:
            evidence["snapshot"] = importance.snapshot
        expected = cls(**evidence)
        graph = tp.DependencyGraph().build_dependency(model, inputs, verbose=False)
        for group in graph.get_all_groups(ignored_layers=[model.head]):
            np.testing.assert_allclose(importance(group), expected(group), rtol=1e-5)
        options = {"pruning_ratio": 0.34, "ignored_layers": [model.head]}
        pruners.append(tp.pruner.BasePruner(model, inputs, importance=importance, **options, **fresh()))
        pruners[-1].step()


def test_an_importance_without_a_criterion_of_its_own_takes_no_loader() -> None:
    model, inputs, loader, _ = setting("mlp")
    with pytest.raises(CriterionError, match="CriterionImportance names no criterion; set criterion_type"):
        CriterionImportance.from_loader(model, inputs, loader)


def test_sparse_training_pruners_can_use_the_scores() -> None:
    """Regularisation multiplies weights and gradients with what the importance returns."""
    for name in ("GroupNormPruner", "BNScalePruner", "GrowingRegPruner"):
        model, inputs, loader, _ = setting("conv_norm")
        importance = SemanticImportance(calibrate(model, loader, unit_groups(model, inputs)), [0, 2])
        pruner = getattr(tp.pruner, name)(
            model, inputs, importance=importance, pruning_ratio=0.5, ignored_layers=[model.head], **fresh()
        )
        model(inputs).sum().backward()
        if name == "GrowingRegPruner":
            pruner.update_reg()
        pruner.regularize(model)
        pruner.step()
        assert model.conv1.out_channels == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", PRUNERS)
def test_on_a_gpu(name: str) -> None:
    model, inputs, loader, groups = setting("conv_norm")
    dense = deepcopy(model)
    model.cuda()
    importance = SemanticImportance.from_loader(model, inputs, loader, [0, 2])
    options = {"pruning_ratio": 0.5, "ignored_layers": [model.head]}
    pruner = getattr(tp.pruner, name)(model, inputs.cuda(), importance=importance, **options, **fresh())
    if hasattr(pruner, "reg") or name == "GrowingRegPruner":
        model(inputs.cuda()).sum().backward()
        pruner.regularize(model)
    pruner.step()
    for group in groups:
        scores = by_hand(dense, loader, group, [0, 2])
        assert kept_units(dense, model, group) == lowest(scores, group.size - int(group.size * 0.5))


def test_scores_are_one_a_root_position() -> None:
    model, inputs, loader, groups = setting("grouped")
    importance = SemanticImportance(calibrate(model, loader, unit_groups(model, inputs)), [0, 2])
    graph = tp.DependencyGraph().build_dependency(model, inputs, verbose=False)
    host_group = next(
        group
        for group in graph.get_all_groups(ignored_layers=[model.head])
        if group[0].dep.target.module is model.first
    )
    scores = importance(host_group)
    assert scores is not None
    assert scores.shape == (8,)
    assert torch.equal(scores[:4], scores[4:]), "two positions of one unit"
    np.testing.assert_allclose(scores[:4], by_hand(model, loader, groups[0], [0, 2]), rtol=1e-5)


def test_importances_from_statistics_survive_pickle() -> None:
    model, inputs, loader, _ = setting("conv_norm")
    dense = deepcopy(model)
    importance = SemanticImportance(calibrate(model, loader, unit_groups(model, inputs)), [0, 2], "frequency")
    graph = tp.DependencyGraph().build_dependency(model, inputs, verbose=False)
    before = [importance(group) for group in graph.get_all_groups(ignored_layers=[model.head])]
    again = pickle.loads(pickle.dumps(importance))
    other = tp.DependencyGraph().build_dependency(dense, inputs, verbose=False)
    after = [again(group) for group in other.get_all_groups(ignored_layers=[dense.head])]
    assert all(torch.equal(left, right) for left, right in zip(before, after, strict=True))
    deep = deepcopy(importance)
    assert torch.equal(deep(next(iter(other.get_all_groups(ignored_layers=[dense.head])))), after[0])


def test_the_model_is_not_touched_by_scoring() -> None:
    model, inputs, loader, _ = setting("conv_norm")
    importance = SemanticImportance.from_loader(model, inputs, loader, [0, 2])
    graph = tp.DependencyGraph().build_dependency(model, inputs, verbose=False)
    model.train()
    model.bn1.eval()
    before = zoo.Snapshot(model)
    for group in graph.get_all_groups(ignored_layers=[model.head]):
        importance(group)
    before.check()


def test_a_one_shot_loader_cannot_be_asked_again() -> None:
    model, inputs, loader, _ = setting("mlp")
    importance = SemanticImportance.from_loader(model, inputs, iter(loader), [0])
    pruner = tp.pruner.BasePruner(
        model,
        inputs,
        importance=importance,
        pruning_ratio=0.5,
        iterative_steps=2,
        ignored_layers=[model.head],
        **fresh(),
    )
    pruner.step()
    with pytest.raises(CalibrationError, match="the loader yielded no inputs"):
        pruner.step()


def test_bad_arguments() -> None:
    model, inputs, loader, _ = setting("mlp")
    statistics = calibrate(model, loader, unit_groups(model, inputs))
    with pytest.raises(LabelError, match="label 7 does not exist"):
        SemanticImportance(statistics, [7])
    with pytest.raises(LabelError, match="label 7 does not exist"):
        SemanticImportance.from_loader(model, inputs, loader, [7])
    with pytest.raises(CriterionError, match="measure is 'median'"):
        SemanticImportance(statistics, [0], "median")  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="nothing in this model can be pruned"):
        SemanticImportance.from_loader(nn.Linear(6, 3), inputs, loader, [0])
    for cls, options in ((SemanticImportance, {"threshold": 0.5}), (MeanWeightImportance, {"labels": [0]})):
        with pytest.raises(
            CriterionError, match=f"{cls.__name__}.from_loader: .*'{next(iter(options))}'.* as calibration"
        ):
            cls.from_loader(model, inputs, 0, **options)  # type: ignore[arg-type]


class Constant:
    """Violates or fulfils the score contract."""

    requires: ClassVar[tuple[str, ...]] = ()

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, group: UnitGroup) -> Any:
        return None if self.value is None else torch.full((group.size,), self.value)


def test_any_criterion_can_be_an_importance() -> None:
    model, inputs, _, _ = setting("mlp")
    pruner = tp.pruner.BasePruner(
        model,
        inputs,
        importance=CriterionImportance(Constant(1.0)),
        pruning_ratio=0.5,
        ignored_layers=[model.head],
        **fresh(),
    )
    pruner.step()
    assert (model.fc1.out_features, model.fc2.out_features) == (4, 2)


def test_broken_scores_never_reach_the_host() -> None:
    model, inputs, _, _ = setting("mlp")
    options = {"pruning_ratio": 0.5, "ignored_layers": [model.head]}
    with pytest.raises(CriterionError, match="Constant scored unit 0 of group 'fc.' nan"):
        tp.pruner.BasePruner(
            model, inputs, importance=CriterionImportance(Constant(float("nan"))), **options, **fresh()
        ).step()
    with (
        pytest.warns(UnscoredGroupWarning, match="group 'fc1'"),
        pytest.warns(UnscoredGroupWarning, match="group 'fc2'"),
    ):
        tp.pruner.BasePruner(model, inputs, importance=CriterionImportance(Constant(None)), **options, **fresh()).step()
    assert (model.fc1.out_features, model.fc2.out_features) == (8, 5)


# --- by name in torch_pruning.importance -----------------------------------------------------------------------------


@pytest.fixture
def _uninstalled() -> Iterator[None]:
    uninstall()
    yield
    uninstall()


@pytest.mark.usefixtures("_uninstalled")
def test_install_adds_and_uninstall_removes() -> None:
    before = dict(vars(tp.importance))
    assert not hasattr(tp.importance, "SemanticImportance"), "never on import"
    install()
    assert tp.importance.SemanticImportance is SemanticImportance
    install()
    uninstall()
    assert dict(vars(tp.importance)) == before
    uninstall()
    assert dict(vars(tp.importance)) == before


@pytest.mark.usefixtures("_uninstalled")
def test_install_leaves_foreign_names_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class SemanticImportance:  # somebody else's
        pass

    monkeypatch.setattr(tp.importance, "SemanticImportance", SemanticImportance, raising=False)
    before = dict(vars(tp.importance))
    with pytest.raises(CriterionError, match="has a 'SemanticImportance' of its own already; it is left alone"):
        install()
    assert dict(vars(tp.importance)) == before, "nothing is added"
    uninstall()
    assert dict(vars(tp.importance)) == before


# --- counting --------------------------------------------------------------------------------------------------------


def test_operations_by_hand() -> None:
    """Two Linear layers: in * out multiply-accumulates each, whatever the batch."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).train()
    before = zoo.Snapshot(model)
    for batch in (1, 4):
        macs, parameters = count_macs(model, torch.randn(batch, 6))
        assert parameters == 6 * 8 + 8 + 8 * 3 + 3
        assert 6 * 8 + 8 * 3 <= macs <= 6 * 8 + 8 * 3 + 8 + 3 + 8, "biases and activations may count"
    before.check(rng=False)
