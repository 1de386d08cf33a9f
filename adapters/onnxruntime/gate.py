"""The gate: thresholds in, a comparison of a candidate with its baseline judged, pass or fail with every reason."""

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
    """One thing that was judged.

    Attributes:
        subject: What it is about.
        name: The threshold, and what it was applied to.
        passed: Whether it holds.
        found: The value that was judged: of an interval, the end that is worse for the candidate.
        limit: The threshold.
        text: What was found and what was allowed, in one line.
    """

    subject: Subject
    name: str
    passed: bool
    found: float | None
    limit: float | None
    text: str


@dataclass(frozen=True)
class Verdict:
    """What a gate says of a comparison.

    Attributes:
        passed: Whether every check holds.
        checks: All of them: providers first, then parity, accuracy and latency.
    """

    passed: bool
    checks: tuple[Check, ...]

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that do not hold."""
        return tuple(check for check in self.checks if not check.passed)

    def to_dict(self) -> dict[str, Any]:
        """The verdict as JSON types."""
        found: dict[str, Any] = jsonable(asdict(self))
        return found


@dataclass(frozen=True)
class Gate:
    """What a candidate must hold to be shipped; a threshold that is None cannot fail.

    Latency and accuracy are judged at the unfavourable end of their intervals, so that neither a noisy machine nor a
    lucky sample can pass; tolerances and agreement, on the inputs that are given. Two things need no threshold: the
    nodes of a file must not all have been run by another provider than the one that was asked for, and of torch models
    that were compared, the files and the removal must answer as they do.

    Attributes:
        min_speedup: Least ratio of medians, baseline over candidate, at every batch size.
        max_p90_ms: Most that the candidate's 90th percentile may be, in milliseconds, at every batch size.
        max_accuracy_drop: How far the accuracy may fall, as a share: open-set accuracy, which is the usual one with
            all labels; with a closed head, closed-set accuracy.
        max_label_drop: How far each label's balanced accuracy may fall, as a share.
        rtol: The dense and the pruned file's outputs for the kept labels must agree with this relative tolerance, which
            the comparison must have been made with.
        atol: The same of the absolute tolerance; with one of the two, the comparison's other is taken.
        min_top1_agreement: Least share of inputs that both answer with the same label.

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
                allowed = "a share from 0 to 1" if share else "a number from 0 on"
                raise GateError(f"{field.name} is {value}; expected {allowed}")

    @property
    def needs_labels(self) -> bool:
        """Whether a threshold is about accuracy, which takes inputs with labels."""
        return self.max_accuracy_drop is not None or self.max_label_drop is not None

    def judge(self, comparison: Comparison) -> Verdict:
        """Judge a comparison.

        Raises:
            GateError: If what a threshold is about was not measured, or not with its tolerances.
        """
        checks = (
            *_judged_providers(comparison),
            *self._judged_parity(comparison),
            *self._judged_accuracy(comparison),
            *(check for latency in comparison.latency for check in self._judged_latency(latency)),
        )
        if not comparison.latency and (self.min_speedup is not None or self.max_p90_ms is not None):
            raise GateError("min_speedup and max_p90_ms need latencies, found none; compare with a batch size")
        return Verdict(all(check.passed for check in checks), checks)

    def _judged_parity(self, comparison: Comparison) -> Iterator[Check]:
        for report in comparison.parity:
            if report.kind != "dense against pruned":
                yield _within_tolerance(report)
                continue
            for name in ("rtol", "atol"):
                asked, used = getattr(self, name), getattr(report, name)
                if asked is not None and asked != used:
                    raise GateError(f"{name} is {asked:g}, but the comparison was made with {used:g}; compare again")
            if self.rtol is not None or self.atol is not None:
                yield _within_tolerance(report)
            if self.min_top1_agreement is not None:
                yield _agreeing(report, self.min_top1_agreement)

    def _judged_accuracy(self, comparison: Comparison) -> Iterator[Check]:
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

    def _judged_latency(self, latency: LatencyComparison) -> Iterator[Check]:
        where = f"batch {latency.batch}"
        if self.min_speedup is not None:
            if latency.sessions < 2:
                raise GateError(
                    f"min_speedup needs two pairs of sessions and 10 samples in each, found {latency.samples} "
                    f"in {latency.sessions}; measure more"
                )
            low, limit = latency.ratio_low, self.min_speedup
            text = (
                f"{where}: {latency.ratio:.3f} times as fast, at least {low:.3f} at 97.5 %; "
                f"{_word(low >= limit)} {limit:g} that are asked for"
            )
            yield Check("latency", f"min_speedup, {where}", low >= limit, low, limit, text)
        if self.max_p90_ms is not None:
            if latency.candidate.p90_interval_ms is None:
                raise GateError(f"max_p90_ms needs at least 100 samples, found {latency.samples}; measure more")
            high, limit = latency.candidate.p90_interval_ms[1], self.max_p90_ms
            text = (
                f"{where}: p90 is {latency.candidate.p90_ms:.4f} ms, at most {high:.4f} at 97.5 %; "
                f"{'within' if high <= limit else 'over'} the {limit:g} ms that are allowed"
            )
            yield Check("latency", f"max_p90_ms, {where}", high <= limit, high, limit, text)


