"""Tables of a validation for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:  # needs the extra onnx, other commands do not
    from nns_plugin.adapters.onnxruntime import Comparison
    from nns_plugin.jobs.validation import Validation

_OPERATORS = 8
_LAYERS = 12


def tables(found: Validation) -> Iterator[Table]:
    """All tables of a validation, the verdict last."""
    comparison = found.comparison
    yield _files(comparison)
    if comparison.accuracy is not None:
        yield _accuracy(comparison)
    yield _parity(comparison)
    if comparison.latency:
        yield _latency(comparison)
    for compared in comparison.profiles:
        table = _table(
            f"where the time goes at batch {compared.baseline.batch}, largest differences first",
            ("operator", "nodes", "baseline, us", "candidate, us", "difference, us"),
        )
        for change in compared.operators[:_OPERATORS]:
            table.add_row(
                escape(change.operator),
                f"{change.baseline_nodes} -> {change.candidate_nodes}",
                f"{change.baseline_us:.1f}",
                f"{change.candidate_us:.1f}",
                f"{change.candidate_us - change.baseline_us:+.1f}",
            )
        table.caption = escape("\n".join(compared.notes)) or None
        table.caption_justify = "left"
        yield table
    if found.rounding is not None:
        yield _rounding(found)
    yield _verdict(found)


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=escape(title))
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    return table


def _files(comparison: Comparison) -> Table:
    table = _table("files", ("", "baseline", "candidate"))
    pair = comparison.baseline, comparison.candidate
    table.add_row("file", *(escape(file.path) for file in pair))
    table.add_row("bytes", *(f"{file.file_bytes:,}" for file in pair))
    table.add_row("opset", *(str(file.opset) for file in pair))
    memories = [comparison.baseline_memory, comparison.candidate_memory]
    for name, field in (("memory of a session, MB", "session_bytes"), ("memory when it has run, MB", "running_bytes")):
        if None not in memories:
            table.add_row(name, *(f"{getattr(memory, field) / 2**20:.1f}" for memory in memories))
    return table


def _accuracy(comparison: Comparison) -> Table:
    accuracy = comparison.accuracy
    assert accuracy is not None
    sure = f"at {100 * accuracy.confidence:g} % at most"
    table = _table("accuracy, %", ("label", "inputs", "baseline", "candidate", "lost, points", sure))
    for before, after, lost in zip(accuracy.baseline.labels, accuracy.candidate.labels, accuracy.labels, strict=True):
        values = [each.recall if each.balanced_accuracy is None else each.balanced_accuracy for each in (before, after)]
        shown = [f"{100 * value:.2f}" for value in (*values, lost.drop, lost.bound)]
        table.add_row(escape(lost.label), str(after.inputs), *shown)
    table.add_section()
    both = accuracy.baseline.accuracy, accuracy.candidate.accuracy
    shown = [f"{100 * value:.2f}" for value in (*both, accuracy.drop, accuracy.drop_bound)]
    table.add_row("all inputs", str(accuracy.candidate.inputs), *shown)
    table.caption = "labels: balanced accuracy; all inputs: share answered right"
    return table


def _parity(comparison: Comparison) -> Table:
    columns = ("parity", "largest error", "p99", "passes with rtol", "or with atol", "same answer, %", "")
    drawn = " drawn at random" if comparison.random_inputs else ""
    table = _table(f"parity on {comparison.inputs} inputs{drawn}", columns)
    for report in comparison.parity:
        table.add_row(
            report.kind,
            f"{report.max_absolute_error:.1e}",
            f"{report.p99_absolute_error:.1e}",
            *("none" if value is None else f"{value:.1e}" for value in (report.passing_rtol, report.passing_atol)),
            "" if report.top1_agreement is None else f"{100 * report.top1_agreement:.2f}",
            "pass" if report.passed else "differs",
        )
    return table


def _latency(comparison: Comparison) -> Table:
    table = _table(
        "latency, ms: baseline -> candidate", ("batch", "p50", "p90", "p99", "times as fast", "95 % interval")
    )
    for each in comparison.latency:
        cells = []
        for name in ("p50_ms", "p90_ms", "p99_ms"):
            left, right = getattr(each.baseline, name), getattr(each.candidate, name)
            cells.append("" if left is None or right is None else f"{left:.4f} -> {right:.4f}")
        interval = f"[{each.ratio_low:.3f}, {each.ratio_high:.3f}]"
        table.add_row(str(each.batch), *cells, f"{each.ratio:.3f}", escape(interval))
    table.caption = escape(comparison.latency[0].conditions)
    return table


def _rounding(found: Validation) -> Table:
    columns = ("layer alone", "batch", "channels", "rounded up", "p50, ms", "times as fast")
    table = _table("channels rounded up", columns)
    for gain in (found.rounding or ())[:_LAYERS]:
        table.add_row(
            escape(gain.layer),
            str(gain.batch),
            f"{gain.channels[0]} -> {gain.channels[1]}",
            f"{gain.rounded[0]} -> {gain.rounded[1]}",
            f"{gain.latency_ms:.4f} -> {gain.rounded_ms:.4f}",
            escape(f"{gain.ratio:.2f} [{gain.ratio_low:.2f}, {gain.ratio_high:.2f}]"),
        )
    faster = sum(gain.ratio_low > 1 for gain in found.rounding or ())
    table.caption = f"{faster} of {len(found.rounding or ())} are faster with more channels, beyond doubt"
    return table


def _verdict(found: Validation) -> Table:
    table = _table("PASS" if found.verdict.passed else "FAIL", ("check", "found", ""))
    table.columns[1].justify = "left"
    for check in found.verdict.checks:
        cell = "pass" if check.passed else "[bold red]FAIL[/]"
        table.add_row(escape(f"{check.subject}: {check.name}"), escape(check.text), cell)
    return table
