"""Latency: two ONNX files measured against each other, in turns."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from nns_plugin.adapters.onnx_session import Arguments, Floats, Inputs, create_session, feed_of, run_session
from nns_plugin.errors import ExportError

_WARMUP_WINDOW = 10  # rounds whose median is compared with the median of as many before them
_WARMUP_CHANGE = 0.05
_RESAMPLES = 2000


@dataclass(frozen=True)
class LatencyReport:
    """Latency of one ONNX file, copies of inputs and outputs between host and device included.

    Attributes:
        name: The name under which the file was given.
        samples: Number of timed runs.
        p50_ms: Median, in milliseconds.
        p90_ms: 90th percentile, in milliseconds; None below 100 samples.
        p99_ms: 99th percentile, in milliseconds; None below 1000 samples.
    """

    name: str
    samples: int
    p50_ms: float
    p90_ms: float | None
    p99_ms: float | None


@dataclass(frozen=True)
class LatencyComparison:
    """Latency of a candidate beside its baseline.

    Attributes:
        baseline: Latency of the first file.
        candidate: Latency of the second file.
        ratio: Median of the baseline over median of the candidate; above 1, the candidate is faster.
        ratio_low: Lower end of the ratio's 95 % bootstrap interval.
        ratio_high: Upper end of the interval.
        provider: Execution provider of both sessions.
        threads: Threads within an operator, in each session.
        batch: Inputs in one run.
        samples: Number of timed runs of each file.
        warmup_rounds: Untimed runs of each file before.
        warmup_stable: Whether the medians had settled by then.
        seed: Seed of the order of runs and of the bootstrap.
    """

    baseline: LatencyReport
    candidate: LatencyReport
    ratio: float
    ratio_low: float
    ratio_high: float
    provider: str
    threads: int
    batch: int
    samples: int
    warmup_rounds: int
    warmup_stable: bool
    seed: int


def measure_latency(
    paths: Mapping[str, str | os.PathLike[str]],
    inputs: Inputs,
    *,
    samples: int = 200,
    warmup: int = 200,
    threads: int = 1,
    provider: str = "CPUExecutionProvider",
    seed: int = 0,
    progress: bool = False,
) -> LatencyComparison:
    """Measure two ONNX files against each other, in one process and in turns of random order.

    Args:
        paths: The baseline's name and file, then the candidate's.
        inputs: Inputs that both accept, ``[N, ...]``; every run takes all of them.
        samples: Timed runs of each file.
        warmup: Untimed runs of each file at most; they end once the median of 10 runs is within 5 % of that of the 10
            before, for both files.
        threads: Threads within an operator, in each session.
        provider: Execution provider of both sessions.
        seed: Seed of the order of runs and of the bootstrap.
        progress: Whether to show a progress bar.

    Returns:
        The comparison.

    Raises:
        ExportError: If the arguments are out of range or a file cannot be loaded or run.
        ProviderError: If a session does not get the provider.
    """
    if len(paths) != 2:
        raise ExportError(f"paths holds {list(paths)}; expected two files, the baseline and then the candidate")
    if samples < 2 or warmup < 0 or threads < 1:
        raise ExportError(f"samples is {samples}, warmup {warmup} and threads {threads}; expected at least 2, 0 and 1")
    arguments = Arguments.of(inputs)
    runs = []
    for path in paths.values():
        session = create_session(path, provider, threads=threads)
        feed = feed_of(session, arguments, path)
        run_session(session, feed, path)
        runs.append((session, feed))
    rng = np.random.default_rng(seed)
    rounds = [_time_round(runs, rng) for _ in range(min(warmup, 2 * _WARMUP_WINDOW))]
    while len(rounds) < warmup and not _is_stable(rounds):
        rounds.append(_time_round(runs, rng))
    bar = tqdm(range(samples), desc="measuring", disable=not progress, leave=False)
    timed = [_time_round(runs, rng) for _ in bar]
    baseline_ms, candidate_ms = np.array(timed).T / 1e6
    ratio, low, high = median_ratio(baseline_ms, candidate_ms, seed=seed)
    baseline_name, candidate_name = paths
    return LatencyComparison(
        baseline=latency_report(baseline_name, baseline_ms),
        candidate=latency_report(candidate_name, candidate_ms),
        ratio=ratio,
        ratio_low=low,
        ratio_high=high,
        provider=session.get_providers()[0],
        threads=threads,
        batch=arguments.batch,
        samples=samples,
        warmup_rounds=len(rounds),
        warmup_stable=_is_stable(rounds),
        seed=seed,
    )


def _time_round(runs: Sequence[tuple[Any, Mapping[str, npt.NDArray[Any]]]], rng: np.random.Generator) -> list[int]:
    """Run every session once, in random order; returns nanoseconds, in the order of the sessions."""
    times = [0] * len(runs)
    for turn in rng.permutation(len(runs)):
        session, feed = runs[turn]
        start = time.perf_counter_ns()
        session.run(None, feed)
        times[turn] = time.perf_counter_ns() - start
    return times


def _is_stable(rounds: Sequence[Sequence[float]]) -> bool:
    """Whether the medians of the last two windows of rounds are close, for every session."""
    if len(rounds) < 2 * _WARMUP_WINDOW:
        return False
    windows = np.array(rounds[-2 * _WARMUP_WINDOW :]).reshape(2, _WARMUP_WINDOW, -1)
    before, after = np.median(windows, axis=1)
    return bool((np.abs(after - before) <= _WARMUP_CHANGE * before).all())


def latency_report(name: str, times_ms: Floats) -> LatencyReport:
    """Summarise measured times with no percentile that the number of samples cannot carry.

    Args:
        name: Name of what was measured.
        times_ms: ``[samples]``, times of single runs in milliseconds.

    Returns:
        The report.

    Example:
        >>> latency_report("dense", np.arange(1.0, 102.0))
        LatencyReport(name='dense', samples=101, p50_ms=51.0, p90_ms=91.0, p99_ms=None)
    """
    samples = len(times_ms)
    return LatencyReport(
        name=name,
        samples=samples,
        p50_ms=float(np.median(times_ms)),
        p90_ms=float(np.percentile(times_ms, 90)) if samples >= 100 else None,
        p99_ms=float(np.percentile(times_ms, 99)) if samples >= 1000 else None,
    )


def median_ratio(baseline_ms: Floats, candidate_ms: Floats, *, seed: int = 0) -> tuple[float, float, float]:
    """Ratio of the medians of two interleaved measurements, with a 95 % bootstrap interval.

    Whole rounds are drawn, so that what slowed down both runs of a round does not widen the interval, and the interval
    is taken of the logarithm, so that exchanging the two inverts it.

    Args:
        baseline_ms: ``[samples]``, times of the baseline, one a round.
        candidate_ms: ``[samples]``, times of the candidate in the same rounds.
        seed: Seed of the bootstrap.

    Returns:
        Median of the baseline over median of the candidate, and the lower and upper end of the interval.

    Example:
        >>> ratio, low, high = median_ratio(np.array([4.0, 6.0, 4.0]), np.array([2.0, 3.0, 2.0]))
        >>> round(ratio, 6), round(low, 6), round(high, 6)
        (2.0, 2.0, 2.0)
    """
    times = np.stack([baseline_ms, candidate_ms])
    rounds, rng = times.shape[1], np.random.default_rng(seed)
    logs: list[Floats] = []
    for size in np.diff(np.linspace(0, _RESAMPLES, 1 + -(-_RESAMPLES * rounds // 2**20)).astype(int)):
        medians = np.log(np.median(times[:, rng.integers(rounds, size=(size, rounds))], axis=2))
        logs.append(medians[0] - medians[1])
    ratio = float(np.median(baseline_ms) / np.median(candidate_ms))
    low, high = np.exp(np.percentile(np.concatenate(logs), (2.5, 97.5)))
    return ratio, min(float(low), ratio), max(float(high), ratio)  # logarithms may miss the ratio by a rounding
