"""Writes files atomically: all of them appear together at the end, or none."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from nns_plugin.errors import OutputError


@contextmanager
def staged_folder(output: Path, names: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Path]:
    """A temporary folder whose files move to ``output`` if the block succeeds.

    It is inside ``output``, so that moving is a rename. On failure, folders created for it are removed again.

    Args:
        output: The folder; created if missing.
        names: Files that the block writes.
        optional: Patterns of files that the block may write; older ones are removed.

    Raises:
        OutputError: At once if ``output`` cannot be written.
    """
    made = [folder for folder in (output, *output.parents) if not folder.exists()]
    try:
        output.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=output, prefix=".staging-"))
    except OSError as error:
        _remove_empty(made)
        raise OutputError(f"output: {str(output)!r} cannot be written: {error.strerror}; choose another") from error
    try:
        for name in names:
            if (output / name).is_dir():
                raise OutputError(f"output: {str(output / name)!r} is a folder; expected a file or nothing there")
        yield staging
        _move(staging, output, optional)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        _remove_empty(made)


def _move(staging: Path, output: Path, optional: Sequence[str]) -> None:
    for file in staging.iterdir():
        if (output / file.name).is_dir():
            raise OutputError(f"output: {str(output / file.name)!r} is a folder; expected a file or nothing there")
    try:
        for pattern in optional:
            for old in output.glob(pattern):
                if old.is_file():
                    old.unlink()
        for file in sorted(staging.iterdir()):
            os.replace(file, output / file.name)
    except OSError as error:
        raise OutputError(f"output: {str(output)!r} cannot be written: {error.strerror}; choose another") from error


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, innermost first, until one is not empty."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def check_writable(paths: Sequence[Path], inputs: Sequence[Path] = ()) -> None:
    """Check, before any work, that files can be written.

    Raises:
        OutputError: If two are the same file, one is an input or a folder, or its folder is missing or not writable.
    """
    read = {path.resolve() for path in inputs}
    for path in paths:
        if path.resolve() in read:
            raise OutputError(f"output: {str(path)!r} is an input file; choose another output path")
    if len({path.resolve() for path in paths}) != len(paths):
        raise OutputError(f"output: two of {', '.join(map(str, paths))} are the same file; choose distinct paths")
    for path in paths:
        if path.is_dir():
            raise OutputError(f"output: {str(path)!r} is a folder; expected a file name")
        if path.exists() and not path.is_file():
            raise OutputError(f"output: {str(path)!r} is not a regular file; choose another output path")
        try:
            tempfile.TemporaryDirectory(dir=path.resolve().parent, prefix=f".{path.name}-").cleanup()
        except OSError as error:
            raise OutputError(
                f"output: {str(path.parent)!r} is not a writable folder: {error.strerror}; choose another"
            ) from error


def written_together(contents: Mapping[Path, Callable[[Path], object]]) -> None:
    """Write files atomically: on failure, all are as they were.

    Args:
        contents: For each path, a function that writes its content to the path passed to it.

    Raises:
        OutputError: If one cannot be written.
    """
    folders: dict[Path, Path] = {}
    try:
        with ExitStack() as stack:
            for path, write in contents.items():
                target = path.resolve()  # the target of a link
                folder = tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{path.name}-")
                folders[target] = Path(stack.enter_context(folder))
                write(folders[target] / "new")
                if target.exists():
                    shutil.copy2(target, folders[target] / "old")
            _replaced(folders)
    except OSError as error:
        listed = ", ".join(map(str, contents))
        raise OutputError(f"output: {listed} cannot be written: {error.strerror}; choose another folder") from error


def _replaced(folders: Mapping[Path, Path]) -> None:
    """Move new files into place; if one fails, put back those that were moved."""
    moved = []
    try:
        for path, folder in folders.items():
            os.replace(folder / "new", path)
            moved.append(path)
    except OSError:
        for path in moved:
            old = folders[path] / "old"
            if old.exists():
                shutil.move(old, path)
            else:
                path.unlink()
        raise
