"""The ``nns`` command: options in, jobs called, tables out."""

from nns_plugin.cli.entry import main

__all__ = ["main"]
