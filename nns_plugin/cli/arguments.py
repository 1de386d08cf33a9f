"""Shared by all commands: parsing the text of options, and printing warnings as notes."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from nns_plugin.errors import RecipeError


def names(text: str) -> list[str]:
    """Names separated by commas."""
    return [part.strip() for part in text.split(",")]


def numbers(option: str, text: str) -> tuple[int, ...]:
    """Whole numbers separated by commas.

    Raises:
        RecipeError: If the text is anything else.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise RecipeError(
            f"{option}: found {text!r}; expected whole numbers separated by commas, such as 1,8"
        ) from error


def import_from_working_folder() -> None:
    """Let a recipe's factories lie in the folder that the command is called from."""
    sys.path.insert(0, "")


@contextmanager
def notes(console: Console) -> Iterator[None]:
    """Print each of our own warnings once, as a note, even when an error follows."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            ours = [entry for entry in caught if entry.category.__module__.startswith("nns_plugin.")]
            for message in dict.fromkeys(str(entry.message) for entry in ours):
                console.print(f"note: {message}", style="yellow", highlight=False, markup=False)
