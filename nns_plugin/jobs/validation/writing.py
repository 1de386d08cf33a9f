"""Writes the reports of a validation, all of them or none, also when it ends with an error."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nns_plugin.adapters.onnxruntime import Comparison
from nns_plugin.errors import OutputError
from nns_plugin.jobs.figures import latency_figure, new_figure
from nns_plugin.jobs.output import check_writable, written_together
from nns_plugin.jobs.validation.junit import junit_of_error
from nns_plugin.jobs.validation.markdown import markdown_of_error
from nns_plugin.jobs.validation.options import ReportPaths


@contextmanager
def reported_errors(paths: ReportPaths, baseline: Path, candidate: Path, inputs: Sequence[Path] = ()) -> Iterator[None]:
    """Write an error of the block into the reports, so that no older verdict is left there.

    Args:
        paths: Where to write.
        baseline: The first file.
        candidate: The second file.
        inputs: Other files that are read and must not be overwritten.

    Raises:
        OutputError: At once if a report cannot be written, or would overwrite an input.
        MissingExtraError: At once if a figure is wanted and matplotlib is missing.
    """
    check_writable(paths.given, (baseline, candidate, *inputs))
    if paths.figure is not None:
        new_figure(1, 1)
    try:
        yield
    except OutputError:
        raise
    except BaseException as error:  # also what stops the process
        found = {"passed": False, "error": {"type": type(error).__name__, "text": str(error)}}
        if paths.figure is not None:
            paths.figure.unlink(missing_ok=True)
        write_reports(paths, found, junit_of_error(error), markdown_of_error(error, baseline, candidate))
        raise


def write_reports(
    paths: ReportPaths, found: Mapping[str, Any], junit: str, markdown: str, comparison: Comparison | None = None
) -> None:
    """Write the reports that are asked for, all of them or none.

    Args:
        paths: Where to write.
        found: Content of the JSON file.
        junit: Content of the JUnit file.
        markdown: Content of the Markdown file.
        comparison: What the figure shows; no figure without it.

    Raises:
        OutputError: If one cannot be written.
    """
    as_json = json.dumps(found, indent=2, allow_nan=False)
    texts = ((paths.json, as_json), (paths.junit, junit), (paths.markdown, markdown))
    contents: dict[Path, Callable[[Path], object]] = {path: _writer(text) for path, text in texts if path is not None}
    if paths.figure is not None and comparison is not None and comparison.latency:
        figure = latency_figure(comparison.latency)
        contents[paths.figure] = lambda path: figure.savefig(path, dpi=150, format="png")
    written_together(contents)


def _writer(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
