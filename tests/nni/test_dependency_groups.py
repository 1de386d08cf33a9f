"""Dependency groups in config lists: layers that share units get one mask."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytestmark = [pytest.mark.host("nni"), pytest.mark.host("torch_pruning")]
nni = pytest.importorskip("nni")
tp = pytest.importorskip("torch_pruning")

import nni.compression.pruning as host  # noqa: E402
from nni_models import KINDS, lively, made, masked, run  # noqa: E402

from nns_plugin.adapters.nni import MeanWeightPruner, UngroupedLayersWarning, speedup, with_dependency_groups  # noqa: E402
from nns_plugin.adapters.nni.dependency_groups import GroupedLayer  # noqa: E402
from nns_plugin.adapters.torch_pruning.groups import unit_groups  # noqa: E402
from nns_plugin.errors import PruningError  # noqa: E402

TOPOLOGIES = ["mlp", "conv_norm", "grouped", "depthwise", "residual", "concat", "twice", "transposed"]


def weight_settings(config: Any) -> dict[str, dict[str, Any]]:
    return {entry["op_names"][0]: entry.get("target_settings", {}).get("weight", {}) for entry in config}


def align(name: str, axis: int = 0) -> dict[str, Any]:
    return {"align": {"module_name": name, "target_name": "weight", "dims": [axis]}}


EXPECTED: dict[str, dict[str, dict[str, Any]]] = {
    "mlp": {"fc1": {}, "fc2": {}},
    "conv_norm": {"conv1": {}, "bn1": align("conv1"), "conv2": {}, "bn2": align("conv2")},
    "grouped": {
        "first": {"dependency_group_id": "units of first", "internal_metric_block": 2},
        "grouped": {"dependency_group_id": "units of grouped", "internal_metric_block": 2},
        "last": {},
    },
    "depthwise": {"first": {}, "bn": align("first"), "depthwise": align("first"), "point": {}},
    "residual": {
        "stem": {"dependency_group_id": "units of stem"},
        "inner": {},
        "outer": {"dependency_group_id": "units of stem"},
        "side": {},
    },
    "concat": {"left": {}, "right": {}, "join": {}},
    "transposed": {"first": {}, "up": {"granularity": "in_channel"}, "last": {}},
}


@pytest.mark.parametrize("case", EXPECTED)
def test_dependency_groups(zoo: Any, case: str) -> None:
    model, inputs = made(zoo, case)
    config = [{"op_types": KINDS, "exclude_op_names": ["head"], "sparse_ratio": 0.5}]
    given = copy.deepcopy(config)
    found = with_dependency_groups(config, model, inputs)
    assert config == given
    assert weight_settings(found) == EXPECTED[case]
    for entry in found:
        aligned = "align" in weight_settings([entry])[entry["op_names"][0]]
        assert ("sparse_ratio" in entry) != aligned
    again = with_dependency_groups(found, model, inputs)
    assert weight_settings(again) == EXPECTED[case], "twice is once"


@pytest.mark.parametrize("kind", ["L1NormPruner", "L2NormPruner", "FPGMPruner"])
@pytest.mark.parametrize("case", [case for case in TOPOLOGIES if case != "grouped"])
def test_masks_of_nnis_own_pruners_become_small_models(zoo: Any, case: str, kind: str) -> None:
    """But in grouped convolutions: NNI takes other offsets in each channel group, which are no whole units."""
    model, inputs = made(zoo, case)
    masks, expected = masked(model, inputs, kind=getattr(host, kind))
    found = speedup(model, inputs, masks)
    assert found.units.contradicted == found.units.extended == ()
    assert torch.allclose(run(found.model, inputs), expected, atol=1e-5 * float(expected.abs().max()))
    assert len(found.units.kept) == len(unit_groups(model, inputs))


def test_global_ranking_and_thresholds_align_with_the_first(zoo: Any) -> None:
    model, inputs = made(zoo, "residual")
    for rule in ({"sparse_ratio": 0.5, "global_group_id": 1}, {"sparse_threshold": 1.0}):
        found = with_dependency_groups([{"op_names": ["stem", "outer", "inner"], **rule}], model, inputs)
        assert weight_settings(found) == {"stem": {}, "inner": {}, "outer": align("stem")}
        pruner = MeanWeightPruner(model, found, example_inputs=inputs)
        masks = pruner.generate_masks()
        pruner.unwrap_model()
        kept = masks["stem"]["weight"].flatten().tolist()
        assert masks["outer"]["weight"].flatten().tolist() == masks["outer"]["bias"].tolist() == kept
        assert 0 < sum(kept) < 6


def test_layers_that_cannot_share_a_mask_are_reported(zoo: Any) -> None:
    model, inputs = made(zoo, "residual")
    with pytest.warns(UngroupedLayersWarning, match="'stem' shares its units with outer, which the config list leaves"):
        with_dependency_groups([{"op_names": ["stem"], "sparse_ratio": 0.5}], model, inputs)
    with pytest.raises(PruningError, match=r"'stem' and 'outer' share .* sparse_ratio 0.5 and sparse_ratio 0.25"):
        with_dependency_groups(
            [{"op_names": ["stem"], "sparse_ratio": 0.5}, {"op_names": ["outer"], "sparse_ratio": 0.25}], model, inputs
        )
    model, inputs = made(zoo, "shared")
    with pytest.warns(UngroupedLayersWarning, match="'both' shares only some of its units"):
        with_dependency_groups([{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], model, inputs)
    model, inputs = made(zoo, "group_norm")
    with pytest.raises(PruningError, match="NNI cannot prune 'norm', a GroupNorm: GroupNorm is not registered"):
        with_dependency_groups([{"op_types": ["GroupNorm"], "sparse_ratio": 0.5}], model, inputs)


class Summed(nn.Module):
    """Layers that write into one sum."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = {name: layer(x) for name, layer in self.layers.items()}
        if "left" in found:
            found["joined"] = torch.cat([found.pop("left"), found.pop("right")], 1)
        total: Tensor = sum(found.values())  # type: ignore[assignment]
        return self.head(torch.relu(self.norm(total)))


