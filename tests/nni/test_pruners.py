"""NNI pruners: the same scores as for torch-pruning, NNI's own flows, and config lists against masks by hand."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytestmark = [pytest.mark.host("nni"), pytest.mark.host("torch_pruning")]
nni = pytest.importorskip("nni")
tp = pytest.importorskip("torch_pruning")

import nni.compression.pruning as host  # noqa: E402
from nni.compression.distillation import DynamicLayerwiseDistiller  # noqa: E402
from nni.compression.utils import TorchEvaluator  # noqa: E402

from nns_plugin import calibrate  # noqa: E402
from nns_plugin.adapters import nni as ours  # noqa: E402
from nns_plugin.adapters import torch_pruning as importances  # noqa: E402
from nns_plugin.adapters.torch_pruning.graph import build_graph  # noqa: E402
from nns_plugin.adapters.torch_pruning.groups import unit_groups  # noqa: E402
from nns_plugin.adapters.torch_pruning.traced_group import trace_group  # noqa: E402
from nns_plugin.criteria import UnscoredGroupWarning  # noqa: E402
from nns_plugin.errors import CriterionError, PruningError, SnapshotError, StaleStatisticsError  # noqa: E402
from nns_plugin.switcher.network import SwitcherNetwork  # noqa: E402
from nns_plugin.switcher.row_network import SwitcherArchitecture  # noqa: E402
from nns_plugin.switcher.scaling_factors import ScalingFactors  # noqa: E402
from nns_plugin.switcher.switches import find_switches  # noqa: E402
from nns_plugin.synapses.snapshot import WeightSnapshot  # noqa: E402

CRITERIA = ["semantic", "distinctiveness", "mean_weight", "switcher", "wsf"]
TOPOLOGIES = ["mlp", "conv_norm", "grouped", "depthwise", "residual", "concat", "transposed", "shared"]
KINDS = ["Conv2d", "Linear", "ConvTranspose2d"]
ROOTS = [nn.Linear, nn.Conv2d, nn.ConvTranspose2d]


class Simple(nn.Module):
    """Two convolutions whose sum is normed and read by linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 12, 3), nn.Conv2d(8, 12, 3)
        self.bn = nn.BatchNorm2d(12)
        self.fc1, self.fc2 = nn.Linear(12 * 4, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv1(x))
        x = torch.relu(self.bn(self.conv2(x) + self.conv3(x)))
        x = nn.functional.max_pool2d(x, 2).flatten(1)
        return self.fc2(torch.relu(self.fc1(x)))


