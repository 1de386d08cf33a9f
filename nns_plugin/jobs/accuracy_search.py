"""The smallest subnet within a budget of balanced accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nns_plugin.errors import LabelError, SelectionError
from nns_plugin.evaluation.evaluation import Outputs, comparable_outputs, drops, evaluate
from nns_plugin.evaluation.intervals import percentile, rule_of_three
from nns_plugin.evaluation.metrics import log_probabilities
from nns_plugin.evaluation.prediction import predict
from nns_plugin.jobs.recipe import CONFIDENCE
from nns_plugin.subnets.head import cross_calibrated
from nns_plugin.subnets.provenance import Trial
from nns_plugin.subnets.steps import Extraction

BISECTIONS = 8
RESAMPLES = 1000


class Judge:
    """Judges cuts by how far their mean balanced accuracy is under the dense model's, on validation data.

    Args:
        dense: The model that is cut.
        names: Name of each label.
        validation: Yields ``(inputs, labels)``, anew each time.
        max_drop: What is to be shown; there must be inputs enough for it. None to estimate only.
        confidence: Share of the bootstrap resamples in which no more is lost than the bound says.
        calibrated: Whether the output "other" of the cuts was calibrated on the validation data. It is calibrated on
            one half then to be judged on the other.
    """

    def __init__(
        self,
        dense: nn.Module,
        names: Sequence[str],
        validation: Iterable[Any],
        max_drop: float | None,
        confidence: float = CONFIDENCE,
        calibrated: bool = False,
    ) -> None:
        self._names, self._validation, self._max_drop = names, validation, max_drop
        self._confidence, self._calibrated = confidence, calibrated
        self._logits, self._truth = predict(dense, validation)

    def __call__(self, extraction: Extraction) -> tuple[float, float]:
        """The mean balanced accuracy of a cut, and how far under the dense model's it is at most.

        Raises:
            LabelError: If the data has too few inputs of a label, or there is nothing to mistake it for.
        """
        truth, names = self._truth, self._names
        logits = predict(extraction.model, self._validation, expected_labels=truth)[0]
        answers = torch.from_numpy(log_probabilities(logits.numpy()))
        if self._calibrated and extraction.opens:
            answers = cross_calibrated(answers, extraction.outputs, truth)
        reached = evaluate(answers, truth, extraction.outputs, extraction.labels, names).mean_balanced_accuracy
        if reached is None:
            raise LabelError("one label with a closed head cannot be mistaken: there is no balanced accuracy to hold")
        large = comparable_outputs(self._logits, tuple(range(len(names))), extraction.labels, extraction.outputs)
        if self._max_drop is not None:
            _check_inputs(truth, extraction.labels, names, self._max_drop, self._confidence)
        return reached, drop_bound(
            large, (answers, extraction.outputs), truth, extraction.labels, names, self._confidence
        )


def smallest_within(
    dense: nn.Module,
    keep: Callable[[float], Mapping[str, Tensor]],
    finish: Callable[[Mapping[str, Tensor]], Extraction],
    names: Sequence[str],
    validation: Iterable[Any],
    max_drop: float,
    confidence: float = CONFIDENCE,
    calibrated: bool = False,
    progress: bool = False,
) -> tuple[Extraction, tuple[Trial, ...]]:
    """Search the share of units to remove by bisection, and keep the smallest cut that stays within the budget.

    The validation data is a sample, and the search is for the smallest subnet that passes on it, which favours one that
    is lucky there: of subnets that lose as much as is allowed on the sample, most lose more on other data. A cut is
    therefore within the budget if its drop is so with a confidence, over bootstrap resamples of the inputs that it
    shares with the dense model.

    Args:
        dense: The model that is cut.
        keep: Gives the kept units for a share of units to remove, in [0, 1).
        finish: Gives the finished cut for kept units.
        names: Name of each label.
        validation: Yields ``(inputs, labels)``, anew each time.
        max_drop: How far the mean balanced accuracy may lie under that of the dense model, as a share.
        confidence: Share of the resamples in which it must be so; 0.5 judges by the middle of them. Of several trials,
            each holds with this confidence.
        calibrated: Whether the output "other" of the cuts was calibrated on the validation data. It is calibrated on
            one half then to be judged on the other.
        progress: Whether to show a progress bar.

    Returns:
        The cut with the fewest parameters, and all that was tried, in order; shares that keep the same units are tried
        once.

    Raises:
        SelectionError: If even the cut that removes no units is not within the budget.
        LabelError: If the validation data has too few inputs of a label, or there is nothing to mistake it for.
    """
    judge = Judge(dense, names, validation, max_drop, confidence, calibrated)
    known: dict[tuple[int, ...], Trial] = {}
    best: tuple[Trial, Extraction] | None = None

    def trial(share: float, extraction: Extraction) -> Trial:
        reached, bound = judge(extraction)
        size = sum(parameter.numel() for parameter in extraction.model.parameters())
        return Trial(share, size, reached, bound, bound <= max_drop)

    low, high = 0.0, 1.0
    for step in tqdm(range(1 + BISECTIONS), desc="searching", disable=not progress, leave=False):
        share = (low + high) / 2 if step else 0.0
        kept = keep(share)
        mark = mark_of(kept)
        if mark not in known:
            extraction = finish(kept)
            known[mark] = trial(share, extraction)
            if known[mark].within and (best is None or known[mark].parameters <= best[0].parameters):
                best = known[mark], extraction
        if best is None:
            raise SelectionError(
                "with all units, balanced accuracy on the validation data drops by at most "
                f"{known[mark].drop_bound or 0.0:.4f} at a confidence of {confidence:g}, more than {max_drop:g}: allow "
                "a larger drop or another head, or give more validation data"
            )
        low, high = (share, high) if known[mark].within else (low, share)
    if best is None:
        raise SelectionError("nothing was tried")
    return best[1], tuple(known.values())


def mark_of(kept: Mapping[str, Tensor]) -> tuple[int, ...]:
    """What tells kept units from others."""
    return tuple(unit for units in kept.values() for unit in (-1, *units.tolist()))


def _check_inputs(
    truth: Tensor, labels: Sequence[int], names: Sequence[str], max_drop: float, confidence: float
) -> None:
    """Refuse data that cannot show what is asked for: where no input is lost, resamples of few inputs lose none.

    Of n inputs that are all answered right, up to ``-ln(1 - confidence) / n`` may be answered wrong elsewhere (the
    "rule of three" at 95 %), which costs half of that in balanced accuracy. At 0.5 the estimate alone is asked for.
    """
    if confidence <= 0.5:
        return
    least = rule_of_three(1, confidence) / (2 * max_drop) if max_drop else math.inf
    for label in labels:
        count = int((truth == label).sum())
        if 0 < count < least:
            needed = f"at least {math.ceil(least)} of each label" if max_drop else "no number of them"
            raise LabelError(
                f"label {names[label]!r} has {count} validation inputs, but {needed} can show a drop of at most "
                f"{max_drop:g} with a confidence of {confidence:g}: give more inputs or a larger drop, or judge by "
                "the estimate with a confidence of 0.5"
            )


def drop_bound(
    dense: Outputs,
    subnet: Outputs,
    truth: Tensor,
    chosen: Sequence[int],
    names: Sequence[str],
    confidence: float = CONFIDENCE,
) -> float:
    """How much a subnet loses of the mean balanced accuracy at most, with a confidence.

    Args:
        dense: Logits and outputs of the dense model, as for :func:`nns_plugin.evaluation.evaluation.evaluate`.
        subnet: The same of the subnet.
        truth: ``[N]`` true labels.
        chosen: The labels of the set.
        names: Name of every label.
        confidence: The share of the bootstrap resamples in which it loses no more.

    Raises:
        LabelError: If there are too few inputs of a label to say.
    """
    bound = percentile(drops(dense, subnet, truth, chosen, names, RESAMPLES).mean_balanced_accuracy, 100 * confidence)
    if bound is None:
        raise LabelError("the validation data has so few inputs of a label that its accuracy cannot be judged")
    return bound
