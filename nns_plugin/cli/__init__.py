"""The ``nns`` command: options in, jobs called, tables out."""

from nns_plugin.cli.entry import main
from nns_plugin.cli.exit_codes import ExitCode

__all__ = ["ExitCode", "main"]
