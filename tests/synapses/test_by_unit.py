"""Scores by unit: a synapse counts for the weaker unit at its ends."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.host("torch_pruning")
pytest.importorskip("torch_pruning")

from nns_plugin.adapters.torch_pruning.groups import unit_groups  # noqa: E402
from nns_plugin.synapses.by_unit import scores_by_unit  # noqa: E402


def test_convolutions_are_scored_along_their_own_axes() -> None:
    """Equally many in- and out-positions, so that no shape would reveal swapped axes."""
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
    """3-2-2: the total of a hidden unit sums the unmasked synapses that write and read it."""
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
