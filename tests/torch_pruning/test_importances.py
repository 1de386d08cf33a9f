"""Criteria inside torch-pruning's own pruners: what goes is what scores lowest, and statistics are never stale."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from copy import deepcopy
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nns_plugin import UnitGroup, calibrate
from nns_plugin.criteria import Semantic, UnscoredGroupWarning
from nns_plugin.errors import CalibrationError, CriterionError, LabelError, StaleStatisticsError

pytestmark = pytest.mark.host("torch_pruning")
tp = pytest.importorskip("torch_pruning")

import zoo  # noqa: E402

from nns_plugin.adapters import torch_pruning  # noqa: E402
from nns_plugin.adapters.torch_pruning import (  # noqa: E402
    CriterionImportance,
    SemanticImportance,
    count_macs,
    install,
    uninstall,
)
from nns_plugin.adapters.torch_pruning.groups import UnusableGroupWarning, unit_groups  # noqa: E402
from nns_plugin.switcher.scaling_factors import ScalingFactors  # noqa: E402
from nns_plugin.switcher.switches import Switch  # noqa: E402
from nns_plugin.synapses.snapshot import WeightSnapshot  # noqa: E402

fresh = zoo.fresh_arguments

PRUNERS = ("BasePruner", "MagnitudePruner", "MetaPruner", "GroupNormPruner", "BNScalePruner", "GrowingRegPruner")
TOPOLOGIES = ("mlp", "conv_norm", "grouped", "depthwise", "residual", "concat", "twice", "transposed", "shared")


def setting(case: str, count: int = 24) -> tuple[nn.Module, Any, list[Any], tuple[UnitGroup, ...]]:
    """A model, example inputs, a loader, and the unit groups written by hand."""
    torch.manual_seed(3)
    return zoo.CASES[case].make().eval(), zoo.CASES[case].inputs(2), zoo.labelled(case, count), zoo.groups_of(case)


def by_hand(model: nn.Module, loader: list[Any], group: UnitGroup, chosen: list[int]) -> np.ndarray:
    """Eq. 1 with hooks and NumPy of its own: maximum over consumers and labels of x / beta."""
    expected = zoo.by_hand(group)
    seen: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in expected.consumers}
    labels = np.zeros(0)
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen[name].append((args[0].numpy().copy(), labels))
        )
        for name in expected.consumers
    ]
    with torch.no_grad():
        for inputs, batch_labels in loader:
            labels = batch_labels.numpy()
            model(inputs)
    for hook in hooks:
        hook.remove()
    scores = np.zeros(group.size)
    for name, positions in expected.consumers.items():
        conv = isinstance(model.get_submodule(name), nn.modules.conv._ConvNd)
        x = np.zeros((len(chosen), group.size))
        for row, label in enumerate(chosen):
            rows = np.concatenate([activation[of == label] for activation, of in seen[name]])
            rows = np.moveaxis(rows, 1, -1) if conv else rows
            x[row] = [np.abs(rows[..., p]).mean() if p else 0.0 for p in positions]
        beta = x.max(1, keepdims=True)
        scores = np.maximum(scores, (x / np.where(beta > 0, beta, 1)).max(0))
    return scores


def kept_units(dense: nn.Module, pruned: nn.Module, group: UnitGroup) -> list[int]:
    """Which units are left, told by the weights of the group's own producer: each row is unlike any other."""
    producer = next(port for port in group.producers if port.name == group.name)
    before, after = dense.get_submodule(group.name), pruned.get_submodule(group.name)
    left = {round(value, 6) for value in after.bias.tolist()}
    rows = [round(value, 6) in left for value in before.bias.tolist()]
    units = {int(unit): rows[int(index)] for index, unit in zip(producer.index, producer.unit, strict=True)}
    return [unit for unit, stays in sorted(units.items()) if stays]


def lowest(scores: np.ndarray, count: int) -> list[int]:
    """The units that stay when so many of the lowest go; of equal ones the last goes."""
    order = sorted(range(len(scores)), key=lambda unit: (-scores[unit], unit))
    return sorted(order[: len(scores) - count])


