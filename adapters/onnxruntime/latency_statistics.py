"""Statistics of measured times: percentiles that the samples support, and the ratio of two medians."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np

from nns_plugin.evaluation.intervals import Interval
from nns_plugin.evaluation.metrics import Array

_RESAMPLES = 2000
_LEVEL = 0.95


@dataclass(frozen=True)
class LatencyReport:
    """Latency of one ONNX file, including copies of inputs and outputs to and from the device unless they are bound.

    Attributes:
        name: The name under which the file was given.
        samples: Number of timed runs.
        p50_ms: Median, in milliseconds.
        p90_ms: 90th percentile, in milliseconds; ``None`` below 100 samples.
        p99_ms: 99th percentile, in milliseconds; ``None`` below 1000 samples.
        p50_interval_ms: 95 % bootstrap interval of the median.
        p90_interval_ms: 95 % bootstrap interval of the 90th percentile; ``None`` below 100 samples.
        times_ms: The timed runs, in order.
    """

    name: str
    samples: int
    p50_ms: float
    p90_ms: float | None
    p99_ms: float | None
    p50_interval_ms: Interval
    p90_interval_ms: Interval | None
    times_ms: tuple[float, ...] = field(repr=False)


def latency_report(name: str, times_ms: Array, *, sessions: int = 1, seed: int = 0) -> LatencyReport:
    """Summarise measured times, without percentiles that the number of samples does not support.

    Args:
        name: Name of what was measured.
        times_ms: ``[samples]``, times of single runs in milliseconds.
        sessions: Number of sessions in which they were taken, equally many in each, one session after the other.
        seed: Seed of the bootstrap.

    Example:
        >>> latency_report("dense", np.arange(1.0, 102.0)).p90_ms
        91.0
    """
    samples = len(times_ms)
    percents = (50, 90) if samples >= 100 else (50,)
    drawn = [np.percentile(times_ms[rows], percents, axis=1) for rows in _resamples(samples, sessions, seed)]
    intervals = np.percentile(np.concatenate(drawn, axis=1), _levels(sessions), axis=1).T
    return LatencyReport(
        name=name,
        samples=samples,
        p50_ms=float(np.median(times_ms)),
        p90_ms=float(np.percentile(times_ms, 90)) if samples >= 100 else None,
        p99_ms=float(np.percentile(times_ms, 99)) if samples >= 1000 else None,
        p50_interval_ms=(float(intervals[0, 0]), float(intervals[0, 1])),
        p90_interval_ms=(float(intervals[1, 0]), float(intervals[1, 1])) if len(percents) > 1 else None,
        times_ms=tuple(times_ms.tolist()),
    )


def median_ratio(
    baseline_ms: Array, candidate_ms: Array, *, sessions: int = 1, seed: int = 0
) -> tuple[float, float, float]:
    """Compute the ratio of the medians of two interleaved measurements, with a 95 % bootstrap interval.

    Whole rounds are resampled, so that what slowed down both runs of a round does not widen the interval. The interval
    is that of the logarithm, so that exchanging the two inverts it. If the rounds were taken in several pairs of
    sessions, pairs are resampled first, then rounds within each pair; as there are few pairs, the percentiles are
    expanded according to Student's t.

    Args:
        baseline_ms: ``[samples]``, times of the baseline, one a round.
        candidate_ms: ``[samples]``, times of the candidate in the same rounds.
        sessions: Number of pairs of sessions in which they were taken, equally many in each, one pair after the other.
        seed: Seed of the bootstrap.

    Returns:
        Median of the baseline over median of the candidate, and the lower and upper end of the interval.

    Source:
        Hesterberg, "What Teachers Should Know About the Bootstrap" (2015), the expanded percentile interval.

    Example:
        >>> ratio, low, high = median_ratio(np.array([4.0, 6.0, 4.0]), np.array([2.0, 3.0, 2.0]))
        >>> round(ratio, 6), round(low, 6), round(high, 6)
        (2.0, 2.0, 2.0)
    """
    times = np.stack([baseline_ms, candidate_ms])
    logs: list[Array] = []
    for rows in _resamples(times.shape[1], sessions, seed):
        medians = np.log(np.median(times[:, rows], axis=2))
        logs.append(medians[0] - medians[1])
    ratio = float(np.median(baseline_ms) / np.median(candidate_ms))
    low, high = np.exp(np.percentile(np.concatenate(logs), _levels(sessions)))
    return (
        ratio,
        min(float(low), ratio),
        max(float(high), ratio),
    )  # the logarithms may miss the ratio by a rounding error


def _levels(sessions: int) -> tuple[float, float]:
    """Percentiles of the bootstrap that bound a 95 % interval, expanded for a small number of pairs of sessions."""
    normal = NormalDist()
    z = normal.inv_cdf((1 + _LEVEL) / 2)
    if sessions > 1:
        z = _student((1 + _LEVEL) / 2, sessions - 1) * math.sqrt(sessions / (sessions - 1))
    tail = 100 * normal.cdf(-z)
    return tail, 100 - tail


def _student(probability: float, freedom: int) -> float:
    """Quantile of Student's t distribution, for a probability above one half.

    Source:
        Abramowitz and Stegun, "Handbook of Mathematical Functions", 26.7.5; exact for one and two degrees of freedom.
    """
    if freedom == 1:
        return math.tan(math.pi * (probability - 0.5))
    if freedom == 2:
        central = 2 * probability - 1
        return central * math.sqrt(2 / (1 - central**2))
    z = NormalDist().inv_cdf(probability)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return float(sum(term / float(freedom) ** power for power, term in enumerate(terms)))


def _resamples(rounds: int, sessions: int, seed: int) -> Iterator[Array]:
    """Rounds drawn for the bootstrap, ``[B, rounds]`` in parts of bounded size."""
    rng, each = np.random.default_rng(seed), rounds // sessions
    for size in np.diff(np.linspace(0, _RESAMPLES, 1 + -(-_RESAMPLES * rounds // 2**20)).astype(int)):
        if sessions == 1:
            yield rng.integers(rounds, size=(size, rounds))
        else:
            pairs = rng.integers(sessions, size=(size, sessions, 1))
            yield (pairs * each + rng.integers(each, size=(size, sessions, each))).reshape(size, rounds)
