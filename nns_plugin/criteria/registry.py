"""Criteria by name: the built-in ones and those that installed packages add.

A package adds a criterion through the entry-point group ``nns_plugin.criteria``: the entry's name is the
criterion's, its value a class that fulfils :class:`nns_plugin.criteria.contract.Criterion`.
"""

from __future__ import annotations

import warnings
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from nns_plugin.criteria.contract import needs_of
from nns_plugin.criteria.distinctiveness import Distinctiveness
from nns_plugin.criteria.mean_weight import MeanWeight
from nns_plugin.criteria.semantic import Semantic
from nns_plugin.criteria.switcher import Switcher
from nns_plugin.criteria.wsf import WSF
from nns_plugin.errors import CriterionError

ENTRY_POINT_GROUP = "nns_plugin.criteria"

BUILT_IN: dict[str, type[Any]] = {
    "distinctiveness": Distinctiveness,
    "mean_weight": MeanWeight,
    "semantic": Semantic,
    "switcher": Switcher,
    "wsf": WSF,
}


def available() -> dict[str, type[Any]]:
    """All criteria that work, by name; a built-in one cannot be replaced.

    A plug-in that cannot be loaded is named in a warning and left out; it does not affect the others.
    """
    criteria, failures = _load()
    for name, failure in failures.items():
        warnings.warn(f"criterion plug-in {name!r} is left out: {failure}", RuntimeWarning, stacklevel=2)
    return criteria


def broken() -> dict[str, str]:
    """The plug-ins that cannot be used, by name, each with the reason."""
    return _load()[1]


def find(name: str) -> type[Any]:
    """The criterion class of a name.

    Raises:
        CriterionError: If there is none, or it is a plug-in that cannot be loaded.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    criteria, failures = _load()
    if name in criteria:
        return criteria[name]
    reason = f"its plug-in is broken: {failures[name]}" if name in failures else "it is not installed"
    raise CriterionError(f"criterion {name!r} cannot be used, {reason}; available: {', '.join(sorted(criteria))}")


def _load() -> tuple[dict[str, type[Any]], dict[str, str]]:
    criteria, failures = dict(BUILT_IN), {}
    entries = list(entry_points(group=ENTRY_POINT_GROUP))
    for entry in entries:
        try:
            values = sorted({other.value for other in entries if other.name == entry.name})
            if len(values) > 1:
                raise CriterionError(f"several packages add a criterion of this name: {', '.join(values)}")
            criteria[entry.name] = _load_entry(entry)
        except (Exception, SystemExit) as error:  # a plug-in may fail in any way
            failures[entry.name] = f"{type(error).__name__}: {error}"
    return criteria, failures


def _load_entry(entry: EntryPoint) -> type[Any]:
    if entry.name in BUILT_IN:
        raise CriterionError("a built-in criterion has this name; choose another")
    loaded = entry.load()
    # getattr would find the metaclass's __call__ on any class.
    if not isinstance(loaded, type) or not any("__call__" in vars(base) for base in loaded.__mro__):
        raise CriterionError(f"{entry.value!r} is not a class whose instances can be called with a unit group")
    needs_of(loaded)  # refuses a class that declares nothing
    return loaded
