"""The results of a validation as tables of text: the terminal and the Markdown summary show the same rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nns_plugin.adapters.onnxruntime import Comparison, LatencyComparison, ProfileComparison, RoundingGain
from nns_plugin.jobs.validation.result import Validation

SIMD = ("sse4_2", "avx", "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "fma", "asimd", "sve")


@dataclass(frozen=True)
class TextTable:
    """A table of text.

    Attributes:
        title: What it shows.
        columns: Their headings.
        rows: One cell a column.
        notes: What stands below the rows.
        ranked: Whether the most important rows come first, so that others may be left out.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    ranked: bool = False


def verdict(found: Validation) -> TextTable:
    """The checks; the title is ``PASS`` or ``FAIL``, the first cell of a row ``pass`` or ``FAIL``."""
    rows = tuple(
        ("pass" if check.passed else "FAIL", f"{check.subject}: {check.name}", check.text)
        for check in found.verdict.checks
    )
    return TextTable("PASS" if found.verdict.passed else "FAIL", ("", "check", "result"), rows)


def measurements(found: Validation) -> Iterator[TextTable]:
    """Everything that was measured."""
    comparison = found.comparison
    yield _files(comparison)
    if comparison.latency:
        yield _latency(comparison.latency)
    if comparison.accuracy is not None:
        yield _accuracy(comparison)
    yield _parity(comparison)
    for compared in comparison.profiles:
        yield _profile(compared)
    if found.rounding is not None:
        yield _rounding(found.rounding)


def facts(comparison: Comparison) -> Iterator[tuple[str, str]]:
    """The files compared, and the conditions of the measurement, by name."""
    for name, file in (("baseline", comparison.baseline), ("candidate", comparison.candidate)):
        yield f"{name}.sha256", ", ".join(f"{which} {digest}" for which, digest in file.sha256.items())
        yield f"{name}.opset", str(file.opset)
        yield f"{name}.bytes", str(file.file_bytes)
    for name, memory in (("baseline", comparison.baseline_memory), ("candidate", comparison.candidate_memory)):
        if memory is not None:
            yield f"{name}.session_bytes", str(memory.session_bytes)
            yield f"{name}.running_bytes", str(memory.running_bytes)
    for latency in comparison.latency:
        yield f"latency.batch {latency.batch}", latency.conditions
    for section, values in comparison.environment.items():
        for name, value in values.items():
            yield f"{section}.{name}", _fact(name, value)


def _fact(name: str, value: Any) -> str:
    if name == "cpu_flags":
        return ", ".join(flag for flag in SIMD if flag in value)
    return "unknown" if value is None else str(value)


def _files(comparison: Comparison) -> TextTable:
    pair = comparison.baseline, comparison.candidate
    rows = [
        ("file", *(file.path for file in pair)),
        ("bytes", *(f"{file.file_bytes:,}" for file in pair)),
        ("opset", *(str(file.opset) for file in pair)),
    ]
    memories = comparison.baseline_memory, comparison.candidate_memory
    for name, field in (("session memory, MB", "session_bytes"), ("memory after a run, MB", "running_bytes")):
        if None not in memories:
            rows.append((name, *(f"{getattr(memory, field) / 2**20:.1f}" for memory in memories)))
    return TextTable("Files", ("", "baseline", "candidate"), tuple(rows))


def _latency(found: tuple[LatencyComparison, ...]) -> TextTable:
    rows = []
    for each in found:
        times = []
        for name in ("p50_ms", "p90_ms", "p99_ms"):
            before, after = getattr(each.baseline, name), getattr(each.candidate, name)
            times.append("" if before is None or after is None else f"{before:.4f} -> {after:.4f}")
        rows.append((str(each.batch), *times, f"{each.ratio:.3f} [{each.ratio_low:.3f}, {each.ratio_high:.3f}]"))
    columns = ("batch", "p50, ms", "p90, ms", "p99, ms", "speed-up [95 % interval]")
    return TextTable("Latency", columns, tuple(rows), (found[0].conditions,))


