"""Removal of masked units by NNI's ``ModelSpeedup``, checked against the masked model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from nni.compression.speedup import ModelSpeedup
from torch import Tensor, nn

from nns_plugin.adapters.nni.mask_resolution import MaskedUnits
from nns_plugin.environment import quiet
from nns_plugin.errors import PruningError
from nns_plugin.models.inputs import map_tensors, run_model, tensors_of
from nns_plugin.models.layers import axis_length
from nns_plugin.models.preserve import copied, preserved, preserved_rng
from nns_plugin.units import removed_positions


@dataclass(frozen=True, eq=False)
class NNIRemoval:
    """What NNI made of a masked model.

    Attributes:
        model: The small model; ``None`` if there is none that equals the masked one.
        reason: Why there is none.
        error: See :func:`largest_error`; infinite if there is no model.
    """

    model: nn.Module | None
    reason: str | None = None
    error: float = float("inf")


def removed_by_nni(
    masked: nn.Module, example_inputs: Any, planned: MaskedUnits, expected: list[Tensor], tolerance: float
) -> NNIRemoval:
    """Have NNI remove units.

    Args:
        masked: The model with 0 where weights are masked; it becomes the small one, and is of no use if NNI fails.
        example_inputs: Inputs that it can run on.
        planned: What the masks mean.
        expected: The masked model's outputs for these inputs.
        tolerance: Largest error that is no failure, unless groups are exempt.
    """
    if not planned.kept:
        return NNIRemoval(None, "the masks turn off no complete unit, so nothing is removed")
    small = copied(masked)
    try:
        with preserved_rng(), quiet(), torch.inference_mode(False), torch.enable_grad():
            small.eval()
            traced = torch.fx.symbolic_trace(small)
            inputs = map_tensors(example_inputs, lambda value: value.detach().clone())
            given = {
                name: {target: mask.float() for target, mask in targets.items()}
                for name, targets in planned.masks.items()
            }
            ModelSpeedup(small, inputs, given, graph_module=traced).speedup_model()
    except Exception as failure:  # the host fails in any way
        return NNIRemoval(None, _first_line(failure))
    try:
        widths = _planned_widths(masked, planned)
        graft(masked, small)
        error = largest_error(expected, outputs_of(masked, example_inputs))
        other = [name for (side, name), width in widths.items() if _width(masked, side, name) != width]
    except Exception as failure:
        return NNIRemoval(None, f"its model does not run: {_first_line(failure)}")
    if not planned.exempt and not error <= tolerance:
        return NNIRemoval(None, f"its model differs from the masked one by {error:.1e}")
    if other:
        return NNIRemoval(None, f"its model has other widths than the masks leave, at {', '.join(other)}")
    return NNIRemoval(masked, error=error)


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


@torch.no_grad()
def outputs_of(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Outputs in evaluation mode; the model is left as it was found."""
    with preserved(model):
        model.eval()
        return [value.detach().clone() for value in tensors_of(run_model(model, inputs))]


def largest_error(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Largest difference of outputs, relative to the largest value of each."""
    if [value.shape for value in expected] != [value.shape for value in found]:
        return float("inf")
    errors = [
        float((one.double() - other.double()).abs().max() / one.double().abs().max().clamp_min(1e-300))
        for one, other in zip(expected, found, strict=True)
        if one.numel()
    ]
    return max(errors, default=0.0)


def _planned_widths(model: nn.Module, planned: MaskedUnits) -> dict[tuple[str, str], int]:
    """Number of positions that the masks leave, by side and layer."""
    removed = removed_positions(planned.groups, planned.kept)
    return {(side, name): _width(model, side, name) - gone.numel() for (side, name), gone in removed.items()}


def _width(model: nn.Module, side: str, name: str) -> int:
    return axis_length(model.get_submodule(name), side, name)


def _first_line(failure: Exception) -> str:
    lines = str(failure).splitlines() or [""]
    return f"{type(failure).__name__}: {lines[0]}"
