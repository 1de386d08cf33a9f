"""The search for the minimal network: against a known truth, step by step, and when something fails."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import prune

pytestmark = pytest.mark.host("torch_pruning")
pytest.importorskip("torch_pruning")

from searches import INPUTS, by_magnitude, mask_of, needing, net, same, searched, task  # noqa: E402

from nns_plugin.errors import NNSError, PruningError, SearchError, SnapshotError  # noqa: E402
from nns_plugin.models.preserve import copied  # noqa: E402
from nns_plugin.synapses.masks import synapse_mask  # noqa: E402
from nns_plugin.synapses.minimal import minimal_network  # noqa: E402
from nns_plugin.synapses.options import MinimalNetworkOptions  # noqa: E402
from nns_plugin.synapses.significance import significance  # noqa: E402
from nns_plugin.synapses.snapshot import WeightSnapshot  # noqa: E402

OPTIONS = MinimalNetworkOptions(schedule=(0.5, 0.2, 0.05), max_drop=0.05, max_steps=14)


def at_random(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.rand_like(score) for name, score in by_magnitude(model).items()}


@pytest.mark.parametrize("scores", [by_magnitude, at_random])
@pytest.mark.parametrize("global_pruning", [True, False])
@pytest.mark.parametrize("by_unit", [True, False])
@pytest.mark.parametrize("schedule", [(0.5, 0.2, 0.05), (0.9,), ()])
def test_exactly_the_needed_synapses_remain_whatever_the_scores(
    scores: Any, global_pruning: bool, by_unit: bool, schedule: tuple[float, ...]
) -> None:
    needed = [1, 6, 14, 20, 23]
    found = searched(
        net(), needing(needed), scores=scores, global_pruning=global_pruning, by_unit=by_unit, schedule=schedule
    )
    assert mask_of(found.masked).nonzero().flatten().tolist() == needed
    assert found.finished
    accepted = [step for step in found.steps if step.accepted]
    assert sum(step.removed for step in accepted) == 25
    assert [step.left for step in accepted] == (30 - np.cumsum([step.removed for step in accepted])).tolist()
    assert all(step.value == float(step.accepted) for step in found.steps)


def test_the_steps_of_a_search_by_hand() -> None:
    """30 synapses, the 8 largest are needed: blocks of a half, then of a tenth, then one by one."""
    model = net()
    scores = torch.cat([score.flatten() for score in by_magnitude(model).values()])
    needed = scores.argsort()[-8:].tolist()
    found = searched(model, needing(needed), schedule=(0.5, 0.1))
    tried = [(step.removed, step.left, step.accepted) for step in found.steps]
    blocks = [(15, 15, True), (8, 7, False), (2, 13, True), (1, 12, True), (1, 11, True), (1, 10, True), (1, 9, True)]
    assert tried == [*blocks, (1, 8, True), (1, 7, False), *[(1, 7, False)] * 8]


def test_equal_shares_of_each_layer() -> None:
    found = searched(net(), lambda model: 1.0, schedule=(0.5,), one_by_one=False, global_pruning=False, max_steps=1)
    assert [int(synapse_mask(layer).sum()) for layer in (found.masked[0], found.masked[2])] == [10, 5]


def test_the_lowest_are_removed_first_and_masked_ones_stay_masked() -> None:
    model = net()
    prune.l1_unstructured(model[0], "weight", 6)
    before = synapse_mask(model[0]).clone()
    found = searched(model, lambda model: 1.0, schedule=(0.5,), max_steps=1)
    scores = torch.cat([score.flatten() for score in by_magnitude(model).values()])
    there = mask_of(model)
    order = there.nonzero().flatten()[scores[there].argsort()]
    assert set(order[12:].tolist()) == set(mask_of(found.masked).nonzero().flatten().tolist())
    assert not bool((synapse_mask(found.masked[0]) & ~before).any())
    assert not found.finished


def test_the_default_scores_are_the_significance() -> None:
    model, before = net(), WeightSnapshot(net(1))
    scores = torch.cat([score.flatten() for score in significance(model, before).values()])
    found = searched(model, lambda model: 1.0, before, None, schedule=(0.5,), max_steps=1)
    assert set(mask_of(found.masked).nonzero().flatten().tolist()) == set(scores.argsort()[15:].tolist())
    with pytest.raises(PruningError, match="neither a snapshot nor scores"):
        searched(model, lambda model: 1.0, None, None)
    with pytest.raises(SnapshotError, match="does not fit the model"):
        searched(model, lambda model: 1.0, WeightSnapshot(nn.Linear(2, 2)), None)


def test_it_stops_at_a_number_of_synapses() -> None:
    found = searched(net(), lambda model: 1.0, schedule=(0.5, 0.1), min_synapses=4)
    assert (int(mask_of(found.masked).sum()), found.finished) == (4, False)
    assert [step.removed for step in found.steps] == [15, 8, 3]


def test_a_drop_may_be_allowed() -> None:
    """Accuracy is the share of remaining synapses."""
    found = searched(net(), lambda model: float(mask_of(model).double().mean()), max_drop=0.31, schedule=(0.5, 0.1))
    assert int(mask_of(found.masked).sum()) == 21
    assert (found.reference, found.value) == (1.0, 0.7)


def test_pruned_synapses_stay_at_zero_through_training_and_runs_repeat() -> None:
    model, before, train, evaluate = task()
    found = minimal_network(model, before, train, evaluate, example_inputs=INPUTS, options=OPTIONS)
    assert any(step.accepted for step in found.steps)
    assert any(not step.accepted for step in found.steps)
    kept = mask_of(found.masked)
    further = copied(found.masked)
    train(further)
    weights = torch.cat([layer.weight.flatten() for layer in further if isinstance(layer, nn.Linear)])
    assert bool((weights[~kept] == 0).all())
    assert bool((weights[kept] != 0).all())
    torch.manual_seed(99)  # the global random state does not matter
    assert same(found, minimal_network(model, before, train, evaluate, example_inputs=INPUTS, options=OPTIONS))
    other = minimal_network(model, before, train, evaluate, example_inputs=INPUTS, options=replace(OPTIONS, seed=1))
    assert [step.value for step in other.steps] != [step.value for step in found.steps]


def test_errors_in_later_steps_are_errors_of_the_search(tmp_path: Path) -> None:
    calls = 0

    def forgetful(model: nn.Module) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        found = by_magnitude(model)
        return found if calls < 4 else {"0": found["0"]}

    with pytest.raises(SearchError, match=r"scores returned the layers 0; expected 0, 2, as before") as caught:
        searched(net(), lambda model: 1.0, scores=forgetful, schedule=(0.2,))
    assert [step.left for step in caught.value.steps] == [24, 19]
    assert int(mask_of(caught.value.accepted).sum()) == 19
    with pytest.raises(SearchError, match="evaluate returned nan") as caught:
        searched(net(), lambda model: float("nan"), checkpoint=tmp_path / "none")
    assert int(mask_of(caught.value.accepted).sum()) == 30
    assert "call again" not in str(caught.value)


@pytest.mark.parametrize("culprit", ["train", "nan", "text", "evaluate", "masks"])
def test_a_failure_returns_the_last_accepted_network(culprit: str, tmp_path: Path) -> None:
    calls = 0

    def counted() -> bool:
        nonlocal calls
        calls += 1
        return calls == 3

    def train(model: nn.Module) -> None:
        if culprit in ("train", "masks") and counted():
            if culprit == "train":
                raise ZeroDivisionError("no more")
            mask = model[0].weight_mask.view(-1)
            mask[(mask == 0).nonzero()[0]] = 1  # a single synapse

    def evaluate(model: nn.Module) -> Any:
        if culprit in ("nan", "text", "evaluate") and counted():
            if culprit == "evaluate":
                raise ZeroDivisionError("no more")
            return "0.9" if culprit == "text" else float("nan")
        return 1.0

    messages = {
        "train": "train raised ZeroDivisionError: no more",
        "nan": "evaluate returned nan; expected a finite number",
        "text": "evaluate returned '0.9'; expected a finite number",
        "evaluate": "evaluate raised ZeroDivisionError",
        "masks": "train returned .* synapses, but it was given .*not restore more",
    }
    file = tmp_path / "search.safetensors"
    options = MinimalNetworkOptions(schedule=(0.2,), checkpoint=file)
    with pytest.raises(SearchError, match=messages[culprit]) as caught:
        minimal_network(net(), None, train, evaluate, example_inputs=INPUTS, scores=by_magnitude, options=options)
    accepted = {"train": 2, "masks": 2}.get(culprit, 1)
    left = [24, 19][accepted - 1]
    assert int(mask_of(caught.value.accepted).sum()) == left
    assert f"with {left} synapses" in str(caught.value)
    assert str(file) in str(caught.value)
    assert int(sum(value.sum() for name, value in load_file(file).items() if name.endswith("_mask"))) == left


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": (0.1, 0.5)}, "expected decreasing shares"),
        ({"schedule": (1.0,)}, r"shares in \(0, 1\)"),
        ({"schedule": (), "one_by_one": False}, "nothing would be tried"),
        ({"max_drop": -1.0}, "max_drop is -1.0"),
        ({"max_drop": float("nan")}, "max_drop is nan"),
        ({"min_synapses": -1}, "min_synapses is -1"),
        ({"schedule": 0.5}, "schedule is 0.5; expected decreasing shares"),
        ({"seed": -1}, "seed is -1; expected a whole number"),
        ({"scores": lambda model: {"0": np.zeros((5, 4))}}, "the scores of '0' are a ndarray; expected a tensor"),
        ({"scores": lambda model: {"9": torch.zeros(1)}}, "no module '9'"),
        ({"scores": lambda model: {"0": torch.zeros(1)}}, "but its weight is"),
        ({"scores": lambda model: {"0": torch.full((5, 4), torch.nan)}}, "not all finite"),
        ({"scores": lambda model: torch.zeros(1)}, "scores returned a Tensor"),
        ({"scores": lambda model: {}}, "expected scores by name of the layer"),
    ],
)
def test_invalid_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(NNSError, match=message):
        searched(net(), lambda model: 1.0, **options)


def test_the_model_and_the_random_states_are_not_changed() -> None:
    model, before, train, evaluate = task()
    model.train()
    state = copy.deepcopy(model.state_dict())
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    minimal_network(model, before, train, evaluate, example_inputs=INPUTS, options=OPTIONS)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())


def test_the_compact_model_computes_what_the_masked_one_does() -> None:
    needed = [1, 6, 20, 23]  # unit 0 reads input 1, unit 1 reads input 2; outputs read units 0 and 3
    found = searched(net(), needing(needed))
    x = torch.randn(20, 4)
    assert torch.allclose(found.compact(x), found.masked(x), atol=1e-5)
    assert found.features is not None
    assert found.features.tolist() == [1]
    assert found.model[0].weight.shape == (1, 1)
    assert found.synapses == 2  # unit 1 is not read, and unit 3 is a constant


def test_units_of_ignored_layers_are_kept() -> None:
    found = searched(net(), needing([1, 20]), ignored_layers=["0"])
    assert found.model[0].weight.shape == (5, 1)
    assert found.synapses == 2
