"""Masks of NNI's pruners turned into small models, by NNI where it can and by torch-pruning where it cannot."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from nni.compression.speedup import ModelSpeedup
from torch import Tensor, nn

from nns_plugin.adapters.nni.masked_removal import (
    MaskedUnits,
    largest_error,
    masked_copy,
    other_than_planned,
    outputs_of,
    resolve_masks,
)
from nns_plugin.adapters.nni.masks import Masks
from nns_plugin.adapters.nni.wrappers import check_unwrapped
from nns_plugin.adapters.torch_pruning.backend import TorchPruningBackend
from nns_plugin.compensation.options import Compensation, Method
from nns_plugin.errors import PruningError, StaleStatisticsError
from nns_plugin.models.inputs import map_tensors
from nns_plugin.models.preserve import copied, preserved_rng
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
            value; with compensation, what that changed as well.
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

    A unit goes if every layer that writes it is masked there. So that it is silent in the masked model as well, what
    passes it on is masked with it, such as batch norms. Single masked weights, and masked positions of units that
    another layer writes, become 0 and stay.

    Args:
        model: Outside of NNI's wrappers (``pruner.unwrap_model()``); left as it is.
        example_inputs: Inputs that the model can run on.
        masks: As of ``pruner.compress()``.
        backend: ``"nni"`` for NNI's ``ModelSpeedup`` on a graph that ``torch.fx`` traces, ``"torch-pruning"`` for its
            dependency graph, or ``"auto"``: NNI, unless it fails or its model is not the masked one or not as small.
        compensation: How the units that stay take over what the others did; needs ``calibration``, or ``statistics``
            where the method needs no inputs, and torch-pruning.
        calibration: Yields ``(inputs, labels)`` or ``inputs``, anew each time.
        statistics: Of the model, with Gram matrices; collected from ``calibration`` by default.
        tolerance: Largest error that is no failure, see :class:`Speedup`.

    Raises:
        PruningError: If the masks do not fit, would leave a group empty, or the backend cannot make of them a model
            that is equal to the masked one.
        GroupError: If the model cannot be traced.
    """
    if backend not in get_args(Backend):
        raise PruningError(f"backend is {backend!r}; it must be one of {', '.join(get_args(Backend))}")
    check_unwrapped(model)
    how = Compensation(method=compensation) if isinstance(compensation, str) else compensation
    if not isinstance(how, (Compensation, type(None))):
        raise PruningError(f"compensation is {compensation!r}; expected a method, or nns_plugin.backends.Compensation")
    if how is None and (calibration is not None or statistics is not None):
        raise PruningError("calibration and statistics are for compensation; choose one, or leave them out")
    if how is not None and backend == "nni":
        raise PruningError("NNI cannot compensate; leave backend out, or compensation")
    if how is not None:
        how.check(calibration)
        if statistics is None and calibration is None:
            raise PruningError("compensation needs calibration=loader, or statistics with Gram matrices")
    if statistics is not None and (differs := statistics.differ_from(model)):
        raise StaleStatisticsError(f"the statistics belong to another state of the model: {differs}; calibrate again")
    planned = resolve_masks(model, example_inputs, masks)
    masked = masked_copy(model, planned.masks)
    expected = outputs_of(masked, example_inputs)
    reason = None if how is None else "NNI cannot compensate"
    small = None
    if backend != "torch-pruning" and how is None:
        small, reason = removed_by_nni(masked, example_inputs, planned, expected, tolerance)
        if small is None and backend == "nni":
            raise PruningError(f"NNI cannot make this model small: {reason}; use backend='auto' or 'torch-pruning'")
    chosen = "torch-pruning" if small is None else "nni"
    if small is None:
        small = _by_torch_pruning(model, masked, example_inputs, planned, how, calibration, statistics)
    error = largest_error(expected, outputs_of(small, example_inputs))
    comparable = error
    if planned.exempt and how is None:  # all but those have to be exact
        partial = copied(masked)
        rest = {name: kept for name, kept in planned.kept.items() if name not in planned.exempt}
        TorchPruningBackend(partial, example_inputs).keep(planned.groups, rest)
        comparable = largest_error(expected, outputs_of(partial, example_inputs))
    if how is None and not comparable <= tolerance:
        raise PruningError(
            f"the small model differs from the masked one by {comparable:.1e}, and {tolerance:.0e} is allowed: masked "
            "units may speak on behind an activation that is not 0 at 0, such as a sigmoid, or the model does more "
            "with units than its layers say; compensation='mean' takes constants over, tolerance=math.inf accepts it"
        )
    return Speedup(small, chosen, reason if chosen == "torch-pruning" else None, planned, error)


