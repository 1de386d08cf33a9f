"""A job's output folder: its files appear together at the end, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
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


def check_writable(paths: Sequence[Path]) -> None:
    """Make sure, before any work, that files can be written where they are wanted.

    Raises:
        RecipeError: If two are the same, one is a folder, or its folder is missing or cannot be written.
    """
    if len({path.resolve() for path in paths}) != len(paths):
        raise RecipeError(f"output: two of {', '.join(map(str, paths))} are the same file; give each its own")
    for path in paths:
        if path.is_dir():
            raise RecipeError(f"output: {str(path)!r} is a folder; expected the name of a file")
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise RecipeError(f"output: {str(path.parent)!r} is no folder that can be written; choose another")


def written_together(contents: Mapping[Path, Callable[[Path], object]]) -> None:
    """Write files so that each is whole or not there, and none is moved into place before all are written.

    Args:
        contents: By path what writes its content to a path that is given to it.

    Raises:
        RecipeError: If one cannot be written; what was there is left then.
    """
    staged: dict[Path, Path] = {}
    try:
        for path, write in contents.items():
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
            os.close(handle)
            staged[path] = Path(name)
            write(staged[path])
            staged[path].chmod(0o666 & ~_umask())
        for path, made in staged.items():
            os.replace(made, path)
    except OSError as error:
        listed = ", ".join(map(str, contents))
        raise RecipeError(f"output: {listed} cannot be written: {error.strerror}; choose another place") from error
    finally:
        for made in staged.values():
            made.unlink(missing_ok=True)


def _umask() -> int:
    """Of this process; temporary files are made for their owner alone."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
