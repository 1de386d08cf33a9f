"""Groups that cannot be scored are left alone, and named."""

from __future__ import annotations

import warnings
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nns_plugin import calibrate
from nns_plugin.criteria import UnscoredGroupWarning

pytestmark = pytest.mark.host("torch_pruning")
tp = pytest.importorskip("torch_pruning")

import zoo  # noqa: E402
from scored import kept_units, lowest, setting  # noqa: E402

from nns_plugin.adapters.torch_pruning import (  # noqa: E402
    SemanticImportance,
)
from nns_plugin.adapters.torch_pruning.groups import UnusableGroupWarning, unit_groups  # noqa: E402

fresh = zoo.fresh_arguments


def test_the_models_output_is_left_alone_by_name() -> None:
    """A user who forgets to ignore the head."""
    model, inputs, loader, _ = setting("mlp")
    importance = SemanticImportance(calibrate(model, loader, unit_groups(model, inputs)), [0])
    with pytest.warns(
        UnusableGroupWarning, match="left alone: group 'head' writes the model's output; list it in ignored_layers"
    ):
        tp.pruner.BasePruner(model, inputs, importance=importance, pruning_ratio=0.5, **fresh()).step()
    assert model.head.out_features == 3
    assert model.fc1.out_features == 4


@pytest.mark.parametrize("name", ["glu", "shuffle"])
def test_malformed_groups_are_left_alone_by_name(name: str) -> None:
    model, inputs, loader, _ = setting(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnusableGroupWarning)
        importance = SemanticImportance.from_loader(model, inputs, loader, [0])
    pruner = tp.pruner.BasePruner(
        model, inputs, importance=importance, pruning_ratio=0.5, ignored_layers=[model.head], **fresh()
    )
    with pytest.warns(UnusableGroupWarning, match="left alone: group of 'first': .* out of range"):
        pruner.step()
    assert model(inputs).shape == (2, 3)
    assert model.first.weight.shape[0] == 8


class JoinsInput(nn.Module):
    """torch-pruning thinks that ``second`` reads the units of ``first`` at 0..3."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(2, 4, 1), nn.Conv2d(6, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, torch.relu(self.first(x))], 1)
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


@pytest.mark.parametrize("loader_is_there", [False, True])
def test_groups_that_are_read_elsewhere_are_left_alone_by_name(loader_is_there: bool) -> None:
    """In every step, although only the tracing of unit_groups can tell."""
    model, inputs = JoinsInput(), torch.randn(2, 2, 3, 3)
    loader = [(torch.randn(6, 2, 3, 3), torch.arange(6) % 3)]

    def build() -> SemanticImportance:
        if loader_is_there:
            return SemanticImportance.from_loader(model, inputs, loader, [0])
        return SemanticImportance(calibrate(model, loader, unit_groups(model, inputs)), [0])

    with pytest.warns(UnusableGroupWarning, match="left out: group of 'first': 'second' does not read its units"):
        importance = build()
    pruner = tp.pruner.BasePruner(
        model,
        inputs,
        importance=importance,
        pruning_ratio=0.5,
        iterative_steps=2,
        ignored_layers=[model.head],
        **fresh(),
    )
    for left in (3, 2):
        with pytest.warns(
            UnscoredGroupWarning, match="cannot score group 'first': missing inputs; none of its 4 units"
        ):
            pruner.step()
        assert (model.first.out_channels, model.second.out_channels) == (4, left)


def test_a_layer_that_was_ignored_in_calibration_is_left_alone_by_name() -> None:
    model, inputs, loader, _ = setting("mlp")
    statistics = calibrate(model, loader, unit_groups(model, inputs, ["fc1"]))
    pruner = tp.pruner.BasePruner(
        model,
        inputs,
        importance=SemanticImportance(statistics, [0]),
        pruning_ratio=0.5,
        ignored_layers=[model.head],
        **fresh(),
    )
    with pytest.warns(UnscoredGroupWarning, match="score group 'fc1'"):
        pruner.step()
    assert (model.fc1.out_features, model.fc2.out_features) == (8, 2)


def test_attention_with_heads() -> None:
    """num_heads tells the host what nn.MultiheadAttention couples; our units say the same."""
    model, inputs, loader, groups = setting("multi_head")
    dense = deepcopy(model)
    statistics = calibrate(model, loader, unit_groups(model, inputs))
    pruner = tp.pruner.BasePruner(
        model, inputs, importance=SemanticImportance(statistics, [0]), pruning_ratio=0.5, ignored_layers=[model.head],
        **{**fresh(), "out_channel_groups": {model.attention: 2, model.embed: 2}},
    )  # fmt: skip
    pruner.step()
    assert model.attention.embed_dim == 4
    assert model(inputs).shape == (2, 3)
    left = kept_units(dense, model, groups[0])
    assert len(left) == 2
    record = statistics.records["out", "attention"]
    scores = [
        max(
            float(statistics.records["out", name].magnitude[0, [unit, unit + 4]].sum()) / max(
                float(statistics.records["out", name].magnitude[0, [other, other + 4]].sum()) for other in range(4)
            )
            for name in ("embed", "attention")
        )
        for unit in range(4)
    ]  # fmt: skip
    assert record.total.shape == (3, 8)
    assert left == lowest(np.array(scores), 2)
