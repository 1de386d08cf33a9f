"""A validation as text: JUnit's XML for build servers, Markdown for people."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from xml.etree import ElementTree

from nns_plugin.adapters.onnxruntime import Comparison, LatencyComparison

if TYPE_CHECKING:
    from nns_plugin.jobs.validation import Validation

SUITE = "nns validate"
SIMD = ("sse4_2", "avx", "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "fma", "asimd", "sve")
_OPERATORS = 12
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # in XML 1.0


def junit(found: Validation) -> str:
    """The checks as test cases; a check that does not hold is a failure."""
    checks = found.verdict.checks
    suite = _suite(tests=len(checks), failures=len(found.verdict.failures), errors=0)
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in _facts(found.comparison):
        ElementTree.SubElement(properties, "property", name=name, value=value)
    for check in checks:
        case = ElementTree.SubElement(suite, "testcase", classname=f"nns.{check.subject}", name=check.name)
        if check.passed:
            ElementTree.SubElement(case, "system-out").text = check.text
        else:
            ElementTree.SubElement(case, "failure", message=check.text, type=check.subject)
    return _xml(suite)


def junit_of_error(error: BaseException) -> str:
    """One test case that could not be carried out."""
    suite = _suite(tests=1, failures=0, errors=1)
    case = ElementTree.SubElement(suite, "testcase", classname="nns", name="comparison")
    ElementTree.SubElement(case, "error", message=_line(error), type=type(error).__name__)
    return _xml(suite)


def _suite(**counts: int) -> ElementTree.Element:
    return ElementTree.Element("testsuite", {"name": SUITE} | {name: str(count) for name, count in counts.items()})


def _xml(suite: ElementTree.Element) -> str:
    root = ElementTree.Element("testsuites")
    root.append(suite)
    for element in root.iter():
        element.attrib.update({name: _FORBIDDEN.sub("\ufffd", value) for name, value in element.attrib.items()})
        element.text = element.text and _FORBIDDEN.sub("\ufffd", element.text)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True)


def markdown(found: Validation, figure: str | None = None) -> str:
    """A summary: the verdict, what was measured, and on what; with a link to a picture from where it will lie."""
    comparison = found.comparison
    lines = [
        f"# {'PASS' if found.verdict.passed else 'FAIL'}: {_code(comparison.candidate.path)} beside "
        f"{_code(comparison.baseline.path)}",
        "",
    ]
    lines += _table(
        ("", "check", "found"),
        [
            ("pass" if check.passed else "**FAIL**", f"{check.subject}: {check.name}", check.text)
            for check in found.verdict.checks
        ],
    )
    if comparison.latency:
        lines += ["", "## Latency", "", *_latency(comparison.latency)]
        if figure is not None:
            lines += ["", f"![both distributions of latency]({quote(figure)})"]
    if comparison.accuracy is not None:
        lines += ["", "## Accuracy", "", *_accuracy(comparison)]
    lines += ["", "## Parity", "", *_parity(comparison)]
    for compared in comparison.profiles:
        lines += ["", f"## Where the time goes at batch {compared.baseline.batch}", ""]
        lines += _table(
            ("operator", "nodes", "baseline, us", "candidate, us", "difference"),
            [
                (
                    change.operator,
                    f"{change.baseline_nodes} -> {change.candidate_nodes}",
                    f"{change.baseline_us:.1f}",
                    f"{change.candidate_us:.1f}",
                    f"{change.candidate_us - change.baseline_us:+.1f}",
                )
                for change in compared.operators[:_OPERATORS]
            ],
        )
        lines += ["", *(f"- {_cell(note)}" for note in compared.notes)] if compared.notes else []
    if found.rounding is not None:
        lines += ["", "## Layers alone, with channels rounded up", "", *_rounding(found)]
    lines += ["", "## Measured on", ""]
    lines += _table(("what", "value"), list(_facts(comparison)))
    return "\n".join(lines)


def markdown_of_error(error: BaseException, baseline: Path, candidate: Path) -> str:
    """What is wrong, in place of a summary."""
    return f"# ERROR: {_code(candidate)} beside {_code(baseline)}\n\n{_cell(_line(error))}"


def _latency(found: Sequence[LatencyComparison]) -> list[str]:
    def cell(value: float | None) -> str:
        return "" if value is None else f"{value:.4f}"

    rows = [
        (
            str(each.batch),
            f"{each.baseline.p50_ms:.4f} -> {each.candidate.p50_ms:.4f}",
            f"{cell(each.baseline.p90_ms)} -> {cell(each.candidate.p90_ms)}" if each.candidate.p90_ms else "",
            f"{cell(each.baseline.p99_ms)} -> {cell(each.candidate.p99_ms)}" if each.candidate.p99_ms else "",
            f"{each.ratio:.3f} [{each.ratio_low:.3f}, {each.ratio_high:.3f}]",
        )
        for each in found
    ]
    how = f"{found[0].conditions}; [95 % interval]"
    return [*_table(("batch", "p50, ms", "p90, ms", "p99, ms", "speed-up"), rows), "", how]


def _accuracy(comparison: Comparison) -> list[str]:
    accuracy = comparison.accuracy
    if accuracy is None:
        return []
    rows = []
    pairs = zip(accuracy.baseline.labels, accuracy.candidate.labels, accuracy.labels, strict=True)
    for before, after, lost in pairs:
        rows.append(
            (
                _cell(lost.label),
                str(after.inputs),
                f"{_percent(before.balanced_accuracy)} -> {_percent(after.balanced_accuracy)}",
                f"{_percent(before.recall)} -> {_percent(after.recall)}",
                f"{_percent(before.false_positive_rate)} -> {_percent(after.false_positive_rate)}",
                f"{100 * lost.drop:.2f}",
                f"{100 * lost.bound:.2f}",
            )
        )
    columns = ("label", "inputs", "balanced accuracy, %", "recall, %", "false positives, %", "lost, points", "at most")
    return [
        f"{100 * accuracy.drop:.2f} points of accuracy are lost, at most {100 * accuracy.drop_bound:.2f} at "
        f"{100 * accuracy.confidence:g} %, on {accuracy.candidate.inputs} inputs.",
        "",
        *_table(columns, rows),
    ]


def _parity(comparison: Comparison) -> list[str]:
    rows = [
        (
            report.kind,
            _cell(report.candidate),
            "pass" if report.passed else "over the tolerance",
            f"{report.max_absolute_error:.2e}",
            f"{report.p99_absolute_error:.2e}",
            "" if report.passing_rtol is None else f"{report.passing_rtol:.2e}",
            "" if report.passing_atol is None else f"{report.passing_atol:.2e}",
            "" if report.top1_agreement is None else _percent(report.top1_agreement),
        )
        for report in comparison.parity
    ]
    columns = ("kind", "of", "", "largest error", "p99", "passes with rtol", "or with atol", "same answer, %")
    drawn = " drawn at random" if comparison.random_inputs else ""
    tolerance = f"rtol {comparison.parity[0].rtol:g}, atol {comparison.parity[0].atol:g}"
    return [*_table(columns, rows), "", f"On {comparison.inputs} inputs{drawn}, {tolerance}."]


def _rounding(found: Validation) -> list[str]:
    rows = [
        (
            _cell(gain.layer),
            str(gain.batch),
            f"{gain.channels[0]} -> {gain.channels[1]}",
            f"{gain.rounded[0]} -> {gain.rounded[1]}",
            f"{gain.latency_ms:.4f} -> {gain.rounded_ms:.4f}",
            f"{gain.ratio:.2f} [{gain.ratio_low:.2f}, {gain.ratio_high:.2f}]",
        )
        for gain in found.rounding or ()
    ]
    if not rows:
        return ["All channels are multiples of 16 already, or the sizes of layers are not known."]
    return _table(("layer", "batch", "channels", "rounded", "p50, ms", "times as fast"), rows)


def _facts(comparison: Comparison) -> Iterator[tuple[str, str]]:
    """What was compared, and what it was measured on and with."""
    for name, file in (("baseline", comparison.baseline), ("candidate", comparison.candidate)):
        digests = ", ".join(f"{which} {digest}" for which, digest in file.sha256.items())
        yield f"{name}.sha256", digests
        yield f"{name}.opset", str(file.opset)
        yield f"{name}.bytes", str(file.file_bytes)
    for name, memory in (("baseline", comparison.baseline_memory), ("candidate", comparison.candidate_memory)):
        if memory is not None:
            yield f"{name}.session_bytes", str(memory.session_bytes)
            yield f"{name}.running_bytes", str(memory.running_bytes)
    for latency in comparison.latency:
        yield f"latency.batch {latency.batch}", latency.conditions
    for section, facts in comparison.environment.items():
        for name, value in facts.items():
            yield f"{section}.{name}", _fact(name, value)


def _fact(name: str, value: Any) -> str:
    if name == "cpu_flags":
        return ", ".join(flag for flag in SIMD if flag in value)
    return "unknown" if value is None else str(value)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
        *(f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows),
    ]


def _cell(text: str) -> str:
    line = " ".join(text.split())
    return line.replace("|", r"\|") if r"\|" not in line else line


def _code(path: str | os.PathLike[str]) -> str:
    return f"`{' '.join(os.fspath(path).split())}`"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
