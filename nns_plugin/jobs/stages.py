"""Stages of a job: an error in the user's code or data names the field of the recipe that it came from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nns_plugin.errors import NNSError, RecipeError


@contextmanager
def stage(field: str) -> Iterator[None]:
    """Name the field of the recipe whose code or data failed.

    Raises:
        RecipeError: For any exception in the block that is not one of ours.
    """
    try:
        yield
    except NNSError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise RecipeError(f"{field}: {type(error).__name__}: {text[:300]}") from error
