"""Classification metrics in NumPy, under many weightings of the inputs at once.

Shapes: B weightings, N inputs, L labels. A weighting of ones gives the estimate; how often each input was drawn gives
the value over a bootstrap resample. A metric that is not defined (no inputs of the label, no others) is NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def label_metrics(weights: Array, is_label: Array, is_predicted: Array, score: Array) -> dict[str, Array]:
    """All metrics of one label against the rest: :func:`rates`, and :func:`auroc` of its ``[N]`` score."""
    return rates(weights, is_label, is_predicted) | {"auroc": auroc(weights, is_label, score)}


def rates(weights: Array, is_label: Array, is_predicted: Array) -> dict[str, Array]:
    """Metrics of the predictions of one label, or of several, each against the rest.

    Args:
        weights: ``[B, N]``.
        is_label: ``[N]`` bool, whether an input has the label; or ``[N, L]`` for several labels.
        is_predicted: Of the same shape, whether the label is predicted.

    Returns:
        ``[B]``, or ``[B, L]``, by name: recall, false_positive_rate, precision, f1, balanced_accuracy.

    Example:
        >>> is_label, is_predicted = np.array([True, True, False]), np.array([True, False, False])
        >>> rates(np.ones((1, 3)), is_label, is_predicted)["recall"]
        array([0.5])
    """
    cells = (is_label & is_predicted, is_label, is_predicted)
    hits, positives, predicted = (weights @ each.astype(np.float64) for each in cells)
    negatives = weights.sum(1).reshape(-1, *[1] * (is_label.ndim - 1)) - positives
    with np.errstate(invalid="ignore", divide="ignore"):
        recall, false_positive_rate = hits / positives, (predicted - hits) / negatives
        return {
            "recall": recall,
            "false_positive_rate": false_positive_rate,
            "precision": hits / predicted,
            "f1": 2 * hits / (positives + predicted),
            "balanced_accuracy": (recall + 1 - false_positive_rate) / 2,
        }


def auroc(weights: Array, is_label: Array, score: Array) -> Array:
    """Area under the ROC curve: weight of the pairs in the right order, plus half of those tied, over all pairs.

    Args:
        weights: ``[B, N]``.
        is_label: ``[N]`` bool, whether an input has the label.
        score: ``[N]``, higher for the label.

    Returns:
        ``[B]``.
    """
    order = np.argsort(score, kind="stable")
    steps = np.flatnonzero(np.diff(score[order], prepend=-np.inf))  # where each distinct score begins
    positive = np.add.reduceat(weights[:, order] * is_label[order], steps, axis=1)
    negative = np.add.reduceat(weights[:, order] * ~is_label[order], steps, axis=1)
    negatives_below = negative.cumsum(1) - negative / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((positive * negatives_below).sum(1) / (positive.sum(1) * negative.sum(1)))


def accuracy(weights: Array, is_correct: Array) -> Array:
    """Weighted share of correct answers, ``[B]``, from ``[B, N]`` weights and ``[N]`` bool."""
    with np.errstate(invalid="ignore"):
        return np.asarray(weights @ is_correct.astype(np.float64) / weights.sum(1))


def probabilities(outputs: Array) -> Array:
    """``[N, outputs]`` float64 softmax of logits; outputs that are probabilities already are returned as they are."""
    values = outputs.astype(np.float64)
    sums_to_one = bool((np.abs(values.sum(1) - 1) < 1e-4).all())
    if sums_to_one and bool((values >= 0).all()) and values.shape[1] > 1:
        return values
    exponentials = np.exp(values - values.max(1, keepdims=True))
    # Sorted: the same logits in another order have the same sum, so equal probabilities stay tied in the AUROC.
    return np.asarray(exponentials / np.sort(exponentials).sum(1, keepdims=True))


def log_probabilities(outputs: Array) -> Array:
    """``[N, outputs]`` float64 logits of what :func:`probabilities` takes; any subset of them is logits again."""
    return np.asarray(np.log(np.maximum(probabilities(outputs), np.finfo(np.float64).tiny)))
