"""The report of a job: every measurement, ready for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nns_plugin.adapters.onnxruntime import LatencyComparison, ParityReport, jsonable, read_file
from nns_plugin.evaluation.evaluation import Evaluation
from nns_plugin.evaluation.intervals import Interval
from nns_plugin.subnets.provenance import Trial


@dataclass(frozen=True)
class ModelReport:
    """The measurements of one model.

    Attributes:
        parameters: Number of parameters.
        macs: MACs per input.
        file_bytes: Size of its ONNX file.
        sha256: SHA-256 of that file, and of its external weights, by file name.
        outputs: Names of its outputs.
        evaluation: Accuracy on held-out data.
        parity: Parity of its ONNX file with the torch model.
    """

    parameters: int
    macs: int
    file_bytes: int
    sha256: dict[str, str]
    outputs: tuple[str, ...]
    evaluation: Evaluation
    parity: ParityReport

    @classmethod
    def of(
        cls,
        evaluation: Evaluation,
        counts: tuple[int, int],
        path: Path,
        outputs: Sequence[str],
        parity: ParityReport,
    ) -> ModelReport:
        """The report of a model whose MACs and parameters are ``counts``."""
        macs, parameters = counts
        file = read_file(path)
        return cls(parameters, macs, file.file_bytes, file.sha256, tuple(outputs), evaluation, parity)


@dataclass(frozen=True)
class Report:
    """What a job did, and its measurements.

    Attributes:
        recipe: The checked recipe.
        labels: Names of the kept labels.
        units: Number of units of each group of the dense model.
        kept_units: The kept units of each pruned group.
        trials: The trials of a search within a budget or for a latency, in order.
        target_met: Whether the final measurement meets the latency target; ``None`` without a target.
        balanced_accuracy_drop: Drop of the mean balanced accuracy against the dense model; ``None`` without one.
        balanced_accuracy_drop_interval: Its 95 % bootstrap interval, if requested.
        baseline: The dense model.
        subnet: The pruned model.
        removal: Parity of the subnet with the dense model whose removed units are masked.
        pruning: Distance of the subnet's outputs for the kept labels from the dense model's, on the test data.
        latency: Latency of both ONNX files, measured in turns.
        environment: The machine, and the build of ONNX Runtime.
        versions: Versions of Python and the packages involved.
    """

    recipe: dict[str, Any]
    labels: tuple[str, ...]
    units: dict[str, int]
    kept_units: dict[str, tuple[int, ...]]
    trials: tuple[Trial, ...]
    target_met: bool | None
    balanced_accuracy_drop: float | None
    balanced_accuracy_drop_interval: Interval | None
    baseline: ModelReport
    subnet: ModelReport
    removal: ParityReport
    pruning: ParityReport
    latency: LatencyComparison
    environment: dict[str, Any]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types; NaN and infinities are None."""
        found: dict[str, Any] = jsonable(asdict(self))
        return found
