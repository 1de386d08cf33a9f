"""Pruning by angles: exact where pairs are parallel, each seed's variant as one setting."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

pytestmark = pytest.mark.host("torch_pruning")
pytest.importorskip("torch_pruning")

from nns_plugin import Statistics, calibrate  # noqa: E402
from nns_plugin.adapters.torch_pruning.angle_pruning import AngleOptions, prune_by_angle  # noqa: E402
from nns_plugin.adapters.torch_pruning.groups import unit_groups  # noqa: E402
from nns_plugin.errors import PruningError, StaleStatisticsError  # noqa: E402
from nns_plugin.selection import AngleRule  # noqa: E402


def perceptron(activation: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), activation, nn.Linear(6, 3)).eval()


def observed(model: nn.Module, x: Tensor, whole: list[str]) -> Statistics:
    return calibrate(model, [x], unit_groups(model, x[:2], whole), gram=True)


@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_a_parallel_unit_goes_and_the_outputs_stay(factor: float) -> None:
    model, x = perceptron(nn.ReLU()), torch.randn(50, 4)
    with torch.no_grad():
        model[0].weight[4], model[0].bias[4] = factor * model[0].weight[1], factor * model[0].bias[1]
    before = model(x)
    found = prune_by_angle(model, x[:2], observed(model, x, ["2"]), AngleRule(similar=1, complementary=180))
    assert found.kept["0"].tolist() == [0, 1, 2, 3, 5]
    assert (found.removed, found.pairs) == (1, 1)
    assert found.statistics.groups[0].size == 5
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)


def test_a_complementary_sigmoid_goes_and_the_outputs_stay() -> None:
    model, x = perceptron(nn.Sigmoid()), torch.randn(50, 4)
    with torch.no_grad():
        model[0].weight[5], model[0].bias[5] = -model[0].weight[2], -model[0].bias[2]
    before = model(x)
    found = prune_by_angle(model, x[:2], observed(model, x, ["2"]), AngleRule(1, 179), AngleOptions(center=0.5))
    assert found.kept["0"].tolist() == [0, 1, 2, 3, 4]
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)


def parts(model: nn.Sequential) -> tuple[Tensor, Tensor]:
    return model[2].weight.detach(), model[2].bias.detach()


@pytest.mark.parametrize(
    ("rule", "options", "kept", "columns"),
    [
        # The first seed: sigmoid units around 0.5, one of both kinds of pairs goes, nothing is merged.
        (AngleRule(complement="one"), AngleOptions(center=0.5, merge="none"), [0, 1, 2], {0: 0.0, 1: 0.0}),
        # The second seed's words: both of a pair that cancels, the outgoing weights are added.
        (AngleRule(complement="both"), AngleOptions(center=0.5, merge="add"), [0, 2], {0: 1.0}),
        # Its code: incoming weights, similar pairs alone.
        (AngleRule(complementary=180), AngleOptions("weights", merge="add"), [0, 1, 2, 4], {0: 1.0, 1: 0.0}),
    ],
)
def test_each_seeds_variant_is_one_setting(
    rule: AngleRule, options: AngleOptions, kept: list[int], columns: dict[int, float]
) -> None:
    """Unit 3 does what unit 0 does, unit 4 the opposite of unit 1; unit 5 is left out."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3)).eval()
    x = torch.randn(200, 4)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(5, 4)).mul_(2)
        model[0].bias.zero_()
        model[0].weight[3], model[0].weight[4] = model[0].weight[0] * 1.01, -model[0].weight[1]
    before, bias = (part.clone() for part in parts(model))
    found = prune_by_angle(model, x[:2], observed(model, x, ["2"]), rule, options)
    assert found.kept["0"].tolist() == kept
    after, shifted = parts(model)
    for place, share in columns.items():
        partner = {0: 3, 1: 4}[kept[place]]
        torch.testing.assert_close(after[:, place], before[:, kept[place]] + share * before[:, partner])
    torch.testing.assert_close(shifted, bias)


def test_units_of_several_channels_merge_channel_by_channel() -> None:
    """A grouped consumer: the units are pairs of channels, one in each group."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1, groups=2), nn.Flatten()).eval()
    with torch.no_grad():
        for group in range(2):
            model[0].weight[3 * group + 2] = 2 * model[0].weight[3 * group]
            model[0].bias[3 * group + 2] = 2 * model[0].bias[3 * group]
    x = torch.randn(20, 1, 3, 3)
    before = model(x)
    found = prune_by_angle(model, x[:2], observed(model, x, ["2"]), AngleRule(1, 180))
    assert model[0].out_channels == 4
    assert found.removed == 1
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)


def test_only_the_named_groups_are_pruned_and_nothing_is_an_answer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    x = torch.randn(50, 4)
    statistics = observed(model, x, ["4"])
    whole = copy.deepcopy(model)
    found = prune_by_angle(whole, x[:2], statistics, AngleRule(similar=0, complementary=180))
    assert (found.removed, found.pairs) == (0, 0)
    torch.testing.assert_close(whole(x), model(x))
    found = prune_by_angle(
        model, x[:2], statistics, AngleRule(similar=80, complementary=180), AngleOptions(groups=["2"])
    )
    assert set(found.kept) == {"2"}
    assert model[0].out_features == 6
    assert model[2].out_features == 5 - found.removed < 5


def test_what_cannot_be_meant_is_refused() -> None:
    model, x = perceptron(nn.ReLU()), torch.randn(50, 4)
    statistics = observed(model, x, ["2"])
    for options, message in (
        ({"merge": "twice"}, "merge is 'twice'"),
        ({"groups": ["nope"]}, r"groups is \['nope'\]; expected a list of names among 0"),
        ({"groups": "0"}, "groups is '0'"),
    ):
        with pytest.raises(PruningError, match=message):
            prune_by_angle(model, x[:2], statistics, options=AngleOptions(**options))
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(StaleStatisticsError, match="another state of the model"):
        prune_by_angle(model, x[:2], statistics)
    assert model[0].out_features == 6