# --- the lowest-scoring units go -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("case", TOPOLOGIES)
def test_local_pruning_removes_the_lowest(case: str, pruner: str) -> None:
    model, inputs, loader, groups = setting(case)
    dense, chosen = deepcopy(model), [0, 2]
    statistics = calibrate(model, loader, unit_groups(model, inputs))
    importance = SemanticImportance(statistics, chosen)
    made = getattr(tp.pruner, pruner)(
        model, inputs, importance=importance, pruning_ratio=0.5, ignored_layers=[model.head], **fresh()
    )
    made.step()
    for group in groups:
        scores = by_hand(dense, loader, group, chosen)
        count = group.size - int(group.size * 0.5)
        assert kept_units(dense, model, group) == lowest(scores, count), group.name
    assert model(inputs).shape == dense(inputs).shape


@pytest.mark.parametrize("isomorphic", [False, True])
@pytest.mark.parametrize("case", TOPOLOGIES)
@pytest.mark.parametrize("ratio", [0.3, 0.6])
def test_global_pruning_removes_the_lowest_of_all(case: str, isomorphic: bool, ratio: float) -> None:
    model, inputs, loader, groups = setting(case)
    dense, chosen = deepcopy(model), [1]
    importance = SemanticImportance.from_loader(model, inputs, loader, chosen)
    pruner = tp.pruner.BasePruner(
        model, inputs, importance=importance, global_pruning=True, isomorphic=isomorphic, pruning_ratio=ratio,
        ignored_layers=[model.head], **fresh(),
    )  # fmt: skip
    pruner.step()
    assert model(inputs).shape == dense(inputs).shape
    left = {group.name: kept_units(dense, model, group) for group in groups}
    scores = {group.name: by_hand(dense, loader, group, chosen) for group in groups}
    # A group that would lose everything is left whole by the host.
    pruned = [group for group in groups if len(left[group.name]) < group.size]
    if not isomorphic:
        total = sum(group.size for group in groups)
        gone = [s for name, kept in left.items() for unit, s in enumerate(scores[name]) if unit not in kept]
        stays = [s for group in pruned for unit, s in enumerate(scores[group.name]) if unit in left[group.name]]
        assert not gone or not stays or max(gone) <= min(stays) + 1e-5
        if len(pruned) == len(groups):
            assert len(gone) == total - int(total * (1 - ratio))
    for group in pruned:
        count = group.size - len(left[group.name])
        assert left[group.name] == lowest(scores[group.name], count), group.name


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_ties_lose_no_more_than_their_share(ratio: float, scale: float) -> None:
    """Every score is 1, or every score is 0: torch-pruning's threshold would take all of them."""
    model = nn.Sequential(nn.Linear(4, 32), nn.Linear(32, 16), nn.Linear(16, 24), nn.Linear(24, 3))
    for layer in model:
        nn.init.constant_(layer.weight, 0.1 * scale)
        nn.init.constant_(layer.bias, scale)
    loader = [(torch.ones(6, 4), torch.arange(6) % 3)]
    importance = SemanticImportance.from_loader(model, torch.ones(2, 4), loader, [0])
    tp.pruner.BasePruner(
        model, torch.ones(2, 4), importance=importance, global_pruning=True, pruning_ratio=ratio,
        ignored_layers=[model[3]], **fresh(),
    ).step()  # fmt: skip
    assert sum(layer.out_features for layer in model[:3]) == int(72 * (1 - ratio))
    assert all(layer.out_features >= 24 * (1 - ratio) / 3 for layer in model[:3]), "spread over the groups"


