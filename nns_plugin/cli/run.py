"""``nns run``: extract a label subnet as a recipe says, and prove it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from nns_plugin.cli.arguments import import_from_working_folder, names, notes
from nns_plugin.cli.exit_codes import ExitCode
from nns_plugin.cli.run_tables import tables


def run(
    recipe: Annotated[
        Path | None, typer.Argument(help="Recipe in YAML; by default scikit-learn's handwritten digits.")
    ] = None,
    labels: Annotated[str | None, typer.Option(help="Labels to keep, by name or index: 3,5. Or: all.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Share of units to remove, in [0, 1).")] = None,
    zeta: Annotated[float | None, typer.Option(help="Instead of a ratio: keep units that score at least this.")] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="Search for the smallest subnet whose balanced accuracy drops by at most this, at 95 % confidence."
        ),
    ] = None,
    target_latency_ms: Annotated[
        float | None, typer.Option(help="Search for the most accurate subnet with at most this median latency.")
    ] = None,
    target_speedup: Annotated[
        float | None,
        typer.Option(help="Search for the most accurate subnet with at least this speed-up in ONNX Runtime: 2.0."),
    ] = None,
    criterion: Annotated[str | None, typer.Option(help="Criterion that scores the units.")] = None,
    compensation: Annotated[
        str | None,
        typer.Option(help="How kept units compensate for removed ones: refit, least_squares, merge, mean or none."),
    ] = None,
    head: Annotated[str | None, typer.Option(help="Head of the subnet: keep, closed or open.")] = None,
    round_to: Annotated[int | None, typer.Option(help="Keep a multiple of this many units in each group.")] = None,
    fine_tune: Annotated[int | None, typer.Option(help="Epochs of fine-tuning after removal.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed for training and measurement.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="Set any field of the recipe: --set angle.similar=20. Repeatable."
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the models and the report.")] = Path("nns-output"),
    figures: Annotated[bool, typer.Option("--figures", help="Also write figures to the folder.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Hide progress bars.")] = False,
) -> None:
    """Extract the part of a classifier that recognises some labels, and prove it in ONNX Runtime."""
    from nns_plugin.jobs.loading import load_recipe, parse_settings
    from nns_plugin.jobs.run import FILES, run_job

    given: dict[str, Any] = {
        "labels": None if labels is None else names(labels),
        "ratio": ratio,
        "zeta": zeta,
        "max_balanced_accuracy_drop": max_drop,
        "target_latency_ms": target_latency_ms,
        "target_speedup": target_speedup,
        "criterion.name": criterion,
        "compensation.method": compensation,
        "head": head,
        "round_to": round_to,
        "fine_tune.epochs": fine_tune,
        "seed": seed,
    }
    import_from_working_folder()
    overrides = {name: value for name, value in given.items() if value is not None}
    if labels == "all":
        overrides["labels"] = None
    overrides |= parse_settings(settings or [])
    checked = load_recipe(recipe, overrides)
    console = Console()
    with notes(console):
        report = run_job(checked, output, progress=not quiet, figures=figures)
    for table in tables(report):
        console.print(table)
    written = ", ".join((*FILES, *(("figures",) if figures else ())))
    console.print(f"written to {output}: {written}", highlight=False, markup=False)
    if not (report.baseline.parity.passed and report.subnet.parity.passed):
        console.print("parity FAILED: an ONNX file does not reproduce its torch model", style="bold red")
        raise typer.Exit(ExitCode.PARITY)
    if report.target_met is False:
        console.print("latency FAILED: the final measurement of the subnet misses its target", style="bold red")
        raise typer.Exit(ExitCode.LATENCY)
