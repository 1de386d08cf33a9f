"""Latency: two ONNX files measured against each other, interleaved in random order."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from nns_plugin.adapters.onnxruntime.arguments import Inputs
from nns_plugin.adapters.onnxruntime.feeds import feeds_of, values_of
from nns_plugin.adapters.onnxruntime.file import read_file
from nns_plugin.adapters.onnxruntime.latency_statistics import LatencyReport, latency_report, median_ratio
from nns_plugin.adapters.onnxruntime.session import create_session, run_session
from nns_plugin.errors import ExportError
from nns_plugin.evaluation.metrics import Array

_WARMUP_WINDOW = 10  # rounds whose median is compared with the median of the 10 before them
_WARMUP_CHANGE = 0.05

Run = Callable[[], object]
Opener = Callable[[], tuple[Run, str]]
"""Opens a session; returns a function that runs it once, and the provider that it got."""


@dataclass(frozen=True)
class LatencyOptions:
    """How latency is measured.

    Attributes:
        samples: Minimum number of timed runs of each file; equally many in each pair of sessions.
        warmup: Maximum number of untimed runs of each file in each pair of sessions. Warm-up ends as soon as the median
            of 10 runs is within 5 % of that of the 10 before, for both files.
        sessions: Number of pairs of sessions; fewer if there would be less than 10 samples in each.
        threads: Intra-op threads of each session.
        provider: Execution provider of all sessions, such as ``"cpu"`` or ``"cuda"``.
        allow_spinning: Whether idle threads spin, see :func:`create_session`.
        io_binding: Whether to bind inputs and outputs to the provider's device once, before the timed runs.
        seed: Seed of the order of runs and of the bootstrap.
    """

    samples: int = 300
    warmup: int = 200
    sessions: int = 10
    threads: int = 1
    provider: str = "cpu"
    allow_spinning: bool = False
    io_binding: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 2 or self.warmup < 0 or self.threads < 1 or self.sessions < 1:
            raise ExportError(
                f"samples is {self.samples}, warmup {self.warmup}, sessions {self.sessions} and threads "
                f"{self.threads}; expected at least 2, 0, 1 and 1"
            )


class FeedPair(NamedTuple):
    """Inputs of two files that take different ones.

    Attributes:
        baseline: Arrays by name of the baseline's inputs.
        candidate: Arrays by name of the candidate's inputs.
        batch: Number of inputs in each.
    """

    baseline: Mapping[str, Array]
    candidate: Mapping[str, Array]
    batch: int


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
        threads: Intra-op threads of each session.
        spinning: Whether idle threads spin.
        io_binding: Whether inputs and outputs were bound to the device once, so that copies were not timed.
        batch: Number of inputs in one run.
        samples: Number of timed runs of each file.
        sessions: Number of pairs of sessions in which they were taken.
        warmup_rounds: Number of untimed runs of each file, over all pairs.
        warmup_stable: Whether the medians had settled by the end of warm-up, in every pair.
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
        """The conditions of the measurement, in words."""
        threads, pairs = ("s" if count != 1 else "" for count in (self.threads, self.sessions))
        return (
            f"{self.provider}, {self.threads} thread{threads}, spinning {'on' if self.spinning else 'off'}, inputs and "
            f"outputs {'bound' if self.io_binding else 'copied'}, {self.samples} samples each in {self.sessions} "
            f"pair{pairs} of sessions, interleaved{'' if self.warmup_stable else ', NOT all settled after warm-up'}"
        )


def measure_latency(
    paths: Mapping[str, str | os.PathLike[str]],
    inputs: Inputs | Mapping[str, Array] | FeedPair,
    options: LatencyOptions | None = None,
    *,
    progress: bool = False,
) -> LatencyComparison:
    """Measure two ONNX files against each other, in one process, interleaved in random order.

    Two sessions of the same file differ by about one per cent for as long as they live, depending on where their
    weights happen to lie in memory. The runs are therefore taken in several pairs of sessions, and the interval
    accounts for pairs as well as for runs.

    Args:
        paths: Name and file of the baseline, then of the candidate.
        inputs: Inputs that both accept, ``[N, ...]``, all of which are taken in each run; or those of each file.
        options: How to measure; the defaults of :class:`LatencyOptions` if ``None``.
        progress: Whether to show a progress bar.

    Raises:
        ExportError: If there are not two files, or one cannot be loaded or run.
        ProviderError: If a session does not get the provider.
    """
    options = options or LatencyOptions()
    if len(paths) != 2:
        raise ExportError(f"paths holds {list(paths)}; expected two files, the baseline and then the candidate")
    feeds = inputs if isinstance(inputs, FeedPair) else _feeds(list(paths.values()), inputs)
    openers = [_opener(path, feed, options) for path, feed in zip(paths.values(), feeds[:2], strict=True)]
    rng = np.random.default_rng(options.seed)
    pairs = min(options.sessions, max(1, options.samples // 10))
    samples_per_pair = -(-options.samples // pairs)
    timed, warm = [], 0
    stable, provider = True, ""
    with tqdm(total=pairs * samples_per_pair, desc="measuring", disable=not progress, leave=False) as bar:
        for _ in range(pairs):
            runs: list[Run] = []  # closes the sessions before
            runs, provider = _opened(openers, rng)
            rounds = [_time_round(runs, rng) for _ in range(min(options.warmup, 2 * _WARMUP_WINDOW))]
            while len(rounds) < options.warmup and not _is_stable(rounds):
                rounds.append(_time_round(runs, rng))
            warm, stable = warm + len(rounds), stable and _is_stable(rounds)
            for _round in range(samples_per_pair):
                timed.append(_time_round(runs, rng))
                bar.update()
    baseline_ms, candidate_ms = np.array(timed).T / 1e6
    ratio, low, high = median_ratio(baseline_ms, candidate_ms, sessions=pairs, seed=options.seed)
    baseline_name, candidate_name = paths
    return LatencyComparison(
        baseline=latency_report(baseline_name, baseline_ms, sessions=pairs, seed=options.seed),
        candidate=latency_report(candidate_name, candidate_ms, sessions=pairs, seed=options.seed),
        ratio=ratio,
        ratio_low=low,
        ratio_high=high,
        provider=provider,
        threads=options.threads,
        spinning=options.allow_spinning,
        io_binding=options.io_binding,
        batch=feeds.batch,
        samples=len(timed),
        sessions=pairs,
        warmup_rounds=warm,
        warmup_stable=stable,
        seed=options.seed,
    )


def _opener(path: str | os.PathLike[str], feed: Mapping[str, Array], options: LatencyOptions) -> Opener:
    def opened() -> tuple[Run, str]:
        session = create_session(path, options.provider, threads=options.threads, allow_spinning=options.allow_spinning)
        run_session(session, feed, path)
        return _runner(session, feed, options.io_binding), session.get_providers()[0]

    return opened


def _feeds(paths: Sequence[str | os.PathLike[str]], inputs: Any) -> FeedPair:
    """The inputs of each file, from inputs for both."""
    baseline, candidate = (feeds_of(file, values_of(inputs, file)) for file in map(read_file, paths))
    return FeedPair(baseline.batch(baseline.inputs), candidate.batch(candidate.inputs), baseline.inputs)


def _opened(openers: Sequence[Opener], rng: np.random.Generator) -> tuple[list[Run], str]:
    """One session of each, opened in random order because the first gets its choice of memory; and their provider."""
    opened: dict[int, tuple[Run, str]] = {}
    for turn in rng.permutation(len(openers)):
        opened[int(turn)] = openers[turn]()
    return [opened[place][0] for place in range(len(openers))], opened[0][1]


def _runner(session: Any, feed: Mapping[str, Array], io_binding: bool) -> Run:
    """A function that runs a session once on a feed."""
    if not io_binding:
        return lambda: session.run(None, feed)
    device = "cuda" if session.get_providers()[0] in ("CUDAExecutionProvider", "TensorrtExecutionProvider") else "cpu"
    binding = session.io_binding()
    for name, values in feed.items():
        binding.bind_cpu_input(name, np.ascontiguousarray(values))
    for output in session.get_outputs():
        binding.bind_output(output.name, device)
    binding.synchronize_inputs()
    return lambda: session.run_with_iobinding(binding)


def _time_round(runs: Sequence[Run], rng: np.random.Generator) -> list[int]:
    """Run every session once, in random order; return nanoseconds, in the order of the sessions."""
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
