"""The ``nns`` command: options in, jobs called, tables out."""

from __future__ import annotations

import os
import signal
import sys
import threading

from nns_plugin.errors import MissingExtraError, NNSError, ProviderError

PASSED, UNKNOWN_ERROR, BAD_INPUT, PARITY, ACCURACY, LATENCY, PROVIDER = range(7)
"""Exit codes: of several failures of a gate that of the first in the order provider, parity, accuracy, latency."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command; every known error is one line on standard error.

    Its exit code is 2, or 6 if a session does not get its provider. An unknown error is one line and exit code 1; with
    ``NNS_DEBUG=1`` in the environment it keeps its traceback.
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
        raise SystemExit(PROVIDER if isinstance(error, ProviderError) else BAD_INPUT) from None
    except Exception as error:
        if os.environ.get("NNS_DEBUG"):
            raise
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        print(f"nns: {text[:400]} (set NNS_DEBUG=1 to see where)", file=sys.stderr)
        raise SystemExit(UNKNOWN_ERROR) from None
