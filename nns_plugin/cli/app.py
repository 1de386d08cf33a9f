"""Commands of ``nns`` and their options."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from nns_plugin import __version__
from nns_plugin.cli import ACCURACY, LATENCY, PARITY, PROVIDER, tables
from nns_plugin.errors import RecipeError

app = typer.Typer(
    name="nns",
    help="Keep what some labels need of a classifier, remove the rest, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nns-plugin {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and stop.")
    ] = False,
) -> None:
    """Options of the command itself."""


@app.command()
def run(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe in YAML; without one, scikit-learn's handwritten digits.")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="Labels to keep, by name or index, separated by commas: 3,5. Or: all.")
    ] = None,
    ratio: Annotated[float | None, typer.Option(help="Share of units to remove, in [0, 1).")] = None,
    zeta: Annotated[
        float | None, typer.Option(help="Keep units that score at least this, in place of a ratio.")
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(help="Search the smallest subnet that loses at most this balanced accuracy, at 95 % confidence."),
    ] = None,
    target_latency_ms: Annotated[
        float | None, typer.Option(help="Search the subnet that loses least and whose median latency is at most this.")
    ] = None,
    target_speedup: Annotated[
        float | None, typer.Option(help="The same for the speed-up, measured in ONNX Runtime: 2.0.")
    ] = None,
    criterion: Annotated[str | None, typer.Option(help="Criterion that scores the units.")] = None,
    compensation: Annotated[
        str | None, typer.Option(help="How kept units take over: refit, least_squares, merge, mean or none.")
    ] = None,
    head: Annotated[str | None, typer.Option(help="keep, closed or open.")] = None,
    round_to: Annotated[int | None, typer.Option(help="Keep a multiple of this many units in each group.")] = None,
    fine_tune: Annotated[int | None, typer.Option(help="Epochs of fine-tuning after removal.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of training and measurement.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="Any field of the recipe: --set angle.similar=20. Repeatable."
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the models and the report.")] = Path("nns-output"),
    figures: Annotated[bool, typer.Option("--figures", help="Write figures into the folder, too.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """Extract the part of a classifier that knows some labels, and prove it in ONNX Runtime."""
    from nns_plugin.jobs.loading import load_recipe, parse_settings
    from nns_plugin.jobs.run import FILES, run_job

    given: dict[str, Any] = {
        "labels": None if labels is None else _names(labels),
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
    sys.path.insert(0, "")  # factories may lie in the folder that the command is called from
    overrides = {name: value for name, value in given.items() if value is not None}
    if labels == "all":
        overrides["labels"] = None
    overrides |= parse_settings(settings or [])
    checked = load_recipe(recipe, overrides)
    console = Console()
    with _notes(console):
        report = run_job(checked, output, progress=not quiet, figures=figures)
    if report.trials:
        console.print(tables.trials(report))
    console.print(tables.comparison(report))
    console.print(tables.per_label(report))
    console.print(tables.kept_units_table(report))
    written = ", ".join((*FILES, *(("figures",) if figures else ())))
    console.print(f"written to {output}: {written}", highlight=False, markup=False)
    if not (report.baseline.parity.passed and report.subnet.parity.passed):
        console.print("parity FAILED: an ONNX file does not answer as its model does", style="bold red")
        raise typer.Exit(PARITY)
    if report.target_met is False:
        console.print("latency FAILED: measured again, the subnet misses its target", style="bold red")
        raise typer.Exit(LATENCY)


@app.command()
def sweep(
    recipe: Annotated[Path, typer.Argument(help="A recipe in YAML with a section sweep.")],
    trials: Annotated[int | None, typer.Option(help="Most trials.")] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Trials at a time; they disturb each other's latency.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Any field of the recipe: --set labels=[3]. Repeatable."),
    ] = None,
    nni_config: Annotated[
        Path | None,
        typer.Option("--nni-config", help="NNI's experiment config, for remote machines or Kubernetes."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the results; a sweep that was cut short goes on.")] = Path(
        "nns-sweep"
    ),
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Try many settings of a recipe on NNI's engine, and show which results nothing beats."""
    from nns_plugin.jobs.loading import parse_settings
    from nns_plugin.jobs.sweep import STATE, run_sweep

    given = {"sweep.trials": trials, "sweep.concurrency": concurrency}
    overrides = {name: value for name, value in given.items() if value is not None} | parse_settings(settings or [])
    sys.path.insert(0, "")
    console = Console()
    try:
        with _notes(console):
            found = run_sweep(recipe, output, overrides, nni_config=nni_config, progress=not quiet)
    except KeyboardInterrupt:
        console.print(
            f"stopped; what has ended is in {output / STATE}, and the same command goes on from there",
            highlight=False,
            markup=False,
        )
        raise typer.Exit(130) from None
    console.print(tables.sweep(found))
    console.print(f"written to {output}: {STATE}, pareto.png, trials", highlight=False, markup=False)


