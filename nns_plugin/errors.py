"""Every error that nns-plugin raises on purpose, under one base class.

Messages name the module, group or file, what was found, what was expected, and what to do.
"""

from typing import Any


class NNSError(Exception):
    """Base class of all errors raised by nns-plugin."""


class GroupError(NNSError, ValueError):
    """A unit group or one of its ports is malformed."""


class CalibrationError(NNSError, ValueError):
    """The calibration data, or the model's activations on it, cannot be used."""


class StatisticsError(NNSError, ValueError):
    """Statistics do not fit the model, the groups or each other."""


class StaleStatisticsError(StatisticsError):
    """The model has changed since the statistics were collected."""


class LabelError(NNSError, ValueError):
    """A label is unknown, out of range, or missing from the calibration data."""


class CriterionError(NNSError, ValueError):
    """A criterion is unknown, misconfigured, or violates the score contract."""


class SelectionError(NNSError, ValueError):
    """A ratio, threshold or rounding is out of range."""


class PruningError(NNSError, RuntimeError):
    """Units cannot be removed from a model."""


class SearchError(NNSError, RuntimeError):
    """A search was cut short.

    Attributes:
        accepted: The last accepted network; ``None`` if there is none yet.
        steps: The trials so far.
    """

    def __init__(self, message: str, accepted: Any = None, steps: tuple[Any, ...] = ()) -> None:
        super().__init__(message)
        self.accepted = accepted
        self.steps = steps


class SweepError(NNSError, RuntimeError):
    """A sweep cannot be run or resumed."""


class CheckpointError(NNSError, ValueError):
    """A checkpoint of a search is damaged, or belongs to another search."""


class SubnetError(NNSError, ValueError):
    """A subnet, or its file, is damaged, foreign, or does not fit the model or the other subnets."""


class SnapshotError(NNSError, ValueError):
    """A weight snapshot is damaged or does not fit the model."""


class SwitchError(NNSError, ValueError):
    """Scaling factors, or their file, are damaged or do not fit the model."""


class TrainingError(NNSError, RuntimeError):
    """Training cannot continue."""


class ExportError(NNSError, RuntimeError):
    """A model cannot be exported to ONNX or loaded from it."""


class ProviderError(NNSError, RuntimeError):
    """A session did not get the requested execution provider."""


class GateError(NNSError, ValueError):
    """A threshold of a gate is out of range, or its quantity was not measured."""


class RecipeError(NNSError, ValueError):
    """A recipe is invalid: the message names the field, the value found and the allowed values."""


class OutputError(RecipeError):
    """An output file cannot be written."""


class MissingExtraError(NNSError, ImportError):
    """An optional dependency is not installed; the message has the exact install command."""

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(
            f'{module!r} is not installed, but this part of nns-plugin needs it: run pip install "nns-plugin[{extra}]"'
        )
        self.module = module
        self.extra = extra

    def __reduce__(self) -> tuple[type["MissingExtraError"], tuple[str, str]]:
        return type(self), (self.module, self.extra)
