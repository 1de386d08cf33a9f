"""Norms over units: their weights and their width follow removal, by whatever way the units go."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytestmark = pytest.mark.host("torch_pruning")
tp = pytest.importorskip("torch_pruning")

import zoo  # noqa: E402

from nns_plugin import Statistics, calibrate  # noqa: E402
from nns_plugin.adapters.torch_pruning import (  # noqa: E402
    DistinctivenessImportance,
    compensated_step,
    norm_pruners,
    prune_by_angle,
    unit_groups,
)
from nns_plugin.adapters.torch_pruning.backend import TorchPruningBackend  # noqa: E402
from nns_plugin.adapters.torch_pruning.norms import MisprunedNormWarning  # noqa: E402
from nns_plugin.compensation.options import Compensation  # noqa: E402
from nns_plugin.errors import PruningError  # noqa: E402
from nns_plugin.jobs.extraction import extract_subnet  # noqa: E402
from nns_plugin.selection import AngleRule  # noqa: E402

WIDTH = 40
NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.LayerNorm(WIDTH),
    "layer without bias": lambda: nn.LayerNorm(WIDTH, bias=False),
    "rms": lambda: nn.RMSNorm(WIDTH),
    "rms without weight": lambda: nn.RMSNorm(WIDTH, elementwise_affine=False),
}


def made(norm: str) -> tuple[nn.Sequential, Tensor]:
    """A model whose norm has a weight of its own for each unit."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, WIDTH), NORMS[norm](), nn.ReLU(), nn.Linear(WIDTH, 3)).eval()
    for parameter in model[1].parameters():
        nn.init.uniform_(parameter, 0.5, 2)
    return model, torch.randn(64, 4)


def observed(model: nn.Module, inputs: Tensor) -> Statistics:
    return calibrate(model, [inputs], unit_groups(model, inputs[:2], ["3"]), gram=True)


def check(model: nn.Module, dense: nn.Module, width: int) -> None:
    """Every unit has the weights it had, in the first layer and in the norm; and the model runs."""
    assert model[0].out_features == width
    kept = [int((row == dense[0].weight).all(1).nonzero()) for row in model[0].weight]
    assert model[1].normalized_shape == (width,)
    for name, parameter in model[1].named_parameters():
        assert torch.equal(parameter, dense[1].get_parameter(name)[kept])
        assert parameter.requires_grad
    assert model(torch.randn(2, 4)).shape == (2, 3)


def pruner_of(model: nn.Module, inputs: Tensor, importance: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unwrapped parameters detected")
        return tp.pruner.BasePruner(
            model,
            inputs[:2],
            importance=importance,
            pruning_ratio=0.75,
            ignored_layers=[model[3]],
            **zoo.fresh_arguments(),
            **options,
        )


@pytest.mark.parametrize("norm", NORMS)
def test_removal_by_a_backend(norm: str) -> None:
    model, inputs = made(norm)
    dense = copy.deepcopy(model)
    traced = TorchPruningBackend(model, inputs[:2])
    traced.keep(traced.groups(["3"]), {"0": torch.tensor([3, 8, 33, 39])})
    check(model, dense, 4)


@pytest.mark.parametrize("method", ["none", "refit"])
@pytest.mark.parametrize("norm", ["layer", "layer without bias", "rms"])
def test_compensated_step(norm: str, method: Any) -> None:
    model, inputs = made(norm)
    dense, statistics = copy.deepcopy(model), observed(model, inputs)
    pruner = pruner_of(model, inputs, DistinctivenessImportance(statistics, mode="span"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compensated_step(pruner, statistics, method, [inputs])
    check(model, dense, 10)


def test_compensated_step_with_a_norm_that_the_pruner_does_not_see() -> None:
    model, inputs = made("rms without weight")
    statistics = observed(model, inputs)
    pruner = pruner_of(model, inputs, DistinctivenessImportance(statistics, mode="span"))
    with pytest.raises(PruningError, match=r"RMSNorm '1', which has no weight.*customized_pruners=norm_pruners\(\)"):
        compensated_step(pruner, statistics, "refit", [inputs])
    assert (model[0].out_features, pruner.current_step) == (WIDTH, 0)
    dense = copy.deepcopy(model)
    importance = DistinctivenessImportance(statistics, mode="span")
    pruner = pruner_of(model, inputs, importance, customized_pruners=norm_pruners())
    compensated_step(pruner, statistics, "refit", [inputs])
    check(model, dense, 10)


@pytest.mark.parametrize("norm", NORMS)
def test_torch_prunings_own_step_with_our_pruners_of_norms(norm: str) -> None:
    model, inputs = made(norm)
    dense, statistics = copy.deepcopy(model), observed(model, inputs)
    importance = DistinctivenessImportance(statistics, mode="span")
    pruner = pruner_of(model, inputs, importance, customized_pruners=norm_pruners())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner.step()
    check(model, dense, 10)


@pytest.mark.parametrize(
    ("norm", "fault"),
    [
        ("layer", "may reorder its weights"),
        ("rms", "leaves its normalized_shape as it is"),
        ("rms without weight", "leaves its normalized_shape as it is"),
    ],
)
def test_without_them_the_fault_is_named(norm: str, fault: str) -> None:
    model, inputs = made(norm)
    pruner = pruner_of(model, inputs, DistinctivenessImportance(observed(model, inputs), mode="span"))
    with pytest.warns(MisprunedNormWarning, match=rf"norm '1': .*{fault}.*; pass customized_pruners=norm_pruners\(\)"):
        pruner.step()


@pytest.mark.parametrize("norm", NORMS)
def test_extracted_subnets_run(norm: str) -> None:
    model, inputs = made(norm)
    loader = [(inputs, torch.arange(64) % 3)]
    subnet = extract_subnet(model, inputs[:2], loader, labels=[0, 2], ratio=0.8, compensation="refit")
    assert subnet.materialise(lambda: copy.deepcopy(model), inputs[:2])(inputs).shape == (64, 3)


@pytest.mark.parametrize("norm", NORMS)
def test_prune_by_angle(norm: str) -> None:
    model, inputs = made(norm)
    dense = copy.deepcopy(model)
    found = prune_by_angle(model, inputs[:2], observed(model, inputs), AngleRule(similar=60, complementary=180))
    check(model, dense, WIDTH - found.removed)
    assert found.removed > WIDTH // 4


@pytest.mark.parametrize("norm", NORMS)
def test_compensation_through_a_backend(norm: str) -> None:
    model, inputs = made(norm)
    dense, statistics = copy.deepcopy(model), observed(model, inputs)
    traced = TorchPruningBackend(model, inputs[:2])
    kept = {"0": torch.arange(0, WIDTH, 4)}
    traced.keep_and_compensate(traced.groups(["3"]), kept, statistics, Compensation("refit"), [inputs])
    check(model, dense, 10)
