"""Safetensors in and out: files appear whole or not at all, and what is wrong with one raises one error."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nns_plugin.errors import NNSError, StatisticsError

Read = TypeVar("Read")


def write_safetensors(tensors: Mapping[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    """Write a safetensors file that appears whole or not at all.

    Raises:
        StatisticsError: If the folder cannot be written.
    """
    contiguous = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
    except OSError as error:
        raise StatisticsError(f"cannot write {str(path)!r}: {error.strerror}; choose a folder that exists") from error
    try:
        save_file(contiguous, temporary, metadata=metadata)
        temporary.chmod(mode)  # save_file lets only the owner read
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise StatisticsError(f"cannot write {str(path)!r}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_safetensors(
    path: Path, kind: str, error: type[NNSError], decode: Callable[[dict[str, str], dict[str, Tensor]], Read]
) -> Read:
    """Read a file of ours, and turn whatever is wrong with it into one error.

    Args:
        path: The file.
        kind: What its metadata ``"format"`` must be.
        error: Class of the error.
        decode: Makes something of the metadata and the tensors.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != kind:
                raise error(
                    f"{str(path)!r} is no such file as is needed: its format is {metadata.get('format')!r}, expected "
                    f"{kind!r}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        return decode(metadata, tensors)
    except error:
        raise
    except FileNotFoundError as cause:
        raise error(f"there is no file {str(path)!r}") from cause
    except (SafetensorError, OSError) as cause:
        raise error(f"{str(path)!r} is damaged or no safetensors file: {cause}") from cause
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, ArithmeticError) as cause:
        raise error(f"{str(path)!r} is damaged: {type(cause).__name__}: {cause}") from cause
