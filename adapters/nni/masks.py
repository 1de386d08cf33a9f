"""Masks of weights and units: the units that a mask turns off, and the weights that must be 0 for that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nns_plugin.models.layers import broadcast_to_weight, by_output
from nns_plugin.models.preserve import copied
from nns_plugin.units import Port, UnitGroup

Masks = Mapping[str, Mapping[str, Tensor | None]]
"""By name of a module and of its parameter: 0 where a weight is masked, of the parameter's shape or broadcast to it."""


def full_mask(module: nn.Module, name: str, mask: Tensor) -> Tensor:
    """A mask broadcast to the shape of its parameter, on the CPU, bool: true where weights stay."""
    shape = getattr(module, name).shape
    return mask.detach().cpu().broadcast_to(shape).bool()


def masked_positions(module: nn.Module, mask: Tensor) -> Tensor:
    """Out-positions of a module that have no weight left, ``[out-positions]`` bool."""
    rows = by_output(module, full_mask(module, "weight", mask))
    return ~rows.reshape(len(rows), -1).any(1)


def masked_units(model: nn.Module, groups: Sequence[UnitGroup], masks: Masks) -> dict[str, Tensor]:
    """Units of each group that no layer writes any more: ``[U]`` bool by the group's name.

    A unit that one producer still writes stays.
    """
    found = {}
    for group in groups:
        written = torch.zeros(group.size, dtype=torch.bool)
        for port in group.producers:
            mask = masks.get(port.name, {}).get("weight")
            if mask is None:
                written[port.unit] = True
            else:
                gone = masked_positions(model.get_submodule(port.name), mask)
                written[port.unit[~gone[port.index]]] = True
        found[group.name] = ~written
    return found


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Masks) -> None:
    """Put 0 where weights are masked, in place."""
    for name, targets in masks.items():
        module = model.get_submodule(name)
        for target, mask in targets.items():
            parameter = getattr(module, target, None)
            if mask is not None and isinstance(parameter, Tensor):
                parameter.masked_fill_(~full_mask(module, target, mask).to(parameter.device), 0)


def masked_copy(model: nn.Module, masks: Masks) -> nn.Module:
    """A copy with 0 where weights are masked."""
    twin = copied(model)
    apply_masks(twin, masks)
    return twin


def silencing_masks(
    model: nn.Module, carriers: Mapping[str, Sequence[Port]], units: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Masks of all weights and biases that write units or pass them on, so that consumers read 0.

    Masking the rows of a producer alone does not turn a unit off: a bias, or a norm's shift, remains.

    Args:
        model: The model.
        carriers: For each group's name the ports where its units lie on out axes.
        units: For each group's name the units that are off, ``[U]`` bool.

    Returns:
        For each carrier with units that are off, masks of the shapes of its weight and bias.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for group, off in units.items():
        for port in carriers.get(group, ()) if bool(off.any()) else ():
            module = model.get_submodule(port.name)
            gone = port.index[off[port.unit]]
            for target in ("weight", "bias"):
                value = getattr(module, target, None)
                if not isinstance(value, Tensor) or not gone.numel() or value.numel() == 1:  # one slope for all
                    continue
                mask = found.setdefault(port.name, {}).setdefault(target, torch.ones(value.shape, dtype=torch.bool))
                rows = torch.ones(len(by_output(module, value)) if target == "weight" else len(value), dtype=torch.bool)
                rows[gone] = False
                mask &= broadcast_to_weight(module, rows, "out", value.shape) if target == "weight" else rows
    return found
