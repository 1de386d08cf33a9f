"""Config lists against masks computed by hand, and the lists that are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytestmark = [pytest.mark.host("nni"), pytest.mark.host("torch_pruning")]
nni = pytest.importorskip("nni")
tp = pytest.importorskip("torch_pruning")

from nni_models import BATCHES, IMAGES, LABELS, masks_of, mean_weights, simple  # noqa: E402

from nns_plugin.adapters import nni as ours  # noqa: E402
from nns_plugin.criteria import UnscoredGroupWarning  # noqa: E402
from nns_plugin.errors import PruningError  # noqa: E402


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


def test_a_global_budget_is_used_up() -> None:
    """Half of 16 units are 8, whose weights fill the budget exactly: the last of them goes as well."""
    model = simple()
    scores = mean_weights(model.fc1)
    masks = masks_of([{"op_names": ["fc1"], "sparse_ratio": 0.5, "global_group_id": "all"}], model)
    assert masks["fc1"]["weight"].flatten().bool().tolist() == (scores >= np.sort(scores)[8]).tolist()


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


def test_a_layer_that_cannot_be_scored_stays_whole() -> None:
    model = simple()
    with pytest.warns(UnscoredGroupWarning, match="left whole: 'fc2'"):
        masks = masks_of([{"op_types": ["Linear"], "sparse_ratio": 0.5}], model)
    assert sorted(masks) == ["fc1"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([{"op_types": ["LSTM"], "sparse_ratio": 0.5}], r"selects no layer; .* types BatchNorm2d, Conv2d, Linear"),
        ([], "selects no layer"),
        (None, "config_list is None"),
        ([{"op_names": "conv1", "sparse_ratio": 0.5}], "op_names is 'conv1'; expected a list"),
        ([{"op_names_re": ["conv["], "sparse_ratio": 0.5}], "is not a regular expression"),
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
def test_wrong_config_lists_are_refused_before_anything_changes(config: Any, message: str) -> None:
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
def test_what_cannot_be_masked_is_an_error_and_no_mask_changes(config: Any, message: str) -> None:
    pruner = ours.MeanWeightPruner(simple(), [config], example_inputs=IMAGES[:2])
    with pytest.raises(PruningError, match=message):
        pruner.compress()
    assert all(bool(mask.all()) for targets in pruner.get_masks().values() for mask in targets.values())
