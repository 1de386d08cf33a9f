"""Removal of units: it equals zeroing them, and what is impossible leaves the model alone."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from nns_plugin import Port, UnitGroup
from nns_plugin.errors import PruningError
from nns_plugin.units import narrow_groups

pytestmark = pytest.mark.host("torch_pruning")
pytest.importorskip("torch_pruning")

import zoo  # noqa: E402
from recorded import groups_of, recorded  # noqa: E402

from nns_plugin.adapters.torch_pruning.graph import build_graph  # noqa: E402
from nns_plugin.adapters.torch_pruning.groups import (  # noqa: E402
    graph_groups,
    unit_groups,
)
from nns_plugin.adapters.torch_pruning.unit_removal import remove_units  # noqa: E402


def zero(model: nn.Module, expected: Any, units: list[int]) -> None:
    """Zero what hand-written positions say: producers' rows and biases, consumers' columns."""
    with torch.no_grad():
        for name, positions in expected.producers.items():
            module = model.get_submodule(name)
            rows = [position for unit in units for position in positions[unit]]
            (module.weight.transpose(0, 1) if getattr(module, "transposed", False) else module.weight)[rows] = 0
            module.bias[rows] = 0
        for name, positions in expected.consumers.items():
            module = model.get_submodule(name)
            columns = [position for unit in units for position in positions[unit]]
            if isinstance(module, nn.LSTM):
                module.weight_ih_l0[:, columns] = 0
            elif isinstance(module, nn.Linear):
                module.weight[:, columns] = 0
            elif module.transposed:
                module.weight[columns] = 0
            else:
                width, outputs = module.in_channels // module.groups, module.out_channels // module.groups
                for column in columns:
                    group = column // width
                    module.weight[group * outputs : (group + 1) * outputs, column % width] = 0


def some_units(expected: Any, generator: torch.Generator) -> list[int]:
    """A random choice of units that leaves every layer something."""
    size = len(next(iter(expected.producers.values())))
    while True:
        units = torch.randperm(size, generator=generator)[
            : int(torch.randint(1, size, (), generator=generator))
        ].tolist()
        ports = [*expected.producers.values(), *expected.consumers.values()]
        if all(any(positions for unit, positions in enumerate(port) if unit not in units) for port in ports):
            return units


EXACT = [(name, group) for name, case in zoo.CASES.items() for group in case.groups if group not in case.inexact]


@pytest.mark.parametrize(("name", "group_name"), EXACT)
def test_removal_equals_zeroing(name: str, group_name: str) -> None:
    case = zoo.CASES[name]
    expected = case.groups[group_name]
    for seed in range(4):
        torch.manual_seed(seed)
        model, inputs = trained(case.make()), case.inputs(3)
        units = some_units(expected, torch.Generator().manual_seed(seed))
        masked = deepcopy(model)
        zero(masked, expected, units)
        group = next(group for group in groups_of(model, inputs) if group.name == group_name)
        remove_units(build_graph(model, inputs), group, torch.tensor(units))
        fed = inputs if isinstance(inputs, tuple) else (inputs,)
        torch.testing.assert_close(model(*fed), masked(*fed), rtol=1e-5, atol=1e-5)
        for producer, positions in expected.producers.items():
            module, old = model.get_submodule(producer), masked.get_submodule(producer)
            gone = sum(len(positions[unit]) for unit in units)
            assert len(module.bias) == len(old.bias) - gone


def trained(model: nn.Module) -> nn.Module:
    """Batch norms away from their initial state, everything in evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean), nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight), nn.init.uniform_(module.bias)
    return model.eval()


@pytest.mark.parametrize("name", [name for name, case in zoo.CASES.items() if not case.inexact])
def test_removal_from_every_group_in_turn(name: str) -> None:
    """One graph, one trace; positions on shared consumers move meanwhile."""
    case = zoo.CASES[name]
    torch.manual_seed(0)
    model, inputs = trained(case.make()), case.inputs(3)
    masked, graph = deepcopy(model), recorded(lambda: build_graph(model, inputs))[0]
    groups, _ = recorded(lambda: graph_groups(graph))
    generator, kept = torch.Generator().manual_seed(7), {}
    for group in groups:
        expected = case.groups[group.name]
        units = some_units(expected, generator)
        zero(masked, expected, units)
        remove_units(graph, group, torch.tensor(units))
        kept[group.name] = torch.tensor([unit for unit in range(group.size) if unit not in units])
    fed = inputs if isinstance(inputs, tuple) else (inputs,)
    torch.testing.assert_close(model(*fed), masked(*fed), rtol=1e-5, atol=1e-5)
    again = {group.name: zoo.by_hand(group) for group in groups_of(model, inputs)}
    assert again == {group.name: zoo.by_hand(group) for group in narrow_groups(groups, kept)}, "as traced anew"


