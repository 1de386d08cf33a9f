"""``nns validate``: judge a candidate ONNX file against its baseline."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nns_plugin.cli.arguments import import_from_working_folder, names, notes, numbers
from nns_plugin.cli.exit_codes import of_failures
from nns_plugin.cli.validate_tables import tables

_INPUTS, _MEASUREMENT, _THRESHOLDS, _REPORTS = "Inputs and labels", "Measurement", "Thresholds", "Reports"


def validate(
    baseline: Annotated[Path, typer.Argument(help="ONNX file in use, or the dense one.")],
    candidate: Annotated[Path, typer.Argument(help="ONNX file to replace it.")],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Inputs by name, and 'labels' if known, in an .npz file; random inputs by default.",
            rich_help_panel=_INPUTS,
        ),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Instead of data: a recipe whose test data to use.", rich_help_panel=_INPUTS)
    ] = None,
    subnet: Annotated[
        Path | None,
        typer.Option(
            help="With a recipe: the candidate's subnet.safetensors, to compare the torch models, too.",
            rich_help_panel=_INPUTS,
        ),
    ] = None,
    candidate_labels: Annotated[
        str | None,
        typer.Option(
            help="Labels of the candidate's outputs, in order, if its file does not name them: 3,5,other.",
            rich_help_panel=_INPUTS,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of random inputs and of the order of runs.", rich_help_panel=_INPUTS)
    ] = 0,
    provider: Annotated[
        str | None, typer.Option(help="Execution provider: cpu, cuda and so on.", rich_help_panel=_MEASUREMENT)
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads within an operator, in each session.", rich_help_panel=_MEASUREMENT)
    ] = None,
    batch: Annotated[
        str | None, typer.Option(help="Batch sizes at which to measure: 1,8,32.", rich_help_panel=_MEASUREMENT)
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            help="Timed runs per file: p90 needs at least 100, p99 at least 1000.",
            show_default="300",
            rich_help_panel=_MEASUREMENT,
        ),
    ] = None,
    io_binding: Annotated[
        bool,
        typer.Option(
            "--io-binding/--no-io-binding",
            help="Bind inputs and outputs to the device once.",
            rich_help_panel=_MEASUREMENT,
        ),
    ] = False,
    spinning: Annotated[
        bool,
        typer.Option("--spinning/--no-spinning", help="Let idle threads spin.", rich_help_panel=_MEASUREMENT),
    ] = False,
    suggest_rounding: Annotated[
        bool,
        typer.Option(
            "--suggest-rounding",
            help="Measure, layer by layer, the speed-up from rounding channels up.",
            rich_help_panel=_MEASUREMENT,
        ),
    ] = False,
    min_speedup: Annotated[
        float | None,
        typer.Option(help="Minimum speed-up (ratio of medians) at each batch size.", rich_help_panel=_THRESHOLDS),
    ] = None,
    max_p90_ms: Annotated[
        float | None,
        typer.Option(help="Maximum p90 latency in ms at each batch size.", rich_help_panel=_THRESHOLDS),
    ] = None,
    max_accuracy_drop: Annotated[
        float | None, typer.Option(help="Maximum accuracy drop: 0.01.", rich_help_panel=_THRESHOLDS)
    ] = None,
    max_label_drop: Annotated[
        float | None,
        typer.Option(help="Maximum drop of any label's balanced accuracy: 0.03.", rich_help_panel=_THRESHOLDS),
    ] = None,
    confidence: Annotated[
        float, typer.Option(help="Confidence level of the accuracy-drop bound.", rich_help_panel=_THRESHOLDS)
    ] = 0.95,
    rtol: Annotated[
        float | None,
        typer.Option(help="Relative tolerance for the outputs of the kept labels.", rich_help_panel=_THRESHOLDS),
    ] = None,
    atol: Annotated[
        float | None,
        typer.Option(help="Absolute tolerance for the outputs of the kept labels.", rich_help_panel=_THRESHOLDS),
    ] = None,
    min_top1_agreement: Annotated[
        float | None,
        typer.Option(help="Minimum share of inputs that both files classify alike: 0.99.", rich_help_panel=_THRESHOLDS),
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write all numbers to this file.", rich_help_panel=_REPORTS)
    ] = None,
    junit: Annotated[
        Path | None,
        typer.Option("--junit", help="Write the checks to this file, as JUnit XML.", rich_help_panel=_REPORTS),
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", help="Write a summary to this file.", rich_help_panel=_REPORTS)
    ] = None,
    figure: Annotated[
        Path | None,
        typer.Option("--figure", help="Plot both latency distributions into this PNG file.", rich_help_panel=_REPORTS),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Hide progress bars.")] = False,
) -> None:
    """Compare a candidate ONNX file with its baseline, and judge it by thresholds.

    Every threshold is optional; only those given can fail.

    Exit codes: 0 pass, 1 unknown error, 2 bad input, 3 parity, 4 accuracy, 5 latency, 6 provider.

    Of several failures, the first of provider, parity, accuracy, latency gives the code.
    """
    from nns_plugin.adapters.onnxruntime import Gate
    from nns_plugin.jobs.loading import load_recipe
    from nns_plugin.jobs.validation import ReportPaths, ValidationOptions, reported_errors
    from nns_plugin.jobs.validation import validate as validate_files

    paths = ReportPaths(json, junit, markdown, figure)
    read = [path for path in (data, recipe, subnet) if path is not None]
    if recipe is not None:
        import_from_working_folder()
    console = Console()
    with notes(console), reported_errors(paths, baseline, candidate, read):
        given = {
            "provider": provider,
            "threads": threads,
            "batches": None if batch is None else tuple(numbers("--batch", batch)),
            "samples": samples,
            "io_binding": io_binding,
            "allow_spinning": spinning,
            "confidence": confidence,
            "seed": seed,
            "progress": not quiet,
        }
        gate = Gate(
            min_speedup=min_speedup,
            max_p90_ms=max_p90_ms,
            max_accuracy_drop=max_accuracy_drop,
            max_label_drop=max_label_drop,
            rtol=rtol,
            atol=atol,
            min_top1_agreement=min_top1_agreement,
        )
        options = ValidationOptions(
            gate=gate,
            data=data,
            recipe=None if recipe is None else load_recipe(recipe),
            subnet=subnet,
            candidate_labels=None if candidate_labels is None else tuple(names(candidate_labels)),
            suggest_rounding=suggest_rounding,
            measurement={name: value for name, value in given.items() if value is not None},
        )
        found = validate_files(baseline, candidate, options, paths)
    for table in tables(found):
        console.print(table)
    for failure in found.verdict.failures:
        print(f"nns: {failure.subject} FAILED: {' '.join(failure.text.split())}", file=sys.stderr)
    if found.verdict.failures:
        raise typer.Exit(of_failures({failure.subject for failure in found.verdict.failures}))
