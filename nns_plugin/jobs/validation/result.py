"""The result of a validation."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from nns_plugin.adapters.onnxruntime import Comparison, Gate, RoundingGain, Verdict, jsonable


@dataclass(frozen=True)
class Validation:
    """A comparison and its verdict.

    Attributes:
        comparison: The measurements.
        gate: The thresholds.
        verdict: How the measurements fare against them.
        rounding: What rounding channels up would gain, if asked for.
    """

    comparison: Comparison
    gate: Gate
    verdict: Verdict
    rounding: tuple[RoundingGain, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The validation as JSON types."""
        found = {
            "passed": self.verdict.passed,
            "verdict": self.verdict.to_dict(),
            "gate": asdict(self.gate),
            "rounding": None if self.rounding is None else [asdict(gain) for gain in self.rounding],
        }
        json_types: dict[str, Any] = jsonable(found)
        return json_types | {"comparison": self.comparison.to_dict()}
