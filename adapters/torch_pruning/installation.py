"""Add our classes by name to a module of a host, and remove them again."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

from nns_plugin.errors import CriterionError


def add_classes(module: ModuleType, title: str, classes: Mapping[str, type]) -> None:
    """Add classes to a module.

    Args:
        module: The module.
        title: The name by which users know it.
        classes: By name.

    Raises:
        CriterionError: If something else has one of the names already; nothing is added then.
    """
    for name, ours in classes.items():
        if getattr(module, name, ours) is not ours:
            raise CriterionError(f"{title} has a {name!r} of its own already; it is left alone")
    for name, ours in classes.items():
        setattr(module, name, ours)


def remove_classes(module: ModuleType, classes: Mapping[str, type]) -> None:
    """Undo :func:`add_classes`; classes of others stay."""
    for name, ours in classes.items():
        if getattr(module, name, None) is ours:
            delattr(module, name)
