"""The ``nns`` command: options in, jobs called, tables out."""

from __future__ import annotations

import sys

from nns_plugin.errors import MissingExtraError, NNSError


def main(arguments: list[str] | None = None) -> None:
    """Run the command; every known error is one line on standard error and exit code 2."""
    try:
        try:
            from nns_plugin.cli.app import app
        except ModuleNotFoundError as error:
            if error.name in ("typer", "rich"):
                raise MissingExtraError(error.name, "cli") from error
            raise
        app(args=arguments)
    except NNSError as error:
        print(f"nns: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
