"""Latency: two ONNX files measured against each other, in turns."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from nns_plugin.adapters.onnxruntime.feeds import feeds_of, values_of
from nns_plugin.adapters.onnxruntime.file import read_file
from nns_plugin.adapters.onnxruntime.session import Floats, Inputs, create_session, run_session
from nns_plugin.errors import ExportError
from nns_plugin.evaluation.intervals import Interval
from nns_plugin.evaluation.metrics import Array

SESSIONS = 10
_WARMUP_WINDOW = 10  # rounds whose median is compared with the median of as many before them
_WARMUP_CHANGE = 0.05
_RESAMPLES = 2000
_LEVEL = 0.95

Run = Callable[[], object]
Opener = Callable[[], tuple[Run, str]]
"""Opens a session; returns what runs it once, and the provider that it got."""


class FeedPair(NamedTuple):
    """Inputs of two files that take different ones.

    Attributes:
        baseline: Arrays by name of the baseline's inputs.
        candidate: Arrays by name of the candidate's inputs.
        batch: Inputs in each.
    """

    baseline: Mapping[str, Array]
    candidate: Mapping[str, Array]
    batch: int


@dataclass(frozen=True)
class LatencyReport:
    """Latency of one ONNX file, copies of inputs and outputs between host and device included unless they are bound.

    Attributes:
        name: The name under which the file was given.
        samples: Number of timed runs.
        p50_ms: Median, in milliseconds.
        p90_ms: 90th percentile, in milliseconds; None below 100 samples.
        p99_ms: 99th percentile, in milliseconds; None below 1000 samples.
        p50_interval_ms: 95 % bootstrap interval of the median.
        p90_interval_ms: 95 % bootstrap interval of the 90th percentile, where there is one.
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


@dataclass(frozen=True)
class LatencyComparison:
    """Latency of a candidate beside its baseline.

    Attributes:
        baseline: Latency of the first file.
        candidate: Latency of the second file.
        ratio: Median of the baseline over median of the candidate; above 1, the candidate is faster.
        ratio_low: Lower end of the ratio's 95 % bootstrap interval.
        ratio_high: Upper end of the interval.
        provider: Execution provider of all sessions.
        threads: Threads within an operator, in each session.
        spinning: Whether idle threads spin.
        io_binding: Whether inputs and outputs were bound to the device once, so that copies are not timed.
        batch: Inputs in one run.
        samples: Number of timed runs of each file.
        sessions: Pairs of sessions that they were taken in.
        warmup_rounds: Untimed runs of each file, in all pairs.
        warmup_stable: Whether the medians had settled by then, in every pair.
        seed: Seed of the order of runs and of the bootstrap.
    """

    baseline: LatencyReport
    candidate: LatencyReport
    ratio: float
    ratio_low: float
    ratio_high: float
    provider: str
    threads: int
    spinning: bool
    io_binding: bool
    batch: int
    samples: int
    sessions: int
    warmup_rounds: int
    warmup_stable: bool
    seed: int

    @property
    def conditions(self) -> str:
        """How it was measured, in words."""
        return (
            f"{self.provider}, {self.threads} thread(s), spinning {'on' if self.spinning else 'off'}, inputs and "
            f"outputs {'bound' if self.io_binding else 'copied'}, {self.samples} samples each in {self.sessions} "
            f"pair(s) of sessions, in turns{'' if self.warmup_stable else ', NOT all settled after warm-up'}"
        )