def test_a_concatenation_that_joins_a_sum_is_reported() -> None:
    torch.manual_seed(0)
    model = lively(Summed(left=nn.Conv2d(3, 4, 1), right=nn.Conv2d(3, 4, 1), c=nn.Conv2d(3, 8, 1)).eval())
    inputs = torch.randn(2, 3, 4, 4)
    config = [{"op_types": ["Conv2d"], "exclude_op_names": ["head"], "sparse_ratio": 0.5}]
    with pytest.warns(UngroupedLayersWarning, match="'layers.c' shares only some of its units"):
        config = with_dependency_groups(config, model, inputs)
    pruner = MeanWeightPruner(model, config, example_inputs=inputs)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    found = speedup(model, inputs, masks)
    assert found.error <= 1e-5
    assert found.model.norm.num_features == sum(kept.numel() for kept in found.units.kept.values())


@pytest.mark.parametrize("order", [("conv", "transposed"), ("transposed", "conv")])
@pytest.mark.parametrize("kind", [MeanWeightPruner, host.L1NormPruner])
def test_convolutions_of_both_kinds_in_one_sum(order: tuple[str, str], kind: Any) -> None:
    torch.manual_seed(0)
    layers = {"conv": nn.Conv2d(3, 8, 1), "transposed": nn.ConvTranspose2d(3, 8, 1)}
    model = lively(Summed(**{name: layers[name] for name in order}).eval())
    inputs = torch.randn(2, 3, 4, 4)
    masks, expected = masked(model, inputs, kind=kind)
    assert masks["layers.conv"]["bias"].tolist() == masks["layers.transposed"]["bias"].tolist()
    found = speedup(model, inputs, masks)
    assert found.units.extended == found.units.contradicted == ()
    assert torch.allclose(run(found.model, inputs), expected, atol=1e-5)


def test_embeddings_depthwise_transposed_and_norms_alone() -> None:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line, self.table, self.head = nn.Linear(4, 8), nn.Embedding(10, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.head(torch.relu(self.line(x) + self.table(y)))

    torch.manual_seed(0)
    model, inputs = Embedded(), (torch.randn(5, 4), torch.arange(5))
    for names in (["line"], ["line", "table"]):
        if names == ["line"]:
            with pytest.warns(UngroupedLayersWarning):
                config = with_dependency_groups([{"op_names": names, "sparse_ratio": 0.5}], model, inputs)
        else:
            config = with_dependency_groups([{"op_names": names, "sparse_ratio": 0.5}], model, inputs)
        pruner = MeanWeightPruner(model, config, example_inputs=inputs)
        _, masks = pruner.compress()
        pruner.unwrap_model()
        assert speedup(model, inputs, masks).model.table.embedding_dim == 4
    torch.manual_seed(0)
    deep = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 8, 3, groups=8), nn.ReLU())
    deep.add_module("head", nn.Conv2d(8, 2, 1))
    x = torch.randn(2, 1, 8, 8)
    masks, expected = masked(deep, x)
    assert torch.allclose(run(speedup(deep, x, masks).model, x), expected, atol=1e-5)
    norm = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    config = with_dependency_groups([{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5}], norm, x)
    assert [entry["op_names"] for entry in config] == [["0"], ["1"]]


@pytest.mark.parametrize(
    ("units", "blocks"), [([0, 1, 2, 3], 1), ([0, 1, 0, 1], 2), ([4, 5, 6], 1), ([0, 0, 1, 1], 1), ([0, 1, 1, 0], 1)]
)
def test_blocks_that_lie_side_by_side(units: list[int], blocks: int) -> None:
    assert GroupedLayer("layer", torch.tensor(units), (len(units),), 0).blocks == blocks


def test_the_users_own_group_ids_and_granularities(zoo: Any) -> None:
    model, inputs = made(zoo, "residual")
    for rule in ({"sparse_ratio": 0.5, "global_group_id": 1}, {"sparse_threshold": 1.0}):
        config = [{"op_names": ["stem", "outer"], "dependency_group_id": "mine", **rule}]
        found = with_dependency_groups(config, model, inputs)
        assert weight_settings(found) == {"stem": {}, "outer": align("stem")}
        for each in (found, config):
            pruner = MeanWeightPruner(model, each, example_inputs=inputs)
            masks = pruner.generate_masks()
            pruner.unwrap_model()
            assert torch.equal(masks["stem"]["weight"], masks["outer"]["weight"])
    config = [{"op_names": ["stem"], "sparse_ratio": 0.5, "granularity": [2, -1, -1, -1]}]
    config.append({"op_names": ["outer"], "sparse_ratio": 0.5})
    with pytest.warns(UngroupedLayersWarning, match="'stem' has a granularity of its own"):
        found = with_dependency_groups(config, model, inputs)
    assert weight_settings(found) == {"stem": {}, "outer": {}}
    pruner = MeanWeightPruner(model, [{"op_names": ["stem"], "sparse_ratio": 0.5}], example_inputs=inputs)
    with pytest.raises(PruningError, match="inside NNI's wrappers"):
        with_dependency_groups(config, model, inputs)
    pruner.unwrap_model()
