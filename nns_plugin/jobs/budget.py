"""The smallest subnet within a budget of balanced accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
    keep: Callable[[float], Mapping[str, Tensor]],
    finish: Callable[[Mapping[str, Tensor]], Cut],
    names: Sequence[str],
    validation: Iterable[Any],
    max_drop: float,
    progress: bool = False,
) -> tuple[Cut, tuple[Trial, ...]]:
    """Search the share of units to remove by bisection, and keep the smallest cut that stays within the budget.

    Args:
        dense: The model that is cut.
        keep: Gives the kept units for a share of units to remove, in [0, 1).
        finish: Gives the finished cut for kept units.
        names: Name of each label.
        validation: Yields ``(inputs, labels)``, anew each time.
        max_drop: How far the mean balanced accuracy may lie under that of the dense model, as a share.
        progress: Whether to show a progress bar.

    Returns:
        The cut with the fewest parameters, and all that was tried, in order; shares that keep the same units are tried
        once.

    Raises:
        SelectionError: If even the cut that removes no units is under the budget.
    """
    logits, truth = predict(dense, validation)
    whole: tuple[int | None, ...] = tuple(range(len(names)))
    known: dict[tuple[int, ...], Trial] = {}
    best: tuple[Trial, Cut] | None = None
    floor: float | None = None

    def accuracy(values: Tensor, outputs: Sequence[int | None], cut: Cut) -> float:
        columns, seen = judged(values, outputs, cut.labels, cut.outputs)
        found = evaluate(columns, truth, seen, cut.labels, names).mean_balanced_accuracy
        if found is None:
            raise LabelError("one label with a closed head cannot be mistaken: there is no balanced accuracy to hold")
        return found

    low, high = 0.0, 1.0
    for step in tqdm(range(1 + BISECTIONS), desc="searching", disable=not progress, leave=False):
        share = (low + high) / 2 if step else 0.0
        kept = keep(share)
        mark = tuple(unit for units in kept.values() for unit in (-1, *units.tolist()))
        if mark not in known:
            cut = finish(kept)
            if floor is None:
                floor = accuracy(logits, whole, cut) - max_drop
            reached = accuracy(predict(cut.model, validation)[0], cut.outputs, cut)
            size = sum(parameter.numel() for parameter in cut.model.parameters())
            known[mark] = Trial(share, size, reached, reached >= floor)
            if known[mark].within and (best is None or size <= best[0].parameters):
                best = known[mark], cut
        if best is None:
            raise SelectionError(
                f"with all units, the balanced accuracy on the validation data is {known[mark].balanced_accuracy:.4f}, "
                f"under the {floor:.4f} that the budget asks for: allow a larger drop, or another head"
            )
        low, high = (share, high) if known[mark].within else (low, share)
    if best is None:
        raise SelectionError("nothing was tried")
    return best[1], tuple(known.values())
