"""Masks on single weights: the lowest scores are pruned, and pruned weights stay pruned."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from nns_plugin.errors import NNSError, PruningError, SnapshotError
from nns_plugin.synapses.exchange import exchange_synapses, synapse_gradients
from nns_plugin.synapses.masks import prune_synapses, synapse_mask
from nns_plugin.synapses.significance import significance
from nns_plugin.synapses.snapshot import WeightSnapshot


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4))


def test_significance_is_the_movement_of_the_weights_only() -> None:
    model = net()
    before = WeightSnapshot(model)
    start = {name: value.detach().numpy().copy() for name, value in model.named_parameters()}
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(-2)
    found = significance(model, before)
    assert set(found) == {"0", "3"}
    for name, score in found.items():
        assert np.allclose(score.numpy(), 3 * np.abs(start[f"{name}.weight"]), rtol=1e-6)
    with pytest.raises(SnapshotError, match="does not fit the model"):
        significance(nn.Linear(3, 3), before)


def random_scores(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(module.weight.shape, generator=generator)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }


@given(amount=st.floats(0, 1), seed=st.integers(0, 50))
def test_a_share_of_each_layer(amount: float, seed: int) -> None:
    model = net()
    scores = random_scores(model, seed)  # some are negative: the lowest are pruned, not those nearest to 0
    removed = prune_synapses(model, scores, amount=amount)
    for name, score in scores.items():
        kept = synapse_mask(model.get_submodule(name)).numpy().ravel()
        order = np.argsort(score.numpy().ravel())
        count = round(amount * score.numel())
        assert removed[name] == count == (~kept).sum()
        assert set(np.flatnonzero(~kept)) == set(order[:count])


def test_all_layers_together_in_two_calls() -> None:
    model = net()
    scores = random_scores(model, 1)
    prune_synapses(model, scores, amount=10, global_pruning=True)
    first = {name: synapse_mask(model.get_submodule(name)).clone() for name in scores}
    removed = prune_synapses(model, scores, amount=0.5, global_pruning=True)
    joined = np.concatenate([score.numpy().ravel() for score in scores.values()])
    kept = np.concatenate([synapse_mask(model.get_submodule(name)).numpy().ravel() for name in scores])
    total = joined.size
    assert (~kept).sum() == 10 + round((total - 10) / 2)
    assert joined[kept].min() > joined[~kept].max()
    assert sum(removed.values()) == (~kept).sum() - 10
    for name, mask in first.items():
        assert not bool((synapse_mask(model.get_submodule(name)) & ~mask).any())


def test_a_threshold() -> None:
    model = net()
    scores = random_scores(model, 2)
    prune_synapses(model, scores, amount=3)
    gone = {name: ~synapse_mask(model.get_submodule(name)) for name in scores}
    prune_synapses(model, scores, threshold=0.1)
    for name, score in scores.items():
        assert torch.equal(synapse_mask(model.get_submodule(name)), (score >= 0.1) & ~gone[name])


def test_pruned_synapses_stay_zero_through_training() -> None:
    model = net()
    prune_synapses(model, random_scores(model, 3), amount=0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(5):
        model(torch.randn(6, 2, 3, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    model(torch.randn(2, 2, 3, 3))
    for place in (0, 3):
        assert not bool(model[place].weight[~synapse_mask(model[place])].any())
        prune.remove(model[place], "weight")
        assert 0.4 < float((model[place].weight == 0).float().mean()) < 0.6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "pass exactly one of them"),
        ({"amount": 0.5, "threshold": 1.0}, "pass exactly one of them"),
        ({"amount": 1.5}, "amount is 1.5; expected a share"),
        ({"amount": -1}, "amount is -1; expected a share"),
        ({"amount": True}, "amount is True"),
        ({"amount": 25}, "at most the 24 remaining"),
        ({"amount": 73, "global_pruning": True}, "at most the 72 remaining"),
    ],
)
def test_invalid_amounts(options: dict[str, float], message: str) -> None:
    model = net()
    with pytest.raises(PruningError, match=message):
        prune_synapses(model, random_scores(model, 0), **options)  # type: ignore[arg-type]
    assert not any(hasattr(module, "weight_mask") for module in model.modules())


def test_scores_that_do_not_fit() -> None:
    model = net()
    for scores, message in (
        ({"9": torch.ones(1)}, "the model has no module '9'"),
        ({"3": torch.ones(4, 11)}, r"the scores of '3' are \[4, 11\], but its weight is \[4, 12\]"),
        ({"2": torch.ones(1)}, "its weight is missing"),
        ({"3": torch.full((4, 12), torch.nan)}, "not all finite"),
    ):
        with pytest.raises(PruningError, match=message):
            prune_synapses(model, {"0": torch.ones(3, 2, 2, 2), **scores}, amount=0.5)
        assert not any(hasattr(module, "weight_mask") for module in model.modules())


@given(seed=st.integers(0, 200), share=st.floats(0, 1))
def test_an_exchange_masks_the_lowest_and_restores_the_most_promising(seed: int, share: float) -> None:
    model = net()
    before = WeightSnapshot(net())
    prune_synapses(model, random_scores(model, seed), amount=0.6, global_pruning=True)
    scores, growth = random_scores(model, seed + 1), random_scores(model, seed + 2)  # half of the growth is negative
    there = np.concatenate([synapse_mask(model[place]).numpy().ravel() for place in (0, 3)])
    rank, promise = (
        np.concatenate([values[name].numpy().ravel() for name in ("0", "3")]) for values in (scores, growth)
    )
    candidates = [place for place in np.argsort(-promise) if not there[place] and promise[place] > 0]
    count = min(round(share * there.sum()), len(candidates))
    gone = [place for place in np.argsort(rank) if there[place]][:count]
    back = candidates[:count]
    assert exchange_synapses(model, scores, growth, share, before) == count
    expected = there.copy()
    expected[gone], expected[back] = False, True
    found = np.concatenate([synapse_mask(model[place]).numpy().ravel() for place in (0, 3)])
    assert np.array_equal(found, expected)
    start = np.concatenate([before.weights[f"{place}.weight"].numpy().ravel() for place in (0, 3)])
    weights = np.concatenate([model[place].weight.detach().numpy().ravel() for place in (0, 3)])
    assert np.allclose(weights[back], start[back])
    assert not weights[~expected].any()
    x = torch.randn(2, 2, 3, 3)
    out = model(x)  # the mask that the hook applies is the new one
    assert np.allclose(np.concatenate([model[place].weight.detach().numpy().ravel() for place in (0, 3)]), weights)
    assert out.requires_grad


def test_an_exchange_that_does_not_fit_changes_nothing() -> None:
    model = net()
    prune_synapses(model, random_scores(model, 0), amount=0.5)
    masks = [synapse_mask(model[place]).clone() for place in (0, 3)]
    scores = random_scores(model, 1)
    for wrong, message in (
        ({"share": 1.5}, "share is 1.5"),
        ({"snapshot": WeightSnapshot(nn.Linear(2, 2))}, "does not fit the model"),
        ({"growth": {"0": scores["0"]}}, "growth covers the layers 0"),
        ({"growth": {**scores, "3": torch.zeros(2)}}, "but its weight is"),
        ({"growth": {**scores, "0": scores["0"] * torch.nan}}, "not all finite"),
    ):
        with pytest.raises(NNSError, match=message):
            exchange_synapses(**{"model": model, "scores": scores, "growth": scores, "share": 0.5, **wrong})
    assert all(torch.equal(synapse_mask(model[place]), mask) for place, mask in zip((0, 3), masks, strict=True))


def test_gradients_reach_masked_synapses_and_leave_none_behind() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2))
    prune_synapses(model, {"0": torch.arange(6.0).reshape(2, 3)}, amount=4)
    x = torch.randn(5, 3)
    loss = (model(x) * torch.tensor([1.0, 2.0])).sum()
    found = synapse_gradients(model, loss)
    expected = np.abs(np.outer([1.0, 2.0], x.numpy().sum(0)))
    assert np.allclose(found["0"].numpy(), expected, rtol=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())
    loss.backward()  # the graph is still there


def test_the_output_layer_of_attention_is_left_out() -> None:
    """Its forward pre-hook never runs, so a mask would not be applied again in training."""
    model = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2, batch_first=True), "h": nn.Linear(4, 2)})
    assert set(significance(model, WeightSnapshot(model))) == {"h"}
    with pytest.raises(PruningError, match="threshold is nan"):
        prune_synapses(model, {"h": torch.ones(2, 4)}, threshold=float("nan"))
    with pytest.raises(PruningError, match="scores is empty"):
        prune_synapses(model, {}, amount=0.5)


def test_weights_tied_after_the_snapshot_are_rejected() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    before = WeightSnapshot(model)
    model[1].weight = model[0].weight
    with pytest.raises(SnapshotError, match=r"'0.weight' and '1.weight' are two parameters in it and one in the model"):
        significance(model, before)
    assert not any(bool(moved.any()) for moved in significance(model, WeightSnapshot(model)).values())


def test_a_computed_weight_is_rejected() -> None:
    for wrap in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal):
        model = nn.Sequential(nn.Linear(3, 3), wrap(nn.Linear(3, 2)))
        with pytest.raises(PruningError, match="the weights of 1 are computed from other parameters"):
            significance(model, WeightSnapshot(model))
