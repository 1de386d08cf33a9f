"""Refit through whole steps, against NumPy: several groups, norms, in-place activations, shared layers, failures."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytestmark = pytest.mark.host("torch_pruning")
tp = pytest.importorskip("torch_pruning")

from nns_plugin import Statistics, calibrate  # noqa: E402
from nns_plugin.adapters.torch_pruning import DistinctivenessImportance, compensated_step  # noqa: E402
from nns_plugin.adapters.torch_pruning.graph import build_graph  # noqa: E402
from nns_plugin.adapters.torch_pruning.groups import unit_groups  # noqa: E402
from nns_plugin.adapters.torch_pruning.removals import PrunableGraph  # noqa: E402
from nns_plugin.compensation.compensated import CompensationWarning  # noqa: E402
from nns_plugin.compensation.options import Compensation  # noqa: E402
from nns_plugin.compensation.plans import apply_plan, plan_removal  # noqa: E402
from nns_plugin.errors import CalibrationError, StaleStatisticsError  # noqa: E402
from nns_plugin.synapses.mean_weight import prune_under_mean  # noqa: E402


def step_of(
    model: nn.Module, inputs: Tensor, ratio: float, whole: list[str], importance: Any = None, **options: Any
) -> Any:
    """A pruner of a model whose training mode is what it was; the host leaves it in evaluation."""
    training = model.training
    pruner = tp.pruner.BasePruner(
        model,
        inputs[:2],
        importance=importance or tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=[model.get_submodule(name) for name in whole],
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
        channel_groups={},
        **options,
    )
    model.train(training)
    return pruner


def observed(model: nn.Module, inputs: Tensor, whole: list[str]) -> Statistics:
    return calibrate(model, [inputs], unit_groups(model, inputs[:2], whole), gram=True)


def fitted(inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The best affine prediction ``[N, O]`` of targets from inputs ``[N, C]``."""
    design = np.concatenate([inputs, np.ones((len(inputs), 1))], 1)
    return design @ np.linalg.lstsq(design, targets, rcond=None)[0]


@pytest.mark.parametrize("bias", [True, False])
def test_consumer_after_consumer_repeats_the_dense_outputs_that_are_kept(bias: bool) -> None:
    """Three lossy groups, in training mode with dropout: NumPy solves the consumers from what comes to them."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 12, bias),
        nn.BatchNorm1d(12),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(12, 10, bias),
        nn.BatchNorm1d(10),
        nn.ReLU(),
        nn.Linear(10, 8),
        nn.ReLU(),
        nn.Linear(8, 4),
    )
    inputs = torch.randn(300, 6)
    for _ in range(20):
        model(torch.randn(64, 6) * 2 + 1)
    statistics = observed(model, inputs, ["9"])
    dense = copy.deepcopy(model).eval()
    compensated_step(
        step_of(model, inputs, 0.5, ["9"]), statistics, Compensation(ridge=1e-9), [inputs[:100], inputs[100:]]
    )
    assert all(module.training for module in model.modules())
    pruned = copy.deepcopy(model).eval()
    with torch.no_grad():
        kept = [
            next(row for row in range(10) if torch.equal(dense[5].running_var[row], value))
            for value in pruned[5].running_var
        ]
        assert len(set(kept)) == 5
        hidden, wanted = pruned[:4](inputs).numpy(), dense[:6](inputs)[:, kept].numpy()
        np.testing.assert_allclose(pruned[:6](inputs).numpy(), fitted(hidden, wanted), atol=1e-3)
        hidden, wanted = pruned[:9](inputs).numpy(), dense(inputs).numpy()
        np.testing.assert_allclose(pruned(inputs).numpy(), fitted(hidden, wanted), atol=1e-3)


class InPlace(nn.Module):
    """Activations that overwrite what the layers give, with and without a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.third, self.head = nn.Conv2d(6, 5, 1), nn.Linear(5, 3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first(x))
        y = self.second(x)
        y += x
        return self.head(self.relu(self.third(self.relu(y))).mean((2, 3)))


