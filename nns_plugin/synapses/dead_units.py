"""Remove dead units: those that nothing reads, or that nothing writes, so that they are constant."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nns_plugin.backends import Backend
from nns_plugin.errors import NNSError
from nns_plugin.models.activations import capture_input
from nns_plugin.models.comparison import same_outputs
from nns_plugin.models.inputs import device_of, to_device
from nns_plugin.models.layers import (
    add_to_bias,
    by_channel,
    has_bias,
    is_plain_convolution,
    padded_positions,
    weight_axis,
    weight_of,
)
from nns_plugin.models.preserve import copied, preserved
from nns_plugin.synapses.by_unit import incoming_synapses, outgoing_synapses
from nns_plugin.units import Port, UnitGroup

Kept = dict[str, Tensor]


class DeadUnitsWarning(UserWarning):
    """Dead units could not be removed."""


def without_dead_units(
    model: nn.Module, inputs: Any, others: Any, backend: Backend, ignored_layers: Sequence[str] = ()
) -> tuple[nn.Module, Kept]:
    """Remove dead units, which nothing reads or nothing writes, from a copy of a model.

    First, idle synapses become 0: those that write a unit that nothing reads, and those that read a unit that nothing
    writes and that is therefore constant; the biases of its consumers absorb the constant if they are linear layers or
    convolutions without zero padding. This repeats, as it makes further units dead. Then units that nothing reads are
    removed; each layer keeps at least one. Changes that would alter the outputs on ``others`` are undone.

    Args:
        model: In double precision, without masks; not changed.
        inputs: Inputs that it can run on, over which units that are not constant vary.
        others: Other inputs, to compare outputs.
        backend: Removes units.
        ignored_layers: Names of layers whose outputs must not be removed.

    Returns:
        The smaller model, and the kept units of each group that lost some, ``[k]`` int64 ascending.

    Warns:
        DeadUnitsWarning: If dead units cannot be removed.
    """
    groups = backend(copied(model), inputs).groups(ignored_layers)
    model, stuck = _without_idle_synapses(model, groups, inputs, others)
    plan = {group.name: units for group in groups if (units := _needed(model, group)) is not None}
    each = [{name: units} for name, units in plan.items()]
    kept: Kept = {}
    small = model
    for attempt in [plan, *each] if len(each) > 1 else each:
        if attempt.keys() & kept.keys():
            continue
        smaller = _narrowed(model, inputs, backend, ignored_layers, {**kept, **attempt})
        if smaller is not None and _same(model, smaller, (inputs, others)):
            kept, small = {**kept, **attempt}, smaller
    stuck |= plan.keys() - kept.keys()
    if stuck:
        warnings.warn(
            f"dead units of {', '.join(sorted(stuck))} are kept: without them the outputs would change or the model "
            "would not run, as where a norm or a parameter spans all units",
            DeadUnitsWarning,
            stacklevel=3,
        )
    return small, kept


def _without_idle_synapses(
    model: nn.Module, groups: Sequence[UnitGroup], inputs: Any, others: Any
) -> tuple[nn.Module, set[str]]:
    """Return a copy whose idle synapses are 0, and the groups for which that would change the outputs."""
    model, stuck = copied(model), set[str]()
    changed = True
    while changed:
        changed = False
        for group in groups:
            steps = [] if group.name in stuck else _disconnection(model, group, inputs)
            if not steps:
                continue
            candidate = copied(model)
            for disconnect in steps:
                disconnect(candidate)
            if _same(model, candidate, (inputs, others)):
                model, changed = candidate, True
            else:
                stuck.add(group.name)
    return model, stuck


def _disconnection(model: nn.Module, group: UnitGroup, inputs: Any) -> list[Callable[[nn.Module], None]]:
    """Return functions that set the group's idle synapses to 0 in a copy of the model; empty if there are none."""
    written, read = _wired(model, group)
    found: list[Callable[[nn.Module], None]] = []
    if read is not None:
        for port in group.producers:
            module, axis = _layer(model, port, side="out")
            places = port.index[~read[port.unit]]
            if module is not None and bool(_slices(module, axis, places).count_nonzero()):
                found.append(partial(_zero, name=port.name, axis=axis, places=places))
    if written is not None and not bool(written.all()):
        for port in group.consumers:
            module, axis = _layer(model, port, side="in")
            if module is None:
                continue
            constants = _constants(model, port, inputs)
            known = constants.isfinite() & ((constants == 0) | _absorbs_constants(module))
            places = port.index[~written[port.unit] & known[port.index]]
            if bool(_slices(module, axis, places).count_nonzero()):
                found.append(partial(_fold, name=port.name, axis=axis, places=places, constants=constants[places]))
    return found


