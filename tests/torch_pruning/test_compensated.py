"""Compensated steps: exact where they can be, with any importance of torch-pruning, never worse than nothing."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytestmark = pytest.mark.host("torch_pruning")
tp = pytest.importorskip("torch_pruning")

from nns_plugin import calibrate  # noqa: E402
from nns_plugin.adapters.torch_pruning import DistinctivenessImportance, compensated_step  # noqa: E402
from nns_plugin.adapters.torch_pruning.groups import unit_groups  # noqa: E402
from nns_plugin.compensation.compensated import CompensationWarning  # noqa: E402
from nns_plugin.compensation.options import Compensation  # noqa: E402
from nns_plugin.errors import PruningError, StaleStatisticsError  # noqa: E402
from nns_plugin.models.activations import capture_call  # noqa: E402


class Residual(nn.Module):
    """A stream with several consumers, each with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.first = nn.Conv2d(6, 6, 1)
        self.second = nn.Conv2d(6, 4, 3, padding=1)
        self.head = nn.Linear(6, 3)
        self.side = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.stem(x).relu()
        stream = stream + self.first(stream)
        return self.head(stream.mean((2, 3))) + self.side(self.second(stream).relu()).mean((2, 3)).sum(1, keepdim=True)


def models() -> dict[str, tuple[Callable[[], nn.Module], Tensor, str, str]]:
    """Model, inputs, name of a producer whose last unit repeats its first, and what must stay whole."""
    images = torch.randn(32, 1, 8, 8)
    return {
        "mlp": (
            lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)),
            torch.randn(64, 5),
            "0",
            "2",
        ),
        "conv": (
            lambda: nn.Sequential(
                nn.Conv2d(1, 6, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(6, 5, 3, padding=1),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
            ),
            images,
            "0",
            "2",
        ),
        "flatten": (
            lambda: nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 3)),
            images,
            "0",
            "3",
        ),
        "transposed": (
            lambda: nn.Sequential(
                nn.Conv2d(1, 6, 3),
                nn.ReLU(),
                nn.ConvTranspose2d(6, 4, 2, stride=2),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
            ),
            images,
            "0",
            "2",
        ),
    }


def _whole(kind: str, name: str) -> list[str]:
    return [name, "4"] if kind == "mlp" else [name]


def pruner_of(model: nn.Module, inputs: Tensor, importance: Any, ratio: float, whole: list[str], **options: Any) -> Any:
    return tp.pruner.BasePruner(
        model,
        inputs[:2],
        importance=importance,
        pruning_ratio=ratio,
        ignored_layers=[model.get_submodule(name) for name in whole],
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
        channel_groups={},
        **options,
    )


@pytest.mark.parametrize("method", ["least_squares", "refit"])
@pytest.mark.parametrize("kind", ["mlp", "conv", "flatten", "transposed"])
def test_removing_a_duplicate_unit_changes_nothing(kind: str, method: str) -> None:
    make, inputs, producer, whole = models()[kind]
    model = make().eval()
    layer = model.get_submodule(producer)
    with torch.no_grad():
        layer.weight[-1] = layer.weight[0]
        layer.bias[-1] = layer.bias[0]
        before = model(inputs)
    statistics = calibrate(model, [inputs], unit_groups(model, inputs[:2], [whole]), gram=True)
    count = layer.weight.shape[0]
    pruner = pruner_of(
        model, inputs, DistinctivenessImportance(statistics, mode="span"), 1 / count, _whole(kind, whole)
    )
    compensated_step(pruner, statistics, method, [inputs])
    assert model.get_submodule(producer).weight.shape[0] == count - 1
    with torch.no_grad():
        torch.testing.assert_close(model(inputs), before, atol=1e-5, rtol=1e-5)


def test_all_consumers_of_a_stream_take_over() -> None:
    model, inputs = Residual().eval(), torch.randn(32, 1, 6, 6)
    with torch.no_grad():
        for layer in (model.stem, model.first):
            layer.weight[-1] = layer.weight[0]
            layer.bias[-1] = layer.bias[0]
        model.first.weight[:, -1] = model.first.weight[:, 0]
        before = model(inputs)
    groups = unit_groups(model, inputs[:2], [model.second])
    statistics = calibrate(model, [inputs], groups, gram=True)
    importance = DistinctivenessImportance(statistics, mode="span")
    pruner = pruner_of(model, inputs, importance, 1 / 6, ["head", "second", "side"])
    compensated_step(pruner, statistics, "least_squares", [inputs])
    assert model.stem.out_channels == 5
    with torch.no_grad():
        torch.testing.assert_close(model(inputs), before, atol=1e-5, rtol=1e-5)