def test_ties_in_grouped_convolutions() -> None:
    """The host averages over three groups before it compares."""
    model = nn.Sequential(nn.Conv2d(2, 12, 1), nn.Conv2d(12, 12, 1, groups=3), nn.Conv2d(12, 8, 1), nn.Conv2d(8, 3, 1))
    for layer in model:
        nn.init.constant_(layer.weight, 0.1)
        nn.init.constant_(layer.bias, 0.7)
    loader = [(torch.ones(6, 2, 2, 2), torch.arange(6) % 3)]
    example = torch.ones(2, 2, 2, 2)
    statistics = calibrate(model, loader, unit_groups(model, example), labels=3)
    importance = SemanticImportance(statistics, [0])
    tp.pruner.BasePruner(
        model,
        example,
        importance=importance,
        global_pruning=True,
        pruning_ratio=0.5,
        ignored_layers=[model[3]],
        **fresh(),
    ).step()
    units = model[0].out_channels // 3 + model[1].out_channels // 3 + model[2].out_channels
    assert units == (4 + 4 + 8) // 2
    assert model(example).shape == (2, 3, 2, 2)


@pytest.mark.parametrize("round_to", [2, 4])
@pytest.mark.parametrize("global_pruning", [False, True])
def test_rounding(round_to: int, global_pruning: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3))
    dense, loader = deepcopy(model), [(torch.randn(24, 4), torch.arange(24) % 3)]
    groups = unit_groups(model, torch.randn(2, 4))
    importance = SemanticImportance(calibrate(model, loader, groups), [1, 2])
    tp.pruner.BasePruner(
        model, torch.randn(2, 4), importance=importance, global_pruning=global_pruning, pruning_ratio=0.4,
        round_to=round_to, ignored_layers=[model[4]], **fresh(),
    ).step()  # fmt: skip
    for group in groups:
        left = kept_units(dense, model, group)
        assert len(left) % round_to == 0
        assert left == lowest(by_hand(dense, loader, group, [1, 2]), group.size - len(left))


@pytest.mark.parametrize(
    "options", [{"measure": "frequency"}, {"contrast": "rest", "labels": [0]}, {"labels": ["1"]}, {"labels": None}]
)
def test_options_reach_the_criterion(options: dict[str, Any]) -> None:
    model, inputs, loader, _ = setting("mlp")
    statistics = calibrate(model, loader, unit_groups(model, inputs))
    importances = (
        CriterionImportance(Semantic(statistics, **options)),
        SemanticImportance(statistics, **options),
        SemanticImportance.from_loader(model, inputs, loader, **options),
        SemanticImportance(statistics),
    )
    graph = tp.DependencyGraph().build_dependency(model, inputs, verbose=False)
    for group in graph.get_all_groups(ignored_layers=[model.head]):
        expected, plain, collected, default = (importance(group) for importance in importances)
        assert torch.equal(plain, expected)
        assert torch.equal(collected, expected)
        assert torch.equal(default, expected) == (options == {"labels": None})


def test_calibration_options_reach_the_calibration() -> None:
    model, inputs, loader, _ = setting("mlp")
    importance = SemanticImportance.from_loader(model, inputs, loader, calibration_options={"threshold": 0.25})
    assert importance.statistics is not None
    assert importance.statistics.threshold == 0.25


# --- several steps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("global_pruning", [False, True])
@pytest.mark.parametrize("case", TOPOLOGIES)
def test_statistics_are_narrowed_between_steps(case: str, global_pruning: bool) -> None:
    """After each step they equal what narrowing by the units that are left gives, unit by unit."""
    model, inputs, loader, groups = setting(case)
    dense = deepcopy(model)
    statistics = calibrate(model, loader, unit_groups(model, inputs))
    importance = SemanticImportance(statistics, [0, 1])
    pruner = tp.pruner.BasePruner(
        model, inputs, importance=importance, pruning_ratio=0.6, iterative_steps=3, global_pruning=global_pruning,
        ignored_layers=[model.head], **fresh(),
    )  # fmt: skip
    for step in range(3):
        if step:
            left = {group.name: torch.tensor(kept_units(dense, model, group)) for group in groups}
            expected = statistics.narrow(left)
        pruner.step()
        if step:
            narrowed = importance.statistics
            assert narrowed is not None
            assert {group.name: group.size for group in narrowed.groups} == {
                name: len(kept) for name, kept in left.items()
            }
            for key, record in expected.records.items():
                for name, value in record.sums().items():
                    assert torch.equal(narrowed.records[key].sums()[name], value), (key, name)
    assert model(inputs).shape == dense(inputs).shape
    assert any(len(kept_units(dense, model, group)) < group.size for group in groups)