@app.command()
def validate(
    baseline: Annotated[Path, typer.Argument(help="The ONNX file that is in use, or the dense one.")],
    candidate: Annotated[Path, typer.Argument(help="The ONNX file that is to take its place.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Inputs by name, and 'labels' if known, in an .npz file; else random inputs."),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="In place of data: a recipe, whose test data to take.")] = None,
    subnet: Annotated[
        Path | None,
        typer.Option(help="With a recipe: the candidate's subnet.safetensors, to compare in torch, too."),
    ] = None,
    provider: Annotated[str | None, typer.Option(help="Execution provider: cpu, cuda and so on.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads within an operator, in each session.")] = None,
    batch: Annotated[str | None, typer.Option(help="Batch sizes at which to measure: 1,8,32.")] = None,
    samples: Annotated[
        int | None, typer.Option(help="Timed runs of each file: 100 for p90, 1000 for p99.", show_default="300")
    ] = None,
    io_binding: Annotated[
        bool, typer.Option("--io-binding/--no-io-binding", help="Bind inputs and outputs to the device once.")
    ] = False,
    spinning: Annotated[bool, typer.Option("--spinning/--no-spinning", help="Let idle threads spin.")] = False,
    min_speedup: Annotated[float | None, typer.Option(help="Least ratio of medians, at each batch size.")] = None,
    max_p90_ms: Annotated[float | None, typer.Option(help="Most that p90 may be, at each batch size.")] = None,
    max_accuracy_drop: Annotated[float | None, typer.Option(help="Most that accuracy may fall: 0.01.")] = None,
    max_label_drop: Annotated[
        float | None, typer.Option(help="Most that each label's balanced accuracy may fall: 0.03.")
    ] = None,
    rtol: Annotated[float | None, typer.Option(help="Relative tolerance of the outputs for the kept labels.")] = None,
    atol: Annotated[float | None, typer.Option(help="Absolute tolerance of them.")] = None,
    min_top1_agreement: Annotated[
        float | None, typer.Option(help="Least share of inputs that both answer alike: 0.99.")
    ] = None,
    candidate_labels: Annotated[
        str | None, typer.Option(help="Labels of the candidate, in order, if its file does not tell: 3,5,other.")
    ] = None,
    confidence: Annotated[float, typer.Option(help="How sure to be of what accuracy loses.")] = 0.95,
    suggest_rounding: Annotated[
        bool, typer.Option("--suggest-rounding", help="Measure what more channels would gain, layer by layer.")
    ] = False,
    json: Annotated[Path | None, typer.Option("--json", help="Write all numbers there.")] = None,
    junit: Annotated[Path | None, typer.Option("--junit", help="Write the checks there, as tests in XML.")] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="Write a summary there.")] = None,
    figure: Annotated[Path | None, typer.Option("--figure", help="Draw both distributions of latency there.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of random inputs and of the order of runs.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """Compare an ONNX file with the one that it is to replace, and judge it by thresholds.

    Every threshold is optional, and only those given can fail. Exit codes: 0 pass, 1 a fault of this program, 2 bad
    input, 3 parity, 4 accuracy, 5 latency, 6 provider; of several failures the first of provider, parity, accuracy,
    latency.
    """
    from nns_plugin.adapters.onnxruntime import Gate
    from nns_plugin.cli import validation_tables
    from nns_plugin.jobs.loading import load_recipe
    from nns_plugin.jobs.validation import Reports, reported_errors
    from nns_plugin.jobs.validation import validate as validate_files

    reports = Reports(json, junit, markdown, figure)
    read = [path for path in (data, recipe, subnet) if path is not None]
    if recipe is not None:
        sys.path.insert(0, "")
    console = Console()
    with _notes(console), reported_errors(reports, baseline, candidate, read):
        given = {
            "provider": provider,
            "threads": threads,
            "batches": None if batch is None else _numbers("--batch", batch),
            "samples": samples,
            "candidate_labels": None if candidate_labels is None else _names(candidate_labels),
        }
        found = validate_files(
            baseline,
            candidate,
            Gate(
                min_speedup=min_speedup,
                max_p90_ms=max_p90_ms,
                max_accuracy_drop=max_accuracy_drop,
                max_label_drop=max_label_drop,
                rtol=rtol,
                atol=atol,
                min_top1_agreement=min_top1_agreement,
            ),
            data=data,
            recipe=None if recipe is None else load_recipe(recipe),
            subnet=subnet,
            reports=reports,
            suggest_rounding=suggest_rounding,
            io_binding=io_binding,
            allow_spinning=spinning,
            confidence=confidence,
            seed=seed,
            progress=not quiet,
            **{name: value for name, value in given.items() if value is not None},
        )
    for table in validation_tables.tables(found):
        console.print(table)
    for failure in found.verdict.failures:
        print(f"nns: {failure.subject} FAILED: {' '.join(failure.text.split())}", file=sys.stderr)
    if found.verdict.failures:
        codes = {"provider": PROVIDER, "parity": PARITY, "accuracy": ACCURACY, "latency": LATENCY}
        failed = {failure.subject for failure in found.verdict.failures}
        raise typer.Exit(next(code for subject, code in codes.items() if subject in failed))


def _names(text: str) -> list[str]:
    """Names that are separated by commas."""
    return [part.strip() for part in text.split(",")]


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """Whole numbers that are separated by commas."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise RecipeError(
            f"{option}: found {text!r}; expected whole numbers separated by commas, such as 1,8"
        ) from error


@app.command()
def doctor() -> None:
    """Show versions, missing extras and the execution providers that a session really gets."""
    from nns_plugin.criteria import available, broken
    from nns_plugin.environment import hosts
    from nns_plugin.errors import MissingExtraError

    console = Console()
    console.print(tables.hosts(hosts()))
    try:
        from nns_plugin.adapters.onnxruntime import session_providers

        console.print(tables.providers(session_providers()))
    except MissingExtraError as error:
        console.print(str(error), highlight=False, markup=False)
    failures = broken()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # broken plug-ins are listed below
        console.print(f"criteria: {', '.join(sorted(available()))}", highlight=False)
    for name, failure in failures.items():
        console.print(f"broken criterion plug-in {name!r}: {failure}", style="red", highlight=False, markup=False)


@contextmanager
def _notes(console: Console) -> Iterator[None]:
    """Print our own warnings as notes, each once, also when an error follows them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            for message in dict.fromkeys(str(entry.message) for entry in caught if _is_ours(entry.category)):
                console.print(f"note: {message}", style="yellow", highlight=False, markup=False)


def _is_ours(category: type[Warning]) -> bool:
    return category.__module__.startswith("nns_plugin.")
