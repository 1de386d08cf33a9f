"""A job's output folder: its files appear together at the end, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nns_plugin.errors import RecipeError


@contextmanager
def staged_folder(output: Path) -> Iterator[Path]:
    """A temporary folder whose files move to ``output`` if the block succeeds.

    It lies inside ``output``, so that moving is a rename; an ``output`` that was made for it goes again on failure.

    Raises:
        RecipeError: At once if ``output`` cannot be written.
    """
    made = [folder for folder in (output, *output.parents) if not folder.exists()]
    try:
        output.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=output, prefix=".staging-"))
    except OSError as error:
        _remove_empty(made)
        raise RecipeError(f"output: {str(output)!r} cannot be written: {error.strerror}; choose another") from error
    try:
        yield staging
        for file in sorted(staging.iterdir()):
            os.replace(file, output / file.name)
    except OSError as error:
        raise RecipeError(f"output: {str(output)!r} cannot be written: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        _remove_empty(made)


def _remove_empty(folders: list[Path]) -> None:
    """Remove the given folders, innermost first, as far as they are empty."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