def test_narrowed_statistics_equal_new_ones_where_inputs_do_not_change() -> None:
    """The first layer's consumers see the same units as before, without the removed ones; later consumers do not."""
    model, inputs, loader, _ = setting("conv_norm")
    groups = unit_groups(model, inputs)
    importance = SemanticImportance(calibrate(model, loader, groups), [0, 2])
    pruner = tp.pruner.BasePruner(
        model,
        inputs,
        importance=importance,
        pruning_ratio=0.6,
        iterative_steps=3,
        ignored_layers=[model.head],
        **fresh(),
    )
    pruner.step(), pruner.step()
    again = calibrate(model, loader, unit_groups(model, inputs))
    pruner.step()
    narrowed = importance.statistics
    assert narrowed is not None
    record, expected = narrowed.records["in", "conv2"], again.records["in", "conv2"]
    for name in ("inputs", "samples", "total", "magnitude", "square", "active"):
        torch.testing.assert_close(getattr(record, name), getattr(expected, name), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(narrowed.records["in", "head"].total, again.records["in", "head"].total, rtol=1e-3)


@pytest.mark.parametrize("case", TOPOLOGIES)
def test_a_loader_is_asked_again_in_every_step(case: str) -> None:
    """The scores of every step are those of the narrowed model."""
    model, inputs, loader, _ = setting(case)
    importance = SemanticImportance.from_loader(model, inputs, loader, [0, 2])
    pruner = tp.pruner.BasePruner(
        model,
        inputs,
        importance=importance,
        pruning_ratio=0.6,
        iterative_steps=3,
        ignored_layers=[model.head],
        **fresh(),
    )
    for _ in range(3):
        before, groups = deepcopy(model), unit_groups(model, inputs)
        pruner.step()
        for group in groups:
            scores = by_hand(before, loader, group, [0, 2])
            left = kept_units(before, model, group)
            assert left == lowest(scores, group.size - len(left)), group.name


def train(model: nn.Module, how: str) -> None:
    if how == "forward":
        model.train()(torch.randn(4, 1, 4, 4))
        model.eval()
    elif how == "load_state_dict":
        model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
    else:
        optimizer = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[how](model.parameters(), lr=0.1)
        model(torch.randn(4, 1, 4, 4)).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("how", ["sgd", "adam", "load_state_dict", "forward"])
@pytest.mark.parametrize("when", ["before", "between"])
def test_training_makes_statistics_stale(how: str, when: str) -> None:
    """Also a forward in training mode: batch norms have other statistics then."""
    model, inputs, loader, _ = setting("conv_norm")
    importance = SemanticImportance(calibrate(model, loader, unit_groups(model, inputs)), [0, 2])
    pruner = tp.pruner.BasePruner(
        model,
        inputs,
        importance=importance,
        pruning_ratio=0.6,
        iterative_steps=3,
        ignored_layers=[model.head],
        **fresh(),
    )
    if when == "between":
        pruner.step()
    train(model, how)
    with pytest.raises(StaleStatisticsError, match="calibrate again, or use an importance that was built with"):
        pruner.step()


def test_weights_that_change_between_two_scorings_are_noticed() -> None:
    """Nothing was removed and no parameter was replaced: only the version counter of one tensor tells."""
    model, inputs, loader, _ = setting("mlp")
    importance = SemanticImportance(calibrate(model, loader, unit_groups(model, inputs)), [0])
    graph = tp.DependencyGraph().build_dependency(model, inputs, verbose=False)
    group = next(iter(graph.get_all_groups(ignored_layers=[model.head])))
    importance(group)
    importance(group)
    with torch.no_grad():
        model.fc2.weight.mul_(2)
    with pytest.raises(StaleStatisticsError, match="weights have changed since the statistics were collected"):
        importance(group)


@pytest.mark.parametrize("how", ["sgd", "load_state_dict", "forward"])
def test_training_is_no_matter_with_a_loader(how: str) -> None:
    model, inputs, loader, _ = setting("conv_norm")
    importance = SemanticImportance.from_loader(model, inputs, loader, [0, 2])
    pruner = tp.pruner.BasePruner(
        model,
        inputs,
        importance=importance,
        pruning_ratio=0.6,
        iterative_steps=3,
        ignored_layers=[model.head],
        **fresh(),
    )
    train(model, how)
    for _ in range(3):
        before, groups = deepcopy(model), unit_groups(model, inputs)
        pruner.step()
        for group in groups:
            left = kept_units(before, model, group)
            assert left == lowest(by_hand(before, loader, group, [0, 2]), group.size - len(left))
        train(model, how)


def test_a_second_pruner_goes_on_where_the_first_one_stopped() -> None:
    model, inputs, loader, groups = setting("residual")
    dense = deepcopy(model)
    statistics = calibrate(model, loader, unit_groups(model, inputs))
    importance = SemanticImportance(statistics, [0, 2])
    options = {"importance": importance, "pruning_ratio": 0.34, "ignored_layers": [model.head]}
    first = tp.pruner.BasePruner(model, inputs, **options, **fresh())
    first.step()
    left = {group.name: torch.tensor(kept_units(dense, model, group)) for group in groups}
    second = tp.pruner.BasePruner(model, inputs, **options, **fresh())
    second.step()
    narrowed = importance.statistics
    assert narrowed is not None
    for key, record in statistics.narrow(left).records.items():
        assert torch.equal(narrowed.records[key].magnitude, record.magnitude)


@pytest.mark.parametrize("forget_first", [False, True])
def test_a_second_pruner_of_a_trained_model_raises(forget_first: bool) -> None:
    """Narrowed statistics have no fingerprint to compare with."""
    model, inputs, loader, _ = setting("conv_norm")
    importance = SemanticImportance(calibrate(model, loader, unit_groups(model, inputs)), [0, 2])
    options = {"importance": importance, "pruning_ratio": 0.5, "ignored_layers": [model.head]}
    first = tp.pruner.BasePruner(model, inputs, **options, iterative_steps=2, **fresh())
    first.step(), first.step()
    if forget_first:
        del first
    train(model, "sgd")
    with pytest.raises(StaleStatisticsError):
        tp.pruner.BasePruner(model, inputs, **options, **fresh()).step()


def test_statistics_of_another_model_raise() -> None:
    model, inputs, loader, _ = setting("mlp")
    statistics = calibrate(model, loader, unit_groups(model, inputs))
    other = zoo.Mlp()
    pruner = tp.pruner.BasePruner(
        other, inputs, importance=SemanticImportance(statistics, [0]), ignored_layers=[other.head], **fresh()
    )
    with pytest.raises(StaleStatisticsError, match="another state of the model: 'fc1.weight' has other values"):
        pruner.step()


def interactive(pruner: Any) -> Iterator[Any]:
    yield from pruner.step(interactive=True)


@pytest.mark.parametrize("loader_is_there", [False, True])
def test_groups_pruned_by_hand_with_indices(loader_is_there: bool) -> None:
    """torch-pruning records group.prune(idxs) twice, the second time with all positions."""
    model, inputs, loader, _ = setting("mlp")
    if loader_is_there:
        importance = SemanticImportance.from_loader(model, inputs, loader, [0])
    else:
        importance = SemanticImportance(calibrate(model, loader, unit_groups(model, inputs)), [0])
    pruner = tp.pruner.BasePruner(
        model,
        inputs,
        importance=importance,
        pruning_ratio=0.5,
        iterative_steps=2,
        ignored_layers=[model.head],
        **fresh(),
    )
    for group in interactive(pruner):
        group.prune([0])
    assert (model.fc1.out_features, model.fc2.out_features) == (7, 4)
    if loader_is_there:
        before, groups = deepcopy(model), unit_groups(model, inputs)
        pruner.step()
        for group in groups:
            left = kept_units(before, model, group)
            assert left == lowest(by_hand(before, loader, group, [0]), group.size - len(left))
    else:
        with pytest.raises(StaleStatisticsError, match="pruning history"):
            pruner.step()


def test_interactive_steps_may_skip_groups() -> None:
    model, inputs, loader, groups = setting("mlp")
    dense = deepcopy(model)
    statistics = calibrate(model, loader, unit_groups(model, inputs))
    importance = SemanticImportance(statistics, [0])
    pruner = tp.pruner.BasePruner(
        model,
        inputs,
        importance=importance,
        pruning_ratio=0.5,
        iterative_steps=2,
        ignored_layers=[model.head],
        **fresh(),
    )
    for number, group in enumerate(interactive(pruner)):
        if number:
            group.prune()
    left = {group.name: torch.tensor(kept_units(dense, model, group)) for group in groups}
    assert sorted(len(kept) < size for kept, size in zip(left.values(), (8, 5), strict=True)) == [False, True]
    pruner.step()
    narrowed = importance.statistics
    assert narrowed is not None
    for key, record in statistics.narrow(left).records.items():
        assert torch.equal(narrowed.records[key].magnitude, record.magnitude)


def test_units_removed_behind_the_pruners_back_are_noticed() -> None:
    model, inputs, loader, _ = setting("mlp")
    importance = SemanticImportance(calibrate(model, loader, unit_groups(model, inputs)), [0])
    pruner = tp.pruner.BasePruner(
        model,
        inputs,
        importance=importance,
        pruning_ratio=0.5,
        iterative_steps=3,
        ignored_layers=[model.head],
        **fresh(),
    )
    pruner.step()
    group = pruner.DG.get_pruning_group(model.fc1, tp.prune_linear_out_channels, [0])
    group.prune(record_history=False)
    with pytest.raises(StaleStatisticsError):
        pruner.step()


# --- groups that cannot be scored ------------------------------------------------------------------------------------


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


# --- the importance itself -------------------------------------------------------------------------------------------


def random_factors(model: nn.Module, groups: tuple[UnitGroup, ...]) -> ScalingFactors:
    switches = [Switch(group.name, group.size, group.consumers, group.producers) for group in groups]
    return ScalingFactors(switches, {group.name: torch.rand(group.size) for group in groups})


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", ["Distinctiveness", "MeanWeight", "Semantic", "Switcher", "WSF"])
def test_every_importance_has_the_same_two_constructors(name: str, steps: int) -> None:
    """Built from a loader, it scores like the criterion whose evidence was collected from the model as it is."""
    model, inputs, loader, groups = setting("conv_norm")
    if name == "Switcher" and steps > 1:
        pytest.skip("factors do not follow removals")
    evidence: dict[str, Any] = {}
    if name == "WSF":
        evidence["snapshot"] = WeightSnapshot(setting("conv_norm")[0])
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter))
    if name == "Switcher":
        evidence["factors"] = random_factors(model, groups)
    cls = getattr(torch_pruning, f"{name}Importance")
    importance, pruners = cls.from_loader(model, inputs, loader, **evidence), []
    for step in range(steps):
        if name in ("Distinctiveness", "Semantic"):
            statistics = calibrate(model, loader, unit_groups(model, inputs), gram=True)
            evidence["statistics"] = statistics
        elif name == "WSF" and step:
            evidence["snapshot"] = importance.snapshot
        expected = cls(**evidence)
        graph = tp.DependencyGraph().build_dependency(model, inputs, verbose=False)
        for group in graph.get_all_groups(ignored_layers=[model.head]):
            np.testing.assert_allclose(importance(group), expected(group), rtol=1e-5)
        options = {"pruning_ratio": 0.34, "ignored_layers": [model.head]}
        pruners.append(tp.pruner.BasePruner(model, inputs, importance=importance, **options, **fresh()))
        pruners[-1].step()


