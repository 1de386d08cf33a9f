"""Calibration: a forward-only pass over data that collects statistics about units."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from nns_plugin.errors import CalibrationError, LabelError
from nns_plugin.models.batches import batches, check_loader
from nns_plugin.models.fingerprint import fingerprint
from nns_plugin.models.hooks import hooked
from nns_plugin.models.preserve import preserved
from nns_plugin.statistics.collectors import Collection, collectors_of
from nns_plugin.statistics.distributed import check_agreement, is_distributed
from nns_plugin.statistics.statistics import Statistics
from nns_plugin.units import UnitGroup


def calibrate(
    model: nn.Module,
    loader: Iterable[Any],
    groups: Sequence[UnitGroup],
    *,
    labels: Sequence[str] | int | None = None,
    threshold: float = 0.0,
    gram: bool = False,
    max_gram_units: int = 8192,
    progress: bool = False,
) -> Statistics:
    """Run the model over calibration data and collect what its units did.

    The model runs in evaluation mode without gradients and is left exactly as it was, random number
    generators included, also if its forward raises. Under ``torch.distributed`` the sums of all processes are
    reduced. Memory is O(labels x units), plus O(units^2) with Gram matrices, whatever the number of inputs. Dimension
    0 of every observed activation must be the batch, or a whole multiple of it (windows, heads) with the inputs in
    order.

    Args:
        model: The model; runs on the device of its first parameter.
        loader: Yields ``(inputs, labels)`` or ``inputs``; ``inputs`` is a tensor ``[N, ...]``, or a tuple or
            mapping of such tensors; ``labels`` is an integer tensor ``[N]``.
        groups: The unit groups to observe, from an adapter.
        labels: Names of the labels, or their number; by default as many as the model's output has columns.
        threshold: A position is active where it exceeds this.
        gram: Whether to collect the Gram matrices that ``distinctiveness`` and compensation need.
        max_gram_units: Largest number of channels whose Gram matrix is collected.
        progress: Whether to show a progress bar.

    Returns:
        The statistics.

    Raises:
        CalibrationError: If the loader is empty or yields something else, if an activation is not finite or does
            not have the batch in front, or if there is nothing to observe.
        LabelError: If a label is out of range.
        GroupError: If a group owns positions that its modules do not have.
    """
    max_gram_units = max_gram_units if gram else 0
    if not is_distributed():
        return _calibrate(model, loader, groups, labels, threshold, max_gram_units, progress)
    outcome: Statistics | Exception
    try:
        outcome = _calibrate(model, loader, groups, labels, threshold, max_gram_units, progress)
    except Exception as error:
        outcome = error
    check_agreement(None if isinstance(outcome, Exception) else outcome.digest())
    if isinstance(outcome, Exception):
        raise outcome
    return outcome.all_reduce()


def _calibrate(
    model: nn.Module,
    loader: Iterable[Any],
    groups: Sequence[UnitGroup],
    labels: Sequence[str] | int | None,
    threshold: float,
    max_gram_units: int,
    progress: bool,
) -> Statistics:
    """The statistics of this process alone."""
    if not groups:
        raise CalibrationError("there are no unit groups to observe: nothing in this model can be pruned")
    check_loader(loader)
    if math.isnan(threshold):
        raise CalibrationError("threshold is nan; it must be a number that activations can exceed")
    collectors = collectors_of(dict(model.named_modules()), groups, max_gram_units)
    names = _label_names(labels)
    collection = Collection(collectors, threshold, None if names is None else len(names))
    with preserved(model), torch.inference_mode(False), torch.no_grad(), hooked(*collection.hooks()):
        model.eval()
        for batch in batches(loader, model, title="calibrating", progress=progress):
            collection.forward(model, batch)
    unseen = [collector.name for collector in collectors.values() if collector.record is None]
    if unseen:
        raise CalibrationError(f"module {unseen[0]!r} never ran during calibration; its units cannot be observed")
    if not collection.labelled:
        names = None
    elif names is None:
        names = tuple(str(label) for label in range(collection.label_count or 0))
    records = {key: collector.record.cpu() for key, collector in collectors.items() if collector.record}
    return Statistics(records, tuple(groups), names, threshold, fingerprint(model))


def _label_names(labels: Sequence[str] | int | None) -> tuple[str, ...] | None:
    if labels is None:
        return None
    if isinstance(labels, int):
        labels = [str(label) for label in range(labels)]
    names = () if isinstance(labels, str) else tuple(labels)
    if not names or len(set(names)) != len(names) or not all(isinstance(name, str) for name in names):
        raise LabelError(f"labels must be a positive number or distinct names, found {labels!r}")
    return names
