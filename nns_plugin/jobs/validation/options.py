"""Options of a validation: thresholds, data, how to measure, and where to write reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nns_plugin.adapters.onnxruntime import Gate
from nns_plugin.errors import GateError, RecipeError
from nns_plugin.jobs.recipe import Recipe


@dataclass(frozen=True)
class ReportPaths:
    """Where to write reports; ``None`` for nowhere.

    Attributes:
        json: All numbers.
        junit: The checks as test cases.
        markdown: A summary for people.
        figure: Both latency distributions, as a PNG file.
    """

    json: Path | None = None
    junit: Path | None = None
    markdown: Path | None = None
    figure: Path | None = None

    @property
    def given(self) -> tuple[Path, ...]:
        """Every file that will be written."""
        return tuple(path for path in (self.json, self.junit, self.markdown, self.figure) if path is not None)


@dataclass(frozen=True)
class ValidationOptions:
    """How to compare a candidate with its baseline, and the thresholds that it must meet.

    Attributes:
        gate: The thresholds.
        data: Inputs, and labels if known, as :func:`nns_plugin.adapters.onnxruntime.read_values` reads them.
        recipe: Instead of data, a recipe whose test data to use; its section ``measure`` gives what ``measurement``
            leaves open.
        subnet: With a recipe, the file of the subnet that the candidate was exported from: the torch models, and the
            removal, are compared as well.
        candidate_labels: Names of the candidate's labels, if its file does not have them.
        suggest_rounding: Whether to measure the speed-up from rounding up the candidate's channels.
        measurement: Fields of :class:`nns_plugin.adapters.onnxruntime.CompareOptions`.

    Raises:
        RecipeError: If two options contradict each other.
        GateError: If a threshold needs more samples than will be taken.
    """

    gate: Gate = field(default_factory=Gate)
    data: Path | None = None
    recipe: Recipe | None = None
    subnet: Path | None = None
    candidate_labels: tuple[str, ...] | None = None
    suggest_rounding: bool = False
    measurement: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.data is not None and self.recipe is not None:
            raise RecipeError("data and recipe exclude each other: both name the inputs to compare on; give one")
        if self.subnet is not None and self.recipe is None:
            raise RecipeError("subnet needs the recipe that it was made with, for the model's architecture; give both")
        samples = self.measured.get("samples", 100)
        if self.gate.max_p90_ms is not None and samples < 100:
            raise GateError(f"max_p90_ms needs at least 100 samples, found {samples}; ask for more")

    @property
    def measured(self) -> dict[str, Any]:
        """Options of the comparison: those given here, before those of the recipe; a gate's tolerances come first."""
        found: dict[str, Any] = {}
        if self.recipe is not None:
            names = ("provider", "threads", "samples", "rtol", "atol")
            found = {name: getattr(self.recipe.measure, name) for name in names}
        tolerances = {
            name: getattr(self.gate, name) for name in ("rtol", "atol") if getattr(self.gate, name) is not None
        }
        return found | dict(self.measurement) | tolerances