def test_heads_lose_the_same_dimensions() -> None:
    """Against attention by hand, with the scale of the narrower heads."""
    model, inputs = zoo.MultiHead().eval(), torch.randn(3, 7, 4)
    before = deepcopy(model)
    group = unit_groups(model, inputs)[0]
    remove_units(build_graph(model, inputs), group, torch.tensor([1]))
    assert (model.attention.embed_dim, model.attention.head_dim) == (6, 3)
    kept = [0, 2, 3, 4, 6, 7]  # unit 1 is dimension 1 of both heads: positions 1 and 5
    x = before.embed(inputs)[..., kept]
    weight, bias = before.attention.in_proj_weight.view(3, 8, 8), before.attention.in_proj_bias.view(3, 8)
    q, k, v = (
        (x @ weight[part][kept][:, kept].T + bias[part][kept]).view(3, 7, 2, 3).transpose(1, 2) for part in range(3)
    )
    attended = (torch.softmax(q @ k.transpose(-2, -1) / 3**0.5, -1) @ v).transpose(1, 2).reshape(3, 7, 6)
    out = attended @ before.attention.out_proj.weight[kept][:, kept].T + before.attention.out_proj.bias[kept]
    hidden = torch.relu(out @ before.hidden.weight[:, kept].T + before.hidden.bias).mean(1)
    torch.testing.assert_close(model(inputs), before.head(hidden), rtol=1e-5, atol=1e-5)


def test_a_group_norm_still_runs() -> None:
    model, inputs = zoo.Normed(), torch.randn(3, 2, 4, 4)
    remove_units(build_graph(model, inputs), unit_groups(model, inputs)[0], torch.tensor([0, 2]))
    assert (model.norm.num_channels, model.second.in_channels) == (4, 4)
    assert model(inputs).shape == (3, 3)


def test_what_was_frozen_stays_frozen() -> None:
    model, inputs = zoo.CASES["conv_norm"].make(), torch.randn(2, 1, 4, 4)
    frozen = {"conv1.weight", "bn1.bias", "bn2.weight", "head.weight"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    for group in unit_groups(model, inputs):
        remove_units(build_graph(model, inputs), group, torch.tensor([0, 3]))
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == frozen
    model(inputs).sum().backward()


def test_removing_nothing_changes_nothing() -> None:
    model, inputs = zoo.Mlp(), torch.randn(2, 6)
    before = zoo.Snapshot(model)
    remove_units(build_graph(model, inputs), unit_groups(model, inputs)[0], torch.tensor([], dtype=torch.int64))
    before.check(rng=False)


@pytest.mark.parametrize(
    ("case", "name", "units", "message"),
    [
        ("mlp", "fc1", list(range(8)), "removing 8 units of group 'fc1' would leave .* empty"),
        ("mlp", "fc1", [0, 8], r"units \[0, 8\] of group 'fc1' cannot be removed, it has 8 units"),
        ("mlp", "fc1", [-1], r"units \[-1\] of group 'fc1' cannot be removed"),
        ("branches", "left", [0, 1, 2], "removing 3 units of group 'left' would leave .* empty"),
        ("branches", "left", [6, 0, 1, 2], "removing 4 units of group 'left' would leave .* empty"),
        ("chunk", "first", [0, 1, 2, 3], "removing 4 units of group 'first' would leave .* empty"),
    ],
)
def test_impossible_removal_leaves_the_model_alone(case: str, name: str, units: list[int], message: str) -> None:
    model, inputs = zoo.CASES[case].make(), zoo.CASES[case].inputs(2)
    group = next(group for group in unit_groups(model, inputs) if group.name == name)
    graph = build_graph(model, inputs)
    before = zoo.Snapshot(model)
    with pytest.raises(PruningError, match=message):
        remove_units(graph, group, torch.tensor(units))
    before.check(rng=False)


def test_removal_from_another_model_is_refused() -> None:
    inputs = torch.randn(2, 6)
    model = zoo.Mlp()
    before = zoo.Snapshot(model)
    graph = build_graph(model, inputs)
    every = torch.arange(8)
    strangers = [
        UnitGroup("a", 8, (Port("a", every, every),), (Port("fc2", every, every),)),
        UnitGroup("fc1", 8, (Port("fc1", every, every),), (Port("head", every, every),)),
        UnitGroup("fc1", 8, (Port("fc1", every, every),), (Port("fc2", torch.arange(16), every.repeat(2)),)),
        UnitGroup("fc1", 9, (Port("fc1", torch.arange(9), torch.arange(9)),), ()),
        UnitGroup("fc1", 8, (Port("fc1", every, every), Port("fc2", every, every)), ()),
    ]
    for group in strangers:
        with pytest.raises(PruningError, match=f"group {group.name!r}"):
            remove_units(graph, group, torch.tensor([group.size - 1]))
    before.check(rng=False)


def test_stale_groups_are_refused() -> None:
    """A group whose producers have moved: the units are others now."""
    model, inputs = zoo.Mlp(), torch.randn(2, 6)
    graph, group = build_graph(model, inputs), unit_groups(model, inputs)[0]
    remove_units(graph, group, torch.tensor([0, 1]))
    for unit in (3, 7):
        with pytest.raises(PruningError, match="'fc1'"):
            remove_units(graph, group, torch.tensor([unit]))
    remove_units(graph, group.narrow(torch.arange(2, 8)), torch.tensor([5]))
    assert model.fc1.out_features == 5