@pytest.mark.parametrize("method", ["refit", "least_squares"])
@pytest.mark.parametrize("batches", [1, 3])
def test_activations_in_place_change_nothing(method: str, batches: int) -> None:
    torch.manual_seed(0)
    model, inputs = InPlace().eval(), torch.randn(24, 1, 6, 6)
    with torch.no_grad():
        for layer in (model.first, model.second):
            layer.weight[-1], layer.bias[-1] = layer.weight[0], layer.bias[0]
        model.second.weight[:, -1] = model.second.weight[:, 0]
        before = model(inputs)
    statistics = observed(model, inputs, ["head", "third"])
    importance = DistinctivenessImportance(statistics, mode="span")
    pruner = step_of(model, inputs, 1 / 6, ["head", "third"], importance)
    compensated_step(pruner, statistics, Compensation(method, ridge=1e-9), list(inputs.chunk(batches)))
    assert model.first.out_channels == 5
    with torch.no_grad():
        torch.testing.assert_close(model(inputs), before, atol=1e-5, rtol=1e-5)


class Shared(nn.Module):
    """Two layers behind one norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 1)
        self.left, self.right = nn.Conv2d(6, 4, 1, bias=False), nn.Conv2d(6, 4, 1, bias=False)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return (self.norm(self.left(x)).relu() * self.norm(self.right(x)).sigmoid()).mean((2, 3))


class Between(nn.Module):
    """A function between a layer and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.consumer = nn.Conv2d(1, 6, 1), nn.Conv2d(6, 4, 1, bias=False)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).expand(4, 1, 3, 3)
        return self.norm(nn.functional.conv2d(self.consumer(self.stem(x).relu()), kernel, groups=4)).mean((2, 3))


def test_only_a_norm_of_its_own_takes_up_a_layers_shift() -> None:
    x = torch.randn(2, 1, 6, 6)
    shared, between = Shared(), Between()
    assert PrunableGraph(build_graph(shared, x)).following_norm("left") is None
    assert PrunableGraph(build_graph(between, x)).following_norm("consumer") is None
    alone = nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3))
    assert PrunableGraph(build_graph(alone, torch.randn(2, 2, 8))).following_norm("0") == "1"


class Bad(torch.utils.data.Dataset[Tensor]):
    """Batches whose last one cannot be run."""

    def __iter__(self) -> Iterator[Tensor]:
        yield torch.randn(8, 5)
        yield torch.randn(8, 4)


