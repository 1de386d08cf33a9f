"""The search for the minimal network: against a made-up truth, step by step, and through interruptions."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune

pytestmark = pytest.mark.host("torch_pruning")
pytest.importorskip("torch_pruning")

from nns_plugin.adapters.torch_pruning.graph import unit_groups  # noqa: E402
from nns_plugin.errors import CheckpointError, NNSError, PruningError, SearchError, SnapshotError  # noqa: E402
from nns_plugin.models.preserve import copied  # noqa: E402
from nns_plugin.synapses.by_unit import scores_by_unit  # noqa: E402
from nns_plugin.synapses.masks import significance, synapse_mask  # noqa: E402
from nns_plugin.synapses.minimal import MinimalNetwork, minimal_network  # noqa: E402
from nns_plugin.synapses.snapshot import WeightSnapshot  # noqa: E402

INPUTS = torch.zeros(1, 4)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def mask_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([synapse_mask(layer).flatten() for layer in model if isinstance(layer, nn.Linear)])


def needing(positions: list[int]) -> Callable[[nn.Module], float]:
    """Right with exactly the network that has all of some synapses."""
    return lambda model: float(mask_of(model)[positions].all())


def idle(model: nn.Module) -> None:
    """Training that changes nothing."""


def by_magnitude(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weights_of(layer).abs() for name, layer in model.named_children() if isinstance(layer, nn.Linear)}


def weights_of(layer: nn.Module) -> torch.Tensor:
    return getattr(layer, "weight_orig", layer.weight).detach()


def at_random(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.rand_like(score) for name, score in by_magnitude(model).items()}


def searched(
    model: nn.Module, evaluate: Callable[[nn.Module], float], snapshot: WeightSnapshot | None = None, **options: Any
) -> MinimalNetwork:
    defaults = {"example_inputs": INPUTS, "scores": by_magnitude}
    return minimal_network(model, snapshot, idle, evaluate, **{**defaults, **options})


@pytest.mark.parametrize("scores", [by_magnitude, at_random])
@pytest.mark.parametrize("global_pruning", [True, False])
@pytest.mark.parametrize("by_unit", [True, False])
@pytest.mark.parametrize("schedule", [(0.5, 0.2, 0.05), (0.9,), ()])
def test_just_what_is_needed_is_left_whatever_the_scores(
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


def test_the_lowest_go_first_and_masked_ones_stay_masked() -> None:
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
    found = minimal_network(model, before, idle, lambda model: 1.0, example_inputs=INPUTS, schedule=(0.5,), max_steps=1)
    assert set(mask_of(found.masked).nonzero().flatten().tolist()) == set(scores.argsort()[15:].tolist())
    with pytest.raises(PruningError, match="neither a snapshot nor scores"):
        minimal_network(model, None, idle, lambda model: 1.0, example_inputs=INPUTS)
    with pytest.raises(SnapshotError, match="does not fit the model"):
        minimal_network(model, WeightSnapshot(nn.Linear(2, 2)), idle, lambda model: 1.0, example_inputs=INPUTS)


def test_it_stops_at_a_number_of_synapses() -> None:
    found = searched(net(), lambda model: 1.0, schedule=(0.5, 0.1), least=4)
    assert (int(mask_of(found.masked).sum()), found.finished) == (4, False)
    assert [step.removed for step in found.steps] == [15, 8, 3]


def test_a_drop_may_be_allowed() -> None:
    """Accuracy is the share of synapses that are left."""
    found = searched(net(), lambda model: float(mask_of(model).double().mean()), max_drop=0.31, schedule=(0.5, 0.1))
    assert int(mask_of(found.masked).sum()) == 21
    assert (found.reference, found.value) == (1.0, 0.7)


def task(seed: int = 0) -> tuple[nn.Module, WeightSnapshot, Callable[[nn.Module], None], Callable[[nn.Module], float]]:
    """A small problem with randomness from three generators."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 4, generator=generator)
    y = (x[:, 0] * x[:, 1] > 0).long()
    model = net(seed)
    before = WeightSnapshot(model)

    def train(model: nn.Module) -> None:
        optimizer = torch.optim.SGD(model.parameters(), 0.5 + random.random() / 10, momentum=0.9)
        for _ in range(30):
            rows = torch.from_numpy(np.random.permutation(200)[:100])
            noise = 0.01 * torch.randn(100, 4)
            loss = nn.functional.cross_entropy(model(x[rows] + noise), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def evaluate(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model(x).argmax(1) == y).double().mean())

    with torch.random.fork_rng():
        random.seed(0)
        np.random.seed(0)
        train(model)
    return model, before, train, evaluate


