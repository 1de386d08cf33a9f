"""Iterative pruning with importances: statistics follow the model and are never stale."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from nns_plugin import calibrate
from nns_plugin.errors import StaleStatisticsError

pytestmark = pytest.mark.host("torch_pruning")
tp = pytest.importorskip("torch_pruning")

import zoo  # noqa: E402
from scored import by_hand, kept_units, lowest, setting  # noqa: E402

from nns_plugin.adapters.torch_pruning import (  # noqa: E402
    SemanticImportance,
)
from nns_plugin.adapters.torch_pruning.groups import unit_groups  # noqa: E402

fresh = zoo.fresh_arguments
TOPOLOGIES = ("mlp", "conv_norm", "grouped", "depthwise", "residual", "concat", "twice", "transposed", "shared")


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
