"""The gate: decides by thresholds whether a candidate passes against its baseline, with every reason."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from nns_plugin.adapters.onnxruntime.accuracy import AccuracyReport
from nns_plugin.adapters.onnxruntime.comparison import Comparison, jsonable
from nns_plugin.adapters.onnxruntime.latency import LatencyComparison
from nns_plugin.errors import GateError
from nns_plugin.evaluation.parity import ParityReport

Subject = Literal["provider", "parity", "accuracy", "latency"]


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        subject: What the check is about.
        name: The threshold, and what it was applied to.
        passed: Whether the check passed.
        found: The value that was checked: the pessimistic end of an interval.
        limit: The threshold.
        text: The value and the threshold, in one line.
    """

    subject: Subject
    name: str
    passed: bool
    found: float | None
    limit: float | None
    text: str


@dataclass(frozen=True)
class Verdict:
    """The decision of a gate on a comparison.

    Attributes:
        passed: Whether every check passed.
        checks: All checks: providers first, then parity, accuracy and latency.
    """

    passed: bool
    checks: tuple[Check, ...]

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if not check.passed)

    def to_dict(self) -> dict[str, Any]:
        """The verdict as JSON types."""
        found: dict[str, Any] = jsonable(asdict(self))
        return found


@dataclass(frozen=True)
class Gate:
    """What a candidate must satisfy to be shipped; a threshold that is ``None`` cannot fail.

    Latency and accuracy are checked at the pessimistic end of their intervals, so that neither a noisy machine nor a
    lucky sample can pass; tolerances and agreement are checked on the given inputs. Two checks need no threshold: at
    least one node of each file must have been run by the requested provider, and if torch models were compared, their
    files and the removal must agree with them.

    Attributes:
        min_speedup: Minimum speed-up (ratio of medians, baseline over candidate) at every batch size.
        max_p90_ms: Maximum p90 latency of the candidate in ms, at every batch size.
        max_accuracy_drop: Maximum drop of accuracy, as a share: open-set accuracy, which with all labels is the usual
            accuracy; closed-set accuracy for a closed head.
        max_label_drop: Maximum drop of each label's balanced accuracy, as a share.
        rtol: Relative tolerance within which the outputs of both files for the kept labels must agree; the comparison
            must have been made with it.
        atol: The same for the absolute tolerance. If only one of the two is given, the other is the comparison's.
        min_top1_agreement: Minimum share of inputs that both files answer with the same label.

    Example:
        >>> Gate(min_speedup=1.3, max_accuracy_drop=0.01).needs_labels
        True
    """

    min_speedup: float | None = None
    max_p90_ms: float | None = None
    max_accuracy_drop: float | None = None
    max_label_drop: float | None = None
    rtol: float | None = None
    atol: float | None = None
    min_top1_agreement: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            share = field.name.endswith(("_drop", "_agreement"))
            if value is not None and not (0 <= value <= (1 if share else math.inf) and math.isfinite(value)):
                allowed = "a share from 0 to 1" if share else "a number of at least 0"
                raise GateError(f"{field.name} is {value}; expected {allowed}")

    @property
    def needs_labels(self) -> bool:
        """Whether a threshold is about accuracy, which needs inputs with labels."""
        return self.max_accuracy_drop is not None or self.max_label_drop is not None

    def judge(self, comparison: Comparison) -> Verdict:
        """Check a comparison against the thresholds.

        Raises:
            GateError: If what a threshold needs was not measured, or not with its tolerances.
        """
        checks = (
            *_provider_checks(comparison),
            *self._parity_checks(comparison),
            *self._accuracy_checks(comparison),
            *(check for latency in comparison.latency for check in self._latency_checks(latency)),
        )
        if not comparison.latency and (self.min_speedup is not None or self.max_p90_ms is not None):
            raise GateError(
                "min_speedup and max_p90_ms need latencies, found none; compare with at least one batch size"
            )
        return Verdict(all(check.passed for check in checks), checks)

    def _parity_checks(self, comparison: Comparison) -> Iterator[Check]:
        for report in comparison.parity:
            if report.kind != "dense against pruned":
                yield _within_tolerance(report)
                continue
            for name in ("rtol", "atol"):
                asked, used = getattr(self, name), getattr(report, name)
                if asked is not None and asked != used:
                    raise GateError(
                        f"{name} is {asked:g}, but the comparison was made with {used:g}; compare again with {asked:g}"
                    )
            if self.rtol is not None or self.atol is not None:
                yield _within_tolerance(report)
            if self.min_top1_agreement is not None:
                yield _agreeing(report, self.min_top1_agreement)

    def _accuracy_checks(self, comparison: Comparison) -> Iterator[Check]:
        if not self.needs_labels:
            return
        found = comparison.accuracy
        if comparison.accuracy_fault is not None:
            yield Check("accuracy", "accuracy", False, None, None, comparison.accuracy_fault)
            return
        if found is None:
            raise GateError("max_accuracy_drop and max_label_drop need inputs with labels; compare with labels")
        if self.max_accuracy_drop is not None:
            text = _drop_text("accuracy", found, found.drop, found.drop_bound, self.max_accuracy_drop)
            passed = found.drop_bound <= self.max_accuracy_drop
            yield Check("accuracy", "max_accuracy_drop", passed, found.drop_bound, self.max_accuracy_drop, text)
        if self.max_label_drop is not None:
            worst = max(found.labels, key=lambda label: label.bound)
            text = _drop_text(f"label {worst.label!r}", found, worst.drop, worst.bound, self.max_label_drop)
            yield Check(
                "accuracy",
                f"max_label_drop, {worst.label}",
                worst.bound <= self.max_label_drop,
                worst.bound,
                self.max_label_drop,
                text,
            )

    def _latency_checks(self, latency: LatencyComparison) -> Iterator[Check]:
        where = f"batch {latency.batch}"
        if self.min_speedup is not None:
            if latency.sessions < 2:
                raise GateError(
                    f"min_speedup needs at least two pairs of sessions with 10 samples each, found {latency.samples} "
                    f"in {latency.sessions}; measure more"
                )
            low, limit = latency.ratio_low, self.min_speedup
            text = (
                f"{where}: {latency.ratio:.3f} times as fast, at least {low:.3f} at 97.5 %; "
                f"{_word(low >= limit)} required {limit:g}"
            )
            yield Check("latency", f"min_speedup, {where}", low >= limit, low, limit, text)
        if self.max_p90_ms is not None:
            if latency.candidate.p90_interval_ms is None:
                raise GateError(f"max_p90_ms needs at least 100 samples, found {latency.samples}; measure more")
            high, limit = latency.candidate.p90_interval_ms[1], self.max_p90_ms
            text = (
                f"{where}: p90 is {latency.candidate.p90_ms:.4f} ms, at most {high:.4f} at 97.5 %; "
                f"{'within' if high <= limit else 'over'} the allowed {limit:g} ms"
            )
            yield Check("latency", f"max_p90_ms, {where}", high <= limit, high, limit, text)


