"""The ``nns`` command: options in, jobs called, tables out."""

from __future__ import annotations

import os
import signal
import sys
import threading

from nns_plugin.errors import MissingExtraError, NNSError


def main(arguments: list[str] | None = None) -> None:
    """Run the command; every known error is one line on standard error and exit code 2.

    An unknown error is one line and exit code 1; with ``NNS_DEBUG=1`` in the environment it keeps its traceback.
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
        app(args=arguments)
    except NNSError as error:
        print(f"nns: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except Exception as error:
        if os.environ.get("NNS_DEBUG"):
            raise
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        print(f"nns: {text[:400]} (set NNS_DEBUG=1 to see where)", file=sys.stderr)
        raise SystemExit(1) from None
