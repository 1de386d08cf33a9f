"""Iterative pruning: prune and fine-tune in turns, until accuracy falls or nothing more qualifies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from tqdm.auto import tqdm

from nns_plugin.errors import PruningError
from nns_plugin.models.preserve import copied


@dataclass(frozen=True)
class Round:
    """One turn of iterative pruning.

    Attributes:
        removed: Number of units or weights that the prune step reported as removed.
        pruned: Accuracy after pruning.
        tuned: Accuracy after fine-tuning.
        accepted: Whether the next turn starts from this model.
    """

    removed: int
    pruned: float
    tuned: float
    accepted: bool


@dataclass(frozen=True, eq=False)
class IterativePruning:
    """The result of iterative pruning.

    Attributes:
        model: The last accepted model.
        pretrained: Accuracy before the first pruning.
        rounds: All turns; the last one may have been rejected.
    """

    model: nn.Module
    pretrained: float
    rounds: tuple[Round, ...]

    @property
    def removed(self) -> int:
        """Total removed in the accepted turns."""
        return sum(turn.removed for turn in self.rounds if turn.accepted)

    @property
    def accuracy(self) -> float:
        """Accuracy of the last accepted model."""
        return next((turn.tuned for turn in reversed(self.rounds) if turn.accepted), self.pretrained)


def prune_iteratively(
    model: nn.Module,
    prune: Callable[[nn.Module], int],
    train: Callable[[nn.Module], object],
    evaluate: Callable[[nn.Module], float],
    *,
    pretrain: bool = True,
    max_drop: float = 0.0,
    max_rounds: int = 100,
    progress: bool = False,
) -> IterativePruning:
    """Pre-train, prune, fine-tune, prune, fine-tune, ... until accuracy falls or nothing more is removed.

    Args:
        model: Left as it is; all turns work on copies.
        prune: Removes something from a model, in place, and returns how much; 0 ends the loop.
        train: Trains a model, in place: the pre-training and every fine-tuning.
        evaluate: Returns the accuracy of a model, higher is better; on other data than the final evaluation.
        pretrain: Whether to train before the first pruning.
        max_drop: Maximum drop below the accuracy before the first pruning.
        max_rounds: Maximum number of turns.
        progress: Whether to show a progress bar.

    Returns:
        The last accepted model, and what happened in each turn.

    Raises:
        PruningError: If an option is out of range, or ``prune`` does not return a count.

    Source:
        "The Pruning Methods for feed-forward network and Convolutional Neural Network", figure 2.
    """
    if max_rounds < 1 or not max_drop >= 0:
        raise PruningError(f"max_rounds is {max_rounds} and max_drop {max_drop}; expected at least 1 and at least 0")
    best = copied(model)
    if pretrain:
        train(best)
    pretrained = evaluate(best)
    rounds: list[Round] = []
    for _ in tqdm(range(max_rounds), desc="train, prune, tune", disable=not progress, leave=False):
        candidate = copied(best)
        removed = prune(candidate)
        if isinstance(removed, bool) or not isinstance(removed, int) or removed < 0:
            raise PruningError(f"prune returned {removed!r}; expected the number of units or weights that it removed")
        if removed == 0:
            break
        pruned = evaluate(candidate)
        train(candidate)
        tuned = evaluate(candidate)
        accepted = tuned >= pretrained - max_drop
        rounds.append(Round(removed, pruned, tuned, accepted))
        if not accepted:
            break
        best = candidate
    return IterativePruning(best, pretrained, tuple(rounds))
