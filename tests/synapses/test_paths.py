"""Paths from inputs to outputs: against the number of paths, counted by products of the masks."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

pytestmark = pytest.mark.host("torch_pruning")
pytest.importorskip("torch_pruning")

from nns_plugin.errors import PruningError  # noqa: E402
from nns_plugin.synapses.paths import synapse_paths  # noqa: E402


def paths_in(masks: list[np.ndarray]) -> np.ndarray:
    """Number of paths to each output."""
    product = masks[0]
    for mask in masks[1:]:
        product = mask @ product
    return product.sum(1)


@given(seed=st.integers(0, 1000), share=st.floats(0.2, 0.9))
def test_a_synapse_is_on_a_path_if_there_are_fewer_without_it(seed: int, share: float) -> None:
    torch.manual_seed(seed)
    widths = [4, 3, 4, 2]
    model = nn.Sequential()
    for left, right in itertools.pairwise(widths):
        model.extend([nn.Linear(left, right), nn.ReLU()])
    model = model[:-1]
    linear = [module for module in model if isinstance(module, nn.Linear)]
    for module in linear:
        prune.custom_from_mask(module, "weight", torch.rand(module.weight.shape) > share)
    masks = [module.weight_mask.numpy() for module in linear]
    every = paths_in(masks)
    found = synapse_paths(model, torch.zeros(1, 4))
    for place, name in enumerate(("0", "2", "4")):
        expected = np.zeros((2, *masks[place].shape), bool)
        for synapse in zip(*np.nonzero(masks[place]), strict=True):
            without = [mask.copy() for mask in masks]
            without[place][synapse] = 0
            expected[:, synapse[0], synapse[1]] = paths_in(without) < every
        assert np.array_equal(found[name].numpy() if name in found else np.zeros_like(expected), expected)


def test_a_residual_stream(zoo: Any) -> None:
    made = zoo.CASES["residual"]
    torch.manual_seed(0)
    model = made.make()
    inputs = made.inputs(2)
    found = synapse_paths(model, inputs)
    layers = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    assert list(found) == layers
    assert all(bool(paths.all()) for name, paths in found.items() if name != layers[-1])
    assert torch.equal(found[layers[-1]], torch.eye(3, dtype=torch.bool)[:, :, None].expand(3, 3, 9))
    with torch.no_grad():
        model.get_submodule(layers[-1]).weight[0] = 0
    extraction = synapse_paths(model, inputs)
    assert all(not bool(paths[0].any()) and bool(paths[1:].any()) for paths in extraction.values())


def test_paths_follow_the_axes_of_convolutions() -> None:
    """Input 0 leads to output 1 through units 1 and 0, and nothing else leads anywhere."""
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.ConvTranspose2d(2, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1))
    with torch.no_grad():
        for place, there in ((0, (1, 0)), (2, (1, 0)), (4, (1, 0))):  # [out, in], [in, out], [out, in]
            model[place].weight.zero_()[there] = 1
    found = synapse_paths(model, torch.zeros(1, 2, 3, 3))
    walked = {name: paths.nonzero().tolist() for name, paths in found.items()}
    assert walked == {"0": [[1, 1, 0]], "2": [[1, 0, 1]], "4": [[1, 1, 0]]}  # output, out-position, in-position


class Sequence(nn.Module):
    """A layer without unit groups between two other layers."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first, self.middle, self.head = nn.Linear(4, 4), middle, nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        out = self.middle(x, x, x) if isinstance(self.middle, nn.MultiheadAttention) else self.middle(x)
        return self.head(out[0].mean(1))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["attention", "recurrent"])
def test_positions_outside_all_groups_are_not_taken_for_inputs(kind: str) -> None:
    middle = nn.MultiheadAttention(4, 2, batch_first=True) if kind == "attention" else nn.LSTM(4, 4, batch_first=True)
    with pytest.raises(PruningError, match="'head' reads outputs of other layers that belong to no unit group"):
        synapse_paths(Sequence(middle), torch.zeros(2, 3, 4))


def test_inputs_may_be_scaled_or_concatenated_with_units() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.f, self.head = nn.BatchNorm1d(3), nn.Linear(3, 4), nn.Linear(7, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(x)
            return self.head(torch.cat([torch.relu(self.f(x)), x], 1))

    model = Beside()
    with torch.no_grad():
        model.f.weight[1:] = 0
        model.head.weight[0, 4:] = 0
    found = synapse_paths(model, torch.zeros(2, 3))
    assert found["head"][0, 0].tolist() == [True] + [False] * 6
    assert found["head"][1, 1].tolist() == [True] + [False] * 3 + [True] * 3
    assert all(parameter.grad is None for parameter in model.parameters())


def test_models_whose_paths_cannot_be_followed() -> None:
    grouped = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2), nn.Flatten(), nn.Linear(16, 2))
    with pytest.raises(PruningError, match="'0' reads its channels in 2 groups"):
        synapse_paths(grouped, torch.zeros(1, 4, 2, 2))
