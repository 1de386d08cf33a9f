"""Masks that become small models, against the model inside NNI's own wrappers."""

from __future__ import annotations

import copy
import logging
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytestmark = [pytest.mark.host("nni"), pytest.mark.host("torch_pruning")]
nni = pytest.importorskip("nni")
tp = pytest.importorskip("torch_pruning")

import nni.compression.pruning as host  # noqa: E402
from nni_models import made, masked, run  # noqa: E402

from nns_plugin import calibrate  # noqa: E402
from nns_plugin.adapters.nni import MeanWeightPruner, speedup  # noqa: E402
from nns_plugin.adapters.torch_pruning.backend import TorchPruningBackend  # noqa: E402
from nns_plugin.adapters.torch_pruning.groups import unit_groups  # noqa: E402
from nns_plugin.compensation.options import Compensation  # noqa: E402
from nns_plugin.errors import PruningError, StaleStatisticsError  # noqa: E402

TOPOLOGIES = ["mlp", "conv_norm", "grouped", "depthwise", "residual", "concat", "twice", "transposed"]
BACKENDS = ["nni", "torch-pruning"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", TOPOLOGIES)
def test_small_models_equal_masked_ones(zoo: Any, case: str, backend: Any) -> None:
    model, inputs = made(zoo, case)
    masks, expected = masked(model, inputs)
    before = copy.deepcopy(model.state_dict())
    drawn = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    found = speedup(model, inputs, masks, backend=backend)
    assert torch.equal(torch.get_rng_state(), drawn[0])
    assert random.getstate() == drawn[1]
    assert np.random.get_state()[1].tolist() == drawn[2]
    assert found.backend == backend
    assert found.reason is None
    assert torch.allclose(run(found.model, inputs), expected, atol=1e-5 * float(expected.abs().max()))
    assert float(expected.abs().max()) > 1e-2
    assert found.error <= 1e-5
    assert found.units.extended == found.units.contradicted == found.units.exempt == ()
    # About a quarter of the weights between pruned layers is left.
    assert sum(v.numel() for v in found.model.parameters()) < 0.6 * sum(v.numel() for v in model.parameters())
    for group in unit_groups(model, inputs):
        kept = found.units.kept[group.name]
        assert kept.numel() == group.size - group.size // 2
        for port in group.producers:
            module = found.model.get_submodule(port.name)
            out = module.out_features if isinstance(module, nn.Linear) else module.out_channels
            assert out == int(torch.isin(port.unit, kept).sum())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_training_modes_come_back_and_nothing_is_printed(zoo: Any, capfd: pytest.CaptureFixture[str]) -> None:
    model, inputs = made(zoo, "conv_norm")
    masks, _ = masked(model, inputs)
    model.train()
    model.bn1.eval()
    levels = {name: logging.getLogger(name).level for name in logging.root.manager.loggerDict if name.startswith("nni")}
    for backend in BACKENDS:
        found = speedup(model, inputs, masks, backend=backend).model  # type: ignore[arg-type]
        modes = {name: module.training for name, module in model.named_modules()}
        assert {name: module.training for name, module in found.named_modules()} == modes
    assert capfd.readouterr() == ("", "")
    assert levels == {name: logging.getLogger(name).level for name in levels}


def test_norms_that_were_not_masked_are_masked_and_reported(zoo: Any) -> None:
    """NNI's masks leave a batch norm's shift where a unit was; without it the small model cannot be the masked one."""
    model, inputs = made(zoo, "conv_norm")
    masks, wrapped = masked(model, inputs, grouped=False)
    assert sorted(masks) == ["conv1", "conv2"]
    for backend in BACKENDS:
        found = speedup(model, inputs, masks, backend=backend)  # type: ignore[arg-type]
        assert found.units.extended == ("bn1", "bn2") or set(found.units.extended) == {"bn1", "bn2"}
        kept = masks["conv1"]["bias"].bool()
        assert found.units.masks["bn1"]["bias"].tolist() == found.units.masks["bn1"]["weight"].tolist() == kept.tolist()
        silent = copy.deepcopy(model)
        with torch.no_grad():
            for name, targets in found.units.masks.items():
                for target, mask in targets.items():
                    getattr(silent.get_submodule(name), target).mul_(mask)
        assert torch.allclose(run(found.model, inputs), run(silent, inputs), atol=1e-4)
        assert not torch.allclose(run(found.model, inputs), wrapped, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_conflicting_masks_are_reported(zoo: Any, backend: Any) -> None:
    """A unit of a residual stream goes if both layers mask it; if one does, its weights are kept as zeros."""
    model, inputs = made(zoo, "residual")
    masks: dict[str, Any] = {
        name: {"weight": torch.ones_like(getattr(model, name).weight)} for name in ("stem", "outer")
    }
    masks["stem"]["weight"][[0, 1, 2]] = 0
    masks["outer"]["weight"][[1, 2, 3]] = 0
    for targets in masks.values():
        targets["bias"] = targets["weight"].flatten(1).any(1).float()
    given = copy.deepcopy(masks)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for name, targets in masks.items():
            for target, mask in targets.items():
                getattr(expected.get_submodule(name), target).mul_(mask)
    found = speedup(model, inputs, masks, backend=backend)
    assert set(found.units.contradicted) == {"stem", "outer"}
    assert found.units.kept["stem"].tolist() == [0, 3, 4, 5]
    assert torch.allclose(run(found.model, inputs), run(expected, inputs), atol=1e-5)
    assert found.model.stem.out_channels == 4
    assert all(torch.equal(masks[n][t], given[n][t]) for n in given for t in given[n]), "masks are left as they were"


def test_where_nni_fails_torch_pruning_does_it(zoo: Any) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.head(torch.relu(x) if x.detach().abs().sum() > 0 else x)

    torch.manual_seed(0)
    model, inputs = Branching(), torch.randn(4, 6)
    masks, expected = masked(model, inputs)
    found = speedup(model, inputs, masks)
    assert found.backend == "torch-pruning"
    assert (found.reason or "").startswith("TraceError")
    assert torch.allclose(run(found.model, inputs), expected, atol=1e-6)
    with pytest.raises(PruningError, match=r"NNI cannot make this model small: TraceError.*use backend='auto'"):
        speedup(model, inputs, masks, backend="nni")
    model, inputs = made(zoo, "shared")  # NNI fails inside, and leaves a model that does not run
    masks, _ = masked(model, inputs, grouped=False)
    found = speedup(model, inputs, masks)
    assert found.backend == "torch-pruning"
    assert found.reason


@pytest.mark.parametrize("compensation", [None, "refit"])
@pytest.mark.parametrize("norm", [nn.LayerNorm(40), nn.RMSNorm(40), nn.RMSNorm(40, elementwise_affine=False)], ids=str)
def test_norms_over_units_become_as_wide_as_their_units(norm: nn.Module, compensation: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 40), copy.deepcopy(norm), nn.ReLU())
    model.add_module("head", nn.Linear(40, 3))
    for parameter in model[1].parameters():
        nn.init.uniform_(parameter, 0.5, 2)
    inputs = torch.randn(8, 4)
    masks, _ = masked(model.eval(), inputs, ratio=0.75)
    options = {} if compensation is None else {"compensation": compensation, "calibration": [inputs]}
    small = speedup(model, inputs, masks, **options).model
    kept = masks["0"]["weight"].any(1)
    assert small[1].normalized_shape == (10,)
    for name, parameter in small[1].named_parameters():
        assert torch.equal(parameter, model[1].get_parameter(name)[kept])
    assert run(small, inputs).shape == (8, 3)


def test_group_norms_are_exempt_and_named(zoo: Any) -> None:
    model, inputs = made(zoo, "group_norm")
    masks, expected = masked(model, inputs)
    found = speedup(model, inputs, masks)
    assert found.units.exempt == ("first",)
    assert found.error > 1e-5
    assert not torch.allclose(run(found.model, inputs), expected, atol=1e-5)
    assert found.model.first.out_channels == 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_single_weights_become_zeros(zoo: Any, backend: Any) -> None:
    model, inputs = made(zoo, "mlp")
    pruner = host.LevelPruner(model, [{"op_names": ["fc2"], "sparse_ratio": 0.5}])
    _, masks = pruner.compress()
    expected = run(model, inputs)
    pruner.unwrap_model()
    masks["fc1"] = {"weight": torch.ones_like(model.fc1.weight), "bias": torch.ones(8)}
    masks["fc1"]["weight"][5:] = masks["fc1"]["bias"][5:] = 0
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for name in ("fc1", "fc2"):
            for target, mask in masks[name].items():
                getattr(zeroed.get_submodule(name), target).mul_(mask)
    found = speedup(model, inputs, masks, backend=backend)
    assert torch.allclose(run(found.model, inputs), run(zeroed, inputs), atol=1e-5)
    assert not torch.allclose(expected, run(zeroed, inputs))
    assert found.model.fc1.out_features == 5
    assert float((found.model.fc2.weight == 0).float().mean()) > 0.3


@pytest.mark.parametrize("case", ["mlp", "conv_norm"])
def test_survivors_take_over(zoo: Any, case: str) -> None:
    """As when torch-pruning removes the same units: compensation sees what goes while it is alive."""
    model, inputs = made(zoo, case, 64)
    masks, _ = masked(model, inputs)
    loader = [inputs]
    groups = unit_groups(model, inputs)
    statistics = calibrate(model, loader, groups, gram=True)
    dense = run(model, inputs)
    errors = {}
    for method in ("none", "mean", "least_squares", "refit"):
        how = Compensation(method=method)  # type: ignore[arg-type]
        found = speedup(model, inputs, masks, compensation=how, calibration=loader)
        expected = copy.deepcopy(model)
        traced = TorchPruningBackend(expected, inputs)
        traced.keep_and_compensate(traced.groups(), found.units.kept, statistics, how, loader)
        assert torch.allclose(run(found.model, inputs), run(expected, inputs), atol=1e-5), method
        assert found.backend == "torch-pruning"
        assert found.reason == "NNI cannot compensate"
        errors[method] = float((run(found.model, inputs) - dense).square().mean())
    if case == "mlp":  # with larger kernels least squares may lose
        assert errors["refit"] <= errors["least_squares"] < errors["none"]
    if case == "mlp":
        by_statistics = speedup(model, inputs, masks, compensation=Compensation("mean"), statistics=statistics)
        assert float((run(by_statistics.model, inputs) - dense).square().mean()) == errors["mean"]


def test_wrong_masks_and_options_are_refused(zoo: Any) -> None:
    model, inputs = made(zoo, "mlp")
    masks, _ = masked(model, inputs)
    whole = {"weight": torch.ones_like(model.fc1.weight)}
    for given, options, message in (
        ({"fc9": whole}, {}, "'fc9', which is not a module"),
        ({"fc1": {"wait": torch.ones(8)}}, {}, "'fc1' has no parameter 'wait'"),
        ({"fc1": {"weight": torch.ones(9, 6)}}, {}, r"is \[9, 6\], and the parameter \[8, 6\]"),
        ({"fc1": {"weight": torch.full((8, 6), 0.5)}}, {}, "other values than 0 and 1"),
        ({"fc1": {"weight": torch.zeros(8, 6)}}, {}, "leave none of the 8 units of group 'fc1'"),
        ({"fc1": {"_output_0": torch.ones(1, 8)}}, {}, "for '_output_0'"),
        ([whole], {}, "masks are a list"),
        ({"fc1": whole["weight"]}, {}, "masks are a dict; expected"),
        (masks, {"backend": "onnx"}, "backend is 'onnx'"),
        (masks, {"backend": "nni", "compensation": "mean", "calibration": [inputs]}, "NNI cannot compensate"),
        (masks, {"calibration": [inputs]}, "are for compensation"),
        (masks, {"compensation": "mean"}, "needs calibration=loader, or statistics"),
        (masks, {"compensation": "some"}, "method is 'some'"),
        (masks, {"compensation": 5}, "compensation is 5"),
        ({"fc1": {"weight": [1, 1]}}, {}, "is a list; expected a tensor"),
    ):
        with pytest.raises(PruningError, match=message):
            speedup(model, inputs, given, **options)  # type: ignore[arg-type]
    pruner = MeanWeightPruner(model, [{"op_names": ["fc1"], "sparse_ratio": 0.5}], example_inputs=inputs)
    with pytest.raises(PruningError, match="1 layers of the model are inside NNI's wrappers"):
        speedup(model, inputs, pruner.get_masks())


class Gated(nn.Module):
    """A parameter that belongs to no layer, on the units' axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2)
        self.gate = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x) + self.gate))))


def test_parameters_of_no_layer_are_named() -> None:
    torch.manual_seed(0)
    model, inputs = Gated(), torch.randn(5, 4)
    masks, _ = masked(model, inputs)
    found = speedup(model, inputs, masks)
    assert found.units.exempt == ("first",)
    assert found.model.gate.shape == (4,)
    only = {name: mask for name, mask in masks.items() if name == "second"}
    assert speedup(model, inputs, only).units.exempt == ()
    pruner = MeanWeightPruner(model, [{"op_names": ["first"], "sparse_ratio": 0.5}], example_inputs=inputs)
    pruner.compress()
    pruner.compress()


def test_what_passes_a_norm_does_not_excuse_the_rest(zoo: Any) -> None:
    class Sigmoidal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.n, self.b, self.head = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.sigmoid(self.b(torch.relu(self.n(self.a(x))))))

    torch.manual_seed(0)
    model, inputs = Sigmoidal(), torch.randn(5, 4)
    masks, _ = masked(model, inputs)
    for given in (masks, {"b": masks["b"]}):
        with pytest.raises(PruningError, match="an activation that is not 0 at 0, such as a sigmoid"):
            speedup(model, inputs, given)
    assert speedup(model, inputs, {"a": masks["a"]}).units.exempt == ("a",)
    assert speedup(model, inputs, masks, tolerance=math.inf).model.b.out_features == 3


def test_one_slope_for_all_units_is_no_unit() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 1), nn.PReLU(), nn.Conv2d(8, 6, 1), nn.PReLU(8 - 2), nn.Flatten())
    model.add_module("head", nn.Linear(6 * 9, 3))
    inputs = torch.randn(4, 1, 3, 3)
    masks, expected = masked(model, inputs)
    for backend in BACKENDS:
        found = speedup(model, inputs, masks, backend=backend)  # type: ignore[arg-type]
        assert torch.allclose(run(found.model, inputs), expected, atol=1e-5)
        assert found.model[1].weight.numel() == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_layers_have_besides_weights_stays(zoo: Any, backend: Any) -> None:
    model, inputs = made(zoo, "conv_norm")
    masks, _ = masked(model, inputs)
    model.conv2.weight.requires_grad_(False)
    model.conv2.mark = 5
    calls: list[int] = []
    model.conv2.register_forward_hook(lambda *args: calls.append(1))
    with torch.no_grad():
        found = speedup(model, inputs, masks, backend=backend).model
    calls.clear()
    run(found, inputs)
    assert calls == [1]
    assert found.conv2.mark == 5
    trainable = {name: value.requires_grad for name, value in model.named_parameters()}
    assert {name: value.requires_grad for name, value in found.named_parameters()} == trainable


def test_nni_may_not_remove_more_than_was_masked(zoo: Any) -> None:
    """It does where nothing reads a unit; the reported kept units would be wrong."""
    model, inputs = made(zoo, "mlp")
    masks: dict[str, Any] = {name: {"weight": torch.ones_like(getattr(model, name).weight)} for name in ("fc1", "fc2")}
    masks["fc1"]["weight"][[0, 1]] = 0
    masks["fc2"]["weight"][:, 5] = 0
    found = speedup(model, inputs, masks)
    assert found.model.fc1.out_features == found.units.kept["fc1"].numel() == 6
    assert found.backend == "torch-pruning"
    assert "other widths than the masks leave, at fc1" in (found.reason or "")


def test_stale_statistics_are_refused(zoo: Any) -> None:
    model, inputs = made(zoo, "mlp")
    masks, _ = masked(model, inputs)
    statistics = calibrate(model, [inputs], unit_groups(model, inputs), gram=True)
    with torch.no_grad():
        model.fc1.weight.mul_(3)
    with pytest.raises(StaleStatisticsError, match="'fc1.weight' has other values"):
        speedup(model, inputs, masks, compensation="mean", statistics=statistics)
