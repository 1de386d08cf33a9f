"""Comparisons of a candidate with its baseline: their options, and everything measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nns_plugin.adapters.onnxruntime.accuracy import AccuracyReport
from nns_plugin.adapters.onnxruntime.file import OnnxFile
from nns_plugin.adapters.onnxruntime.latency import LatencyComparison, LatencyOptions
from nns_plugin.adapters.onnxruntime.memory import SessionMemory
from nns_plugin.adapters.onnxruntime.profiling import ProfileComparison
from nns_plugin.errors import ExportError
from nns_plugin.evaluation.parity import ParityReport, check_tolerances


@dataclass(frozen=True)
class CompareOptions:
    """How a candidate is compared with its baseline.

    Attributes:
        provider: Execution provider of all sessions, such as ``"cpu"`` or ``"cuda"``.
        threads: Intra-op threads.
        batches: Batch sizes at which latency is measured; empty for no latency. By default 1, or the only batch size
            that a file takes.
        samples: Timed runs of each file at each batch size.
        sessions: Number of pairs of sessions in which they are taken.
        io_binding: Whether to bind inputs and outputs to the device for the timed runs.
        allow_spinning: Whether idle threads spin.
        rtol: Relative tolerance of outputs.
        atol: Absolute tolerance of outputs.
        confidence: Confidence level of the accuracy-drop bounds.
        resamples: Number of bootstrap resamples of the inputs for these bounds.
        profile_runs: Number of runs with ONNX Runtime's profiler.
        memory: Whether to measure the memory of sessions, each in a process of its own.
        opset: ONNX operator set version for exports of torch models.
        seed: Seed of random inputs, of the order of runs and of the bootstrap.
        progress: Whether to show progress bars.
    """

    provider: str = "cpu"
    threads: int = 1
    batches: tuple[int, ...] | None = None
    samples: int = 300
    sessions: int = 10
    io_binding: bool = False
    allow_spinning: bool = False
    rtol: float = 1e-3
    atol: float = 1e-5
    confidence: float = 0.95
    resamples: int = 1000
    profile_runs: int = 30
    memory: bool = True
    opset: int | None = None
    seed: int = 0
    progress: bool = False

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ExportError(f"seed is {self.seed}; expected a number of at least 0")
        if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in self.batches or ()):
            raise ExportError(f"batches is {list(self.batches or ())}; expected sizes of at least 1")
        if not 0.5 <= self.confidence < 1 or self.resamples < 100 or self.profile_runs < 1:
            raise ExportError(
                f"confidence is {self.confidence}, resamples {self.resamples} and profile_runs {self.profile_runs}; "
                "expected a share from 0.5 to under 1, at least 100 and at least 1"
            )
        check_tolerances(self.rtol, self.atol)
        _ = self.latency  # checks its options

    @property
    def latency(self) -> LatencyOptions:
        """The options of the latency measurement."""
        return LatencyOptions(
            samples=self.samples,
            sessions=self.sessions,
            threads=self.threads,
            provider=self.provider,
            allow_spinning=self.allow_spinning,
            io_binding=self.io_binding,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Comparison:
    """Everything measured for a candidate and its baseline.

    Attributes:
        baseline: Description of the baseline's file.
        candidate: Description of the candidate's file.
        labels: Names of the labels for which outputs were compared; empty if there are none.
        inputs: Number of inputs on which outputs were compared.
        random_inputs: Whether these were drawn at random, for lack of data.
        parity: All reports, each with its kind.
        accuracy: Accuracy of both; ``None`` without labels.
        accuracy_fault: Why there is no accuracy despite labels.
        latency: One comparison per batch size.
        profiles: Where the time goes at each batch size; at one batch size if latency was not measured.
        baseline_memory: Memory of a session of the baseline, at the largest batch size.
        candidate_memory: Memory of a session of the candidate.
        environment: Hardware and software of the measurement.
    """

    baseline: OnnxFile
    candidate: OnnxFile
    labels: tuple[str, ...]
    inputs: int
    random_inputs: bool
    parity: tuple[ParityReport, ...]
    accuracy: AccuracyReport | None
    accuracy_fault: str | None
    latency: tuple[LatencyComparison, ...]
    profiles: tuple[ProfileComparison, ...]
    baseline_memory: SessionMemory | None
    candidate_memory: SessionMemory | None
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON types; numbers that JSON lacks become ``None``."""
        found: dict[str, Any] = jsonable(asdict(self))
        return found


def jsonable(value: Any) -> Any:
    """Convert nested dataclasses to JSON types; numbers that JSON lacks, such as NaN, become ``None``."""
    if isinstance(value, Mapping):
        return {str(name): jsonable(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
