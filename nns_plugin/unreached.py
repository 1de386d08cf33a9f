"""Remove for real the units that no synapse reaches."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nns_plugin.circle import copied
from nns_plugin.comparison import same_outputs
from nns_plugin.consumers import Convolution, Transposed, add_to_bias, has_bias, padded_positions, weight_of
from nns_plugin.observe import calibrate
from nns_plugin.statistics import Record
from nns_plugin.surgery import Surgeon
from nns_plugin.unit_synapses import incoming_synapses, outgoing_synapses
from nns_plugin.units import UnitGroup, complement

Kept = dict[str, Tensor]


class UnremovedWarning(UserWarning):
    """Units or inputs that no synapse reaches had to stay."""


def without_unreached_units(
    model: nn.Module, inputs: Any, surgeon: Surgeon, ignored_layers: Sequence[str] = ()
) -> tuple[nn.Module, Kept]:
    """Remove units that nothing reads, or that no input reaches, from a copy of a model.

    A unit whose outgoing weights are all 0 goes. A unit whose incoming weights are all 0 is constant: it goes into
    the biases of its readers, where they are linear layers or convolutions without zero padding. Both go on from layer
    to layer; each layer keeps at least one unit. What changes the outputs, such as fewer units under a norm over units,
    is left undone.

    Args:
        model: In double precision, without masks; left as it is.
        inputs: Inputs that it can run on, which all its units tell apart.
        surgeon: Removes units.
        ignored_layers: Names of layers whose outputs must stay whole.

    Returns:
        The smaller model, and the units that are left of each group that lost some, ``[k]`` int64 ascending.

    Warns:
        UnremovedWarning: If units that are not reached have to stay.
    """
    kept: Kept = {}
    stuck: set[str] = set()
    while plan := _plan(model, _groups(model, inputs, surgeon, ignored_layers), stuck):
        each = [{name: stays} for name, stays in plan.items()]
        for attempt in each if len(each) == 1 else [plan, *each]:
            smaller = _cut(model, inputs, surgeon, ignored_layers, attempt)
            if same_outputs(model, smaller, inputs):
                model = smaller
                kept |= {name: kept[name][stays] if name in kept else stays for name, stays in attempt.items()}
                break
            if len(attempt) == 1:
                stuck.update(attempt)
    if stuck:
        warnings.warn(
            f"units of {', '.join(sorted(stuck))} that no synapse reaches stay: the outputs are others without them, "
            "as under a norm over units",
            UnremovedWarning,
            stacklevel=3,
        )
    return model, kept


def _groups(model: nn.Module, inputs: Any, surgeon: Surgeon, ignored_layers: Sequence[str]) -> tuple[UnitGroup, ...]:
    return surgeon(copied(model), inputs).groups(ignored_layers)


def _plan(model: nn.Module, groups: Sequence[UnitGroup], stuck: set[str]) -> Kept:
    """Units that stay, of each group that can lose some."""
    found = {group.name: _needed(model, group) for group in groups if group.name not in stuck}
    return {name: stays for name, stays in found.items() if stays is not None}


def _needed(model: nn.Module, group: UnitGroup) -> Tensor | None:
    """Units of a group that have to stay, ``[k]`` int64; ``None`` if that is all of them."""
    there = {name: value != 0 for name, value in model.named_parameters(remove_duplicate=False)}
    written, read = incoming_synapses(model, group, there), outgoing_synapses(model, group, there)
    if not read or None in read:
        return None
    stays = _any(read)
    readers = [model.get_submodule(port.name) for port in group.consumers]
    if written and None not in written and all(_takes_constants(module) for module in readers):
        stays &= _any(written)
    for port in (*group.producers, *group.consumers):  # no layer may become empty
        if not bool(stays[port.unit].any()):
            stays[port.unit[0]] = True
    return None if bool(stays.all()) else stays.nonzero().flatten()


def _any(layers: Sequence[tuple[Tensor, Tensor] | None]) -> Tensor:
    """Which units have a synapse in any of the layers, ``[U]`` bool."""
    return torch.stack([layer[0] for layer in layers if layer is not None]).sum(0) > 0


def _takes_constants(module: nn.Module) -> bool:
    """Whether a constant input of a layer adds the same to each of its outputs, which its bias can take up."""
    if isinstance(module, nn.Linear):
        return has_bias(module)
    if not isinstance(module, Convolution) or isinstance(module, Transposed) or module.groups != 1:
        return False
    return has_bias(module) and padded_positions(module, [8] * len(module.kernel_size)) == 0


def _cut(model: nn.Module, inputs: Any, surgeon: Surgeon, ignored_layers: Sequence[str], kept: Kept) -> nn.Module:
    """A copy with the kept units of each named group, whose readers take up what removed ones always are."""
    surgery = surgeon(copied(model), inputs)
    groups = [group for group in surgery.groups(ignored_layers) if group.name in kept]
    statistics = calibrate(model, [(inputs,)], groups)
    for group in groups:
        removed = complement(group.size, kept[group.name])
        for port in group.consumers:
            module, positions = surgery.model.get_submodule(port.name), port.positions(removed)
            if _takes_constants(module):
                weight = weight_of(module).detach().double().cpu()[:, positions]
                means = _means(statistics.records["in", port.name])[positions]
                add_to_bias(module, weight.reshape(*weight.shape[:2], -1).sum(2) @ means)
    surgery.keep(groups, kept)
    return surgery.model


def _means(record: Record) -> Tensor:
    """Mean activation of each position of an observed axis, ``[positions]``."""
    samples = record.samples.sum() * record.layout.positions_per_channel
    return (record.total.sum(0) / samples)[record.layout.channel]
