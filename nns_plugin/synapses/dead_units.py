"""Remove for real the units that no synapse reaches."""

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


class UnremovedWarning(UserWarning):
    """Units that no synapse reaches had to stay."""


def without_dead_units(
    model: nn.Module, inputs: Any, others: Any, backend: Backend, ignored_layers: Sequence[str] = ()
) -> tuple[nn.Module, Kept]:
    """Remove units that nothing reads, or that no input reaches, from a copy of a model.

    First, synapses that do nothing become 0: those that write a unit which nothing reads, and those that read a unit
    which nothing writes and which is therefore constant; the biases of its consumers take that up, where they are
    linear layers or convolutions without zero padding. This goes on from layer to layer. Then units that nothing reads
    are removed; each layer keeps at least one. What changes the outputs on other inputs is left undone.

    Args:
        model: In double precision, without masks; left as it is.
        inputs: Inputs that it can run on, in which units that are not constant differ.
        others: Other inputs.
        backend: Removes units.
        ignored_layers: Names of layers whose outputs must stay whole.

    Returns:
        The smaller model, and the units that are left of each group that lost some, ``[k]`` int64 ascending.

    Warns:
        UnremovedWarning: If units that are not reached have to stay.
    """
    groups = backend(copied(model), inputs).groups(ignored_layers)
    model, stuck = _disconnected(model, groups, inputs, others)
    plan = {group.name: stays for group in groups if (stays := _needed(model, group)) is not None}
    each = [{name: stays} for name, stays in plan.items()]
    kept: Kept = {}
    small = model
    for attempt in [plan, *each] if len(each) > 1 else each:
        if attempt.keys() & kept.keys():
            continue
        smaller = _cut(model, inputs, backend, ignored_layers, {**kept, **attempt})
        if smaller is not None and _same(model, smaller, (inputs, others)):
            kept, small = {**kept, **attempt}, smaller
    stuck |= plan.keys() - kept.keys()
    if stuck:
        warnings.warn(
            f"units of {', '.join(sorted(stuck))} that no synapse reaches stay: without them, the outputs are others "
            "or the model does not run, as where a norm or a parameter goes over all units",
            UnremovedWarning,
            stacklevel=3,
        )
    return small, kept


def _disconnected(
    model: nn.Module, groups: Sequence[UnitGroup], inputs: Any, others: Any
) -> tuple[nn.Module, set[str]]:
    """A copy in which synapses that do nothing are 0, and the groups where that would change the outputs."""
    model, stuck = copied(model), set[str]()
    changed = True
    while changed:
        changed = False
        for group in groups:
            idle = [] if group.name in stuck else _idle(model, group, inputs)
            if not idle:
                continue
            candidate = copied(model)
            for cut_off in idle:
                cut_off(candidate)
            if _same(model, candidate, (inputs, others)):
                model, changed = candidate, True
            else:
                stuck.add(group.name)
    return model, stuck


def _idle(model: nn.Module, group: UnitGroup, inputs: Any) -> list[Callable[[nn.Module], None]]:
    """What makes the group's synapses that do nothing 0 in a copy of the model; empty if there are none."""
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
            known = constants.isfinite() & ((constants == 0) | _takes_constants(module))
            places = port.index[~written[port.unit] & known[port.index]]
            if bool(_slices(module, axis, places).count_nonzero()):
                found.append(partial(_fold, name=port.name, axis=axis, places=places, constants=constants[places]))
    return found


def _needed(model: nn.Module, group: UnitGroup) -> Tensor | None:
    """Units of a group that have to stay, ``[k]`` int64; ``None`` if that is all of them."""
    _, stays = _wired(model, group)
    if stays is None:
        return None
    for port in (*group.producers, *group.consumers):  # no layer may become empty
        if not bool(stays[port.unit].any()):
            stays[port.unit[0]] = True
    return None if bool(stays.all()) else stays.nonzero().flatten()


def _wired(model: nn.Module, group: UnitGroup) -> tuple[Tensor | None, Tensor | None]:
    """Which units some synapse writes, and which some synapse reads, ``[U]`` bool; ``None`` where that is not known."""
    there = {name: value != 0 for name, value in model.named_parameters(remove_duplicate=False)}
    sides = incoming_synapses(model, group, there), outgoing_synapses(model, group, there)
    written, read = (
        None if not side or None in side else torch.stack([layer[0] for layer in side if layer is not None]).sum(0) > 0
        for side in sides
    )
    return written, read


def _layer(model: nn.Module, port: Port, side: str) -> tuple[nn.Module | None, int]:
    """The module of a port and the axis of its weight that the port counts; ``None`` if its weight has no such axis."""
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
    """Put what constant inputs contribute into the bias, and their synapses to 0."""
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


def _takes_constants(module: nn.Module) -> bool:
    """Whether a constant input of a layer adds the same to each of its outputs, which its bias can take up."""
    if isinstance(module, nn.Linear):
        return has_bias(module)
    return (
        is_plain_convolution(module)
        and has_bias(module)
        and padded_positions(module, [8] * len(module.kernel_size)) == 0
    )


def _cut(
    model: nn.Module, inputs: Any, backend: Backend, ignored_layers: Sequence[str], kept: Kept
) -> nn.Module | None:
    """A copy with only the kept units of each named group; ``None`` if the host cannot remove the others."""
    traced = backend(copied(model), inputs)
    try:
        traced.keep([group for group in traced.groups(ignored_layers) if group.name in kept], kept)
    except NNSError:
        return None
    return traced.model


def _same(left: nn.Module, right: nn.Module, several: Iterable[Any]) -> bool:
    """Whether two models give the same outputs; not if one of them does not run any more."""
    try:
        return all(same_outputs(left, right, inputs) for inputs in several)
    except Exception:  # whatever the user's forward raises once its tensors are smaller
        return False