IMAGES = torch.zeros(24, 1, 8, 8).normal_(generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(24) % 3
BATCHES = [(IMAGES[:12], LABELS[:12]), (IMAGES[12:], LABELS[12:])]
CONFIG = [{"op_types": ["Conv2d", "Linear"], "exclude_op_names": ["fc2"], "sparse_ratio": 0.75}]


def simple(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Simple()


def moved_snapshot(model: nn.Module) -> WeightSnapshot:
    """Of weights from which these have moved."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in other.parameters():
            value.add_(torch.randn(value.shape, generator=generator))
    return WeightSnapshot(other)


def random_factors(model: nn.Module, inputs: Any) -> ScalingFactors:
    generator = torch.Generator().manual_seed(6)
    switches = find_switches(model, inputs)
    return ScalingFactors(switches, {switch.name: torch.rand(switch.size, generator=generator) for switch in switches})


def pruner_for(
    criterion: str, model: nn.Module, config: Any, inputs: Any, batches: Any, count: int = 3, **options: Any
) -> ours.CriterionPruner:
    data = {"calibration": batches, "calibration_options": {"labels": count}}
    found: dict[str, tuple[type[ours.CriterionPruner], dict[str, Any]]] = {
        "semantic": (ours.SemanticPruner, {**data, "labels": [0, 2]}),
        "distinctiveness": (ours.DistinctivenessPruner, {**data, "mode": "span"}),
        "mean_weight": (ours.MeanWeightPruner, {}),
        "switcher": (ours.SwitcherPruner, {}),
        "wsf": (ours.WSFPruner, {}),
    }
    kind, given = found[criterion]
    if criterion == "wsf":
        given["snapshot"] = moved_snapshot(model)
    if criterion == "switcher":
        given["factors"] = random_factors(model, inputs)
    return kind(model, config, example_inputs=inputs, **{**given, **options})


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


def kept_positions(module: nn.Module, mask: Tensor) -> list[bool]:
    """Out-positions with any weight left."""
    axis = 1 if isinstance(module, nn.ConvTranspose2d) else 0
    return mask.bool().movedim(axis, 0).flatten(1).any(1).tolist() if mask.dim() > 1 else mask.bool().tolist()


# The same numbers as for torch-pruning ---------------------------------------------------------------------------


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


# NNI's own flows -------------------------------------------------------------------------------------------------


def evaluator_for(model: nn.Module, rate: float = 0.01) -> TorchEvaluator:
    def train(
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        training_step: Any,
        lr_scheduler: Any = None,
        max_steps: int | None = None,
        max_epochs: int | None = None,
    ) -> None:
        model.train()
        for step in range(max_steps or len(BATCHES) * (max_epochs or 1)):
            optimizer.zero_grad()
            training_step(BATCHES[step % len(BATCHES)], model).backward()
            optimizer.step()

    def step(batch: Any, model: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    return TorchEvaluator(train, nni.trace(torch.optim.SGD)(model.parameters(), lr=rate), step)


def check(model: nn.Module, masks: dict[str, dict[str, Tensor]], share: float = 0.75) -> nn.Module:
    """Shares, biases, one mask where units are one, and the small model; against the masked one of NNI's wrappers."""
    for name in ("conv1", "conv2", "conv3", "fc1"):
        weight = masks[name]["weight"]
        assert 1 - float(weight.sum()) / weight.numel() == share
        assert kept_positions(model, weight) == masks[name]["bias"].bool().tolist()
    assert kept_positions(model, masks["conv2"]["weight"]) == kept_positions(model, masks["conv3"]["weight"])
    assert masks["bn"]["weight"].tolist() == masks["bn"]["bias"].tolist() == masks["conv2"]["bias"].tolist()
    small = ours.speedup(model, IMAGES[:2], masks)
    assert small.units.extended == small.units.contradicted == ()
    assert small.model.conv2.weight.shape == (3, 2, 3, 3)
    return small.model


@pytest.mark.parametrize("criterion", CRITERIA)
def test_as_with_nnis_norm_pruners(criterion: str) -> None:
    model = simple()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    config = ours.with_dependency_groups(CONFIG, model, IMAGES[:2])
    pruner = pruner_for(criterion, model, config, IMAGES[:2], BATCHES)
    assert isinstance(pruner, host.L1NormPruner.__mro__[2])  # NNI's own Pruner
    wrapped, masks = pruner.compress()
    assert wrapped is model
    model.eval()
    with torch.no_grad():
        masked = model(IMAGES)
    model.train()
    pruner.unwrap_model()
    small = check(model, masks)
    with torch.no_grad():
        assert torch.allclose(small.eval()(IMAGES), masked, atol=1e-5)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.grad is None and value.requires_grad for value in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("schedule", ["LinearPruner", "AGPPruner"])
def test_as_with_nnis_scheduled_pruners(schedule: str, criterion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = simple()
    config = ours.with_dependency_groups(CONFIG, model, IMAGES[:2])
    inner = pruner_for(criterion, model, config, IMAGES[:2], BATCHES)
    shares: list[float] = []
    collected: list[int] = []
    monkeypatch.setattr(
        "nns_plugin.adapters.nni.criterion_pruner.calibrate",
        lambda *args, **options: collected.append(1) or calibrate(*args, **options),
    )
    make = inner.generate_masks

    def noted() -> Any:
        masks = make()
        for name, targets in inner.get_masks().items():  # what was masked stays masked
            for target, mask in targets.items():
                if target in masks.get(name, {}) and mask is not None:
                    assert not bool((masks[name][target].expand_as(mask).bool() & ~mask.bool()).any()), name
        shares.append(1 - float(masks["conv1"]["weight"].mean()))
        return masks

    monkeypatch.setattr(inner, "generate_masks", noted)
    pruner = getattr(host, schedule)(inner, interval_steps=3, total_times=4, evaluator=evaluator_for(model))
    weights = copy.deepcopy(model.state_dict())
    pruner.compress(14, None)
    pruner.unwrap_model()
    assert len(shares) == 4
    assert shares == sorted(shares)
    assert shares[-1] == 0.75
    if schedule == "LinearPruner":
        assert shares == [int(8 * 0.75 * step / 4) / 8 for step in (1, 2, 3, 4)]
    assert len(collected) == (4 if criterion in ("semantic", "distinctiveness") else 0)
    assert not torch.equal(weights["fc2.weight"], model.fc2.weight)
    check(model, pruner.get_masks())


@pytest.mark.parametrize("criterion", CRITERIA)
def test_fused_with_another_compressor(criterion: str) -> None:
    """A distiller, then the pruner from it: both work while the evaluator trains."""
    model, teacher = simple(), simple(1)
    evaluator = evaluator_for(model)
    distiller = DynamicLayerwiseDistiller(
        model,
        [{"op_names": ["conv1"], "lambda": 0.1, "apply_method": "mse"}],
        evaluator,
        teacher,
        lambda batch, teacher: teacher(batch[0]),
        0.1,
    )
    distiller.unwrap_model()
    config = ours.with_dependency_groups(CONFIG, model, IMAGES[:2])
    given = {"example_inputs": IMAGES[:2]}
    if criterion in ("semantic", "distinctiveness"):
        given.update(calibration=BATCHES)
    kind = type(pruner_for(criterion, copy.deepcopy(model), config, IMAGES[:2], BATCHES))
    if criterion == "wsf":
        given.update(snapshot=moved_snapshot(model))
    if criterion == "switcher":
        given.update(factors=random_factors(model, IMAGES[:2]))
    distiller.wrap_model()
    pruner = kind.from_compressor(distiller, config, **given)
    assert pruner.evaluator is evaluator
    pruner.interval_steps = 5
    pruner.compress(8, None)
    pruner.unwrap_model()
    check(model, pruner.get_masks())


def test_after_a_pruner_of_nni() -> None:
    model = simple()
    first = host.L1NormPruner(model, [{"op_names": ["fc1"], "sparse_ratio": 0.5}])
    _, masks = first.compress()
    rest = ours.with_dependency_groups([{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], _unwrapped(first), IMAGES[:2])
    first.wrap_model()
    pruner = ours.SemanticPruner.from_compressor(first, rest, example_inputs=IMAGES[:2], calibration=BATCHES)
    pruner.generate_masks()
    pruner.update_masks(pruner.generate_masks())
    found = pruner.get_masks()
    assert torch.equal(found["fc1"]["weight"], masks["fc1"]["weight"])
    pruner.unwrap_model()
    small = ours.speedup(model, IMAGES[:2], found).model
    assert (small.conv1.out_channels, small.conv2.out_channels, small.fc1.out_features) == (4, 6, 8)


def _unwrapped(pruner: Any) -> nn.Module:
    pruner.unwrap_model()
    model: nn.Module = pruner.bound_model
    return model


def test_a_failed_start_from_another_compressor_leaves_it_as_it_was() -> None:
    model = simple()
    first = host.L1NormPruner(model, [{"op_names": ["fc1"], "sparse_ratio": 0.5}])
    for config in ([{"op_names": ["none"], "sparse_ratio": 0.5}], [{"op_names": ["conv1"], "sparse_ratio": 2}]):
        with pytest.raises(PruningError):
            ours.MeanWeightPruner.from_compressor(first, config, example_inputs=IMAGES[:2])
        assert first._is_wrapped
        assert hasattr(model.fc1, "_nni_wrapper")
        assert not hasattr(model.conv1, "_nni_wrapper")


def test_masked_units_stay_masked_whatever_becomes_of_their_weights() -> None:
    model = simple()
    pruner = ours.MeanWeightPruner(model, [{"op_names": ["fc1"], "sparse_ratio": 0.25}], example_inputs=IMAGES[:2])
    _, masks = pruner.compress()
    gone = ~masks["fc1"]["bias"].bool()
    with torch.no_grad():
        model.fc1._nni_wrapper.weight[gone] *= 100
    again = pruner.generate_masks()["fc1"]["weight"].flatten()
    assert again.bool().tolist() == (~gone).tolist()


def test_equal_scores_do_not_count_for_more_than_they_are() -> None:
    """At a threshold, ties are what they are; at a ratio they are told apart, the same way in every layer."""
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


def test_alignment_along_a_chain() -> None:
    model = simple()

    def aligned(name: str, target: str = "weight") -> dict[str, Any]:
        return {"align": {"module_name": name, "target_name": target, "dims": [0]}}

    config = [
        {"op_names": ["conv2"], "sparse_ratio": 0.5},
        {"op_names": ["conv3"], "target_settings": {"weight": aligned("conv2")}},
        {"op_names": ["bn"], "target_settings": {"weight": aligned("conv3"), "bias": aligned("conv3", "bias")}},
    ]
    masks = masks_of(config, model)
    kept = masks["conv2"]["weight"].flatten().tolist()
    assert sum(kept) == 6
    for name, target in (("conv3", "weight"), ("conv3", "bias"), ("bn", "weight"), ("bn", "bias")):
        assert masks[name][target].flatten().tolist() == kept


def test_the_evaluator_may_come_third() -> None:
    model = simple()
    first = host.L1NormPruner(model, [{"op_names": ["fc1"], "target_names": ["weight"], "sparse_ratio": 0.5}])
    evaluator = evaluator_for(_unwrapped(first))
    first.wrap_model()
    wrong = [{"op_names": ["fc1"], "sparse_ratio": 0.25}, {"op_names": ["conv1"], "target_names": ["none"]}]
    with pytest.raises(PruningError):
        ours.MeanWeightPruner.from_compressor(first, wrong, evaluator, example_inputs=IMAGES[:2])
    assert sorted(first.get_masks()["fc1"]) == ["weight"]
    config = [{"op_names": ["conv1"], "sparse_ratio": 0.5}]
    pruner = ours.MeanWeightPruner.from_compressor(first, config, evaluator, example_inputs=IMAGES[:2])
    assert pruner.evaluator is evaluator


def test_calibration_sees_the_masked_model_without_a_word_of_masked_units() -> None:
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


# Config lists ----------------------------------------------------------------------------------------------------


def mean_weights(layer: nn.Module) -> np.ndarray:
    sums = layer.weight.detach().double().abs().flatten(1).sum(1).numpy()
    return sums / sums.mean()


def masks_of(config: Any, model: nn.Module, **options: Any) -> dict[str, dict[str, Tensor]]:
    pruner = ours.MeanWeightPruner(model, config, example_inputs=IMAGES[:2], **options)
    masks = pruner.generate_masks()
    pruner.unwrap_model()
    return masks


def test_thresholds_and_their_limits() -> None:
    model = simple()
    scores = mean_weights(model.fc1)
    threshold = float(np.sort(scores)[4:6].mean())
    for limits, least in (({}, 5), ({"min_sparse_ratio": 0.5}, 8), ({"max_sparse_ratio": 0.25}, 4)):
        config = [{"op_names": ["fc1"], "sparse_threshold": threshold, **limits}]
        kept = masks_of(config, model)["fc1"]["weight"].flatten().bool().numpy()
        assert kept.tolist() == (scores >= np.sort(scores)[least]).tolist()


def test_zeta_keeps_just_what_is_as_active() -> None:
    model = simple().eval()
    pruner = ours.SemanticPruner(
        model,
        [{"op_names": ["fc1", "conv1"], "sparse_threshold": 0.4}],
        example_inputs=IMAGES[:2],
        calibration=BATCHES,
        labels=[1],
    )
    masks = pruner.generate_masks()
    pruner.unwrap_model()
    with torch.no_grad():
        x = IMAGES[LABELS == 1]
        maps = torch.relu(model.conv1(x))
        hidden = torch.relu(model.bn(model.conv2(maps) + model.conv3(maps)))
        hidden = torch.relu(model.fc1(nn.functional.max_pool2d(hidden, 2).flatten(1)))
    for name, activity in (("conv1", maps.mean((0, 2, 3))), ("fc1", hidden.mean(0))):
        kept = (activity / activity.max() >= 0.4).tolist()
        assert masks[name]["weight"].flatten().bool().tolist() == kept
        assert True in kept
        assert False in kept


@pytest.mark.parametrize("limits", [{}, {"conv1": {"max_sparse_ratio": 0.25}}, {"fc1": {"min_sparse_ratio": 0.5}}])
@pytest.mark.parametrize("share", [0.2, 0.4, 0.7])
def test_global_groups_rank_layers_together(share: float, limits: dict[str, Any]) -> None:
    """The lowest of all layers go, as many as there is room for; NNI's own rule removes up to twice as many."""
    model = simple()
    sizes = {"conv1": 9, "fc1": 48}
    config = [
        {"op_names": [name], "sparse_ratio": share, "global_group_id": "all", **limits.get(name, {})} for name in sizes
    ]
    masks = masks_of(config, model)
    first, second, gone = [], [], {"conv1": 0, "fc1": 0}
    for name in sizes:
        scores = np.sort(mean_weights(getattr(model, name)))
        limit = limits.get(name, {})
        least = int(limit.get("min_sparse_ratio", 0) * len(scores))
        most = int(limit.get("max_sparse_ratio", 1) * len(scores))
        first += [(score, name) for score in scores[:least]]
        second += [(score, name) for score in scores[least:most]]
    room = int(share * (8 * 9 + 16 * 48))
    for place, (_, name) in enumerate([*first, *sorted(second)]):
        room -= sizes[name]
        if room < 0 and place >= len(first):
            break
        gone[name] += 1
    for name in sizes:
        scores = mean_weights(getattr(model, name))
        kept = masks[name]["weight"].flatten().bool().tolist()
        assert kept == (scores >= np.sort(scores)[gone[name]]).tolist(), name


def test_limits_in_dependency_groups() -> None:
    model = simple()
    for limit, removed in (({"min_sparse_ratio": 0.75}, 9), ({"max_sparse_ratio": 0.25}, 3), ({}, 6)):
        config = [{"op_names": ["conv2", "conv3"], "sparse_ratio": 0.5, "dependency_group_id": 1, **limit}]
        masks = masks_of(config, model)
        scores = mean_weights(model.conv2) + mean_weights(model.conv3)
        expected = (scores >= np.sort(scores)[removed]).tolist()
        for name in ("conv2", "conv3"):
            assert masks[name]["weight"].flatten().bool().tolist() == expected


@pytest.mark.parametrize(
    "where",
    [
        {"op_names": ["conv2", "conv3"]},
        {"op_names_re": ["conv[23]"]},
        {"op_types": ["Conv2d"], "exclude_op_names": ["conv1"]},
        {"op_types": ["Conv2d", "Linear"], "exclude_op_types": ["Linear"], "exclude_op_names_re": [".*1$"]},
    ],
)
def test_layers_are_selected_as_in_nni(where: dict[str, Any]) -> None:
    masks = masks_of([{**where, "sparse_ratio": 0.5}], simple())
    assert sorted(masks) == ["conv2", "conv3"]


def test_settings_of_targets_and_alignment() -> None:
    model = simple()
    config = [
        {"op_names": ["conv1"], "target_settings": {"weight": {"sparse_ratio": 0.5}}},
        {"op_names": ["conv2"], "target_names": ["weight"], "sparse_ratio": 0.5},
        {
            "op_names": ["conv3", "bn"],
            "target_settings": {
                target: {"align": {"module_name": "conv2", "target_name": "weight", "dims": [0]}}
                for target in ("weight", "bias")
            },
        },
    ]
    masks = masks_of(config, model)
    kept = masks["conv2"]["weight"].flatten().tolist()
    assert sum(kept) == 6
    assert "bias" not in masks["conv2"]
    for name in ("conv3", "bn"):
        for target in ("weight", "bias"):
            assert masks[name][target].flatten().tolist() == kept
    assert masks["conv1"]["bias"].tolist() == masks["conv1"]["weight"].flatten().tolist()


def test_a_batch_norm_has_the_scores_of_what_it_passes_on() -> None:
    model = simple()
    masks = masks_of([{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5}], model)
    scores = model.conv2.weight.detach().abs().flatten(1).sum(1) + model.conv3.weight.detach().abs().flatten(1).sum(1)
    kept = torch.zeros(12).index_fill(0, scores.topk(6).indices, 1).tolist()
    assert masks["bn"]["weight"].tolist() == kept
    assert masks["bn"]["bias"].tolist() == kept  # NNI's own rule leaves it whole


def test_blocks_of_units_and_the_axis_of_inputs() -> None:
    model = simple()
    scores = mean_weights(model.fc1)
    masks = masks_of([{"op_names": ["fc1"], "sparse_ratio": 0.5, "granularity": [4, -1]}], model)
    blocks = scores.reshape(4, 4).mean(1)
    kept = np.repeat(blocks >= np.sort(blocks)[2], 4)
    assert masks["fc1"]["weight"].expand(16, 48)[:, 0].bool().tolist() == kept.tolist()
    masks = masks_of([{"op_names": ["conv2"], "sparse_ratio": 0.5, "granularity": "in_channel"}], model)
    read = mean_weights(model.conv1)
    assert masks["conv2"]["weight"].flatten().bool().tolist() == (read >= np.sort(read)[4]).tolist()


def test_outputs_as_targets() -> None:
    model = simple()
    settings = {"_output_": {"sparse_ratio": 0.5, "granularity": "per_channel", "apply_method": "mul"}}
    config = [{"op_names": ["conv1"], "target_names": ["_output_"], "target_settings": settings}]
    masks = masks_of(config, model)
    scores = mean_weights(model.conv1)
    assert masks["conv1"]["_output_0"].flatten().bool().tolist() == (scores >= np.sort(scores)[4]).tolist()


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


def test_a_switcher_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = simple()
    torch.manual_seed(0)
    switcher = SwitcherNetwork(model, IMAGES[:2], architecture=SwitcherArchitecture(2, 1, 8), budget=None)
    pruner = ours.SwitcherPruner(model, CONFIG, example_inputs=IMAGES[:2], factors=switcher)
    first = pruner.scores()
    assert np.allclose(first["conv1"], switcher(simple())["conv1"].detach(), atol=1e-6)
    with torch.no_grad():
        model.conv1._nni_wrapper.weight.normal_()
    assert not np.allclose(pruner.scores()["conv1"], first["conv1"])


def test_a_layer_that_cannot_be_scored_stays_whole() -> None:
    model = simple()
    with pytest.warns(UnscoredGroupWarning, match="left whole: 'fc2'"):
        masks = masks_of([{"op_types": ["Linear"], "sparse_ratio": 0.5}], model)
    assert sorted(masks) == ["fc1"]


# Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([{"op_types": ["LSTM"], "sparse_ratio": 0.5}], r"selects no layer; .* types BatchNorm2d, Conv2d, Linear"),
        ([], "selects no layer"),
        (None, "config_list is None"),
        ([{"op_names": "conv1", "sparse_ratio": 0.5}], "op_names is 'conv1'; expected a list"),
        ([{"op_names_re": ["conv["], "sparse_ratio": 0.5}], "no regular expression"),
        ([{"op_names": ["conv1"]}], "asks for no sparsity"),
        ([{"op_names": ["conv1"], "sparse_ratio": -0.5}], "is -0.5; expected a share"),
        ([{"op_names": ["conv1"], "sparse_ratio": float("nan")}], "is nan; expected a share"),
        ([{"op_names": ["conv1"], "sparse_threshold": float("inf")}], "sparse_threshold of 'weight' of 'conv1' is inf"),
        (
            [{"op_names": ["conv1"], "sparse_ratio": 0.5, "min_sparse_ratio": 0.8, "max_sparse_ratio": 0.2}],
            "min_sparse_ratio of 0.8 over its max_sparse_ratio of 0.2",
        ),
        ([{"op_names": ["conv1", "conv9"], "sparse_ratio": 0.5}], "op_names has 'conv9'"),
        ("conv1", "expected a list"),
        ([{"op_names": ["conv1"], "sparse_ratio": 2}], "NNI refuses the config list: Schema"),
        ([{"op_names": ["conv1"], "ratio": 0.5}], "NNI refuses the config list"),
        ([{"op_names": ["conv1"], "sparse_ratio": 0.5, "target_names": ["none"]}], "NNI refuses the config list"),
    ],
)
def test_wrong_config_lists_are_told_before_anything_changes(config: Any, message: str) -> None:
    model = simple()
    with pytest.raises(PruningError, match=message):
        ours.MeanWeightPruner(model, config, example_inputs=IMAGES[:2])
    assert not any(hasattr(module, "_nni_wrapper") for module in model.modules())
    assert isinstance(model.conv1.weight, nn.Parameter)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"op_names": ["fc1"], "sparse_ratio": 1.0}, "sparse_ratio 1.0 would leave nothing of 'weight' of 'fc1'"),
        ({"op_names": ["fc1"], "sparse_threshold": 9.0}, "sparse_threshold 9.0 would leave nothing"),
        ({"op_names": ["fc1"], "sparse_ratio": 0.5, "granularity": [1, 1]}, "asks for single weights"),
        ({"op_names": ["fc1"], "sparse_ratio": 0.5, "granularity": [3, -1]}, r"\[3, -1\] does not divide"),
        (
            {"op_names": ["fc1", "conv1"], "sparse_ratio": 0.5, "dependency_group_id": 1},
            "layers that share a group id need the same",
        ),
        (
            {
                "op_names": ["fc1"],
                "sparse_ratio": 0.5,
                "target_settings": {
                    "bias": {"align": {"module_name": "conv1", "target_name": "weight", "dims": [0]}},
                },
            },
            "aligned with 'weight' of 'conv1', which the config list does not select",
        ),
    ],
)
def test_what_cannot_be_masked_is_told_and_no_mask_changes(config: Any, message: str) -> None:
    pruner = ours.MeanWeightPruner(simple(), [config], example_inputs=IMAGES[:2])
    with pytest.raises(PruningError, match=message):
        pruner.compress()
    assert all(bool(mask.all()) for targets in pruner.get_masks().values() for mask in targets.values())


def test_what_is_missing_or_too_much_is_told() -> None:
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


def test_given_statistics_serve_until_weights_change() -> None:
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