def measure_latency(
    paths: Mapping[str, str | os.PathLike[str]],
    inputs: Inputs | Mapping[str, Array] | FeedPair,
    *,
    samples: int = 300,
    warmup: int = 200,
    sessions: int = SESSIONS,
    threads: int = 1,
    provider: str = "CPUExecutionProvider",
    allow_spinning: bool = False,
    io_binding: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> LatencyComparison:
    """Measure two ONNX files against each other, in one process and in turns of random order.

    Two sessions of one and the same file differ by a per cent or so, for as long as they live, by where their weights
    happen to lie in memory. The runs are therefore taken in several pairs of sessions, and the interval counts pairs as
    well as runs.

    Args:
        paths: The baseline's name and file, then the candidate's.
        inputs: Inputs that both accept, ``[N, ...]``; every run takes all of them. Or those of each.
        samples: Timed runs of each file, at least; as many in each pair of sessions.
        warmup: Untimed runs of each file at most, in each pair of sessions; they end once the median of 10 runs is
            within 5 % of that of the 10 before, for both files.
        sessions: Pairs of sessions; fewer if there are less than 10 samples for each.
        threads: Threads within an operator, in each session.
        provider: Execution provider of all sessions.
        allow_spinning: Whether idle threads spin, see :func:`create_session`.
        io_binding: Whether to bind inputs and outputs to the provider's device once, before the timed runs.
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
    if samples < 2 or warmup < 0 or threads < 1 or sessions < 1:
        raise ExportError(
            f"samples is {samples}, warmup {warmup}, sessions {sessions} and threads {threads}; expected at least 2, "
            "0, 1 and 1"
        )
    pair_of_feeds = inputs if isinstance(inputs, FeedPair) else _feeds(list(paths.values()), inputs)
    openers: list[Opener] = []
    for path, feed in zip(paths.values(), pair_of_feeds[:2], strict=True):

        def opener(path: str | os.PathLike[str] = path, feed: Mapping[str, Array] = feed) -> tuple[Run, str]:
            session = create_session(path, provider, threads=threads, allow_spinning=allow_spinning)
            run_session(session, feed, path)
            return _runner(session, feed, io_binding), session.get_providers()[0]

        openers.append(opener)
    rng = np.random.default_rng(seed)
    pairs = min(sessions, max(1, samples // 10))
    each = -(-samples // pairs)
    timed, warm = [], 0
    stable, found_provider = True, ""
    with tqdm(total=pairs * each, desc="measuring", disable=not progress, leave=False) as bar:
        for _ in range(pairs):
            runs: list[Run] = []  # closes the sessions before
            runs, found_provider = _opened(openers, rng)
            rounds = [_time_round(runs, rng) for _ in range(min(warmup, 2 * _WARMUP_WINDOW))]
            while len(rounds) < warmup and not _is_stable(rounds):
                rounds.append(_time_round(runs, rng))
            warm, stable = warm + len(rounds), stable and _is_stable(rounds)
            for _round in range(each):
                timed.append(_time_round(runs, rng))
                bar.update()
    baseline_ms, candidate_ms = np.array(timed).T / 1e6
    ratio, low, high = median_ratio(baseline_ms, candidate_ms, sessions=pairs, seed=seed)
    baseline_name, candidate_name = paths
    return LatencyComparison(
        baseline=latency_report(baseline_name, baseline_ms, sessions=pairs, seed=seed),
        candidate=latency_report(candidate_name, candidate_ms, sessions=pairs, seed=seed),
        ratio=ratio,
        ratio_low=low,
        ratio_high=high,
        provider=found_provider,
        threads=threads,
        spinning=allow_spinning,
        io_binding=io_binding,
        batch=pair_of_feeds.batch,
        samples=len(timed),
        sessions=pairs,
        warmup_rounds=warm,
        warmup_stable=stable,
        seed=seed,
    )


def _feeds(paths: Sequence[str | os.PathLike[str]], inputs: Any) -> FeedPair:
    """What each file takes of inputs for both."""
    baseline, candidate = (feeds_of(file, values_of(inputs, file)) for file in map(read_file, paths))
    return FeedPair(baseline.batch(baseline.inputs), candidate.batch(candidate.inputs), baseline.inputs)


def _opened(openers: Sequence[Opener], rng: np.random.Generator) -> tuple[list[Run], str]:
    """One session each, opened in random order, for the first has the pick of the memory; and their provider."""
    opened: dict[int, tuple[Run, str]] = {}
    for turn in rng.permutation(len(openers)):
        opened[int(turn)] = openers[turn]()
    return [opened[place][0] for place in range(len(openers))], opened[0][1]


def _runner(session: Any, feed: Mapping[str, Array], io_binding: bool) -> Run:
    """What runs a session once on a feed."""
    if not io_binding:
        return lambda: session.run(None, feed)
    device = "cuda" if session.get_providers()[0] in ("CUDAExecutionProvider", "TensorrtExecutionProvider") else "cpu"
    binding = session.io_binding()
    for name, values in feed.items():
        binding.bind_cpu_input(name, np.ascontiguousarray(values))
    for put in session.get_outputs():
        binding.bind_output(put.name, device)
    binding.synchronize_inputs()
    return lambda: session.run_with_iobinding(binding)


def _time_round(runs: Sequence[Run], rng: np.random.Generator) -> list[int]:
    """Run every session once, in random order; returns nanoseconds, in the order of the sessions."""
    times = [0] * len(runs)
    for turn in rng.permutation(len(runs)):
        run = runs[turn]
        start = time.perf_counter_ns()
        run()
        times[turn] = time.perf_counter_ns() - start
    return times


def _is_stable(rounds: Sequence[Sequence[float]]) -> bool:
    """Whether the medians of the last two windows of rounds are close, for every session."""
    if len(rounds) < 2 * _WARMUP_WINDOW:
        return False
    windows = np.array(rounds[-2 * _WARMUP_WINDOW :]).reshape(2, _WARMUP_WINDOW, -1)
    before, after = np.median(windows, axis=1)
    return bool((np.abs(after - before) <= _WARMUP_CHANGE * before).all())


def latency_report(name: str, times_ms: Floats, *, sessions: int = 1, seed: int = 0) -> LatencyReport:
    """Summarise measured times with no percentile that the number of samples cannot carry.

    Args:
        name: Name of what was measured.
        times_ms: ``[samples]``, times of single runs in milliseconds.
        sessions: How many sessions they were taken in, as many in each and one session after the other.
        seed: Seed of the bootstrap.

    Returns:
        The report.

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
    baseline_ms: Floats, candidate_ms: Floats, *, sessions: int = 1, seed: int = 0
) -> tuple[float, float, float]:
    """Ratio of the medians of two interleaved measurements, with a 95 % bootstrap interval.

    Whole rounds are drawn, so that what slowed down both runs of a round does not widen the interval, and the interval
    is taken of the logarithm, so that exchanging the two inverts it. Of rounds that were taken in several pairs of
    sessions, pairs are drawn first, and then rounds within each; as pairs are few, the percentiles are wider by what
    Student's t asks for.

    Args:
        baseline_ms: ``[samples]``, times of the baseline, one a round.
        candidate_ms: ``[samples]``, times of the candidate in the same rounds.
        sessions: How many pairs of sessions they were taken in, as many in each and one pair after the other.
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
    logs: list[Floats] = []
    for rows in _resamples(times.shape[1], sessions, seed):
        medians = np.log(np.median(times[:, rows], axis=2))
        logs.append(medians[0] - medians[1])
    ratio = float(np.median(baseline_ms) / np.median(candidate_ms))
    low, high = np.exp(np.percentile(np.concatenate(logs), _levels(sessions)))
    return ratio, min(float(low), ratio), max(float(high), ratio)  # logarithms may miss the ratio by a rounding


def _levels(sessions: int) -> tuple[float, float]:
    """Percentiles of the bootstrap that make an interval of 95 %, expanded if there are only some pairs of sessions."""
    normal = NormalDist()
    z = normal.inv_cdf((1 + _LEVEL) / 2)
    if sessions > 1:
        z = _student((1 + _LEVEL) / 2, sessions - 1) * math.sqrt(sessions / (sessions - 1))
    tail = 100 * normal.cdf(-z)
    return tail, 100 - tail


def _student(probability: float, freedom: int) -> float:
    """The quantile of Student's t distribution, for a probability over a half.

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


def _resamples(rounds: int, sessions: int, seed: int) -> Iterator[npt.NDArray[np.intp]]:
    """Rounds that are drawn for the bootstrap, ``[b, rounds]`` in parts of bounded size."""
    rng, each = np.random.default_rng(seed), rounds // sessions
    for size in np.diff(np.linspace(0, _RESAMPLES, 1 + -(-_RESAMPLES * rounds // 2**20)).astype(int)):
        if sessions == 1:
            yield rng.integers(rounds, size=(size, rounds))
        else:
            pairs = rng.integers(sessions, size=(size, sessions, 1))
            yield (pairs * each + rng.integers(each, size=(size, sessions, each))).reshape(size, rounds)
