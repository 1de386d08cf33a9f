"""Exit codes of ``nns``, and which error or failed check gives which."""

from __future__ import annotations

from collections.abc import Collection
from enum import IntEnum

from nns_plugin.errors import NNSError, ProviderError


class ExitCode(IntEnum):
    """What the exit code of ``nns`` means."""

    PASSED = 0
    """Everything ran, and every given threshold holds."""
    UNKNOWN_ERROR = 1
    """An unexpected error: a bug in this program."""
    BAD_INPUT = 2
    """An option, a recipe, a model, data or a file cannot be used; typer exits with it on wrong usage, too."""
    PARITY = 3
    """Outputs differ by more than the tolerances allow, or are missing."""
    ACCURACY = 4
    """Accuracy, or a label's balanced accuracy, drops by more than is allowed."""
    LATENCY = 5
    """A threshold or target for latency or speed-up is missed."""
    PROVIDER = 6
    """A session did not get the requested execution provider, or another provider ran all of its nodes."""
    INTERRUPTED = 130
    """Ctrl-C."""


# What a gate judges, the most serious first.
SUBJECTS = {
    "provider": ExitCode.PROVIDER,
    "parity": ExitCode.PARITY,
    "accuracy": ExitCode.ACCURACY,
    "latency": ExitCode.LATENCY,
}


def of_error(error: Exception) -> ExitCode:
    """The exit code of an error."""
    if isinstance(error, ProviderError):
        return ExitCode.PROVIDER
    return ExitCode.BAD_INPUT if isinstance(error, NNSError) else ExitCode.UNKNOWN_ERROR


def of_failures(subjects: Collection[str]) -> ExitCode:
    """The exit code of a gate whose checks on these subjects failed: that of the most serious one."""
    return next((code for subject, code in SUBJECTS.items() if subject in subjects), ExitCode.PASSED)
