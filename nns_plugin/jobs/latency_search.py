"""Prune to a measured latency: the share of units and the rounding of channels that meet a target."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from nns_plugin.adapters.onnxruntime import LatencyComparison, LatencyOptions, export, measure_latency
from nns_plugin.errors import LabelError, SelectionError
from nns_plugin.jobs.accuracy_search import mark_of
from nns_plugin.models.inputs import repeated
from nns_plugin.subnets.extraction import Choice, Extraction
from nns_plugin.subnets.provenance import Trial

BISECTIONS = 6
MOST = 0.99  # share of units that is tried first, to see whether the target can be met at all
STEPS = 8  # further shares that are tried where a finished extraction misses the target that its sketch met
STEP = 0.05  # of what is left


@dataclass(frozen=True)
class Target:
    """A target for latency; the pessimistic end of the 95 % interval must meet it.

    Attributes:
        latency_ms: Maximum median latency in milliseconds; ``None`` for no limit.
        speedup: Minimum speed-up (ratio of medians, dense over subnet); ``None`` for no limit.
    """

    latency_ms: float | None = None
    speedup: float | None = None

    def is_met(self, found: LatencyComparison) -> bool:
        """Whether a measurement meets the target."""
        fast = self.latency_ms is None or found.candidate.p50_interval_ms[1] <= self.latency_ms
        return fast and (self.speedup is None or found.ratio_low >= self.speedup)

    def __str__(self) -> str:
        parts = [f"a median of at most {self.latency_ms:g} ms"] if self.latency_ms is not None else []
        parts += [f"a speed-up of at least {self.speedup:g}"] if self.speedup is not None else []
        return " and ".join(parts)


@dataclass(frozen=True)
class Timing:
    """How to measure latency.

    Attributes:
        batch: Inputs per run.
        opset: ONNX opset of the exported models; the exporter's default if ``None``.
        latency: Options of the measurement.
    """

    batch: int = 1
    opset: int | None = None
    latency: LatencyOptions = field(default_factory=LatencyOptions)


class Stopwatch:
    """Measures models beside a dense one.

    Args:
        dense: The dense model.
        example_inputs: Inputs that both can run on.
        timing: How to measure.
    """

    def __init__(self, dense: nn.Module, example_inputs: Any, timing: Timing) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._inputs, self._timing = example_inputs, timing
        self._batch = repeated(example_inputs, timing.batch)
        self._dense = export(dense, example_inputs, Path(self._folder.name, "dense.onnx"), opset=timing.opset)

    def __enter__(self) -> Stopwatch:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def __call__(self, model: nn.Module) -> LatencyComparison:
        """The latency of a model beside the dense one's."""
        path = export(model, self._inputs, Path(self._folder.name, "small.onnx"), opset=self._timing.opset)
        return measure_latency(
            {"dense": self._dense, "subnet": path},
            self._batch,
            self._timing.latency,
        )


@dataclass(frozen=True, eq=False)
class Candidates:
    """How candidates of a search are made.

    Attributes:
        keep: Returns the kept units for a share of units to remove and a rounding.
        sketch: Returns the small model for kept units, without compensation.
        finish: Returns the finished extraction for kept units.
    """

    keep: Callable[[float, int], Choice]
    sketch: Callable[[Choice], nn.Module]
    finish: Callable[[Choice], Extraction]