CONSUMERS: dict[str, Callable[[], tuple[nn.Module, Tensor, str]]] = {
    "linear": lambda: (nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6)), torch.randn(40, 5), "2"),
    "no bias": lambda: (nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6, False)), torch.randn(40, 5), "2"),
    "conv1d": lambda: (
        nn.Sequential(nn.Conv1d(2, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 3, padding=1), nn.Flatten(1), nn.Linear(24, 2)),
        torch.randn(12, 2, 8),
        "2",
    ),
    "conv2d": lambda: (
        nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1, stride=2), nn.Flatten()),
        torch.randn(12, 2, 8, 8),
        "2",
    ),
    "conv3d": lambda: (
        nn.Sequential(nn.Conv3d(2, 8, 1), nn.Sigmoid(), nn.Conv3d(8, 4, 2, padding=1), nn.Flatten()),
        torch.randn(6, 2, 4, 4, 4),
        "2",
    ),
    "1x1": lambda: (
        nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1, padding=1), nn.Flatten()),
        torch.randn(12, 2, 6, 6),
        "2",
    ),
    "transposed": lambda: (
        nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3, stride=2), nn.Flatten()),
        torch.randn(12, 2, 6, 6),
        "2",
    ),
    "grouped": lambda: (
        nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=2), nn.Flatten()),
        torch.randn(12, 2, 8, 8),
        "2",
    ),
    "flatten": lambda: (
        nn.Sequential(nn.Conv2d(2, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 16, 5)),
        torch.randn(12, 2, 6, 6),
        "3",
    ),
}


@pytest.mark.parametrize(
    ("method", "sequential"), [("least_squares", False), ("least_squares", True), ("refit", False)]
)
@pytest.mark.parametrize("kind", CONSUMERS)
def test_removing_a_linear_combination_of_others_changes_nothing(kind: str, method: str, sequential: bool) -> None:
    torch.manual_seed(0)
    model, inputs, consumer = CONSUMERS[kind]()
    model[1] = nn.Identity()
    model.eval()
    blocks = 2 if kind == "grouped" else 1  # a unit has a channel in each group of the consumer
    length = 8 // blocks
    with torch.no_grad():
        for start in range(0, 8, length):
            for values in (model[0].weight, model[0].bias):
                values[start + length - 1] = 0.7 * values[start] - 0.4 * values[start + 1]
        before = model(inputs)
    whole = sorted(
        {consumer, *(name for name, module in model.named_modules() if isinstance(module, nn.Linear))} - {"0"}
    )
    statistics = calibrate(model, [inputs], unit_groups(model, inputs[:2], whole), gram=True)
    importance = DistinctivenessImportance(statistics, mode="span")
    pruner = pruner_of(model, inputs, importance, 1 / length, whole)
    compensated_step(pruner, statistics, Compensation(method, sequential, ridge=1e-9), [inputs])
    assert model[0].weight.shape[0] == 8 - blocks
    with torch.no_grad():
        torch.testing.assert_close(model(inputs), before, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::nns_plugin.compensation.compensated.CompensationWarning")
@pytest.mark.parametrize("seed", [0, 5])  # seed 5: plans for "transposed" and "flatten" err more than plain removal
@pytest.mark.parametrize("kind", CONSUMERS)
@pytest.mark.parametrize(
    ("method", "sequential"),
    [
        ("mean", False),
        ("merge", False),
        ("least_squares", False),
        ("least_squares", True),
        ("refit", False),
    ],
)
def test_a_consumer_never_errs_more_on_the_calibration_data_than_without(
    method: str, sequential: bool, kind: str, seed: int
) -> None:
    torch.manual_seed(seed)
    model, inputs, consumer = CONSUMERS[kind]()
    model.eval()
    whole = sorted(
        {consumer, *(name for name, module in model.named_modules() if isinstance(module, nn.Linear))} - {"0"}
    )
    statistics = calibrate(model, [inputs], unit_groups(model, inputs[:2], whole), gram=True)
    target = capture_call(model, consumer, inputs).output.detach()
    errors = []
    for how in (Compensation("none"), Compensation(method, sequential)):
        pruned = copy.deepcopy(model)
        pruner = pruner_of(pruned, inputs, tp.importance.RandomImportance(), 0.5, whole)
        torch.manual_seed(seed)
        compensated_step(pruner, statistics, how, [inputs])
        assert pruned[0].weight.shape[0] == 4
        errors.append(float((capture_call(pruned, consumer, inputs).output - target).detach().double().square().sum()))
    assert errors[1] <= errors[0] * (1 + 1e-5)
    if method in ("least_squares", "refit") and kind in ("linear", "1x1"):
        assert errors[1] < 0.9 * errors[0]


def test_batch_norms_take_up_the_shift_of_layers_without_bias() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 1, bias=False),
        nn.BatchNorm2d(4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ).eval()
    inputs = torch.randn(32, 1, 8, 8)
    with torch.no_grad():
        model[0].weight[5] = 0  # after the norm, its unit is a constant
        model[1].bias[5] = 0.7
        before = model(inputs)
    statistics = calibrate(model, [inputs], unit_groups(model, inputs[:2], [model[3]]), gram=True)
    pruner = pruner_of(model, inputs, DistinctivenessImportance(statistics, mode="span"), 1 / 6, ["3"])
    compensated_step(pruner, statistics, Compensation("least_squares", recalibrate_batch_norms=False))
    assert model[0].out_channels == 5
    with torch.no_grad():
        torch.testing.assert_close(model(inputs), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["none", "mean", "least_squares", "refit"])
