"""Iterative pruning: training, pruning and fine-tuning in turns: when it ends, and with which model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nns_plugin.errors import PruningError
from nns_plugin.jobs.iterative import IterativePruning, Round, prune_iteratively
from nns_plugin.models.preserve import copied
from nns_plugin.synapses.mean_weight import prune_under_mean


class Scripted(nn.Module):
    """A model whose state is how often it was pruned and trained."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("pruned", torch.tensor(0))
        self.register_buffer("trained", torch.tensor(0))

    def counts(self) -> tuple[int, int]:
        return int(self.pruned), int(self.trained)


def run(removals: list[int], accuracies: list[float], **options: object) -> tuple[IterativePruning, Scripted]:
    """Iterative pruning whose prune steps remove what is scripted and whose evaluations return what is scripted."""
    model, amounts, scores = Scripted(), iter(removals), iter(accuracies)

    def prune(model: nn.Module) -> int:
        model.pruned += 1
        return next(amounts)

    def train(model: nn.Module) -> None:
        model.trained += 1

    return prune_iteratively(model, prune, train, lambda model: next(scores), **options), model


def test_it_ends_when_nothing_more_qualifies() -> None:
    iterative, model = run([3, 2, 0], [0.8, 0.6, 0.85, 0.7, 0.8])
    assert iterative.rounds == (Round(3, 0.6, 0.85, True), Round(2, 0.7, 0.8, True))
    assert (iterative.pretrained, iterative.removed, iterative.accuracy) == (0.8, 5, 0.8)
    assert iterative.model.counts() == (2, 3)
    assert model.counts() == (0, 0)


def test_it_ends_when_accuracy_falls_and_goes_back() -> None:
    iterative, _ = run([3, 2, 9], [0.8, 0.6, 0.85, 0.7, 0.79])
    assert [turn.accepted for turn in iterative.rounds] == [True, False]
    assert (iterative.removed, iterative.accuracy) == (3, 0.85)
    assert iterative.model.counts() == (1, 2)


def test_a_drop_may_be_allowed() -> None:
    iterative, _ = run([3, 2, 0], [0.8, 0.6, 0.76, 0.7, 0.75], max_drop=0.05)
    assert [turn.accepted for turn in iterative.rounds] == [True, True]


def test_without_pre_training_and_with_a_limit() -> None:
    iterative, _ = run([1, 1, 1], [0.5, 0.5, 0.5, 0.5, 0.5], pretrain=False, max_rounds=2)
    assert len(iterative.rounds) == 2
    assert iterative.model.counts() == (2, 2)


def test_a_score_that_is_no_number_is_a_fall() -> None:
    iterative, _ = run([1, 1], [0.5, 0.5, float("nan")])
    assert [turn.accepted for turn in iterative.rounds] == [False]
    assert iterative.removed == 0


@pytest.mark.parametrize(
    ("removals", "options", "message"),
    [([-1], {}, "returned -1"), ([0.5], {}, "returned 0.5"), ([1], {"max_rounds": 0}, "max_rounds is 0")],
)
def test_impossible_options_and_counts(removals: list[int], options: dict[str, object], message: str) -> None:
    with pytest.raises(PruningError, match=message):
        run(removals, [0.5, 0.5, 0.5], **options)


def test_masked_models_go_round() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64, 4), torch.randint(0, 2, (64,))
    model = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 2))

    def train(model: nn.Module) -> None:
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    def evaluate(model: nn.Module) -> float:
        return float((model(x).argmax(1) == y).double().mean())

    def prune(model: nn.Module) -> int:
        return prune_under_mean(model, ["0"])["0"]

    iterative = prune_iteratively(model, prune, train, evaluate, max_drop=1.0, max_rounds=3)
    masked: Tensor = iterative.model[0].weight_mask
    assert int((masked == 0).sum()) == iterative.removed > 0
    assert iterative.model(x).shape == (64, 2)
    assert copied(iterative.model)(x).shape == (64, 2)
    assert not hasattr(model[0], "weight_mask")
