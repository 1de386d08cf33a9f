"""Weight significance factor: units against sums counted by hand, and through torch-pruning's removals."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune

from nns_plugin import Port, UnitGroup
from nns_plugin.criteria import WSF
from nns_plugin.errors import CriterionError, SnapshotError
from nns_plugin.synapses.significance import significance
from nns_plugin.synapses.snapshot import WeightSnapshot


def trained_on(model: nn.Module, seed: int = 1, scale: float = 0.3) -> nn.Module:
    """Weights that have moved."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(scale * torch.randn(value.shape, generator=generator))
    return model


def group_of(case: Any, zoo: Any, name: str) -> UnitGroup:
    found: UnitGroup = next(group for group in zoo.groups_of(case) if group.name == name)
    return found


REDUCTIONS = {
    "sum": lambda rows: rows.sum(0),
    "mean": lambda rows: rows.sum(0) / (rows > 0).sum(0),
    "max": lambda rows: rows.max(0),
    "first": lambda rows: np.array([column[column > 0][0] for column in rows.T]),
}


@pytest.mark.parametrize("reduction", list(REDUCTIONS))
def test_units_of_convolutions_are_sums_of_their_synapses(zoo: Any, reduction: Any) -> None:
    """A residual net: two producers, three consumers of one group; a flatten and a grouped convolution."""
    torch.manual_seed(0)
    model = zoo.CASES["residual"].make()
    before = WeightSnapshot(model)
    start = {name: value.detach().numpy().copy() for name, value in model.named_parameters()}
    trained_on(model)
    delta = {name: np.abs(value.detach().numpy() - start[name]) for name, value in model.named_parameters()}
    group = group_of("residual", zoo, "stem")
    rows = np.stack(
        [
            delta["stem.weight"].sum((1, 2, 3)),
            delta["outer.weight"].sum((1, 2, 3)),
            delta["inner.weight"].sum((0, 2, 3)),
            delta["side.weight"].sum((0, 2, 3)),
            delta["head.weight"].sum(0)[:6],
        ]
    )
    found = WSF(model, before, reduction)(group)
    assert found is not None
    assert np.allclose(found.numpy(), REDUCTIONS[reduction](rows), rtol=1e-5)


def test_flattened_and_grouped_readers(zoo: Any) -> None:
    torch.manual_seed(0)
    flat = zoo.CASES["conv_norm"].make()
    before = WeightSnapshot(flat)
    head = flat.head.weight.detach().clone()
    trained_on(flat)
    with torch.no_grad():
        flat.conv2.weight.copy_(before.weights["conv2.weight"])
    moved = (flat.head.weight - head).abs().detach().reshape(head.shape[0], 6, 4).sum((0, 2)).double()
    found = WSF(flat, before, "sum")(group_of("conv_norm", zoo, "conv2"))
    assert torch.allclose(found, moved, rtol=1e-5)
    grouped = zoo.CASES["grouped"].make()
    before = WeightSnapshot(grouped)
    weight = grouped.grouped.weight
    with torch.no_grad():
        weight.add_(torch.arange(weight.numel()).reshape(weight.shape).float())
    steps = torch.arange(weight.numel()).reshape(weight.shape).double().flatten(2).sum(2)  # [O, C / G]
    found = WSF(grouped, before, "sum")(group_of("grouped", zoo, "first"))
    assert torch.allclose(found, steps.sum(0), rtol=1e-5)  # equal offsets of all groups are one unit


