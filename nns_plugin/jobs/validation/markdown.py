"""A validation as Markdown, for people."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from nns_plugin.jobs.validation.result import Validation
from nns_plugin.jobs.validation.tables import TextTable, facts, measurements, verdict


def markdown(found: Validation, figure: str | None = None) -> str:
    """A summary: the verdict, the measurements, and their conditions.

    Args:
        found: The validation.
        figure: Link to the picture of the latencies, from where the summary will be.
    """
    comparison = found.comparison
    judged = verdict(found)
    rows = [(outcome if outcome == "pass" else f"**{outcome}**", *row) for outcome, *row in judged.rows]
    files = f"{_code(comparison.candidate.path)} against {_code(comparison.baseline.path)}"
    lines = [f"# {judged.title}: {files}", "", *_table(judged.columns, rows)]
    if figure is not None:
        lines += ["", f"![latency distributions]({quote(figure)})"]
    for measured in measurements(found):
        lines += ["", f"## {measured.title}", "", *_section(measured)]
    lines += ["", "## Measured on", "", *_table(("what", "value"), list(facts(comparison)))]
    return "\n".join(lines)


def markdown_of_error(error: BaseException, baseline: Path, candidate: Path) -> str:
    """The error, in place of a summary."""
    return f"# ERROR: {_code(candidate)} against {_code(baseline)}\n\n{_cell(str(error))}"


def _section(measured: TextTable) -> list[str]:
    lines = _table(measured.columns, measured.rows) if measured.rows else []
    notes = [f"- {_cell(note)}" for note in measured.notes]
    return [*lines, *([""] if lines and notes else []), *notes]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
        *(f"| {' | '.join(map(_cell, row))} |" for row in rows),
    ]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def _code(path: str | os.PathLike[str]) -> str:
    return f"`{' '.join(os.fspath(path).split())}`"