def fast_enough(
    stopwatch: Callable[[nn.Module], LatencyComparison],
    candidates: Candidates,
    judge: Callable[[Extraction], tuple[float, float]],
    target: Target,
    roundings: Sequence[int],
    max_drop: float | None = None,
    progress: bool = False,
) -> tuple[Extraction, tuple[Trial, ...]]:
    """Search the extraction that loses least and is fast enough.

    For each rounding, bisection finds the smallest share of units to remove that meets the target, measured in ONNX
    Runtime on sketches: models without compensation, which are as fast. Those extractions are then finished, measured
    again and judged on the validation data. Latency does not fall evenly with the units: a rounding may be faster with
    more of them.

    Args:
        stopwatch: Measures a model beside the dense one.
        candidates: How extractions and their sketches are made.
        judge: Returns the mean balanced accuracy of an extraction on the validation data, and the upper bound on its
            drop below the dense model's.
        target: The latency to meet.
        roundings: Multiples of channels to keep, tried one after the other.
        max_drop: Maximum drop of the balanced accuracy, as a share; ``None`` for no limit.
        progress: Whether to show a progress bar.

    Returns:
        The extraction with the smallest drop that meets the target, and the budget if there is one; and all trials in
        order.

    Raises:
        SelectionError: If no extraction does; it names the nearest.
    """
    trials: list[Trial] = []
    known: dict[tuple[int, ...], LatencyComparison] = {}
    best: tuple[tuple[float, int], Extraction] | None = None
    bar = tqdm(total=len(roundings) * (BISECTIONS + 3), desc="searching", disable=not progress, leave=False)

    def is_met(share: float, multiple: int) -> bool:
        """Whether the sketch for a share of units is fast enough; shares that keep the same units are tried once."""
        choice = candidates.keep(share, multiple)
        mark = mark_of(choice)
        bar.update()
        if mark not in known:
            model = candidates.sketch(choice)
            known[mark] = stopwatch(model)
            trials.append(_trial(share, multiple, model, known[mark], target))
        return target.is_met(known[mark])

    def finished(share: float, multiple: int) -> tuple[Trial, Extraction]:
        """The finished extraction for a share of units, measured and judged."""
        extraction = candidates.finish(candidates.keep(share, multiple))
        trial = _trial(share, multiple, extraction.model, stopwatch(extraction.model), target)
        bar.update()
        try:
            accuracy, bound = judge(extraction)
        except LabelError:  # one label with a closed head has no balanced accuracy
            if max_drop is not None:
                raise
            return trial, extraction
        within = trial.within and (max_drop is None or bound <= max_drop)
        return replace(trial, balanced_accuracy=accuracy, drop_bound=bound, within=within), extraction

    with bar:
        for multiple in roundings:
            share = _smallest(is_met, multiple)
            if share is None:
                continue
            for further in _further(share, candidates.keep, multiple):
                trial, extraction = finished(further, multiple)
                trials.append(trial)
                rank = (0.0 if trial.drop_bound is None else trial.drop_bound, -trial.parameters)
                if trial.within and (best is None or rank < best[0]):
                    best = rank, extraction
                if trial.is_fast_enough:
                    break
    if best is None:
        raise SelectionError(_missed(trials, target, max_drop))
    return best[1], tuple(trials)


def _further(share: float, keep: Callable[[float, int], Choice], multiple: int) -> Iterator[float]:
    """A share of units to remove, then larger ones that keep other units; no model is measured until it passes."""
    tried: set[tuple[int, ...]] = set()
    for step in range(round(1 / STEP)):
        further = share + step * STEP * (1 - share)
        mark = mark_of(keep(further, multiple))
        if mark not in tried and len(tried) < STEPS:
            tried.add(mark)
            yield further


def _smallest(is_met: Callable[[float, int], bool], multiple: int) -> float | None:
    """The smallest share of units to remove that is fast enough, by bisection; ``None`` if there is none."""
    if is_met(0.0, multiple):
        return 0.0
    if not is_met(MOST, multiple):
        return None
    low, high = 0.0, MOST
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if is_met(middle, multiple) else (middle, high)
    return high


def _trial(share: float, multiple: int, model: nn.Module, latency: LatencyComparison, target: Target) -> Trial:
    fast = target.is_met(latency)
    return Trial(
        ratio=share,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        balanced_accuracy=None,
        drop_bound=None,
        within=fast,
        round_to=multiple,
        latency_ms=latency.candidate.p50_ms,
        speedup=latency.ratio,
        speedup_low=latency.ratio_low,
        is_fast_enough=fast,
    )


def _missed(trials: Sequence[Trial], target: Target, max_drop: float | None) -> str:
    """Why no extraction meets the target, and which came nearest."""
    fast = [trial for trial in trials if trial.is_fast_enough and trial.drop_bound is not None]
    if fast and max_drop is not None:
        nearest = min(fast, key=lambda trial: trial.drop_bound or 0.0)
        return (
            f"{target} costs at most {100 * (nearest.drop_bound or 0.0):.1f} points of balanced accuracy (ratio "
            f"{nearest.ratio:.2f}, rounded to {nearest.round_to}), more than {100 * max_drop:g}: allow a larger drop, "
            "relax the target, or fine-tune"
        )
    finished = [trial for trial in trials if trial.drop_bound is not None]
    tried = finished or list(trials)
    nearest = max(tried, key=lambda trial: trial.speedup_low or 0.0)
    return (
        f"{target} cannot be met: the fastest of {len(tried)} {'finished ' if finished else ''}extractions has a "
        f"median of {nearest.latency_ms:.4f} ms and a speed-up of at least {nearest.speedup_low:.2f} (ratio "
        f"{nearest.ratio:.2f}, rounded to {nearest.round_to}); relax the target, or measure on a quieter machine"
    )