OPTIONS: dict[str, Any] = {"example_inputs": INPUTS, "schedule": (0.5, 0.2, 0.05), "max_drop": 0.05, "max_steps": 14}


def same(left: MinimalNetwork, right: MinimalNetwork) -> bool:
    states = left.masked.state_dict(), right.masked.state_dict()
    return left.steps == right.steps and all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_pruned_synapses_stay_at_zero_through_training_and_runs_repeat() -> None:
    model, before, train, evaluate = task()
    found = minimal_network(model, before, train, evaluate, **OPTIONS)
    assert any(step.accepted for step in found.steps)
    assert any(not step.accepted for step in found.steps)
    kept = mask_of(found.masked)
    further = copied(found.masked)
    train(further)
    weights = torch.cat([layer.weight.flatten() for layer in further if isinstance(layer, nn.Linear)])
    assert bool((weights[~kept] == 0).all())
    assert bool((weights[kept] != 0).all())
    torch.manual_seed(99)  # the state of the generators outside does not matter
    assert same(found, minimal_network(model, before, train, evaluate, **OPTIONS))
    other = minimal_network(model, before, train, evaluate, **OPTIONS, seed=1)
    assert [step.value for step in other.steps] != [step.value for step in found.steps]


@pytest.mark.parametrize("fails_at", [0, 1, 3, 6])
def test_a_search_that_was_interrupted_ends_as_if_it_had_not_been(fails_at: int, tmp_path: Path) -> None:
    model, before, train, evaluate = task()
    whole = minimal_network(model, before, train, evaluate, **OPTIONS)
    file = tmp_path / "search.safetensors"
    calls = 0

    def killed(model: nn.Module) -> None:
        nonlocal calls
        calls += 1
        train(model)
        if calls == fails_at + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        minimal_network(model, before, killed, evaluate, **OPTIONS, checkpoint=file)
    assert file.exists()
    again = minimal_network(model, before, train, evaluate, **OPTIONS, checkpoint=file)
    assert same(whole, again)

    def untouchable(model: nn.Module) -> None:
        raise AssertionError("a search that has ended trains nothing")

    assert same(whole, minimal_network(model, before, untouchable, evaluate, **OPTIONS, checkpoint=file))


def test_what_is_an_error_later_is_one_of_the_search(tmp_path: Path) -> None:
    calls = 0

    def forgetful(model: nn.Module) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        found = by_magnitude(model)
        return found if calls < 4 else {"0": found["0"]}

    with pytest.raises(SearchError, match=r"scores are of 0, and were of 0, 2 before") as caught:
        searched(net(), lambda model: 1.0, scores=forgetful, schedule=(0.2,))
    assert [step.left for step in caught.value.steps] == [24, 19]
    assert int(mask_of(caught.value.accepted).sum()) == 19
    with pytest.raises(SearchError, match="evaluate returned nan") as caught:
        searched(net(), lambda model: float("nan"), checkpoint=tmp_path / "none")
    assert int(mask_of(caught.value.accepted).sum()) == 30
    assert "call again" not in str(caught.value)