def test_an_importance_without_a_criterion_of_its_own_takes_no_loader() -> None:
    model, inputs, loader, _ = setting("mlp")
    with pytest.raises(CriterionError, match="CriterionImportance names no criterion; set criterion_type"):
        CriterionImportance.from_loader(model, inputs, loader)


def test_sparse_training_pruners_can_use_the_scores() -> None:
    """Regularisation multiplies weights and gradients with what the importance returns."""
    for name in ("GroupNormPruner", "BNScalePruner", "GrowingRegPruner"):
        model, inputs, loader, _ = setting("conv_norm")
        importance = SemanticImportance(calibrate(model, loader, unit_groups(model, inputs)), [0, 2])
        pruner = getattr(tp.pruner, name)(
            model, inputs, importance=importance, pruning_ratio=0.5, ignored_layers=[model.head], **fresh()
        )
        model(inputs).sum().backward()
        if name == "GrowingRegPruner":
            pruner.update_reg()
        pruner.regularize(model)
        pruner.step()
        assert model.conv1.out_channels == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", PRUNERS)
def test_on_a_gpu(name: str) -> None:
    model, inputs, loader, groups = setting("conv_norm")
    dense = deepcopy(model)
    model.cuda()
    importance = SemanticImportance.from_loader(model, inputs, loader, [0, 2])
    options = {"pruning_ratio": 0.5, "ignored_layers": [model.head]}
    pruner = getattr(tp.pruner, name)(model, inputs.cuda(), importance=importance, **options, **fresh())
    if hasattr(pruner, "reg") or name == "GrowingRegPruner":
        model(inputs.cuda()).sum().backward()
        pruner.regularize(model)
    pruner.step()
    for group in groups:
        scores = by_hand(dense, loader, group, [0, 2])
        assert kept_units(dense, model, group) == lowest(scores, group.size - int(group.size * 0.5))


