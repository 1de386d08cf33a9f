"""Fingerprint of a model's weights: shows whether a file or statistics belong to it, and if not, why."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Shape and content of every parameter and persistent buffer.

    Args:
        model: The model to describe.

    Returns:
        For each name of ``model.state_dict()`` a text such as ``"64x3x3x3:9f86d081884c7d65"``.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> before = fingerprint(layer)
        >>> _ = torch.nn.init.constant_(layer.weight, 7.0)
        >>> difference(before, fingerprint(layer))
        "'weight' has other values"
    """
    return fingerprint_of(model.state_dict())


def fingerprint_of(state: Mapping[str, Any]) -> dict[str, str]:
    """The fingerprint of a state dictionary."""
    return {name: _describe(value) if isinstance(value, Tensor) else repr(value) for name, value in state.items()}


def difference(expected: Mapping[str, str], found: Mapping[str, str], limit: int = 3) -> str:
    """How two fingerprints differ, in words, names and shapes before values; empty if they are equal."""
    shapes, values = [], []
    for name in [*expected, *(name for name in found if name not in expected)]:
        if name not in found:
            shapes.append(f"{name!r} is missing")
        elif name not in expected:
            shapes.append(f"{name!r} is new")
        elif expected[name] != found[name]:
            old, new = (text.partition(":")[0] for text in (expected[name], found[name]))
            if old == new:
                values.append(f"{name!r} has other values")
            else:
                shapes.append(f"{name!r} is {new} instead of {old}")
    parts = shapes + values
    more = f" and {len(parts) - limit} more" if len(parts) > limit else ""
    return ", ".join(parts[:limit]) + more


def digest(marks: Mapping[str, str]) -> str:
    """A whole fingerprint as 32 hexadecimal digits."""
    return hashlib.blake2b(repr(sorted(marks.items())).encode(), digest_size=16).hexdigest()


def _describe(tensor: Tensor) -> str:
    shape = "x".join(str(length) for length in tensor.shape) or "scalar"
    # Reinterpreting as bytes covers every dtype, bfloat16 included, which NumPy does not know.
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{shape}:{hashlib.blake2b(content.data, digest_size=8).hexdigest()}"
