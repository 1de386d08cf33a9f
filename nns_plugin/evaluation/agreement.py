"""Agreement: how often two models answer with the same label."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nns_plugin.evaluation.metrics import Array


def top1_agreement(expected: Array, found: Array) -> float | None:
    """Share of inputs and positions with the same largest label; ``None`` unless both are float ``[N, L > 1, ...]``."""
    if expected.ndim < 2 or expected.shape[1] < 2 or not np.issubdtype(expected.dtype, np.floating):
        return None
    same = (expected.argmax(1) == found.argmax(1)) & _finite(expected, found)
    return float(np.mean(same))


def label_agreement(dense: Array, pruned: Array, columns: Sequence[int | None]) -> float | None:
    """Share of inputs (and positions) that both models answer with the same label.

    If the pruned model can answer "other", every answer of the dense model outside the pruned model's labels counts as
    "other". If it cannot, only the inputs count that the dense model answers with a label of both. Scores that are not
    finite agree with nothing.

    Args:
        dense: Scores of the dense model ``[N, labels, ...]``.
        pruned: Scores of the pruned model ``[N, outputs, ...]``.
        columns: For each output of the pruned model the dense model's label; ``None`` for "other".

    Returns:
        The share; ``None`` if no input counts, or there is only one output.

    Example:
        >>> dense, pruned = np.array([[3.0, 1, 2], [1, 2, 3], [1, 3, 2]]), np.array([[9.0, 0], [0, 1], [2, 0]])
        >>> label_agreement(dense, pruned, [0, None])
        0.667
    """
    agreeing, counted = count_agreement(dense, pruned, columns)
    return agreeing / counted if counted else None


def count_agreement(dense: Array, pruned: Array, columns: Sequence[int | None]) -> tuple[int, int]:
    """How many answers agree, and how many count; arguments as for :func:`label_agreement`."""
    if len(columns) < 2:
        return 0, 0
    ours, theirs = shared_columns(columns)
    finite = _finite(dense, pruned)
    if None in columns:
        answer = np.full(dense.shape[1], columns.index(None))
        answer[ours] = theirs
        return int(((answer[dense.argmax(1)] == pruned.argmax(1)) & finite).sum()), finite.size
    counts = np.isin(dense.argmax(1), ours)
    same = dense[:, ours].argmax(1) == pruned[:, theirs].argmax(1)
    return int((same & counts & finite).sum()), int(counts.sum())


def shared_columns(columns: Sequence[int | None]) -> tuple[list[int], list[int]]:
    """Columns of the labels that both models have: the dense model's, and the pruned model's."""
    ours = [column for column in columns if column is not None]
    return ours, [place for place, column in enumerate(columns) if column is not None]


def _finite(left: Array, right: Array) -> Array:
    """``[N, ...]`` bool, whether all scores ``[N, L, ...]`` of both are finite."""
    return np.asarray(np.isfinite(left).all(1) & np.isfinite(right).all(1))