def _by_torch_pruning(
    model: nn.Module,
    masked: nn.Module,
    example_inputs: Any,
    planned: MaskedUnits,
    how: Compensation | None,
    calibration: Iterable[Any] | None,
    statistics: Statistics | None,
) -> nn.Module:
    if how is None:
        small = copied(masked)
        TorchPruningBackend(small, example_inputs).keep(planned.groups, planned.kept)
        return small
    # What goes is alive when the others learn to take over.
    stays = {
        name: {t: mask | ~planned.silence.get(name, {}).get(t, torch.ones_like(mask)) for t, mask in masks.items()}
        for name, masks in planned.masks.items()
    }
    small = masked_copy(model, stays)
    if statistics is None:
        assert calibration is not None
        statistics = calibrate(small, calibration, planned.groups, gram=True)
    traced = TorchPruningBackend(small, example_inputs)
    traced.keep_and_compensate(planned.groups, planned.kept, statistics, how, calibration)
    return small


def removed_by_nni(
    masked: nn.Module, example_inputs: Any, planned: MaskedUnits, expected: list[Tensor], tolerance: float
) -> tuple[nn.Module | None, str | None]:
    """NNI's small model; or why there is none.

    Args:
        masked: The model with 0 where weights are masked; left as it is.
        example_inputs: Inputs that it can run on.
        planned: What the masks mean.
        expected: The masked model's outputs for these inputs.
        tolerance: See :func:`speedup`.
    """
    if not planned.kept:
        return None, "no unit is masked whole, there is nothing to remove"
    small = copied(masked)
    try:
        with preserved_rng(), _quiet(), torch.inference_mode(False), torch.enable_grad():
            small.eval()
            traced = torch.fx.symbolic_trace(small)
            inputs = map_tensors(example_inputs, lambda value: value.detach().clone())
            given = {
                name: {target: mask.float() for target, mask in targets.items()}
                for name, targets in planned.masks.items()
            }
            ModelSpeedup(small, inputs, given, graph_module=traced).speedup_model()
    except Exception as failure:  # the host fails in any way
        return None, _told(failure)
    try:
        small = graft(copied(masked), small)
        error = largest_error(expected, outputs_of(small, example_inputs))
        other = other_than_planned(small, planned, masked)
    except Exception as failure:
        return None, f"its model does not run: {_told(failure)}"
    if not planned.exempt and not error <= tolerance:
        return None, f"its model differs from the masked one by {error:.1e}"
    if other:
        return None, f"its model has other widths than the masks leave, at {', '.join(other)}"
    return small, None


def graft(model: nn.Module, small: nn.Module) -> nn.Module:
    """Give a model's layers the weights and sizes of those of its small form, in place.

    NNI puts new layers where old ones were: trainable, in training mode, without hooks and whatever else they had.
    """
    trainable = {name: value.requires_grad for name, value in model.named_parameters()}
    for name, module in small.named_modules():
        own = model.get_submodule(name)
        if own.__class__ is not module.__class__:
            raise PruningError(f"{name!r} became a {type(module).__name__}; expected a {type(own).__name__}")
        kept = {key for key in vars(own) if key.endswith("_hooks")} | {"training", "_modules"}
        vars(own).update({key: value for key, value in vars(module).items() if key not in kept})
    for name, value in model.named_parameters():
        value.requires_grad_(trainable[name])
    return model


def _told(failure: Exception) -> str:
    lines = str(failure).splitlines() or [""]
    return f"{type(failure).__name__}: {lines[0]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """NNI prints, logs each step, and warns of its own doings."""
    found = [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.startswith("nni")]
    levels = [(each, each.level) for each in found]
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        for each, level in levels:
            each.setLevel(level)
