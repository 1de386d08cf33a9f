"""Compensated steps: a pruner of torch-pruning chooses the units that go, and the kept units take over."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch_pruning as tp

from nns_plugin.adapters.torch_pruning.removals import PrunableGraph, planned_removals
from nns_plugin.compensation.compensated import compensated_removal
from nns_plugin.compensation.options import Compensation, Method
from nns_plugin.models.fingerprint import fingerprint
from nns_plugin.statistics.statistics import Statistics


def compensated_step(
    pruner: tp.pruner.BasePruner,
    statistics: Statistics,
    compensation: Compensation | Method = "refit",
    loader: Iterable[Any] | None = None,
    *,
    progress: bool = False,
) -> Statistics:
    """Do what ``pruner.step()`` does, and let the kept units take over from the removed ones.

    Works with any importance of torch-pruning, and step by step in iterative pruning: later calls take the same
    ``statistics``, which are narrowed along.

    Args:
        pruner: Any high-level pruner of torch-pruning.
        statistics: Statistics of its model, collected with ``gram=True``.
        compensation: A method, or :class:`nns_plugin.Compensation` with further options. ``"least_squares"`` mixes
            the kept channels so that they replace the removed ones best, from the statistics alone. ``"refit"`` is
            layer-wise reconstruction: starting there, it walks the consumers in execution order and solves for the
            weights with which the pruned model best repeats the dense model's outputs on the loader's data.
            ``"mean"`` moves the removed channels' means into the biases, ``"none"`` changes no weight.
        loader: Re-iterable; yields ``(inputs, labels)`` or ``inputs``. Needed by ``"refit"`` and
            ``sequential=True``; with one, batch norms are recalibrated, and where a kernel spans several positions
            ``"least_squares"`` is used only if it beats plain removal on this data.
        progress: Whether to show progress bars.

    Returns:
        The statistics of the pruned model, narrowed; exact but for what removal itself changed.

    Raises:
        PruningError: If the method is unknown, the loader is missing, or the pruner does not see a norm of the model.
            After this or any other error, the model and the pruner are as they were.
        StaleStatisticsError: If the statistics do not belong to the model.
    """
    how = Compensation(compensation) if isinstance(compensation, str) else compensation
    how.check(loader)
    known = _followed(pruner, statistics)
    steps_before = pruner.current_step
    try:
        with torch.no_grad():
            removals = planned_removals(pruner)
        known = compensated_removal(PrunableGraph(pruner.DG), removals, known, how, loader, progress=progress)
    except BaseException:
        pruner.current_step = steps_before
        raise
    _FOLLOWED[pruner] = (statistics, known, fingerprint(pruner.model))
    follow = getattr(pruner.importance, "follow", None)
    if follow is not None:
        follow(pruner.DG, known)
    return known


# For each pruner the statistics that it was given, the narrowed ones, and the fingerprint of the model they describe.
_FOLLOWED: weakref.WeakKeyDictionary[Any, tuple[Statistics, Statistics, Mapping[str, str]]]
_FOLLOWED = weakref.WeakKeyDictionary()


def _followed(pruner: tp.pruner.BasePruner, statistics: Statistics) -> Statistics:
    given, known, mark = _FOLLOWED.get(pruner, (None, statistics, statistics.fingerprint))
    if given is not statistics:
        known, mark = statistics, statistics.fingerprint
    replace(known, fingerprint=mark).check_current(pruner.model)
    return known