def test_modes_that_evaluate_leaves_behind_do_not_matter(tmp_path: Path) -> None:
    """With batch norm and dropout, an evaluation in evaluation mode, and a training that sets no mode."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 2))
    x, y = torch.randn(64, 4), torch.arange(64) % 2
    seen: list[bool] = []

    def train(model: nn.Module) -> None:
        seen.append(model.training)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    def evaluate(model: nn.Module) -> float:
        model.eval()
        with torch.no_grad():
            return -float(nn.functional.cross_entropy(model(x), y))

    options: dict[str, Any] = {"example_inputs": x[:2], "scores": by_magnitude, "schedule": (0.2,), "max_drop": 1.0}
    whole = minimal_network(model, None, train, evaluate, **options, max_steps=5)
    assert seen == [True] * 5
    for steps in (2, 5):
        again = minimal_network(model, None, train, evaluate, **options, max_steps=steps, checkpoint=tmp_path / "file")
    assert same(whole, again)


@pytest.mark.parametrize("culprit", ["train", "nan", "text", "evaluate", "masks"])
def test_what_fails_leaves_the_last_accepted_network(culprit: str, tmp_path: Path) -> None:
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
        "masks": "train left .* synapses of .*not bring more back",
    }
    file = tmp_path / "search.safetensors"
    with pytest.raises(SearchError, match=messages[culprit]) as caught:
        minimal_network(
            net(), None, train, evaluate, example_inputs=INPUTS, scores=by_magnitude, schedule=(0.2,), checkpoint=file
        )
    accepted = {"train": 2, "masks": 2}.get(culprit, 1)
    left = [24, 19][accepted - 1]
    assert int(mask_of(caught.value.accepted).sum()) == left
    assert f"with {left} synapses" in str(caught.value)
    assert str(file) in str(caught.value)
    assert int(sum(value.sum() for name, value in load_file(file).items() if name.endswith("_mask"))) == left


def forge(file: Path, change: dict[str, Any]) -> None:
    """Change the progress that a checkpoint tells of."""
    with safe_open(file, "pt") as content:
        metadata, tensors = dict(content.metadata()), {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    header = json.loads(metadata["nns"])
    header["progress"] |= change
    save_file(tensors, file, metadata={**metadata, "nns": json.dumps(header)})


def test_a_checkpoint_of_another_search_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "search.safetensors"
    options: dict[str, Any] = {"schedule": (0.5,), "max_steps": 1, "checkpoint": file}
    searched(net(), lambda model: 1.0, **options)
    content = file.read_bytes()
    with pytest.raises(CheckpointError, match=r"belongs to another search: its options"):
        searched(net(), lambda model: 1.0, **options, seed=3)
    with pytest.raises(CheckpointError, match=r"belongs to another search: its parent"):
        searched(net(1), lambda model: 1.0, **options)
    snapshots = [WeightSnapshot(net(seed)) for seed in (1, 2)]
    with pytest.raises(CheckpointError, match=r"belongs to another search: its snapshot is scores"):
        searched(net(), lambda model: 1.0, **{**options, "scores": None}, snapshot=snapshots[0])
    assert file.read_bytes() == content
    file.write_bytes(content[:200])
    with pytest.raises(CheckpointError, match="is damaged"):
        searched(net(), lambda model: 1.0, **options)
    save_file({"weight": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="its format is None, expected 'nns-plugin minimal network 1'"):
        searched(net(), lambda model: 1.0, **options)
    metadata = {"format": "nns-plugin minimal network 1", "nns": json.dumps({"parent": "x"})}
    save_file({"weight": torch.zeros(1)}, file, metadata=metadata)
    with pytest.raises(CheckpointError, match="damaged"):
        searched(net(), lambda model: 1.0, **options)
    for change in ({"rung": 99}, {"rung": -1}, {"rung": "x"}, {"tried": "abc"}, {"reference": float("nan")}):
        file.write_bytes(content)
        forge(file, change)
        with pytest.raises(CheckpointError, match="damaged"):
            searched(net(), lambda model: 1.0, **options)
    with pytest.raises(NNSError, match="choose a folder that exists"):
        searched(net(), lambda model: 1.0, **{**options, "checkpoint": tmp_path / "no" / "file"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": (0.1, 0.5)}, "expected falling shares"),
        ({"schedule": (1.0,)}, r"shares in \(0, 1\)"),
        ({"schedule": (), "one_by_one": False}, "nothing would be tried"),
        ({"max_drop": -1.0}, "max_drop is -1.0"),
        ({"max_drop": float("nan")}, "max_drop is nan"),
        ({"least": -1}, "least -1"),
        ({"schedule": 0.5}, "schedule is 0.5; expected falling shares"),
        ({"seed": -1}, "seed is -1; expected a whole number"),
        ({"scores": lambda model: {"0": np.zeros((5, 4))}}, "the scores of '0' are a ndarray; expected a tensor"),
        ({"scores": lambda model: {"9": torch.zeros(1)}}, "no module '9'"),
        ({"scores": lambda model: {"0": torch.zeros(1)}}, "but its weight is"),
        ({"scores": lambda model: {"0": torch.full((5, 4), torch.nan)}}, "not all finite"),
        ({"scores": lambda model: torch.zeros(1)}, "scores returned a Tensor"),
        ({"scores": lambda model: {}}, "expected scores for the names of layers"),
    ],
)
def test_wrong_options_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(NNSError, match=message):
        searched(net(), lambda model: 1.0, **options)


def test_the_model_and_the_random_states_are_left_as_they_are() -> None:
    model, before, train, evaluate = task()
    model.train()
    state = copy.deepcopy(model.state_dict())
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    minimal_network(model, before, train, evaluate, **OPTIONS)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())


def test_the_compact_model_answers_as_the_masked_one() -> None:
    needed = [1, 6, 20, 23]  # unit 0 reads input 1, unit 1 reads input 2; outputs read units 0 and 3
    found = searched(net(), needing(needed))
    x = torch.randn(20, 4)
    assert torch.allclose(found.compact(x), found.masked(x), atol=1e-5)
    assert found.features is not None
    assert found.features.tolist() == [1]
    assert found.model[0].weight.shape == (1, 1)
    assert found.synapses == 2  # unit 1 is not read, and unit 3 is a constant


def test_units_of_layers_that_are_to_stay_whole_stay() -> None:
    found = searched(net(), needing([1, 20]), ignored_layers=["0"])
    assert found.model[0].weight.shape == (5, 1)
    assert found.synapses == 2


def test_convolutions_go_by_unit_along_their_own_axes() -> None:
    """As many in- as out-positions, so that an axis taken for the other would not be told by a shape."""
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.ConvTranspose2d(2, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1))
    groups = unit_groups(model, torch.zeros(1, 2, 3, 3))
    scores = {
        "0": torch.tensor([[1.0, 2.0], [10.0, 20.0]]),  # [out, in]
        "2": torch.tensor([[3.0, 300.0], [4.0, 400.0]]),  # [in, out]
        "4": torch.tensor([[5.0, 50.0], [6.0, 60.0]]),  # [out, in]
    }
    masks = {name: torch.ones_like(score, dtype=torch.bool)[..., None, None] for name, score in scores.items()}
    found = scores_by_unit(model, groups, {name: score[..., None, None] for name, score in scores.items()}, masks)
    first = [1 + 2 + 3 + 300, 10 + 20 + 4 + 400]
    second = [3 + 4 + 5 + 6, 300 + 400 + 50 + 60]
    expected = {
        "0": [[unit] * 2 for unit in first],
        "2": [[min(a, b) for b in second] for a in first],
        "4": [second] * 2,
    }
    for name, values in expected.items():
        assert torch.allclose(found[name][..., 0, 0], torch.tensor(values).double(), atol=1e-2)


def test_scores_by_unit_by_hand() -> None:
    """3 - 2 - 2: hidden unit totals are sums over what writes and what reads them; a masked synapse does not count."""
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    groups = unit_groups(model, torch.zeros(1, 3))
    scores = {
        "0": torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.5, 0.5]]),
        "2": torch.tensor([[1.0, 4.0], [2.0, 0.0]]),
    }
    masks = {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
    masks["0"][0, 2] = False
    found = scores_by_unit(model, groups, scores, masks)
    first, second = 1 + 2 + 1 + 2, 0.5 * 3 + 4
    assert torch.allclose(found["0"], torch.tensor([[first] * 3, [second] * 3]).double(), atol=1e-4)
    assert torch.allclose(found["2"], torch.tensor([[first, second]] * 2).double(), atol=1e-4)
    assert found["0"][0, 0] < found["0"][0, 1]
    assert found["2"][1, 1] < found["2"][0, 1]


def test_a_synapse_between_hidden_units_counts_for_the_weaker_one() -> None:
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    groups = unit_groups(model, torch.zeros(1, 1))
    scores = {
        "0": torch.tensor([[1.0], [2.0]]),
        "2": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        "4": torch.tensor([[1.0, 2.0]]),
    }
    masks = {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
    found = scores_by_unit(model, groups, scores, masks)
    left, right = (1 + 1 + 3, 2 + 2 + 4), (1 + 2 + 1, 3 + 4 + 2)
    expected = [[min(a, b) for a in left] for b in right]
    assert torch.allclose(found["2"], torch.tensor(expected).double(), atol=1e-4)
