"""Accuracy of a candidate beside its baseline: the drop of each label, and its confidence bound."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from nns_plugin.adapters.onnxruntime.answers import Answers
from nns_plugin.errors import LabelError
from nns_plugin.evaluation.evaluation import Drops, Evaluation, Outputs, comparable_outputs, drops, evaluate
from nns_plugin.evaluation.intervals import percentile, rule_of_three
from nns_plugin.evaluation.metrics import Array


@dataclass(frozen=True)
class LabelDrop:
    """Drop of one label's balanced accuracy.

    Attributes:
        label: Name of the label.
        drop: Drop of its balanced accuracy, as a share.
        bound: Upper bound of the drop, at the confidence level of the report.
    """

    label: str
    drop: float
    bound: float


@dataclass(frozen=True)
class AccuracyReport:
    """Accuracy of a candidate beside its baseline, on the same inputs.

    Attributes:
        baseline: Evaluation of the baseline, for the labels that the candidate has.
        candidate: Evaluation of the candidate.
        drop: Drop of the open-set accuracy (of the closed-set accuracy for a closed head), as a share.
        drop_bound: Upper bound of the drop at the confidence level: from the bootstrap, and where nothing is lost from
            the rule of three. 0 for one and the same file.
        labels: What each label loses.
        confidence: Confidence level of the bounds: share of the bootstrap resamples in which no more is lost.
    """

    baseline: Evaluation
    candidate: Evaluation
    drop: float
    drop_bound: float
    labels: tuple[LabelDrop, ...]
    confidence: float


def accuracy_report(
    answers: Answers, labels: Any, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[AccuracyReport | None, str | None]:
    """Evaluate both files for the labels that the candidate has.

    Args:
        answers: What both files answered.
        labels: ``[N]`` indices of the true labels, among the baseline's.
        confidence: Confidence level of the bounds.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resamples.

    Returns:
        The report, or the reason why there is none: outputs that are not finite have no accuracy.

    Raises:
        LabelError: If the outputs are not logits ``[N, labels]``, or the labels do not fit them.
    """
    if answers.parity.incomparable and answers.logits is None:
        return None, "; ".join(answers.parity.incomparable)
    if answers.logits is None or answers.logits[0].ndim != 2:
        raise LabelError("accuracy per label needs floating-point first outputs [N, labels]; drop the labels")
    for name, values in zip(("baseline", "candidate"), answers.logits, strict=True):
        broken = int((~np.isfinite(values)).any(1).sum())
        if broken:
            return None, f"the {name} returns outputs that are not finite for {broken} of {len(values)} inputs"
    truth = _indices(labels, len(answers.logits[0]))
    chosen = sorted(column for column in answers.columns if column is not None)
    baseline: Outputs = answers.logits[0], tuple(range(len(answers.names)))
    closed = None not in answers.columns
    if closed:
        baseline = comparable_outputs(*baseline, chosen, chosen)
    candidate: Outputs = answers.logits[1], answers.columns
    before, after = (
        evaluate(logits, truth, outputs, chosen, answers.names, resamples, seed)
        for logits, outputs in (baseline, candidate)
    )
    if len(chosen) == 1 and closed:
        return None, f"label {answers.labels[0]!r} alone cannot be confused with another, so it has no accuracy"
    lost = drops(baseline, candidate, truth, chosen, answers.names, resamples, seed)
    found = AccuracyReport(
        baseline=before,
        candidate=after,
        drop=before.accuracy - after.accuracy,
        drop_bound=_accuracy_bound(before, after, lost, confidence, answers.one_file),
        labels=tuple(_label_drops(before, after, lost, confidence, answers.one_file)),
        confidence=confidence,
    )
    return found, None


def _accuracy_bound(before: Evaluation, after: Evaluation, lost: Drops, confidence: float, one_file: bool) -> float:
    unseen = min(1.0, rule_of_three(after.inputs, confidence))
    drop = before.accuracy - after.accuracy
    return _bound("the accuracy", drop, lost.accuracy, confidence, 0.0 if one_file else unseen)


def _label_drops(
    before: Evaluation, after: Evaluation, lost: Drops, confidence: float, one_file: bool
) -> Iterator[LabelDrop]:
    for left, right in zip(before.labels, after.labels, strict=True):
        if left.balanced_accuracy is None or right.balanced_accuracy is None:
            raise LabelError(f"label {left.label!r} has no inputs of other labels beside it, so no balanced accuracy")
        drop = left.balanced_accuracy - right.balanced_accuracy
        unseen = min(1.0, rule_of_three(left.inputs, confidence)) / 2  # of recall, which is half of it
        resampled = lost.balanced_accuracies[left.label]
        bound = _bound(f"label {left.label!r}", drop, resampled, confidence, 0.0 if one_file else unseen)
        yield LabelDrop(left.label, drop, bound)


def _bound(what: str, drop: float, resampled: Array, confidence: float, unseen: float) -> float:
    """Upper bound of a drop; where nothing is lost, neither do resamples lose anything, and the rule of three holds."""
    found = percentile(resampled, 100 * confidence)
    if found is None:
        raise LabelError(f"{what} has too few inputs to bound its drop; pass more inputs")
    return found if drop > 0 or confidence <= 0.5 or not unseen else max(found, drop + unseen)


def _indices(labels: Any, count: int) -> Array:
    found = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if found.shape != (count,) or not np.issubdtype(found.dtype, np.integer):
        raise LabelError(f"the labels are {found.dtype}{list(found.shape)}; expected integers [{count}], one per input")
    return found.astype(np.int64)
