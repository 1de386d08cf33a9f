"""The smallest subnet within a budget of balanced accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from nns_plugin.cutting import Cut
from nns_plugin.errors import LabelError, SelectionError
from nns_plugin.jobs.evaluation import evaluate, judged, predict
from nns_plugin.subnet import Trial

BISECTIONS = 8


def smallest_within(
    dense: nn.Module,
    cut_at: Callable[[float], Cut],
    names: Sequence[str],
    validation: Iterable[Any],
    max_drop: float,
    progress: bool = False,
) -> tuple[Cut, tuple[Trial, ...]]:
    """Search the share of units to remove by bisection, and keep the smallest cut that stays within the budget.

    Args:
        dense: The model that is cut.
        cut_at: Gives the finished cut for a share of units to remove, in [0, 1).
        names: Name of each label.
        validation: Yields ``(inputs, labels)``, anew each time.
        max_drop: How far the mean balanced accuracy may lie under that of the dense model, as a share.
        progress: Whether to show a progress bar.

    Returns:
        The cut with the fewest parameters, and all that was tried, in order.

    Raises:
        SelectionError: If even the cut that removes no units is under the budget.
    """
    logits, truth = predict(dense, validation)
    whole: tuple[int | None, ...] = tuple(range(len(names)))
    trials: list[Trial] = []
    best: Cut | None = None
    floor = 0.0

    def measured(outputs: Sequence[int | None], values: Tensor, cut: Cut) -> float:
        columns, seen = judged(values, outputs, cut.labels, cut.outputs)
        found = evaluate(columns, truth, seen, cut.labels, names).mean_balanced_accuracy
        if found is None:
            raise LabelError("one label with a closed head cannot be mistaken: there is no balanced accuracy to hold")
        return found

    low, high = 0.0, 1.0
    shares = [0.0]
    for _ in tqdm(range(1 + BISECTIONS), desc="searching", disable=not progress, leave=False):
        share = shares[-1]
        cut = cut_at(share)
        if not trials:
            floor = measured(whole, logits, cut) - max_drop
        found = measured(cut.outputs, predict(cut.model, validation)[0], cut)
        size = sum(parameter.numel() for parameter in cut.model.parameters())
        within = found >= floor
        trials.append(Trial(share, size, found, within))
        if within and (best is None or size <= min(trial.parameters for trial in trials if trial.within)):
            best = cut
        low, high = (share, high) if within else (low, share)
        if not within and share == 0:
            break
        shares.append((low + high) / 2)
    if best is None:
        raise SelectionError(
            f"with all units, the balanced accuracy on the validation data is {trials[0].balanced_accuracy:.4f}, under "
            f"the {floor:.4f} that the budget asks for: allow a larger drop, or another head"
        )
    return best, tuple(trials)
