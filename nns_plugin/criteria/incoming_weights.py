"""Incoming weights: all weights that write a unit, as one vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nns_plugin.models.layers import by_output
from nns_plugin.units import UnitGroup


def incoming_weights(model: nn.Module, group: UnitGroup) -> list[Tensor] | None:
    """The incoming weights of each unit, without biases.

    Args:
        model: The model that the group belongs to.
        group: Its U units.

    Returns:
        For each producer ``[U, D]`` float64 on the CPU: all weights that write the unit's positions there, 0 for
        units that it does not write. ``None`` if a producer has no weight with a known out axis, or writes different
        numbers of positions for its units.
    """
    vectors = []
    for port in group.producers:
        rows = _rows(model.get_submodule(port.name))
        positions = torch.bincount(port.unit, minlength=group.size)
        written = positions.nonzero().flatten()
        if rows is None or positions[written].unique().numel() != 1:
            return None
        order = port.unit.argsort(stable=True)
        found = rows[port.index[order]].reshape(written.numel(), -1)
        vectors.append(found.new_zeros(group.size, found.shape[1]).index_copy(0, written, found))
    return vectors


def _rows(module: nn.Module) -> Tensor | None:
    """Weights of a module, ``[out-positions, D]``."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    return by_output(module, weight.detach()).double().cpu().flatten(1)
