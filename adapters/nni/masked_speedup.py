"""Masks of NNI's pruners turned into small models, by NNI where it can and by torch-pruning where it cannot."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from nns_plugin.adapters.nni.mask_resolution import MaskedUnits, resolve_masks
from nns_plugin.adapters.nni.masks import Masks, apply_masks, masked_copy
from nns_plugin.adapters.nni.nni_removal import NNIRemoval, largest_error, outputs_of, removed_by_nni
from nns_plugin.adapters.nni.wrappers import check_unwrapped
from nns_plugin.adapters.torch_pruning.backend import TorchPruningBackend
from nns_plugin.adapters.torch_pruning.traced_units import traced_units
from nns_plugin.compensation.options import Compensation, Method
from nns_plugin.errors import PruningError
from nns_plugin.models.preserve import copied
from nns_plugin.statistics.calibration import calibrate
from nns_plugin.statistics.statistics import Statistics

Backend = Literal["auto", "nni", "torch-pruning"]


@dataclass(frozen=True, eq=False)
class Speedup:
    """A model without the units that masks turn off.

    Attributes:
        model: The small model, in the training modes of the one that was given.
        backend: What removed the units: ``"nni"`` or ``"torch-pruning"``.
        reason: Why it was not NNI; ``None`` if it was, or was not asked for.
        units: What the masks mean for units: which are kept, which masks were extended or contradicted, and the masks
            of which the small model is the equal.
        error: Largest difference from the masked model's outputs on the example inputs, relative to their largest
            value; with compensation, including what that changed.
    """

    model: nn.Module
    backend: str
    reason: str | None
    units: MaskedUnits
    error: float


def speedup(
    model: nn.Module,
    example_inputs: Any,
    masks: Masks,
    *,
    backend: Backend = "auto",
    compensation: Compensation | Method | None = None,
    calibration: Iterable[Any] | None = None,
    statistics: Statistics | None = None,
    tolerance: float = 1e-5,
) -> Speedup:
    """Make a masked model small.

    A unit goes if every layer that writes it is masked there. So that it is silent in the masked model as well, the
    layers that pass it on are masked with it, such as batch norms. Single masked weights, and masked positions of units
    that another layer writes, are kept as zeroed weights.

    Args:
        model: Outside of NNI's wrappers (``pruner.unwrap_model()``); left as it is.
        example_inputs: Inputs that the model can run on.
        masks: As from ``pruner.compress()``.
        backend: ``"nni"`` for NNI's ``ModelSpeedup`` on a graph traced by ``torch.fx``, ``"torch-pruning"`` for its
            dependency graph, or ``"auto"``: NNI, unless it fails or its model differs from the masked one or is not as
            small.
        compensation: How the units that stay take over what the others did; needs ``calibration``, or ``statistics``
            where the method needs no inputs, and torch-pruning.
        calibration: Re-iterable; yields ``(inputs, labels)`` or ``inputs``.
        statistics: Statistics of the model, with Gram matrices; collected from ``calibration`` by default.
        tolerance: Largest error that is no failure, see :class:`Speedup`.

    Raises:
        PruningError: If the masks do not fit, would leave a group empty, or the backend cannot make a model of them
            that equals the masked one.
        GroupError: If the model cannot be traced.
    """
    if backend not in get_args(Backend):
        raise PruningError(f"backend is {backend!r}; it must be one of {', '.join(get_args(Backend))}")
    check_unwrapped(model)
    how = Compensation(method=compensation) if isinstance(compensation, str) else compensation
    _check_compensation(how, backend, calibration, statistics)
    if statistics is not None:
        statistics.check_current(model)
    traced = TorchPruningBackend(copied(model), example_inputs)
    planned = resolve_masks(model, traced_units(traced.graph), masks)
    masked = masked_copy(model, planned.masks)
    expected = outputs_of(masked, example_inputs)
    removal = NNIRemoval(None, None if how is None else "NNI cannot compensate")
    if backend != "torch-pruning" and how is None:
        removal = removed_by_nni(masked, example_inputs, planned, expected, tolerance)
        if removal.model is None and backend == "nni":
            raise PruningError(
                f"NNI cannot make this model small: {removal.reason}; use backend='auto' or 'torch-pruning'"
            )
    if removal.model is not None:
        small, chosen, error = removal.model, "nni", removal.error
    else:
        if how is None:
            apply_masks(traced.model, planned.masks)
            traced.keep(planned.groups, planned.kept)
        else:
            _compensate(traced, planned, how, calibration, statistics)
        small, chosen = traced.model, "torch-pruning"
        error = largest_error(expected, outputs_of(small, example_inputs))
    comparable = error
    if planned.exempt and how is None:  # all but those have to be exact
        partial = masked_copy(model, planned.masks)
        rest = {name: kept for name, kept in planned.kept.items() if name not in planned.exempt}
        TorchPruningBackend(partial, example_inputs).keep(planned.groups, rest)
        comparable = largest_error(expected, outputs_of(partial, example_inputs))
    if how is None and not comparable <= tolerance:
        raise PruningError(
            f"the small model differs from the masked one by {comparable:.1e}, and {tolerance:.0e} is allowed: masked "
            "units may still contribute through an activation that is not 0 at 0, such as a sigmoid, or through "
            "operations outside the model's layers; compensation='mean' lets biases take constants over, "
            "tolerance=math.inf accepts the difference"
        )
    return Speedup(small, chosen, removal.reason, planned, error)


def _check_compensation(
    how: Compensation | None, backend: Backend, calibration: Iterable[Any] | None, statistics: Statistics | None
) -> None:
    if not isinstance(how, (Compensation, type(None))):
        raise PruningError(f"compensation is {how!r}; expected a method, or nns_plugin.Compensation")
    if how is None:
        if calibration is not None or statistics is not None:
            raise PruningError("calibration and statistics are for compensation; choose one, or leave them out")
        return
    if backend == "nni":
        raise PruningError("NNI cannot compensate; leave backend out, or compensation")
    how.check(calibration)
    if statistics is None and calibration is None:
        raise PruningError("compensation needs calibration=loader, or statistics with Gram matrices")


def _compensate(
    traced: TorchPruningBackend,
    planned: MaskedUnits,
    how: Compensation,
    calibration: Iterable[Any] | None,
    statistics: Statistics | None,
) -> None:
    """Have torch-pruning remove the units, which are alive while the others learn to take over."""
    apply_masks(
        traced.model,
        {
            name: {t: mask | ~planned.silence.get(name, {}).get(t, torch.ones_like(mask)) for t, mask in masks.items()}
            for name, masks in planned.masks.items()
        },
    )
    if statistics is None:
        assert calibration is not None
        statistics = calibrate(traced.model, calibration, planned.groups, gram=True)
    traced.keep_and_compensate(planned.groups, planned.kept, statistics, how, calibration)