def test_scores_are_one_a_root_position() -> None:
    model, inputs, loader, groups = setting("grouped")
    importance = SemanticImportance(calibrate(model, loader, unit_groups(model, inputs)), [0, 2])
    graph = tp.DependencyGraph().build_dependency(model, inputs, verbose=False)
    host_group = next(
        group
        for group in graph.get_all_groups(ignored_layers=[model.head])
        if group[0].dep.target.module is model.first
    )
    scores = importance(host_group)
    assert scores is not None
    assert scores.shape == (8,)
    assert torch.equal(scores[:4], scores[4:]), "two positions of one unit"
    np.testing.assert_allclose(scores[:4], by_hand(model, loader, groups[0], [0, 2]), rtol=1e-5)


def test_importances_from_statistics_survive_pickle() -> None:
    model, inputs, loader, _ = setting("conv_norm")
    dense = deepcopy(model)
    importance = SemanticImportance(calibrate(model, loader, unit_groups(model, inputs)), [0, 2], "frequency")
    graph = tp.DependencyGraph().build_dependency(model, inputs, verbose=False)
    before = [importance(group) for group in graph.get_all_groups(ignored_layers=[model.head])]
    again = pickle.loads(pickle.dumps(importance))
    other = tp.DependencyGraph().build_dependency(dense, inputs, verbose=False)
    after = [again(group) for group in other.get_all_groups(ignored_layers=[dense.head])]
    assert all(torch.equal(left, right) for left, right in zip(before, after, strict=True))
    deep = deepcopy(importance)
    assert torch.equal(deep(next(iter(other.get_all_groups(ignored_layers=[dense.head])))), after[0])


