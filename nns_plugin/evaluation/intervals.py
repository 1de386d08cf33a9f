"""Bootstrap intervals: the metrics of one evaluation over resampled inputs, many resamples at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Interval = tuple[float, float]

LEVEL = 95.0
_CHUNK = 4_000_000  # counts held at a time


def resampled(inputs: int, resamples: int, seed: int) -> Iterator[Array]:
    """How often each input was drawn in each resample of as many inputs, ``[b, N]`` in parts of bounded size."""
    generator = np.random.default_rng(seed)
    most = max(1, _CHUNK // inputs)
    for start in range(0, resamples, most):
        rows = min(most, resamples - start)
        drawn = generator.integers(0, inputs, (rows, inputs)) + inputs * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * inputs).reshape(rows, inputs).astype(np.float64)


def bootstrap(
    metrics: Callable[[Array], Mapping[str, Array]], inputs: int, resamples: int, seed: int = 0
) -> dict[str, Array]:
    """Values of metrics over resamples.

    Args:
        metrics: Weights of the inputs ``[b, N]`` in, values ``[b]`` by name out; NaN where one is not defined.
        inputs: N.
        resamples: How many.
        seed: Two evaluations with one seed see the same resamples, so that their difference can be resampled, too.

    Returns:
        By name ``[resamples]``.
    """
    parts = [metrics(weights) for weights in resampled(inputs, resamples, seed)]
    return {name: np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else ())}


def interval(values: Array) -> Interval | None:
    """The percentile interval; ``None`` where fewer than half of the resamples define the metric."""
    low, high = (percentile(values, (100 + side * LEVEL) / 2) for side in (-1, 1))
    return None if low is None or high is None else (low, high)


def percentile(values: Array, percent: float) -> float | None:
    """Of a metric over resamples; ``None`` where fewer than half of them define it."""
    defined = values[np.isfinite(values)]
    if defined.size * 2 < values.size or not defined.size:
        return None
    return float(np.percentile(defined, percent))


def unseen_share(inputs: int, confidence: float) -> float:
    """What may be lost elsewhere though nothing is lost on some inputs, as a share of them; for few, more than all.

    Resamples of inputs on which nothing is lost lose nothing. Of n inputs that are all answered right, up to
    ``-ln(1 - confidence) / n`` may be answered wrong on other data: the "rule of three" at 95 %.

    Source:
        Hanley and Lippman-Hand, "If Nothing Goes Wrong, Is Everything All Right?" (1983).
    """
    return -math.log(1 - confidence) / inputs


def label_metrics(weights: Array, is_label: Array, is_answered: Array, score: Array) -> dict[str, Array]:
    """Metrics of one label against all others: :func:`rates`, and AUROC for ``[N]`` scores, higher for the label."""
    pairs = (weights @ np.stack([is_label, ~is_label], 1).astype(np.float64)).prod(1)
    return rates(weights, is_label, is_answered) | {"auroc": _auroc(weights, is_label, score, pairs)}


def rates(weights: Array, is_label: Array, is_answered: Array) -> dict[str, Array]:
    """Metrics of the answers with one label against all others, for many weightings of the inputs at once.

    Args:
        weights: ``[b, N]``.
        is_label: ``[N]`` bool, inputs of the label; or ``[N, L]``, of several.
        is_answered: Of the same shape, inputs answered with it.

    Returns:
        By name ``[b]``, or ``[b, L]``; NaN where one is not defined.
    """
    cells = (is_label & is_answered, is_label, is_answered)
    hits, positives, answers = (weights @ each.astype(np.float64) for each in cells)
    negatives = weights.sum(1).reshape(-1, *[1] * (is_label.ndim - 1)) - positives
    with np.errstate(invalid="ignore", divide="ignore"):
        recall, rate = hits / positives, (answers - hits) / negatives
        return {
            "recall": recall,
            "false_positive_rate": rate,
            "precision": hits / answers,
            "f1": 2 * hits / (positives + answers),
            "balanced_accuracy": (recall + 1 - rate) / 2,
        }


def _auroc(weights: Array, is_label: Array, score: Array, pairs: Array) -> Array:
    """Weight of the pairs that are in order, half of those that are tied, over all pairs; ``[b]``."""
    order = np.argsort(score, kind="stable")
    steps = np.flatnonzero(np.diff(score[order], prepend=-np.inf))  # where each different score begins
    positive = np.add.reduceat(weights[:, order] * is_label[order], steps, axis=1)
    negative = np.add.reduceat(weights[:, order] * ~is_label[order], steps, axis=1)
    below = negative.cumsum(1) - negative / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((positive * below).sum(1) / pairs)
