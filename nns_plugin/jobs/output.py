"""A job's output folder: its files appear together at the end, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nns_plugin.errors import RecipeError


@contextmanager
def staged_folder(output: Path, names: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Path]:
    """A temporary folder whose files move to ``output`` if the block succeeds.

    It lies inside ``output``, so that moving is a rename; an ``output`` that was made for it goes again on failure.

    Args:
        output: The folder; made if missing.
        names: The files that will be written there.
        optional: Patterns of files that may be written as well; those of an earlier time are removed.

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
        for name in names:
            if (output / name).is_dir():
                raise RecipeError(f"output: {str(output / name)!r} is a folder; expected to write a file there")
        yield staging
        _move(staging, output, optional)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        _remove_empty(made)


def _move(staging: Path, output: Path, optional: Sequence[str]) -> None:
    for file in staging.iterdir():
        if (output / file.name).is_dir():
            raise RecipeError(f"output: {str(output / file.name)!r} is a folder; expected to write a file there")
    try:
        for pattern in optional:
            for old in output.glob(pattern):
                if old.is_file():
                    old.unlink()
        for file in sorted(staging.iterdir()):
            os.replace(file, output / file.name)
    except OSError as error:
        raise RecipeError(f"output: {str(output)!r} cannot be written: {error.strerror}; choose another") from error


def _remove_empty(folders: list[Path]) -> None:
    """Remove the given folders, innermost first, as far as they are empty."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
