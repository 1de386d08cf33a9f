"""The report of a job: every number that it measured, ready for JSON."""

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
    """What was measured of one model.

    Attributes:
        parameters: Number of parameters.
        macs: Multiply-accumulate operations for one input.
        file_bytes: Size of its ONNX file.
        sha256: Of that file, by its name.
        outputs: Names of its outputs.
        evaluation: On held-out data.
        parity: Of its ONNX file with the torch model.
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
        operations: tuple[int, int],
        path: Path,
        outputs: Sequence[str],
        parity: ParityReport,
    ) -> ModelReport:
        """Put together what was measured; ``operations`` are MACs and parameters."""
        macs, parameters = operations
        file = read_file(path)
        return cls(parameters, macs, file.file_bytes, file.sha256, tuple(outputs), evaluation, parity)


@dataclass(frozen=True)
class Report:
    """What a job did and measured.

    Attributes:
        recipe: The recipe, as checked.
        labels: Names of the labels of the set.
        units: Number of units of each group of the dense model.
        kept_units: The units that are left, for each pruned group.
        trials: What a search within a budget or for a latency tried, in order.
        target_met: Whether the last measurement meets the target for latency; None if there is none.
        balanced_accuracy_drop: What the subnet loses of the mean balanced accuracy; ``None`` if there is none.
        balanced_accuracy_drop_interval: Its 95 % bootstrap interval, if asked for.
        baseline: The dense model.
        subnet: The pruned model.
        removal: Parity of the subnet with the dense model in which the removed units are masked.
        pruning: How far the subnet's outputs for the kept labels are from the dense model's on the test data.
        latency: Of both ONNX files, measured in turn.
        environment: The machine, and the build of ONNX Runtime.
        versions: Of Python and the packages involved.
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
        """The report as JSON types; numbers that JSON has not are None."""
        found: dict[str, Any] = jsonable(asdict(self))
        return found
