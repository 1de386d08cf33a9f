"""The targets of a config list: the weights, biases and outputs that it masks, their settings and alignments."""

from __future__ import annotations

import copy
import math
from typing import Any

from nni.compression.base.target_space import PruningTargetSpace
from nni.compression.pruning.tools import is_active_target
from torch import Tensor

from nns_plugin.errors import PruningError

Spaces = dict[str, dict[str, PruningTargetSpace]]
"""NNI's targets, by name of the module and of the target."""
Metrics = dict[str, dict[str, Tensor]]
"""One number for each block of a target, by name of the module and of the target."""


def changed(space: PruningTargetSpace, **settings: Any) -> PruningTargetSpace:
    """The same target with other settings."""
    other = copy.copy(space)
    other._setting = {**space.setting, **settings}
    return other


def check_targets(spaces: Spaces) -> None:
    """Refuse sparsity that is out of range, and config lists that ask for none.

    Raises:
        PruningError: Names the target, its module and the value.
    """
    active = False
    for name, targets in spaces.items():
        for target, space in targets.items():
            active |= is_active_target(space)
            for rule in ("sparse_ratio", "min_sparse_ratio", "max_sparse_ratio"):
                value = getattr(space, rule)
                if value is not None and not 0 <= value <= 1:
                    raise PruningError(f"{rule} of {target!r} of {name!r} is {value}; expected a share in [0, 1]")
            if space.sparse_threshold is not None and not math.isfinite(space.sparse_threshold):
                raise PruningError(
                    f"sparse_threshold of {target!r} of {name!r} is {space.sparse_threshold}; expected a finite number"
                )
            least, most = space.min_sparse_ratio or 0.0, space.max_sparse_ratio or 1.0
            if least > most:
                raise PruningError(
                    f"{name!r} has a min_sparse_ratio of {least} over its max_sparse_ratio of {most}; lower the minimum"
                )
    if not active:
        raise PruningError("the config list asks for no sparsity; give a sparse_ratio or a sparse_threshold")


def aligned_target(spaces: Spaces, name: str, target: str) -> PruningTargetSpace:
    """An aligned target, aligned directly to the end of its chain, which has a mask of its own.

    Raises:
        PruningError: If the config list does not select a target of the chain.
    """
    space = spaces[name][target]
    passed = [(name, target)]
    align = {**space.align, "module_name": space.align["module_name"] or name}
    while True:
        source = spaces.get(align["module_name"], {}).get(align["target_name"])
        if source is None:
            raise PruningError(
                f"{target!r} of {name!r} is aligned with {align['target_name']!r} of {align['module_name']!r}, "
                "which the config list does not select"
            )
        here = align["module_name"], align["target_name"]
        if is_active_target(source) or source.align is None or here in passed:
            return changed(space, align=align)
        passed.append(here)
        align = {**source.align, "module_name": source.align["module_name"] or align["module_name"]}