def test_iterative_steps_with_an_importance_of_the_host(method: str) -> None:
    inputs = torch.randn(64, 5)
    model = models()["mlp"][0]()
    statistics = calibrate(model, [inputs], unit_groups(model, inputs[:2], [model[4]]), gram=True)
    pruner = pruner_of(model, inputs, tp.importance.MagnitudeImportance(p=2), 0.5, ["4"], iterative_steps=3)
    for _ in range(3):
        returned = compensated_step(pruner, statistics, method, [inputs])
    assert (model[0].out_features, model[2].out_features) == (4, 3)
    assert [group.size for group in returned.groups] == [4, 3]
    assert model(inputs).shape == (64, 3)


def test_iterative_steps_with_our_importance_follow_the_compensation() -> None:
    inputs = torch.randn(64, 5)
    model = models()["mlp"][0]()
    statistics = calibrate(model, [inputs], unit_groups(model, inputs[:2], [model[4]]), gram=True)
    importance = DistinctivenessImportance(statistics, mode="span")
    pruner = pruner_of(model, inputs, importance, 0.5, ["4"], iterative_steps=2)
    for _ in range(2):
        compensated_step(pruner, statistics, "least_squares")
    assert (model[0].out_features, model[2].out_features) == (4, 3)


def test_statistics_of_other_weights_are_refused_and_nothing_is_removed() -> None:
    inputs = torch.randn(64, 5)
    model = models()["mlp"][0]()
    statistics = calibrate(model, [inputs], unit_groups(model, inputs[:2], [model[4]]), gram=True)
    with torch.no_grad():
        model[0].weight.mul_(2)
    pruner = pruner_of(model, inputs, tp.importance.MagnitudeImportance(p=2), 0.5, ["4"])
    with pytest.raises(StaleStatisticsError, match="'0.weight' has other values"):
        compensated_step(pruner, statistics, "least_squares")
    assert model[0].out_features == 8


@pytest.mark.parametrize(
    ("compensation", "loader", "message"),
    [
        ("magic", None, "method is 'magic'"),
        ("refit", None, "needs a loader"),
        (Compensation("none", sequential=True), None, "requires refit or least_squares"),
        (Compensation("least_squares", sequential=True), None, "needs a loader"),
        ("refit", iter([]), "is an iterator"),
        (Compensation("mean", ridge=0.0), None, "ridge is 0.0"),
    ],
)
def test_wrong_options(compensation: Any, loader: Any, message: str) -> None:
    inputs = torch.randn(8, 5)
    model = models()["mlp"][0]()
    statistics = calibrate(model, [inputs], unit_groups(model, inputs[:2], [model[4]]), gram=True)
    pruner = pruner_of(model, inputs, tp.importance.MagnitudeImportance(p=2), 0.5, ["4"])
    with pytest.raises(PruningError, match=message):
        compensated_step(pruner, statistics, compensation, loader)
    assert model[0].out_features == 8


def test_batch_norms_that_are_not_recalibrated_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    inputs = torch.randn(16, 4)
    statistics = calibrate(model, [inputs], unit_groups(model, inputs[:2], [model[3]]), gram=True)
    pruner = pruner_of(model, inputs, tp.importance.MagnitudeImportance(p=2), 0.5, ["3"])
    with pytest.warns(CompensationWarning, match="batch norms keep the dense model's statistics"):
        compensated_step(pruner, statistics, "least_squares")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model(inputs).shape == (16, 2)


class Twice(nn.Module):
    """A consumer that runs twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.consumer, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.consumer(self.consumer(self.first(x).relu()).relu()))


@pytest.mark.parametrize(
    ("options", "make", "reason"),
    [
        ({"max_unfolded": 5}, lambda: models()["mlp"][0](), "unfolds to [0-9]+ rows, more than max_unfolded=5"),
        ({}, Twice, "runs 2 times in a forward"),
    ],
)
def test_what_refit_leaves_out_is_named_and_keeps_least_squares(
    options: dict[str, int], make: Callable[[], nn.Module], reason: str
) -> None:
    torch.manual_seed(0)
    model, inputs = make().eval(), torch.randn(64, 5)
    head = "head" if isinstance(model, Twice) else "4"
    statistics = calibrate(model, [inputs], unit_groups(model, inputs[:2], [head]), gram=True)
    results = []
    for method in ("refit", "least_squares"):
        pruned = copy.deepcopy(model)
        pruner = pruner_of(pruned, inputs, tp.importance.MagnitudeImportance(p=2), 0.25, [head])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            compensated_step(pruner, statistics, Compensation(method, **options), [inputs])
        results.append(pruned)
        assert any(re.search(reason, str(entry.message)) for entry in caught) == (method == "refit")
    consumer = "consumer" if isinstance(model, Twice) else "2"
    assert torch.equal(results[0].get_submodule(consumer).weight, results[1].get_submodule(consumer).weight)