def _word(enough: bool) -> str:
    return "not under the" if enough else "under the"


def _judged_providers(comparison: Comparison) -> Iterator[Check]:
    for compared in comparison.profiles[:1]:
        for side, name in (("baseline", comparison.baseline.path), ("candidate", comparison.candidate.path)):
            of = getattr(compared, side)
            fallen, total = len(of.fallen_back), len(of.nodes)
            text = f"{name}: {of.provider} ran {total - fallen} of {total} nodes"
            yield Check("provider", f"nodes, {side}", fallen < total or not total, float(fallen), float(total), text)


def _within_tolerance(report: ParityReport) -> Check:
    told = f"{report.kind}, {report.candidate} beside {report.reference}"
    if report.incomparable:
        text = f"{told}: {'; '.join(report.incomparable)}"
    elif report.passed:
        text = f"{told}: largest error {report.max_absolute_error:.2e}, within {_tolerance(report)}"
    else:
        first = report.first_divergence
        place = "" if first is None else f", first at {first.output}{list(first.position)}: {first.found:.6g}"
        expected = "" if first is None else f" in place of {first.expected:.6g}"
        text = (
            f"{told}: largest error {report.max_absolute_error:.2e} in {report.worst_output}, over "
            f"{_tolerance(report)}{place}{expected}"
        )
    return Check("parity", f"tolerance, {report.kind}", report.passed, report.max_absolute_error, None, text)


def _tolerance(report: ParityReport) -> str:
    return f"rtol {report.rtol:g}, atol {report.atol:g}"


def _agreeing(report: ParityReport, limit: float) -> Check:
    found = report.top1_agreement
    if found is None and not report.incomparable:
        raise GateError(
            "min_top1_agreement needs first outputs [N, labels], two labels at least, and inputs that the dense model "
            f"answers with labels of both; found none (outputs: {', '.join(report.outputs)}); drop it"
        )
    passed = found is not None and found >= limit and not report.incomparable
    told = "; ".join(report.incomparable) or f"{found:.4f} of the answers agree, {limit:g} asked for"
    return Check("parity", "min_top1_agreement", passed, found, limit, f"{report.kind}: {told}")


def _drop_text(what: str, found: AccuracyReport, drop: float, bound: float, limit: float) -> str:
    text = (
        f"{what} falls by {100 * drop:.2f} points, by at most {100 * bound:.2f} at {100 * found.confidence:g} %; "
        f"{100 * limit:g} are allowed"
    )
    if drop <= limit < bound:
        text += " (more inputs narrow that)"
    return text
