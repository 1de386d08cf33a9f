"""``nns sweep``: a recipe with many settings on NNI's engine, and the Pareto-optimal results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nns_plugin.cli.arguments import import_from_working_folder, notes
from nns_plugin.cli.exit_codes import ExitCode
from nns_plugin.cli.formats import new_table, number

if TYPE_CHECKING:  # so that --help imports no torch
    from nns_plugin.jobs.sweep import Sweep

# Heading, number of a trial, factor and format.
NUMBERS = (
    ("balanced acc., %", "balanced_accuracy", 100, ".1f"),
    ("drop, points", "lost", 100, ".1f"),
    ("p50 latency, ms", "latency_ms", 1, ".4f"),
    ("speed-up", "speed_up", 1, ".2f"),
    ("parameters", "parameters", 1, ",.0f"),
)


def sweep(
    recipe: Annotated[Path, typer.Argument(help="Recipe in YAML with a section sweep.")],
    trials: Annotated[int | None, typer.Option(help="Maximum number of trials.")] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Number of trials at a time; they distort each other's latency.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Set any field of the recipe: --set labels=[3]. Repeatable."),
    ] = None,
    nni_config: Annotated[
        Path | None,
        typer.Option("--nni-config", help="NNI's experiment config, for remote machines or Kubernetes."),
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Folder for the results; rerun with the same one to resume a sweep.")
    ] = Path("nns-sweep"),
    quiet: Annotated[bool, typer.Option("--quiet", help="Hide the progress bar.")] = False,
) -> None:
    """Try many settings of a recipe on NNI's engine, report every trial and mark the Pareto-optimal ones."""
    from nns_plugin.jobs.loading import parse_settings
    from nns_plugin.jobs.sweep import FIGURE, run_sweep
    from nns_plugin.jobs.sweep_state import STATE

    given = {"sweep.trials": trials, "sweep.concurrency": concurrency}
    overrides = {name: value for name, value in given.items() if value is not None} | parse_settings(settings or [])
    import_from_working_folder()
    console = Console()
    try:
        with notes(console):
            found = run_sweep(recipe, output, overrides, nni_config=nni_config, progress=not quiet)
    except KeyboardInterrupt:
        console.print(
            f"interrupted; finished trials are in {output / STATE}: rerun to resume", highlight=False, markup=False
        )
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    console.print(_trials(found))
    written = ", ".join(name for name in (STATE, FIGURE, "trials") if (output / name).exists())
    console.print(f"written to {output}: {written}", highlight=False, markup=False)


def _trials(found: Sweep) -> Table:
    """Every trial, the fastest first; the Pareto-optimal ones are marked."""
    fields = list(dict.fromkeys(field for trial in found.trials for field in trial.parameters))
    table = new_table(f"{len(found.trials)} of {found.planned} trials; * Pareto-optimal", ("trial", *fields))
    table.columns[0].justify = "right"
    for heading, *_ in NUMBERS:
        table.add_column(heading, justify="right")
    front = {trial.number for trial in found.pareto}
    for trial in sorted(found.trials, key=lambda trial: (trial.point is None, (trial.point or (0, 0))[1])):
        name = f"{trial.number}{' *' if trial.number in front else '  '}"
        chosen = [escape(str(trial.parameters.get(field, ""))) for field in fields]
        if trial.numbers is None:
            table.add_row(name, *chosen, escape(f"failed: {trial.error}"))
            continue
        cells = []
        for _, key, factor, form in NUMBERS:
            value = trial.numbers.get(key)
            cells.append(number(None if value is None else factor * value, form))
        table.add_row(name, *chosen, *cells)
    return table