@pytest.mark.parametrize(
    "how",
    [Compensation("refit"), Compensation("least_squares", sequential=True), Compensation("none")],
    ids=lambda how: how.method,
)
@pytest.mark.parametrize("loader", [[], Bad()], ids=["empty", "bad"])
def test_a_failure_leaves_model_and_pruner_as_they_were(how: Compensation, loader: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    inputs = torch.randn(64, 5)
    statistics = observed(model, inputs, ["5"])
    before = copy.deepcopy(model)
    pruner = step_of(model, inputs, 0.5, ["5"])
    with pytest.raises((CalibrationError, RuntimeError)):
        compensated_step(pruner, statistics, how, loader)
    assert str(model) == str(before)
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    compensated_step(pruner, statistics, how, [inputs])  # and again, with good data
    assert (model[0].out_features, model[3].out_features) == (4, 3)
    assert model(inputs).shape == (64, 3)


def test_weights_that_were_trained_between_steps_are_stale() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    inputs = torch.randn(64, 5)
    statistics = observed(model, inputs, ["2"])
    pruner = step_of(model, inputs, 0.5, ["2"], iterative_steps=2)
    compensated_step(pruner, statistics, "least_squares")
    with torch.no_grad():
        model[2].weight.mul_(2)
    with pytest.raises(StaleStatisticsError, match="'2.weight' has other values"):
        compensated_step(pruner, statistics, "least_squares")


def test_statistics_of_other_widths_are_stale() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    inputs = torch.randn(64, 5)
    narrowed = observed(model, inputs, ["2"]).narrow({"0": torch.arange(4)})
    pruner = step_of(model, inputs, 0.5, ["2"])
    with pytest.raises(StaleStatisticsError, match="'2' cover 4 positions, but it reads 8 now"):
        compensated_step(pruner, narrowed, "least_squares")
    assert model[0].out_features == 8
    compensated_step(pruner, observed(model, inputs, ["2"]), "least_squares")
    assert model[0].out_features == 4


def test_consumers_that_were_not_observed_are_named() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    inputs = torch.randn(64, 5)
    groups = unit_groups(model, inputs[:2], ["4"])
    statistics = calibrate(model, [inputs], groups[:1], gram=True)
    pruner = step_of(model, inputs, 0.5, ["4"])
    with pytest.warns(CompensationWarning, match="do not cover the inputs of: 4"):
        compensated_step(pruner, statistics, "least_squares")


def test_masked_layers_elsewhere_and_frozen_ones_stay_what_they_are() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    inputs = torch.randn(64, 5)
    prune_under_mean(model, ["4"])
    model(inputs)
    statistics = observed(model, inputs, ["2", "4"])
    pruner = step_of(model, inputs, 0.5, ["2", "4"])
    model[0].requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compensated_step(pruner, statistics, loader=[inputs])
    assert model[0].out_features == 4
    assert not model[0].weight.requires_grad
    assert model[2].weight.requires_grad


class Doubled(nn.Module):
    """What the sum adds depends on what it is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.consumer = nn.Linear(4, 8), nn.Linear(8, 5)
        self.more = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.consumer(self.stem(x).relu())
        return y + self.more(y).relu()


def test_a_sum_whose_other_part_depends_on_the_layer_is_not_repeated() -> None:
    torch.manual_seed(0)
    model, inputs = Doubled().eval(), torch.randn(100, 4)
    statistics = observed(model, inputs, ["consumer", "more"])
    with torch.no_grad():
        wanted = model.consumer(model.stem(inputs).relu()).numpy()
    compensated_step(step_of(model, inputs, 0.5, ["consumer", "more"]), statistics, Compensation(ridge=1e-9), [inputs])
    with torch.no_grad():
        hidden = model.stem(inputs).relu()
        np.testing.assert_allclose(model.consumer(hidden).numpy(), fitted(hidden.numpy(), wanted), atol=1e-4)


class Joined(nn.Module):
    """A consumer of two groups side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.consumer = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.consumer(torch.cat([self.left(x).relu(), self.right(x).relu()], 1))


def test_in_sequence_a_consumer_of_two_groups_ends_with_the_best_weights() -> None:
    torch.manual_seed(0)
    model, inputs = Joined().eval(), torch.randn(200, 4)
    statistics = observed(model, inputs, ["consumer"])
    with torch.no_grad():
        wanted = model(inputs).numpy()
    pruner = step_of(model, inputs, 0.5, ["consumer"])
    compensated_step(pruner, statistics, Compensation("least_squares", sequential=True), [inputs])
    with torch.no_grad():
        hidden = torch.cat([model.left(inputs).relu(), model.right(inputs).relu()], 1).numpy()
        np.testing.assert_allclose(model(inputs).numpy(), fitted(hidden, wanted), atol=1e-4)


def test_the_constant_of_a_transposed_convolution_is_what_an_output_sums_of_it() -> None:
    """Kernel and stride of 2: each output meets one of the kernel's four positions, so the means stay right."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.ConvTranspose2d(4, 3, 2, stride=2)).eval()
    inputs = torch.randn(20, 1, 5, 5)
    with torch.no_grad():
        model[0].weight[-1], model[0].bias[-1] = 0.0, 2.0
        before = model(inputs)
    record = observed(model, inputs, ["2"]).records["in", "2"]
    plan = plan_removal(model[2], record, torch.tensor([3]), "mean", constant=True)
    assert plan is not None
    apply_plan(model[2], record.layout, plan, None)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs).mean((0, 2, 3)), before.mean((0, 2, 3)), atol=1e-5, rtol=1e-5)
