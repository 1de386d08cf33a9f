"""Safetensors in and out: files are written atomically, and whatever is wrong with one raises the caller's error."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nns_plugin.errors import NNSError

Read = TypeVar("Read")


def write_safetensors(
    path: Path, kind: str, error: type[NNSError], metadata: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> None:
    """Write a safetensors file atomically.

    Args:
        path: The file.
        kind: Written as ``"format"`` into its metadata.
        error: Class of the error if it cannot be written.
        metadata: More metadata.
        tensors: Content; copied, so that tensors may share memory.
    """
    contiguous = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
    except OSError as cause:
        raise error(f"cannot write {str(path)!r}: {cause.strerror}; choose a folder that exists") from cause
    try:
        save_file(contiguous, temporary, metadata={"format": kind, **metadata})
        temporary.chmod(mode)  # save_file lets only the owner read
        os.replace(temporary, path)
    except (OSError, SafetensorError) as cause:
        raise error(f"cannot write {str(path)!r}: {cause}") from cause
    finally:
        temporary.unlink(missing_ok=True)


def read_safetensors(
    path: Path, kind: str | None, error: type[NNSError], decode: Callable[[dict[str, str], dict[str, Tensor]], Read]
) -> Read:
    """Read a safetensors file, and turn whatever is wrong with it into one error.

    Args:
        path: The file.
        kind: Required ``"format"`` in its metadata; ``None`` for any file.
        error: Class of the error.
        decode: Makes the result of the metadata and the tensors; may raise ``error`` itself.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if kind is not None and metadata.get("format") != kind:
                found = metadata.get("format")
                raise error(f"{str(path)!r} is a file of another kind: its format is {found!r}, expected {kind!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        return decode(metadata, tensors)
    except error:
        raise
    except FileNotFoundError as cause:
        raise error(f"there is no file {str(path)!r}") from cause
    except (SafetensorError, OSError) as cause:
        raise error(f"{str(path)!r} is damaged or not a safetensors file: {cause}") from cause
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, ArithmeticError) as cause:
        raise error(f"{str(path)!r} is damaged: {type(cause).__name__}: {cause}") from cause