def test_the_model_is_not_touched_by_scoring() -> None:
    model, inputs, loader, _ = setting("conv_norm")
    importance = SemanticImportance.from_loader(model, inputs, loader, [0, 2])
    graph = tp.DependencyGraph().build_dependency(model, inputs, verbose=False)
    model.train()
    model.bn1.eval()
    before = zoo.Snapshot(model)
    for group in graph.get_all_groups(ignored_layers=[model.head]):
        importance(group)
    before.check()


def test_a_one_shot_loader_cannot_be_asked_again() -> None:
    model, inputs, loader, _ = setting("mlp")
    importance = SemanticImportance.from_loader(model, inputs, iter(loader), [0])
    pruner = tp.pruner.BasePruner(
        model,
        inputs,
        importance=importance,
        pruning_ratio=0.5,
        iterative_steps=2,
        ignored_layers=[model.head],
        **fresh(),
    )
    pruner.step()
    with pytest.raises(CalibrationError, match="the loader yielded no inputs"):
        pruner.step()


def test_bad_arguments() -> None:
    model, inputs, loader, _ = setting("mlp")
    statistics = calibrate(model, loader, unit_groups(model, inputs))
    with pytest.raises(LabelError, match="label 7 does not exist"):
        SemanticImportance(statistics, [7])
    with pytest.raises(LabelError, match="label 7 does not exist"):
        SemanticImportance.from_loader(model, inputs, loader, [7])
    with pytest.raises(CriterionError, match="measure is 'median'"):
        SemanticImportance(statistics, [0], "median")  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="nothing in this model can be pruned"):
        SemanticImportance.from_loader(nn.Linear(6, 3), inputs, loader, [0])


