"""The smallest subnet within a budget of balanced accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nns_plugin.errors import LabelError, SelectionError
from nns_plugin.evaluation.evaluation import Outputs, comparable_outputs, drops, evaluate
from nns_plugin.evaluation.intervals import percentile, rule_of_three
from nns_plugin.evaluation.metrics import log_probabilities
from nns_plugin.evaluation.prediction import predict
from nns_plugin.labels import LabelSet
from nns_plugin.subnets.extraction import Choice, Extraction
from nns_plugin.subnets.head import cross_calibrated
from nns_plugin.subnets.options import CONFIDENCE
from nns_plugin.subnets.provenance import Trial

BISECTIONS = 8
RESAMPLES = 1000


class Judge:
    """Judges extractions on validation data: how far their mean balanced accuracy is below the dense model's.

    Args:
        dense: The dense model.
        validation: Re-iterable; yields ``(inputs, labels)``.
        max_drop: The drop that must be shown, for which there must be enough inputs; ``None`` to estimate only.
        confidence: Share of the bootstrap resamples in which the bound on the drop holds.
        calibrated: Whether the output "other" was calibrated on the validation data. It is then calibrated again on
            each half and judged on the other.
    """

    def __init__(
        self,
        dense: nn.Module,
        validation: Iterable[Any],
        max_drop: float | None,
        confidence: float = CONFIDENCE,
        calibrated: bool = False,
    ) -> None:
        self.max_drop, self.confidence = max_drop, confidence
        self._validation, self._calibrated = validation, calibrated
        self._logits, self._truth = predict(dense, validation)

    def __call__(self, extraction: Extraction) -> tuple[float, float]:
        """The mean balanced accuracy of an extraction, and the upper bound on its drop below the dense model's.

        Raises:
            LabelError: If the data has too few inputs of a label, or there is no other answer than it.
        """
        truth, labels = self._truth, extraction.labels
        logits = predict(extraction.model, self._validation, expected_labels=truth)[0]
        answers = torch.from_numpy(log_probabilities(logits.numpy()))
        if self._calibrated and extraction.opens:
            answers = cross_calibrated(answers, labels.outputs, truth)
        reached = evaluate(answers, truth, labels.outputs, labels.indices, labels.names).mean_balanced_accuracy
        if reached is None:
            raise LabelError("one label with a closed head cannot be mistaken: there is no balanced accuracy to judge")
        large = comparable_outputs(self._logits, labels.with_all_outputs().outputs, labels.indices, labels.outputs)
        if self.max_drop is not None:
            _check_inputs(truth, labels, self.max_drop, self.confidence)
        return reached, drop_bound(
            large, (answers, labels.outputs), truth, labels.indices, labels.names, self.confidence
        )


def smallest_within(
    judge: Judge,
    keep: Callable[[float], Choice],
    finish: Callable[[Choice], Extraction],
    *,
    progress: bool = False,
) -> tuple[Extraction, tuple[Trial, ...]]:
    """Search the smallest extraction within a budget of balanced accuracy, by bisection.

    Args:
        judge: Judges extractions; it knows the budget. Each of several trials holds with its confidence.
        keep: Returns the kept units for a share of units to remove, in [0, 1).
        finish: Returns the finished extraction for kept units.
        progress: Whether to show a progress bar.

    Returns:
        The extraction with the fewest parameters, and all trials in order; shares that keep the same units are tried
        once.

    Raises:
        SelectionError: If even the extraction that removes no units exceeds the budget.
        LabelError: If the validation data has too few inputs of a label, or there is no other answer than it.
    """
    max_drop = judge.max_drop
    if max_drop is None:
        raise SelectionError("there is no budget to search within; give max_balanced_accuracy_drop")
    known: dict[tuple[int, ...], Trial] = {}
    best: tuple[Trial, Extraction] | None = None

    def trial(share: float, extraction: Extraction) -> Trial:
        reached, bound = judge(extraction)
        size = sum(parameter.numel() for parameter in extraction.model.parameters())
        return Trial(share, size, reached, bound, bound <= max_drop)

    low, high = 0.0, 1.0
    for step in tqdm(range(1 + BISECTIONS), desc="searching", disable=not progress, leave=False):
        share = (low + high) / 2 if step else 0.0
        choice = keep(share)
        mark = mark_of(choice)
        if mark not in known:
            extraction = finish(choice)
            known[mark] = trial(share, extraction)
            if known[mark].within and (best is None or known[mark].parameters <= best[0].parameters):
                best = known[mark], extraction
        if best is None:
            raise SelectionError(
                "with all units, balanced accuracy on the validation data drops by at most "
                f"{known[mark].drop_bound or 0.0:.4f} at a confidence of {judge.confidence:g}, more than {max_drop:g}: "
                "allow a larger drop or another head, or give more validation data"
            )
        low, high = (share, high) if known[mark].within else (low, share)
    if best is None:
        raise SelectionError("nothing was tried")
    return best[1], tuple(known.values())


def mark_of(choice: Choice) -> tuple[int, ...]:
    """The kept units as a key."""
    return tuple(unit for units in choice.kept.values() for unit in (-1, *units.tolist()))


def _check_inputs(truth: Tensor, labels: LabelSet, max_drop: float, confidence: float) -> None:
    """Refuse data that cannot show the bound: where no input is lost, resamples of few inputs lose none.

    Of n inputs that are all answered right, up to ``-ln(1 - confidence) / n`` may be answered wrong elsewhere (the
    "rule of three" at 95 %), which costs half of that in balanced accuracy. At 0.5 the estimate is enough.
    """
    if confidence <= 0.5:
        return
    least = rule_of_three(1, confidence) / (2 * max_drop) if max_drop else math.inf
    for label in labels.indices:
        count = int((truth == label).sum())
        if 0 < count < least:
            needed = f"at least {math.ceil(least)} of each label" if max_drop else "no number of them"
            raise LabelError(
                f"label {labels.names[label]!r} has {count} validation inputs, but {needed} can show a drop of at most "
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
    """Upper bound on the drop of the mean balanced accuracy, at a confidence.

    Args:
        dense: Logits and outputs of the dense model, as for :func:`nns_plugin.evaluation.evaluation.evaluate`.
        subnet: The same of the subnet.
        truth: ``[N]`` true labels.
        chosen: The labels of the set.
        names: Name of every label.
        confidence: The share of the bootstrap resamples in which the drop is no larger.

    Raises:
        LabelError: If a label has too few inputs.
    """
    bound = percentile(drops(dense, subnet, truth, chosen, names, RESAMPLES).mean_balanced_accuracy, 100 * confidence)
    if bound is None:
        raise LabelError("the validation data has so few inputs of a label that its accuracy cannot be judged")
    return bound
