"""Accuracy of a candidate beside its baseline: what each label loses, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nns_plugin.adapters.onnxruntime.answers import Answers
from nns_plugin.errors import LabelError
from nns_plugin.evaluation.intervals import percentile, unseen_share

if TYPE_CHECKING:  # needs the extra cli, and only where there are labels
    from nns_plugin.evaluation.evaluation import Evaluation


@dataclass(frozen=True)
class LabelDrop:
    """What one label loses.

    Attributes:
        label: Its name.
        drop: Of its balanced accuracy, as a share.
        bound: What that is at most, with the confidence of the report.
    """

    label: str
    drop: float
    bound: float


@dataclass(frozen=True)
class AccuracyReport:
    """Accuracy of a candidate beside its baseline, on the same inputs.

    Attributes:
        baseline: Of the baseline, for the labels that the candidate has.
        candidate: Of the candidate.
        drop: What is lost of the open-set accuracy (of the closed-set accuracy with a closed head), as a share.
        drop_bound: What that is at most, with the confidence: over the resamples, and no less than what so many inputs
            could miss of it. Of one and the same file nothing is lost.
        labels: What each label loses.
        confidence: Share of the bootstrap resamples of the inputs in which no more is lost.
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
        answers: What they answered.
        labels: ``[N]`` indices of the true labels, among the baseline's.
        confidence: Share of the bootstrap resamples in which no more is lost than the bounds say.
        resamples: How many.
        seed: Of the resamples.

    Returns:
        The report, or why there is none: outputs that are not finite have no accuracy.

    Raises:
        LabelError: If the outputs are no logits ``[N, labels]``, or the labels do not fit them.
    """
    from nns_plugin.evaluation.evaluation import ACCURACY, evaluate, judged, paired_drops

    if answers.parity.incomparable and answers.logits is None:
        return None, "; ".join(answers.parity.incomparable)
    if answers.logits is None or answers.logits[0].ndim != 2:
        raise LabelError("accuracy per label needs first outputs [N, labels] of floating point; drop the labels")
    logits = [torch.as_tensor(values.astype(np.float64)) for values in answers.logits]
    for name, values in zip(("baseline", "candidate"), logits, strict=True):
        broken = int((~torch.isfinite(values)).any(1).sum())
        if broken:
            return None, f"the {name} gives outputs that are not finite for {broken} of {len(values)} inputs"
    truth = _indices(labels, len(logits[0]))
    chosen = sorted(column for column in answers.columns if column is not None)
    whole: tuple[int | None, ...] = tuple(range(len(answers.names)))
    closed = None not in answers.columns
    large = judged(logits[0], whole, chosen, chosen) if closed else (logits[0], whole)
    small: tuple[Tensor, Sequence[int | None]] = logits[1], answers.columns
    evaluations = [
        evaluate(values, truth, outputs, chosen, answers.names, resamples, seed) for values, outputs in (large, small)
    ]
    if len(chosen) == 1 and None not in answers.columns:
        return None, f"label {answers.labels[0]!r} alone cannot be mistaken for another: it has no accuracy to judge"
    lost = paired_drops(large, small, truth, chosen, answers.names, resamples, seed)

    def bound(name: str, drop: float, unseen: float) -> float:
        found = percentile(lost[name], 100 * confidence)
        if found is None:
            raise LabelError(f"label {name!r} has too few inputs to say how much is lost; give more")
        exact = drop > 0 or confidence <= 0.5 or answers.one_file  # resamples of what is lost on no input lose nothing
        return found if exact else max(found, drop + unseen)

    before, after = (each.accuracy for each in evaluations)
    pairs = zip(*(each.labels for each in evaluations), strict=True)
    drops = []
    for left, right in pairs:
        if left.balanced_accuracy is None or right.balanced_accuracy is None:
            raise LabelError(f"label {left.label!r} has no other inputs beside it, so no balanced accuracy; give some")
        drop = left.balanced_accuracy - right.balanced_accuracy
        missed = min(1.0, unseen_share(left.inputs, confidence)) / 2  # of recall, which is half of it
        drops.append(LabelDrop(left.label, drop, bound(left.label, drop, missed)))
    unseen = min(1.0, unseen_share(evaluations[1].inputs, confidence))
    found = AccuracyReport(
        baseline=evaluations[0],
        candidate=evaluations[1],
        drop=before - after,
        drop_bound=bound(ACCURACY, before - after, unseen),
        labels=tuple(drops),
        confidence=confidence,
    )
    return found, None


def _indices(labels: Any, count: int) -> Tensor:
    found = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if found.shape != (count,) or not np.issubdtype(found.dtype, np.integer):
        raise LabelError(f"the labels are {found.dtype}{list(found.shape)}; expected integers [{count}], one an input")
    return torch.from_numpy(found.astype(np.int64))
