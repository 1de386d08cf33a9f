"""Compares a candidate with its baseline, judges it, and writes reports."""

from __future__ import annotations

import os
from pathlib import Path

from nns_plugin.adapters.onnxruntime import (
    CompareOptions,
    check_provider,
    compare,
    read_file,
    read_values,
    rounding_gains,
)
from nns_plugin.errors import GateError
from nns_plugin.jobs.output import check_writable
from nns_plugin.jobs.recipe import WEIGHTS
from nns_plugin.jobs.validation.evidence import Evidence, evidence_of
from nns_plugin.jobs.validation.junit import junit
from nns_plugin.jobs.validation.markdown import markdown
from nns_plugin.jobs.validation.options import ReportPaths, ValidationOptions
from nns_plugin.jobs.validation.result import Validation
from nns_plugin.jobs.validation.writing import write_reports
from nns_plugin.models.preserve import seeded


def validate(
    baseline: Path, candidate: Path, options: ValidationOptions | None = None, paths: ReportPaths | None = None
) -> Validation:
    """Compare a candidate with its baseline, judge it and, when everything is measured, write all reports together.

    Args:
        baseline: An ONNX file.
        candidate: The ONNX file to replace it.
        options: Thresholds, data and how to measure.
        paths: Where to write reports.

    Raises:
        NNSError: If anything cannot be used; ProviderError if a session does not get its provider.
    """
    options, paths = options or ValidationOptions(), paths or ReportPaths()
    if options.recipe is not None:
        weights = [getattr(options.recipe.model, name) for name in WEIGHTS]
        check_writable(paths.given, [path for path in weights if path is not None])
    found = _judged(baseline, candidate, options, paths)
    link = None
    if paths.figure is not None and paths.markdown is not None:
        link = Path(os.path.relpath(paths.figure.resolve(), paths.markdown.resolve().parent)).as_posix()
    write_reports(paths, found.to_dict(), junit(found), markdown(found, link), found.comparison)
    return found


def _judged(baseline: Path, candidate: Path, options: ValidationOptions, paths: ReportPaths) -> Validation:
    gate, recipe, measured = options.gate, options.recipe, options.measured
    check_provider(measured.get("provider", "cpu"))
    files = [read_file(path) for path in (baseline, candidate)]
    read = [Path(file.path).parent / name for file in files for name in file.sha256]
    check_writable(paths.given, read)
    if recipe is not None and not any(file.fixed_batch for file in files):
        measured = {"batches": (recipe.measure.batch,)} | measured
    evidence = Evidence()
    if options.data is not None:
        inputs, labels = read_values(options.data, files[0])
        evidence = Evidence(inputs, labels)
    elif recipe is not None:
        with seeded(recipe.seed):  # as the job does, so that its test data are the same
            evidence = evidence_of(recipe, files, options.subnet)
    if gate.needs_labels and evidence.labels is None:
        raise GateError(
            "max_accuracy_drop and max_label_drop need inputs with labels; give data with an array 'labels', or a "
            "recipe"
        )
    comparison = compare(
        files[0],
        files[1],
        evidence.inputs,
        evidence.labels,
        CompareOptions(**measured),
        torch_models=evidence.models,
        label_names=evidence.label_names,
        candidate_labels=options.candidate_labels or evidence.candidate_labels,
    )
    gains = rounding_gains(candidate, comparison) if options.suggest_rounding else None
    return Validation(comparison, gate, gate.judge(comparison), gains)
