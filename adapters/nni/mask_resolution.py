"""What masks of weights mean for units: which are off, and what must be masked besides to silence them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from nns_plugin.adapters.nni.masks import Masks, full_mask, masked_positions, masked_units, silencing_masks
from nns_plugin.adapters.torch_pruning.traced_units import TracedUnits
from nns_plugin.errors import PruningError
from nns_plugin.models.layers import is_norm_over_units
from nns_plugin.units import Port, UnitGroup


@dataclass(frozen=True, eq=False)
class MaskedUnits:
    """The units that masks turn off, and what else must be masked to silence them.

    Attributes:
        groups: The model's unit groups.
        kept: For each group that loses units the ones that stay, ``[k]`` int64.
        masks: The given masks, extended so that the units that go are silent: bool, of the parameters' shapes.
        silence: The masks that silence the units that go, and nothing else: likewise.
        extended: Names of the modules whose masks were extended: norms and others that pass units on.
        contradicted: Names of the modules with masked positions that stay, as zeroed weights, because another layer
            writes the same units.
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


def resolve_masks(model: nn.Module, units: TracedUnits, masks: Masks) -> MaskedUnits:
    """Find the units that masks turn off.

    Args:
        model: Left as it is.
        units: The model's units.
        masks: By name of the module and the parameter.

    Raises:
        PruningError: If the masks do not fit the model, or a group would lose all of its units.
    """
    given = _checked(model, masks)
    off = masked_units(model, units.groups, given)
    for group in units.groups:
        if bool(off[group.name].all()):
            raise PruningError(
                f"the masks leave none of the {group.size} units of group {group.name!r}; mask fewer of "
                f"{', '.join(port.name for port in group.producers)}"
            )
    joined = {name: dict(targets) for name, targets in given.items()}
    extended: dict[str, None] = {}
    silence = silencing_masks(model, units.carriers, off)
    for name, targets in silence.items():
        for target, mask in targets.items():
            there = joined.setdefault(name, {}).get(target)
            joined[name][target] = mask if there is None else there & mask
            if not bool(mask.all()) and (there is None or bool((there & ~mask).any())):
                extended[name] = None
    kept: dict[str, Tensor] = {}
    contradicted: dict[str, None] = {}
    exempt = []
    for group in units.groups:
        gone, carriers = off[group.name], units.carriers.get(group.name, ())
        contradicted |= dict.fromkeys(port.name for port in carriers if _stays_in_part(model, port, given, gone))
        if bool(gone.any()):
            kept[group.name] = (~gone).nonzero().flatten()
            if group.name in units.with_parameters or _passes_norm(model, carriers):
                exempt.append(group.name)
    return MaskedUnits(units.groups, kept, joined, silence, tuple(extended), tuple(contradicted), tuple(exempt))


def _checked(model: nn.Module, masks: Masks) -> dict[str, dict[str, Tensor]]:
    """The masks as bool, of the parameters' shapes."""
    if not isinstance(masks, Mapping) or not all(isinstance(targets, Mapping) for targets in masks.values()):
        raise PruningError(
            f"masks are a {type(masks).__name__}; expected a dictionary of dictionaries, as from compress()"
        )
    modules = dict(model.named_modules())
    found: dict[str, dict[str, Tensor]] = {}
    for name, targets in masks.items():
        if name not in modules:
            raise PruningError(f"the masks name {name!r}, which is not a module of the model; pass their own model")
        for target, mask in targets.items():
            if mask is not None:
                found.setdefault(name, {})[target] = _checked_mask(name, modules[name], target, mask)
    return found


def _checked_mask(name: str, module: nn.Module, target: str, mask: Tensor) -> Tensor:
    if not isinstance(mask, Tensor):
        raise PruningError(f"the mask of {target!r} of {name!r} is a {type(mask).__name__}; expected a tensor")
    if target.startswith(("_input_", "_output_")):
        raise PruningError(
            f"the masks of {name!r} are for {target!r}; only masks of parameters can make a model small: "
            "prune 'weight' instead"
        )
    value = getattr(module, target, None)
    if not isinstance(value, Tensor):
        raise PruningError(f"{name!r} has no parameter {target!r}, which the masks are for")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise PruningError(f"the mask of {target!r} of {name!r} holds other values than 0 and 1")
    try:
        return full_mask(module, target, mask)
    except RuntimeError as error:
        raise PruningError(
            f"the mask of {target!r} of {name!r} is {list(mask.shape)}, and the parameter {list(value.shape)}; "
            "pass the model that the masks are for, unpruned"
        ) from error


def _stays_in_part(model: nn.Module, port: Port, masks: Masks, off: Tensor) -> bool:
    """Whether a layer masks positions of units that stay."""
    mask = masks.get(port.name, {}).get("weight")
    if mask is None:
        return False
    gone = masked_positions(model.get_submodule(port.name), mask)[port.index]
    return bool((gone & ~off[port.unit]).any())


def _passes_norm(model: nn.Module, ports: Sequence[Port]) -> bool:
    return any(is_norm_over_units(model.get_submodule(port.name)) for port in ports)