@pytest.mark.parametrize("reduction", list(REDUCTIONS))
def test_each_unit_counts_the_layers_that_touch_it(reduction: Any) -> None:
    """A concatenation: two layers write different units of one group, and one of them is read by a second consumer."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 1), "r": nn.Linear(3, 2), "s": nn.Linear(2, 2)})
    before = WeightSnapshot({name: torch.zeros_like(value) for name, value in model.state_dict().items()})
    every, two = torch.arange(3), torch.arange(2)
    group = UnitGroup(
        "a", 3, (Port("a", two, two), Port("b", two[:1], every[2:])), (Port("r", every, every), Port("s", two, two))
    )
    weights = {name: np.abs(layer.weight.detach().double().numpy()) for name, layer in model.items()}
    rows = np.zeros((4, 3))
    rows[0, :2], rows[1, 2] = weights["a"].sum(1), weights["b"].sum(1)[0]
    rows[2], rows[3, :2] = weights["r"].sum(0), weights["s"].sum(0)
    found = WSF(model, before, reduction)(group)
    assert found is not None
    assert np.allclose(found.numpy(), REDUCTIONS[reduction](rows), rtol=1e-6)


def pair() -> tuple[nn.Sequential, UnitGroup]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    units = torch.arange(5)
    return model, UnitGroup("0", 5, (Port("0", units, units),), (Port("2", units, units),))


@given(scale=st.floats(0.01, 100), seed=st.integers(0, 100))
def test_properties(scale: float, seed: int) -> None:
    """No movement gives 0; scaling both checkpoints scales it; permuting the units permutes it."""
    model, group = pair()
    before = WeightSnapshot(model)
    assert torch.equal(WSF(model, before)(group), torch.zeros(5, dtype=torch.float64))
    trained_on(model, seed)
    scores = WSF(model, before)(group)
    larger = copy.deepcopy(model)
    with torch.no_grad():
        for value in larger.parameters():
            value.mul_(scale)
    scaled = WeightSnapshot({name: value * scale for name, value in before.weights.items()})
    assert torch.allclose(WSF(larger, scaled)(group), scale * scores, rtol=1e-3)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))

    def permuted(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            "0.weight": values["0.weight"][order],
            "0.bias": values["0.bias"][order],
            "2.weight": values["2.weight"][:, order],
            "2.bias": values["2.bias"],
        }

    shuffled = copy.deepcopy(model)
    shuffled.load_state_dict(permuted(dict(model.state_dict())))
    assert torch.allclose(WSF(shuffled, WeightSnapshot(permuted(before.weights)))(group), scores[order], rtol=1e-6)


def test_biases_are_no_synapses() -> None:
    model, group = pair()
    before = WeightSnapshot(model)
    with torch.no_grad():
        model[0].bias.add_(5)
        model[2].bias.add_(5)
    assert torch.equal(WSF(model, before, "sum")(group), torch.zeros(5, dtype=torch.float64))


def test_a_masked_weight_is_what_lies_behind_the_mask() -> None:
    model, _ = pair()
    before = WeightSnapshot(model)
    prune.l1_unstructured(model[0], "weight", 0.5)
    assert not bool(before.movement(model)["0.weight"].any())
    masked = WeightSnapshot(model)
    assert set(masked.weights) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_files(tmp_path: Path) -> None:
    model, group = pair()
    before = WeightSnapshot(model)
    path = before.save(tmp_path / "before.safetensors")
    trained_on(model)
    again = WeightSnapshot.load(path)
    assert torch.equal(WSF(model, again)(group), WSF(model, before)(group))
    save_file(dict(model.state_dict()), tmp_path / "checkpoint.safetensors")  # any checkpoint will do
    assert not bool(WSF(model, WeightSnapshot.load(tmp_path / "checkpoint.safetensors"))(group).any())
    with pytest.raises(SnapshotError, match="there is no file"):
        WeightSnapshot.load(tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:50])
    with pytest.raises(SnapshotError, match="is damaged or not a safetensors file"):
        WeightSnapshot.load(tmp_path / "cut.safetensors")
    with pytest.raises(SnapshotError, match="choose a folder that exists"):
        before.save(tmp_path / "none" / "x.safetensors")


def test_a_snapshot_that_does_not_fit_is_an_error() -> None:
    model, group = pair()
    with pytest.raises(SnapshotError, match=r"'0.weight' is \[5, 4\] in it and \[5, 3\] in the model"):
        WSF(model, WeightSnapshot(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))))(group)
    with pytest.raises(SnapshotError, match="'0.weight' is not in it, '0.bias' is not in it.* and 1 more"):
        WSF(model, WeightSnapshot(nn.Linear(3, 5)))(group)
    with pytest.raises(SnapshotError, match="there are no weights"):
        WeightSnapshot(nn.ReLU())
    with pytest.raises(SnapshotError, match=r"given a str; expected a model, .* WeightSnapshot.load\(file\)"):
        WeightSnapshot("before.safetensors")  # type: ignore[arg-type]
    with pytest.raises(CriterionError, match="reduction is 'median'; it must be one of mean, sum, max, first"):
        WSF(model, WeightSnapshot(model), "median")  # type: ignore[arg-type]


@pytest.mark.host("torch_pruning")
@pytest.mark.parametrize("case", ["mlp", "conv_norm", "residual", "concat", "grouped", "depthwise", "transposed"])
def test_the_snapshot_follows_iterative_pruning_with_training_in_between(zoo: Any, case: str) -> None:
    """What is left of the snapshot is what the units that are left had: marked by numbers in a copy."""
    tp = pytest.importorskip("torch_pruning")
    from nns_plugin.adapters.torch_pruning import WSFImportance

    torch.manual_seed(0)
    model = zoo.CASES[case].make().eval()
    importance = WSFImportance(WeightSnapshot(model))
    start = copy.deepcopy(model)
    trained_on(model)
    inputs = zoo.CASES[case].inputs(2)
    pruner = tp.pruner.BasePruner(
        model,
        inputs,
        importance=importance,
        pruning_ratio=0.6,
        iterative_steps=3,
        ignored_layers=[model.head],
        **zoo.fresh_arguments(),
    )
    for _ in range(3):
        pruner.step()
        trained_on(model, 2)
    left = importance.snapshot
    assert significance(model, left).keys() == significance(start, WeightSnapshot(start)).keys()
    replayed = tp.DependencyGraph().build_dependency(start, inputs)
    replayed.load_pruning_history(pruner.DG.pruning_history())
    expected = dict(start.named_parameters())
    assert set(left.weights) == set(expected)
    assert sum(value.numel() for value in model.parameters()) == sum(value.numel() for value in left.weights.values())
    for name, value in expected.items():
        assert torch.equal(left.weights[name], value), name
    pickle.loads(pickle.dumps(importance))


@pytest.mark.host("torch_pruning")
def test_removals_that_cannot_be_followed_are_errors(zoo: Any) -> None:
    tp = pytest.importorskip("torch_pruning")
    from nns_plugin.adapters.torch_pruning import WSFImportance

    torch.manual_seed(0)
    model = zoo.CASES["mlp"].make().eval()
    importance = WSFImportance(WeightSnapshot(model))
    graph = tp.DependencyGraph().build_dependency(model, torch.randn(2, 6))
    importance(graph.get_pruning_group(model.fc1, tp.prune_linear_out_channels, list(range(8))))
    graph.get_pruning_group(model.fc2, tp.prune_linear_out_channels, [0]).prune()
    again = next(iter(graph.get_all_groups(ignored_layers=[model.head])))
    with pytest.raises(SnapshotError, match="take a new snapshot"):
        importance(again)
