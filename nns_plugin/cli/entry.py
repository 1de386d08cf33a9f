"""Runs ``nns``: every error becomes one line on standard error and an exit code."""

from __future__ import annotations

import os
import signal
import sys
import threading

from nns_plugin.cli.exit_codes import of_error
from nns_plugin.errors import MissingExtraError, NNSError


def main(arguments: list[str] | None = None) -> None:
    """Run the command.

    A known error is one line on standard error. So is an unknown one, unless ``NNS_DEBUG=1`` in the environment asks
    for its traceback. :mod:`nns_plugin.cli.exit_codes` has the exit codes.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that files are cleaned up
    try:
        try:
            from nns_plugin.cli.app import app
        except ModuleNotFoundError as error:
            if error.name in ("typer", "rich"):
                raise MissingExtraError(error.name, "cli") from error
            raise
        app(args=arguments, prog_name="nns")
    except NNSError as error:
        print(f"nns: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(of_error(error)) from None
    except Exception as error:
        if os.environ.get("NNS_DEBUG"):
            raise
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        print(f"nns: {text[:400]} (set NNS_DEBUG=1 for the traceback)", file=sys.stderr)
        raise SystemExit(of_error(error)) from None
