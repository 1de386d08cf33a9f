"""Parity: how far outputs are from those expected, the tolerance they would need, and where they first diverge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from nns_plugin.errors import ExportError
from nns_plugin.evaluation.agreement import label_agreement, shared_columns
from nns_plugin.evaluation.metrics import Array

Kind = Literal["masked against removed", "torch against ONNX", "dense against pruned"]

_MOST_KEPT = 2**22  # errors held for the percentiles
_ROUNDING = 4 * float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Divergence:
    """The first value that differs by more than the tolerance.

    Attributes:
        output: Name of the output.
        position: Its index in the output; the first number is the input.
        expected: The reference's value.
        found: The candidate's value.
    """

    output: str
    position: tuple[int, ...]
    expected: float
    found: float


@dataclass(frozen=True)
class ParityReport:
    """How far a candidate's outputs are from its reference's.

    Attributes:
        kind: What is compared.
        reference: Name of the model or file whose outputs are expected.
        candidate: Name of the model or file whose outputs are checked.
        passed: Whether every value differs by at most ``atol + rtol * |reference's value|``; a NaN never passes.
        max_absolute_error: Largest absolute difference; NaN if an output holds one.
        max_relative_error: Largest difference relative to the reference's value, over values larger than ``atol``.
        p50_absolute_error: Median of the absolute differences.
        p90_absolute_error: Their 90th percentile.
        p99_absolute_error: Their 99th percentile.
        passing_rtol: The smallest relative tolerance that would pass with this ``atol``; ``None`` if none would.
        passing_atol: The smallest absolute tolerance that would pass with this ``rtol``; ``None`` if none would.
        top1_agreement: Share of inputs (and positions) for which the first output's largest label is the same, in
            [0, 1]; ``None`` if the first output is not ``[N, L, ...]`` with at least two labels.
        worst_output: Name of the output that is furthest from passing.
        outputs: Names of the outputs compared.
        incomparable: Which of the reference's outputs cannot be compared, and why; with any, the report does not pass.
        first_divergence: The first value, in order of outputs and inputs, that differs by more than the tolerance.
        inputs: Number of inputs, N.
        batch_sizes: Batch sizes at which outputs were compared.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        provider: Execution provider of the file's session; ``None`` without a file.
    """

    kind: Kind
    reference: str
    candidate: str
    passed: bool
    max_absolute_error: float
    max_relative_error: float
    p50_absolute_error: float
    p90_absolute_error: float
    p99_absolute_error: float
    passing_rtol: float | None
    passing_atol: float | None
    top1_agreement: float | None
    worst_output: str
    outputs: tuple[str, ...]
    incomparable: tuple[str, ...]
    first_divergence: Divergence | None
    inputs: int
    batch_sizes: tuple[int, ...]
    rtol: float
    atol: float
    provider: str | None


class OutputErrors(NamedTuple):
    """Element-wise differences of one output.

    Attributes:
        absolute: Absolute differences, flat.
        relative: Largest difference relative to the expected value, over values larger than ``atol``.
        excess: Largest ratio of a difference to its tolerance; above 1 fails, and a NaN counts as infinite.
        rtol: Smallest relative tolerance that passes with this ``atol``; infinite if none does.
        atol: Smallest absolute tolerance that passes with this ``rtol``; infinite if none does.
        place: Flat index of the first value that differs by more than the tolerance; ``None`` if none does.
    """

    absolute: Array
    relative: float
    excess: float
    rtol: float
    atol: float
    place: int | None


def output_errors(expected: Array, found: Array, rtol: float, atol: float) -> OutputErrors:
    """Compare one output element by element; equal infinities do not count as different.

    Example:
        >>> output_errors(np.array([1.0, 2.0]), np.array([1.0, 2.5]), rtol=0.0, atol=0.1).rtol
        0.2
    """
    expected, found = (array.astype(np.float64).ravel() for array in (expected, found))
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        absolute = np.where(expected == found, 0.0, np.abs(found - expected))
        size = np.abs(expected)
        differs = absolute != 0  # a NaN differs
        relative = np.divide(absolute, size, out=np.zeros_like(size), where=~(size <= atol) & differs)
        excess = np.divide(absolute, atol + rtol * size, out=np.zeros_like(size), where=differs)
        rounded = absolute * (1 + _ROUNDING)  # so that the reported tolerance passes despite rounding
        needed_rtol = np.divide(rounded - atol, size, out=np.zeros_like(size), where=~(absolute <= atol))
        needed_atol = np.where(differs, rounded - rtol * size, 0.0)
    excess = np.where(np.isfinite(excess), excess, np.inf)
    over = np.flatnonzero(excess > 1)
    return OutputErrors(
        absolute=absolute,
        relative=float(relative.max(initial=0)),
        excess=float(excess.max(initial=0)),
        rtol=_largest(needed_rtol),
        atol=_largest(needed_atol),
        place=int(over[0]) if over.size else None,
    )


def _largest(values: Array) -> float:
    return float(np.where(np.isnan(values), np.inf, values).max(initial=0))


def check_tolerances(rtol: float, atol: float) -> None:
    """Raise ExportError unless both are finite numbers of at least 0."""
    if not (0 <= rtol < np.inf and 0 <= atol < np.inf):
        raise ExportError(f"rtol is {rtol} and atol is {atol}; expected finite numbers of at least 0")


class ParityAccumulator:
    """Accumulates the differences of outputs, batch by batch.

    Args:
        names: Names of the outputs to compare.
        rtol: Relative tolerance.
        atol: Absolute tolerance.

    Raises:
        ExportError: If a tolerance is out of range.
    """

    def __init__(self, names: Sequence[str], rtol: float, atol: float) -> None:
        check_tolerances(rtol, atol)
        self.names, self.rtol, self.atol = tuple(names), rtol, atol
        self._worst: list[tuple[str, OutputErrors]] = []
        self._first: dict[str, Divergence] = {}
        self._kept, self._size, self._stride = [np.zeros(0)], 0, 1
        self._largest = 0.0

    def add(self, expected: Sequence[Array], found: Sequence[Array], first_input: int = 0) -> None:
        """Compare the outputs of a batch; ``first_input`` is the number of its first input."""
        for name, reference, candidate in zip(self.names, expected, found, strict=True):
            of = output_errors(reference, candidate, self.rtol, self.atol)
            if of.place is not None and name not in self._first:
                index = tuple(int(axis) for axis in np.unravel_index(of.place, reference.shape))
                position = (index[0] + first_input, *index[1:]) if index else ()
                self._first[name] = Divergence(name, position, float(reference[index]), float(candidate[index]))
            self._largest = float(np.max(of.absolute, initial=self._largest))
            self._keep(of.absolute)
            self._worst.append((name, of._replace(absolute=np.zeros(0))))

    def _keep(self, absolute: Array) -> None:
        """Keep errors for the percentiles: all, or every second, fourth and so on if there are very many."""
        self._kept.append(absolute[:: self._stride])
        self._size += self._kept[-1].size
        while self._size > _MOST_KEPT:
            self._kept = [np.concatenate(self._kept)[::2]]
            self._size, self._stride = self._kept[0].size, 2 * self._stride

    def report(
        self,
        kind: Kind,
        names: tuple[str, str],
        *,
        inputs: int,
        batch_sizes: tuple[int, ...],
        top1: float | None,
        provider: str | None = None,
        incomparable: tuple[str, ...] = (),
    ) -> ParityReport:
        """The report on all outputs that were added."""
        absolute = np.concatenate(self._kept)
        if not absolute.size and not incomparable:
            raise ExportError(f"{names[0]} and {names[1]} return no values to compare; pass inputs for which they do")
        worst, of_worst = max(self._worst, key=lambda named: named[1].excess, default=("", None))
        method: Any = "linear" if np.isfinite(absolute).all() else "higher"  # no interpolation between infinite errors
        p50, p90, p99 = map(float, np.percentile(absolute, (50, 90, 99), method=method) if absolute.size else (0, 0, 0))
        rtol = max((of.rtol for _, of in self._worst), default=0.0)
        atol = max((of.atol for _, of in self._worst), default=0.0)
        firsts = [self._first[name] for name in self.names if name in self._first]
        return ParityReport(
            kind=kind,
            reference=names[0],
            candidate=names[1],
            passed=not incomparable and of_worst is not None and of_worst.excess <= 1,
            max_absolute_error=self._largest,
            max_relative_error=float(np.max([of.relative for _, of in self._worst], initial=0)),
            p50_absolute_error=p50,
            p90_absolute_error=p90,
            p99_absolute_error=p99,
            passing_rtol=rtol if np.isfinite(rtol) and not incomparable else None,
            passing_atol=atol if np.isfinite(atol) and not incomparable else None,
            top1_agreement=top1,
            worst_output=worst,
            outputs=self.names,
            incomparable=incomparable,
            first_divergence=firsts[0] if firsts else None,
            inputs=inputs,
            batch_sizes=batch_sizes,
            rtol=self.rtol,
            atol=self.atol,
            provider=provider,
        )


def label_parity(
    dense: Array,
    pruned: Array,
    columns: Sequence[int | None],
    names: tuple[str, str] = ("baseline", "candidate"),
    *,
    rtol: float = 1e-3,
    atol: float = 1e-5,
) -> ParityReport:
    """Compare the scores of two models for the labels that both have.

    Args:
        dense: Scores of the dense model ``[N, labels, ...]``.
        pruned: Scores of the pruned model ``[N, outputs, ...]``, of the same inputs.
        columns: For each output of the pruned model the dense model's label; ``None`` for "other".
        names: Names of the two models.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
    """
    accumulator = ParityAccumulator(["scores"], rtol, atol)
    ours, theirs = shared_columns(columns)
    accumulator.add([dense[:, ours]], [pruned[:, theirs]])
    same = label_agreement(dense, pruned, columns)
    return accumulator.report("dense against pruned", names, inputs=len(dense), batch_sizes=(len(dense),), top1=same)