def _word(enough: bool) -> str:
    return "not under the" if enough else "under the"


def _provider_checks(comparison: Comparison) -> Iterator[Check]:
    for compared in comparison.profiles[:1]:
        for side, name in (("baseline", comparison.baseline.path), ("candidate", comparison.candidate.path)):
            of = getattr(compared, side)
            fallen, total = len(of.fallen_back), len(of.nodes)
            text = f"{name}: {of.provider} ran {total - fallen} of {total} nodes"
            yield Check("provider", f"nodes, {side}", fallen < total or not total, float(fallen), float(total), text)


def _within_tolerance(report: ParityReport) -> Check:
    compared = f"{report.kind}, {report.candidate} beside {report.reference}"
    if report.incomparable:
        text = f"{compared}: {'; '.join(report.incomparable)}"
    elif report.passed:
        text = f"{compared}: largest error {report.max_absolute_error:.2e}, within {_tolerance(report)}"
    else:
        first = report.first_divergence
        place = "" if first is None else f", first at {first.output}{list(first.position)}: {first.found:.6g}"
        expected = "" if first is None else f" instead of {first.expected:.6g}"
        text = (
            f"{compared}: largest error {report.max_absolute_error:.2e} in {report.worst_output}, over "
            f"{_tolerance(report)}{place}{expected}"
        )
    return Check("parity", f"tolerance, {report.kind}", report.passed, report.max_absolute_error, None, text)


def _tolerance(report: ParityReport) -> str:
    return f"rtol {report.rtol:g}, atol {report.atol:g}"


def _agreeing(report: ParityReport, limit: float) -> Check:
    found = report.top1_agreement
    if found is None and not report.incomparable:
        raise GateError(
            "min_top1_agreement needs first outputs [N, labels] with at least two labels, and inputs that the dense "
            f"model answers with labels of both; found none (outputs: {', '.join(report.outputs)}); drop it"
        )
    passed = found is not None and found >= limit and not report.incomparable
    result = "; ".join(report.incomparable) or f"{found:.4f} of the answers agree, {limit:g} required"
    return Check("parity", "min_top1_agreement", passed, found, limit, f"{report.kind}: {result}")


def _drop_text(what: str, found: AccuracyReport, drop: float, bound: float, limit: float) -> str:
    text = (
        f"{what} falls by {100 * drop:.2f} points, by at most {100 * bound:.2f} at {100 * found.confidence:g} %; "
        f"{100 * limit:g} are allowed"
    )
    if drop <= limit < bound:
        text += " (more inputs narrow this bound)"
    return text
