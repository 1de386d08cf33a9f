"""Masks made small: which units they turn off, what has to be masked besides, and how good the small model is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nns_plugin.adapters.nni.masks import (
    Masks,
    apply_masks,
    full_mask,
    masked_positions,
    masked_units,
    silencing_masks,
)
from nns_plugin.adapters.torch_pruning.graph import build_graph
from nns_plugin.adapters.torch_pruning.groups import carriers, graph_groups, groups_with_parameters
from nns_plugin.errors import PruningError
from nns_plugin.models.inputs import run_model, tensors_of
from nns_plugin.models.layers import axis_length, is_norm_over_units
from nns_plugin.models.preserve import copied, preserved
from nns_plugin.units import Port, UnitGroup, removed_positions


@dataclass(frozen=True, eq=False)
class MaskedUnits:
    """What masks mean for the units of a model.

    Attributes:
        groups: The model's unit groups.
        kept: For each group that loses units the ones that stay, ``[k]`` int64.
        masks: The masks, with what has to be masked besides so that units that go are silent: bool, of the parameters'
            shapes.
        silence: What silences the units that go, and nothing else: likewise.
        extended: Names of the modules for which masks are more than was given: norms and others that pass units on.
        contradicted: Names of the modules whose masked positions stay, with weights of 0, because something else writes
            the same units.
        exempt: Names of the groups that lose units and pass a layer or group norm, whose statistics then change, or a
            parameter that belongs to no layer and cannot be masked.
    """

    groups: tuple[UnitGroup, ...]
    kept: Mapping[str, Tensor]
    masks: Mapping[str, Mapping[str, Tensor]]
    silence: Mapping[str, Mapping[str, Tensor]]
    extended: tuple[str, ...]
    contradicted: tuple[str, ...]
    exempt: tuple[str, ...]


def resolve_masks(model: nn.Module, example_inputs: Any, masks: Masks) -> MaskedUnits:
    """Find the units that masks turn off.

    Args:
        model: Left as it is.
        example_inputs: Inputs that the model can run on.
        masks: By name of the module and the parameter.

    Raises:
        PruningError: If the masks do not fit the model, or a group would lose all of its units.
        GroupError: If the model cannot be traced.
    """
    given = _checked(model, masks)
    graph = build_graph(model, example_inputs)
    groups, ports, bare = graph_groups(graph), carriers(graph), groups_with_parameters(graph)
    off = masked_units(model, groups, given)
    for group in groups:
        if bool(off[group.name].all()):
            raise PruningError(
                f"the masks leave none of the {group.size} units of group {group.name!r}; mask fewer of "
                f"{', '.join(port.name for port in group.producers)}"
            )
    joined = {name: dict(targets) for name, targets in given.items()}
    extended = []
    silence = silencing_masks(model, ports, off)
    for name, targets in silence.items():
        for target, mask in targets.items():
            there = joined.setdefault(name, {}).get(target)
            joined[name][target] = mask if there is None else there & mask
            if not bool(mask.all()) and (there is None or bool((there & ~mask).any())):
                extended.append(name)
    losing = [group for group in groups if bool(off[group.name].any())]
    return MaskedUnits(
        groups,
        {group.name: (~off[group.name]).nonzero().flatten() for group in losing},
        joined,
        silence,
        tuple(dict.fromkeys(extended)),
        _contradicted(model, groups, ports, given, off),
        tuple(group.name for group in losing if group.name in bare or _passes_norm(model, ports.get(group.name, ()))),
    )


def masked_copy(model: nn.Module, masks: Masks) -> nn.Module:
    """A copy with 0 where weights are masked."""
    twin = copied(model)
    apply_masks(twin, masks)
    return twin


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


def other_than_planned(small: nn.Module, planned: MaskedUnits, model: nn.Module) -> list[str]:
    """Layers of a small model that have more or fewer positions than the masks leave."""
    other = []
    for (side, name), gone in removed_positions(planned.groups, planned.kept).items():
        expected = axis_length(model.get_submodule(name), side, name) - gone.numel()
        if axis_length(small.get_submodule(name), side, name) != expected:
            other.append(name)
    return other


def _checked(model: nn.Module, masks: Masks) -> dict[str, dict[str, Tensor]]:
    """The masks as bool, of the parameters' shapes."""
    if not isinstance(masks, Mapping) or not all(isinstance(targets, Mapping) for targets in masks.values()):
        raise PruningError(
            f"masks are a {type(masks).__name__}; expected a dictionary of dictionaries, as of compress()"
        )
    modules = dict(model.named_modules())
    found: dict[str, dict[str, Tensor]] = {}
    for name, targets in masks.items():
        if name not in modules:
            raise PruningError(f"the masks name {name!r}, which is no module of the model; pass the model they are for")
        for target, mask in targets.items():
            if mask is None:
                continue
            if not isinstance(mask, Tensor):
                raise PruningError(f"the mask of {target!r} of {name!r} is a {type(mask).__name__}; expected a tensor")
            if target.startswith(("_input_", "_output_")):
                raise PruningError(
                    f"the masks of {name!r} are about {target!r}; only masks of parameters can make a model small: "
                    "prune 'weight' instead"
                )
            value = getattr(modules[name], target, None)
            if not isinstance(value, Tensor):
                raise PruningError(f"{name!r} has no parameter {target!r}, which the masks are about")
            if not bool(((mask == 0) | (mask == 1)).all()):
                raise PruningError(f"the mask of {target!r} of {name!r} holds other values than 0 and 1")
            try:
                found.setdefault(name, {})[target] = full_mask(modules[name], target, mask)
            except RuntimeError as error:
                raise PruningError(
                    f"the mask of {target!r} of {name!r} is {list(mask.shape)}, and the parameter {list(value.shape)}; "
                    "pass the model that the masks are for, unpruned"
                ) from error
    return found


def _contradicted(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    ports: Mapping[str, Sequence[Port]],
    masks: Masks,
    off: Mapping[str, Tensor],
) -> tuple[str, ...]:
    found = []
    for group in groups:
        for port in ports.get(group.name, ()):
            mask = masks.get(port.name, {}).get("weight")
            if mask is not None:
                gone = masked_positions(model.get_submodule(port.name), mask)[port.index]
                if bool((gone & ~off[group.name][port.unit]).any()):
                    found.append(port.name)
    return tuple(dict.fromkeys(found))


def _passes_norm(model: nn.Module, ports: Sequence[Port]) -> bool:
    return any(is_norm_over_units(model.get_submodule(port.name)) for port in ports)
