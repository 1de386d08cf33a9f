"""Unit groups of a model, with the warnings about groups that are left out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from nns_plugin import UnitGroup
from nns_plugin.adapters.torch_pruning.groups import UnusableGroupWarning, unit_groups


def recorded(find: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What a call returns, and the groups that it says it leaves out."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = find()
    assert all(warning.category is UnusableGroupWarning for warning in caught), [str(one.message) for one in caught]
    return found, [str(warning.message) for warning in caught]


def groups_of(model: nn.Module, inputs: Any, ignored: Any = None) -> tuple[UnitGroup, ...]:
    return recorded(lambda: unit_groups(model, inputs, ignored))[0]