def _needed(model: nn.Module, group: UnitGroup) -> Tensor | None:
    """Return the units of a group that must be kept, ``[k]`` int64; ``None`` for all of them."""
    _, read = _wired(model, group)
    if read is None:
        return None
    for port in (*group.producers, *group.consumers):  # no layer may become empty
        if not bool(read[port.unit].any()):
            read[port.unit[0]] = True
    return None if bool(read.all()) else read.nonzero().flatten()


def _wired(model: nn.Module, group: UnitGroup) -> tuple[Tensor | None, Tensor | None]:
    """Mark the units that some synapse writes and those that one reads, ``[U]`` bool; ``None`` where unknown."""
    synapses = {name: value != 0 for name, value in model.named_parameters(remove_duplicate=False)}
    sides = incoming_synapses(model, group, synapses), outgoing_synapses(model, group, synapses)
    written, read = (
        None if not side or None in side else torch.stack([layer[0] for layer in side if layer is not None]).sum(0) > 0
        for side in sides
    )
    return written, read


def _layer(model: nn.Module, port: Port, side: str) -> tuple[nn.Module | None, int]:
    """Return the module of a port and the weight axis that counts its positions; ``None`` without such an axis."""
    module = model.get_submodule(port.name)
    axis = weight_axis(module, side)
    return (None, 0) if axis is None else (module, axis)


def _slices(module: nn.Module, axis: int, places: Tensor) -> Tensor:
    return weight_of(module).detach().movedim(axis, 0)[places]


@torch.no_grad()
def _zero(model: nn.Module, name: str, axis: int, places: Tensor) -> None:
    weight_of(model.get_submodule(name)).movedim(axis, 0)[places] = 0


@torch.no_grad()
def _fold(model: nn.Module, name: str, axis: int, places: Tensor, constants: Tensor) -> None:
    """Add the contribution of constant inputs to the bias, and set their synapses to 0."""
    module = model.get_submodule(name)
    if bool(constants.any()):
        slices = _slices(module, axis, places).double()
        add_to_bias(module, constants @ slices.flatten(2).sum(2) if slices.dim() > 2 else constants @ slices)
    _zero(model, name, axis, places)


def _constants(model: nn.Module, port: Port, inputs: Any) -> Tensor:
    """The value of each in-position of a consumer, ``[in-positions]``; NaN where it varies over inputs or positions."""
    module = model.get_submodule(port.name)
    with preserved(model), torch.no_grad():
        values = capture_input(model.eval(), port.name, to_device(inputs, device_of(model)))
    values = by_channel(module, values).double()
    low, high = values.amin(1), values.amax(1)
    return torch.where(high - low <= 1e-12 * (1 + high.abs()), (low + high) / 2, torch.nan)


def _absorbs_constants(module: nn.Module) -> bool:
    """Whether a constant input adds the same to every output position, so that the layer's bias can absorb it."""
    if isinstance(module, nn.Linear):
        return has_bias(module)
    return (
        is_plain_convolution(module)
        and has_bias(module)
        and padded_positions(module, [8] * len(module.kernel_size)) == 0
    )


def _narrowed(
    model: nn.Module, inputs: Any, backend: Backend, ignored_layers: Sequence[str], kept: Kept
) -> nn.Module | None:
    """Return a copy with only the kept units of each named group; ``None`` if the host cannot remove the others."""
    traced = backend(copied(model), inputs)
    try:
        traced.keep([group for group in traced.groups(ignored_layers) if group.name in kept], kept)
    except NNSError:
        return None
    return traced.model


def _same(left: nn.Module, right: nn.Module, batches: Iterable[Any]) -> bool:
    """Whether two models give the same outputs; False if one of them does not run."""
    try:
        return all(same_outputs(left, right, inputs) for inputs in batches)
    except Exception:  # whatever the user's forward raises once its tensors are smaller
        return False
