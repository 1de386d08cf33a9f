"""Puts the commands of ``nns`` together."""

from __future__ import annotations

from typing import Annotated

import typer

from nns_plugin import __version__
from nns_plugin.cli.doctor import doctor
from nns_plugin.cli.run import run
from nns_plugin.cli.sweep import sweep
from nns_plugin.cli.validate import validate

app = typer.Typer(
    name="nns",
    help="Prune a classifier down to the labels you need, and prove the result with ONNX Runtime.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (run, sweep, validate, doctor):
    app.command()(_command)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nns-plugin {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of ``nns`` itself."""
