"""Bootstrap intervals of metrics: resampled inputs, percentiles, and the rule of three."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from nns_plugin.evaluation.metrics import Array

Interval = tuple[float, float]

LEVEL = 95.0  # per cent
_CHUNK = 4_000_000  # counts held at a time


def resample_counts(inputs: int, resamples: int, seed: int) -> Iterator[Array]:
    """How often each of N inputs is drawn in each resample of size N, ``[B, N]`` in parts of bounded size."""
    generator = np.random.default_rng(seed)
    most = max(1, _CHUNK // inputs)
    for start in range(0, resamples, most):
        rows = min(most, resamples - start)
        drawn = generator.integers(0, inputs, (rows, inputs)) + inputs * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * inputs).reshape(rows, inputs).astype(np.float64)


def bootstrap(
    metrics: Callable[[Array], Mapping[str, Array]], inputs: int, resamples: int, seed: int = 0
) -> dict[str, Array]:
    """Values of metrics over bootstrap resamples of the inputs.

    Args:
        metrics: Maps weights of the inputs ``[B, N]`` to values ``[B]`` by name; NaN where a metric is not defined.
        inputs: N.
        resamples: Number of resamples.
        seed: Seed of the resamples. Two evaluations with the same seed see the same resamples, so their difference can
            be resampled as well.

    Returns:
        ``[resamples]`` by name.
    """
    parts = [metrics(weights) for weights in resample_counts(inputs, resamples, seed)]
    return {name: np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else ())}


def interval(values: Array) -> Interval | None:
    """The 95 % percentile interval; ``None`` if the metric is defined in fewer than half of the resamples."""
    low, high = (percentile(values, (100 + side * LEVEL) / 2) for side in (-1, 1))
    return None if low is None or high is None else (low, high)


def percentile(values: Array, percent: float) -> float | None:
    """A percentile over resamples; ``None`` if the metric is defined in fewer than half of them."""
    defined = values[np.isfinite(values)]
    if defined.size * 2 < values.size or not defined.size:
        return None
    return float(np.percentile(defined, percent))


def rule_of_three(inputs: int, confidence: float) -> float:
    """Upper bound on the error rate on other data when none of n inputs is wrong: ``-ln(1 - confidence) / n``.

    At 95 % this is the "rule of three", 3 / n. It is the limit, for large n, of the exact bound
    ``1 - (1 - confidence) ** (1 / n)``, which it never undercuts; for very few inputs it exceeds 1.

    A bootstrap cannot give this bound: resamples of inputs that are all correct are all correct.

    Source:
        Hanley and Lippman-Hand, "If Nothing Goes Wrong, Is Everything All Right?" (JAMA, 1983).

    Example:
        >>> round(rule_of_three(100, 0.95), 4)
        0.03
    """
    return -math.log(1 - confidence) / inputs
