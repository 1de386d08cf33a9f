"""NNI's own flows with our pruners: norm pruners, schedules, distillation, and one compressor after another."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytestmark = [pytest.mark.host("nni"), pytest.mark.host("torch_pruning")]
nni = pytest.importorskip("nni")
tp = pytest.importorskip("torch_pruning")

import nni.compression.pruning as host  # noqa: E402
from nni.compression.base.compressor import Pruner  # noqa: E402
from nni.compression.distillation import DynamicLayerwiseDistiller  # noqa: E402
from nni.compression.utils import TorchEvaluator  # noqa: E402
from nni_models import BATCHES, CONFIG, IMAGES, moved_snapshot, pruner_for, random_factors, simple, unwrapped  # noqa: E402

from nns_plugin.adapters import nni as ours  # noqa: E402
from nns_plugin.errors import PruningError  # noqa: E402


def kept_positions(module: nn.Module, mask: Tensor) -> list[bool]:
    """Out-positions with any weight left."""
    axis = 1 if isinstance(module, nn.ConvTranspose2d) else 0
    return mask.bool().movedim(axis, 0).flatten(1).any(1).tolist() if mask.dim() > 1 else mask.bool().tolist()


CRITERIA = ["semantic", "distinctiveness", "mean_weight", "switcher", "wsf"]


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
def test_as_a_norm_pruner_of_nni(criterion: str) -> None:
    model = simple()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    config = ours.with_dependency_groups(CONFIG, model, IMAGES[:2])
    pruner = pruner_for(criterion, model, config, IMAGES[:2], BATCHES)
    assert isinstance(pruner, Pruner)
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


class CountedPasses(list[Any]):
    """Batches that count how often they are gone through."""

    passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        yield from super().__iter__()


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("schedule", ["LinearPruner", "AGPPruner"])
def test_inside_a_scheduled_pruner_of_nni(schedule: str, criterion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = simple()
    config = ours.with_dependency_groups(CONFIG, model, IMAGES[:2])
    batches = CountedPasses(BATCHES)
    inner = pruner_for(criterion, model, config, IMAGES[:2], batches)
    shares: list[float] = []
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
    assert batches.passes == (4 if criterion in ("semantic", "distinctiveness") else 0), "a calibration for each mask"
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
    rest = ours.with_dependency_groups([{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], unwrapped(first), IMAGES[:2])
    first.wrap_model()
    pruner = ours.SemanticPruner.from_compressor(first, rest, example_inputs=IMAGES[:2], calibration=BATCHES)
    pruner.generate_masks()
    pruner.update_masks(pruner.generate_masks())
    found = pruner.get_masks()
    assert torch.equal(found["fc1"]["weight"], masks["fc1"]["weight"])
    pruner.unwrap_model()
    small = ours.speedup(model, IMAGES[:2], found).model
    assert (small.conv1.out_channels, small.conv2.out_channels, small.fc1.out_features) == (4, 6, 8)


def test_a_failed_start_from_another_compressor_leaves_it_as_it_was() -> None:
    model = simple()
    first = host.L1NormPruner(model, [{"op_names": ["fc1"], "sparse_ratio": 0.5}])
    for config in ([{"op_names": ["none"], "sparse_ratio": 0.5}], [{"op_names": ["conv1"], "sparse_ratio": 2}]):
        with pytest.raises(PruningError):
            ours.MeanWeightPruner.from_compressor(first, config, example_inputs=IMAGES[:2])
        assert first._is_wrapped
        assert hasattr(model.fc1, "_nni_wrapper")
        assert not hasattr(model.conv1, "_nni_wrapper")


def test_the_evaluator_may_be_the_third_argument() -> None:
    model = simple()
    first = host.L1NormPruner(model, [{"op_names": ["fc1"], "target_names": ["weight"], "sparse_ratio": 0.5}])
    evaluator = evaluator_for(unwrapped(first))
    first.wrap_model()
    wrong = [{"op_names": ["fc1"], "sparse_ratio": 0.25}, {"op_names": ["conv1"], "target_names": ["none"]}]
    with pytest.raises(PruningError):
        ours.MeanWeightPruner.from_compressor(first, wrong, evaluator, example_inputs=IMAGES[:2])
    assert sorted(first.get_masks()["fc1"]) == ["weight"]
    config = [{"op_names": ["conv1"], "sparse_ratio": 0.5}]
    pruner = ours.MeanWeightPruner.from_compressor(first, config, evaluator, example_inputs=IMAGES[:2])
    assert pruner.evaluator is evaluator
