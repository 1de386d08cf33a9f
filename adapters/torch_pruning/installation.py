"""Our classes put by name into a module of a host, and taken out again."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

from nns_plugin.errors import CriterionError


def put(place: ModuleType, called: str, classes: Mapping[str, type]) -> None:
    """Put classes into a module.

    Args:
        place: The module.
        called: What its users call it.
        classes: By name.

    Raises:
        CriterionError: If something else has one of the names already; nothing is put then.
    """
    for name, ours in classes.items():
        if getattr(place, name, ours) is not ours:
            raise CriterionError(f"{called} has a {name!r} of its own already; it is left alone")
    for name, ours in classes.items():
        setattr(place, name, ours)


def take(place: ModuleType, classes: Mapping[str, type]) -> None:
    """Undo :func:`put`; what is not ours stays."""
    for name, ours in classes.items():
        if getattr(place, name, None) is ours:
            delattr(place, name)