def _accuracy(comparison: Comparison) -> TextTable:
    accuracy = comparison.accuracy
    assert accuracy is not None
    rows = []
    for before, after, lost in zip(accuracy.baseline.labels, accuracy.candidate.labels, accuracy.labels, strict=True):
        pairs = (
            _change(getattr(before, name), getattr(after, name))
            for name in ("balanced_accuracy", "recall", "false_positive_rate")
        )
        rows.append((lost.label, str(after.inputs), *pairs, f"{100 * lost.drop:.2f}", f"{100 * lost.bound:.2f}"))
    columns = ("label", "inputs", "balanced accuracy, %", "recall, %", "false positives, %", "drop, points", "at most")
    note = (
        f"accuracy on all {accuracy.candidate.inputs} inputs: "
        f"{_change(accuracy.baseline.accuracy, accuracy.candidate.accuracy)} %, a drop of {100 * accuracy.drop:.2f} "
        f"points, at most {100 * accuracy.drop_bound:.2f} at {100 * accuracy.confidence:g} % confidence"
    )
    return TextTable("Accuracy", columns, tuple(rows), (note,))


def _change(before: float | None, after: float | None) -> str:
    return "" if before is None or after is None else f"{100 * before:.2f} -> {100 * after:.2f}"


def _parity(comparison: Comparison) -> TextTable:
    rows = tuple(
        (
            report.kind,
            report.candidate,
            f"{report.max_absolute_error:.1e}",
            f"{report.p99_absolute_error:.1e}",
            *("none" if value is None else f"{value:.1e}" for value in (report.passing_rtol, report.passing_atol)),
            "" if report.top1_agreement is None else f"{100 * report.top1_agreement:.2f}",
            "pass" if report.passed else "differs",
        )
        for report in comparison.parity
    )
    columns = (
        "parity",
        "of",
        "largest error",
        "p99",
        "passes with rtol",
        "or with atol",
        "top-1 agreement, %",
        "",
    )
    drawn = "random inputs" if comparison.random_inputs else "inputs"
    note = f"on {comparison.inputs} {drawn}, rtol {comparison.parity[0].rtol:g}, atol {comparison.parity[0].atol:g}"
    return TextTable("Parity", columns, rows, (note,))


def _profile(compared: ProfileComparison) -> TextTable:
    rows = tuple(
        (
            change.operator,
            f"{change.baseline_nodes} -> {change.candidate_nodes}",
            f"{change.baseline_us:.1f}",
            f"{change.candidate_us:.1f}",
            f"{change.candidate_us - change.baseline_us:+.1f}",
        )
        for change in compared.operators
    )
    columns = ("operator", "nodes", "baseline, us", "candidate, us", "difference, us")
    title = f"Time per operator at batch {compared.baseline.batch}, largest differences first"
    return TextTable(title, columns, rows, tuple(compared.notes), ranked=True)


def _rounding(gains: tuple[RoundingGain, ...]) -> TextTable:
    rows = tuple(
        (
            gain.layer,
            str(gain.batch),
            f"{gain.channels[0]} -> {gain.channels[1]}",
            f"{gain.rounded[0]} -> {gain.rounded[1]}",
            f"{gain.latency_ms:.4f} -> {gain.rounded_ms:.4f}",
            f"{gain.ratio:.2f} [{gain.ratio_low:.2f}, {gain.ratio_high:.2f}]",
        )
        for gain in gains
    )
    columns = ("layer", "batch", "channels", "rounded up", "p50 latency, ms", "speed-up [95 % interval]")
    faster = sum(gain.ratio_low > 1 for gain in gains)
    note = f"{faster} of {len(gains)} are faster over the whole interval"
    if not gains:
        note = "All channels are multiples of 16 already, or the widths of layers are unknown."
    return TextTable("Layers timed alone, with channels rounded up", columns, rows, (note,), ranked=True)