class Constant:
    """Violates or fulfils the score contract."""

    requires: ClassVar[tuple[str, ...]] = ()

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, group: UnitGroup) -> Any:
        return None if self.value is None else torch.full((group.size,), self.value)


def test_any_criterion_can_be_an_importance() -> None:
    model, inputs, _, _ = setting("mlp")
    pruner = tp.pruner.BasePruner(
        model,
        inputs,
        importance=CriterionImportance(Constant(1.0)),
        pruning_ratio=0.5,
        ignored_layers=[model.head],
        **fresh(),
    )
    pruner.step()
    assert (model.fc1.out_features, model.fc2.out_features) == (4, 2)


def test_broken_scores_never_reach_the_host() -> None:
    model, inputs, _, _ = setting("mlp")
    options = {"pruning_ratio": 0.5, "ignored_layers": [model.head]}
    with pytest.raises(CriterionError, match="Constant scored unit 0 of group 'fc.' nan"):
        tp.pruner.BasePruner(
            model, inputs, importance=CriterionImportance(Constant(float("nan"))), **options, **fresh()
        ).step()
    with (
        pytest.warns(UnscoredGroupWarning, match="group 'fc1'"),
        pytest.warns(UnscoredGroupWarning, match="group 'fc2'"),
    ):
        tp.pruner.BasePruner(model, inputs, importance=CriterionImportance(Constant(None)), **options, **fresh()).step()
    assert (model.fc1.out_features, model.fc2.out_features) == (8, 5)


# --- by name in torch_pruning.importance -----------------------------------------------------------------------------


@pytest.fixture
def _uninstalled() -> Iterator[None]:
    uninstall()
    yield
    uninstall()


@pytest.mark.usefixtures("_uninstalled")
def test_install_adds_and_uninstall_removes() -> None:
    before = dict(vars(tp.importance))
    assert not hasattr(tp.importance, "SemanticImportance"), "never on import"
    install()
    assert tp.importance.SemanticImportance is SemanticImportance
    install()
    uninstall()
    assert dict(vars(tp.importance)) == before
    uninstall()
    assert dict(vars(tp.importance)) == before


@pytest.mark.usefixtures("_uninstalled")
def test_install_leaves_foreign_names_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class SemanticImportance:  # somebody else's
        pass

    monkeypatch.setattr(tp.importance, "SemanticImportance", SemanticImportance, raising=False)
    before = dict(vars(tp.importance))
    with pytest.raises(CriterionError, match="has a 'SemanticImportance' of its own already; it is left alone"):
        install()
    assert dict(vars(tp.importance)) == before, "nothing is added"
    uninstall()
    assert dict(vars(tp.importance)) == before


# --- counting --------------------------------------------------------------------------------------------------------


def test_operations_by_hand() -> None:
    """Two Linear layers: in * out multiply-accumulates each, whatever the batch."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).train()
    before = zoo.Snapshot(model)
    for batch in (1, 4):
        macs, parameters = count_macs(model, torch.randn(batch, 6))
        assert parameters == 6 * 8 + 8 + 8 * 3 + 3
        assert 6 * 8 + 8 * 3 <= macs <= 6 * 8 + 8 * 3 + 8 + 3 + 8, "biases and activations may count"
    before.check(rng=False)
