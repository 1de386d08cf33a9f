"""NNI pruners: the scores and units of the torch-pruning adapter, masked units, and missing inputs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytestmark = [pytest.mark.host("nni"), pytest.mark.host("torch_pruning")]
nni = pytest.importorskip("nni")
tp = pytest.importorskip("torch_pruning")

import nni.compression.pruning as host  # noqa: E402
from nni_models import (  # noqa: E402
    BATCHES,
    CONFIG,
    IMAGES,
    KINDS,
    LABELS,
    masks_of,
    moved_snapshot,
    pruner_for,
    random_factors,
    simple,
)

from nns_plugin import calibrate  # noqa: E402
from nns_plugin.adapters import nni as ours  # noqa: E402
from nns_plugin.adapters import torch_pruning as importances  # noqa: E402
from nns_plugin.adapters.torch_pruning.graph import build_graph  # noqa: E402
from nns_plugin.adapters.torch_pruning.groups import unit_groups  # noqa: E402
from nns_plugin.adapters.torch_pruning.traced_group import trace_group  # noqa: E402
from nns_plugin.errors import CriterionError, PruningError, SnapshotError, StaleStatisticsError  # noqa: E402
from nns_plugin.switcher.network import SwitcherNetwork  # noqa: E402
from nns_plugin.switcher.row_network import SwitcherArchitecture  # noqa: E402
from nns_plugin.synapses.snapshot import WeightSnapshot  # noqa: E402

CRITERIA = ["semantic", "distinctiveness", "mean_weight", "switcher", "wsf"]
TOPOLOGIES = ["mlp", "conv_norm", "grouped", "depthwise", "residual", "concat", "transposed", "shared"]
ROOTS = [nn.Linear, nn.Conv2d, nn.ConvTranspose2d]


def importance_for(criterion: str, model: nn.Module, inputs: Any, batches: Any, count: int = 3) -> Any:
    def statistics(**options: Any) -> Any:
        return calibrate(model, batches, unit_groups(model, inputs), labels=count, **options)

    if criterion == "semantic":
        return importances.SemanticImportance(statistics(), [0, 2])
    if criterion == "distinctiveness":
        return importances.DistinctivenessImportance(statistics(gram=True), "span")
    if criterion == "mean_weight":
        return importances.MeanWeightImportance()
    if criterion == "switcher":
        return importances.SwitcherImportance(random_factors(model, inputs))
    return importances.WSFImportance(moved_snapshot(model))


@pytest.mark.filterwarnings("ignore::nns_plugin.switcher.switches.UnswitchedWarning")
@pytest.mark.filterwarnings("ignore::nns_plugin.criteria.UnscoredGroupWarning")
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("case", TOPOLOGIES)
def test_scores_are_those_of_the_torch_pruning_adapter(zoo: Any, case: str, criterion: str) -> None:
    made = zoo.CASES[case]
    torch.manual_seed(0)
    model, inputs = made.make().eval(), made.inputs(24)
    batches = [(inputs, LABELS)]
    config = [{"op_types": KINDS, "exclude_op_names": ["head"], "sparse_ratio": 0.5}]
    pruner = pruner_for(criterion, copy.deepcopy(model), config, inputs, batches)
    found = pruner.scores()
    importance = importance_for(criterion, model, inputs, batches)
    graph = build_graph(model, inputs)
    seen = 0
    for host_group in graph.get_all_groups(ignored_layers=[model.head], root_module_types=ROOTS):
        expected = importance(host_group)
        if expected is None:
            continue
        traced = trace_group(host_group)
        assert np.allclose(found[traced.group.name][traced.unit_of_root], expected, rtol=1e-5), traced.group.name
        seen += 1
    assert seen == len(found)
    assert seen > 0


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_same_units_stay_as_with_torch_pruning(zoo: Any, criterion: str) -> None:
    model = simple().eval()
    small = copy.deepcopy(model)
    tp.BasePruner(
        small,
        IMAGES[:2],
        importance_for(criterion, small, IMAGES[:2], BATCHES),
        pruning_ratio=0.75,
        ignored_layers=[small.fc2],
        **zoo.fresh_arguments(),
    ).step()
    config = ours.with_dependency_groups(CONFIG, model, IMAGES[:2])
    pruner = pruner_for(criterion, model, config, IMAGES[:2], BATCHES)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    found = ours.speedup(model, IMAGES[:2], masks).model
    assert [name for name, _ in found.named_parameters()] == [name for name, _ in small.named_parameters()]
    for (name, value), other in zip(small.named_parameters(), found.parameters(), strict=True):
        assert torch.equal(value, other), name
    assert small.conv1.out_channels == 2


def test_masked_units_stay_masked_whatever_their_weights_become() -> None:
    model = simple()
    pruner = ours.MeanWeightPruner(model, [{"op_names": ["fc1"], "sparse_ratio": 0.25}], example_inputs=IMAGES[:2])
    _, masks = pruner.compress()
    gone = ~masks["fc1"]["bias"].bool()
    with torch.no_grad():
        model.fc1._nni_wrapper.weight[gone] *= 100
    again = pruner.generate_masks()["fc1"]["weight"].flatten()
    assert again.bool().tolist() == (~gone).tolist()


def test_thresholds_and_ratios_treat_ties_as_they_should() -> None:
    """A threshold treats ties alike; a ratio separates them, the same way in every layer."""
    model = simple()
    with torch.no_grad():
        model.fc1.weight.fill_(1.0)
        model.conv2.weight.fill_(1.0)
        model.conv3.weight.fill_(1.0)
    above = float(np.nextafter(np.float64(1.0), 2.0))
    pruner = ours.MeanWeightPruner(model, [{"op_names": ["fc1"], "sparse_threshold": above}], example_inputs=IMAGES[:2])
    with pytest.raises(PruningError, match="would leave nothing"):
        pruner.generate_masks()
    pruner.unwrap_model()
    masks = masks_of([{"op_names": ["conv2", "conv3"], "sparse_ratio": 0.5}], model)
    assert masks["conv2"]["weight"].sum() == 6
    assert torch.equal(masks["conv2"]["weight"], masks["conv3"]["weight"])


def test_calibration_sees_the_model_with_masked_units_silent() -> None:
    """A masked unit is silent for its consumers, although a batch norm would make a constant of it."""
    model = simple()
    with torch.no_grad():
        model.bn.bias.fill_(3.0)
    pruner = ours.SemanticPruner(model, CONFIG, example_inputs=IMAGES[:2], calibration=BATCHES)
    masks = {name: {"weight": torch.ones_like(getattr(model, name).weight)} for name in ("conv2", "conv3")}
    for mask in masks.values():
        mask["weight"][[1, 5]] = 0
    pruner.update_masks(masks)
    scores = pruner.scores()["conv2"]
    assert scores[[1, 5]].tolist() == [0, 0]
    others = [unit for unit in range(12) if unit not in (1, 5)]
    assert bool((scores[others] > 0).all())
    found = pruner.generate_masks()
    for name in ("conv2", "conv3"):
        assert not bool(found[name]["weight"][[1, 5]].any())


@pytest.mark.parametrize("how", [{"single_weights": True}, {}])
def test_single_weights_by_significance(how: dict[str, Any]) -> None:
    model = simple()
    snapshot = moved_snapshot(model)
    config: dict[str, Any] = {"op_names": ["fc1"], "sparse_ratio": 0.6}
    if not how:
        config["granularity"] = [1, 1]
    pruner = ours.WSFPruner(model, [config], example_inputs=IMAGES[:2], snapshot=snapshot, **how)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    moved = (model.fc1.weight.detach().double() - snapshot.weights["fc1.weight"].double()).abs().flatten().numpy()
    gone = int(0.6 * moved.size)
    assert (masks["fc1"]["weight"].flatten().numpy() == (moved >= np.sort(moved)[gone])).all()
    small = ours.speedup(model, IMAGES[:2], masks)
    assert small.backend == "torch-pruning"
    assert "no complete unit, so nothing is removed" in (small.reason or "")


def test_a_switcher_computes_its_factors_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model = simple()
    torch.manual_seed(0)
    switcher = SwitcherNetwork(model, IMAGES[:2], architecture=SwitcherArchitecture(2, 1, 8), budget=None)
    pruner = ours.SwitcherPruner(model, CONFIG, example_inputs=IMAGES[:2], factors=switcher)
    first = pruner.scores()
    assert np.allclose(first["conv1"], switcher(simple())["conv1"].detach(), atol=1e-6)
    with torch.no_grad():
        model.conv1._nni_wrapper.weight.normal_()
    assert not np.allclose(pruner.scores()["conv1"], first["conv1"])


def test_missing_and_superfluous_arguments_are_refused() -> None:
    model = simple()
    statistics = calibrate(model, BATCHES, unit_groups(model, IMAGES[:2]))
    for kind, options, message in (
        (ours.SemanticPruner, {}, "neither of calibration and statistics is given"),
        (ours.SemanticPruner, {"calibration": BATCHES, "statistics": statistics}, "both of calibration and"),
        (ours.SemanticPruner, {"calibration": iter(BATCHES)}, "anew each time"),
        (ours.MeanWeightPruner, {"labels": [1]}, "MeanWeightPruner takes no labels"),
        (ours.DistinctivenessPruner, {"labels": [1], "calibration": BATCHES}, "takes no labels"),
        (ours.MeanWeightPruner, {"calibration": BATCHES}, "scores weights; leave calibration and statistics out"),
    ):
        with pytest.raises(CriterionError, match=message):
            kind(model, CONFIG, example_inputs=IMAGES[:2], **options)
    other = WeightSnapshot(nn.Linear(2, 2))
    with pytest.raises(SnapshotError):
        ours.WSFPruner(model, CONFIG, example_inputs=IMAGES[:2], snapshot=other)
    with torch.no_grad():
        model.conv1.weight.mul_(2)
    with pytest.raises(StaleStatisticsError, match="'conv1.weight' has other values; pass calibration"):
        ours.SemanticPruner(model, CONFIG, example_inputs=IMAGES[:2], statistics=statistics)
    assert not any(hasattr(module, "_nni_wrapper") for module in model.modules())
    pruner = ours.MeanWeightPruner(model, CONFIG, example_inputs=IMAGES[:2])
    with pytest.raises(PruningError, match="4 layers of the model are inside NNI's wrappers, such as 'conv1'"):
        ours.MeanWeightPruner(model, CONFIG, example_inputs=IMAGES[:2])
    assert pruner._is_wrapped


def test_given_statistics_are_valid_until_weights_change() -> None:
    model = simple()
    statistics = calibrate(model, BATCHES, unit_groups(model, IMAGES[:2]))
    pruner = ours.SemanticPruner(model, CONFIG, example_inputs=IMAGES[:2], statistics=statistics)
    pruner.compress()
    pruner.compress()  # masks are no change of weights
    with torch.no_grad():
        model.conv1._nni_wrapper.weight.mul_(2)
    with pytest.raises(StaleStatisticsError, match="another state of the model"):
        pruner.compress()


@pytest.fixture
def _uninstalled() -> Iterator[None]:
    yield
    ours.uninstall()


@pytest.mark.usefixtures("_uninstalled")
def test_pruners_by_name_in_nni(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not hasattr(host, "SemanticPruner")
    ours.install()
    ours.install()
    assert host.SemanticPruner is ours.SemanticPruner
    ours.uninstall()
    ours.uninstall()
    assert not hasattr(host, "SemanticPruner")
    monkeypatch.setattr(host, "WSFPruner", int, raising=False)
    with pytest.raises(CriterionError, match="'WSFPruner' of its own"):
        ours.install()
    assert not hasattr(host, "SemanticPruner")
    ours.uninstall()
    assert host.WSFPruner is int
