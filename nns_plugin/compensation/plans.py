"""Plans: the new weights of a consumer that loses channels, computed before any model changes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from nns_plugin.compensation.least_squares import RIDGE, means, merging, mixing, nearest, take_over
from nns_plugin.compensation.survivors import Survivors
from nns_plugin.models.activations import capture_input
from nns_plugin.models.batches import batches
from nns_plugin.models.layers import (
    Layout,
    add_to_bias,
    channel_groups,
    consumer_matrices,
    has_bias,
    kernel_share,
    set_consumer_matrices,
    weight_of,
)
from nns_plugin.models.preserve import preserved
from nns_plugin.statistics.angles import Center
from nns_plugin.statistics.records import Record
from nns_plugin.statistics.statistics import Statistics
from nns_plugin.units import complement

ChannelMethod = Literal["least_squares", "merge", "mean"]


@dataclass(frozen=True, eq=False)
class Plan:
    """New weights of a consumer.

    Attributes:
        matrices: As :func:`nns_plugin.models.layers.consumer_matrices` gives them, 0 at removed channels.
        shift: ``[O]`` float64, to be added to the outputs.
        nothing: The matrices of plain removal.
        is_worse: Whether the outputs err more on the calibration data than after plain removal; ``None`` where a
            kernel spans several positions, because the statistics cannot tell.
    """

    matrices: list[Tensor]
    shift: Tensor
    nothing: list[Tensor]
    is_worse: bool | None


def plan_removal(
    module: nn.Module,
    record: Record,
    gone: Tensor,
    method: ChannelMethod,
    *,
    constant: bool,
    survivors: Survivors | None = None,
) -> Plan | None:
    """Let a consumer's kept channels take over from the removed ones.

    Args:
        module: The consumer, still whole.
        record: Statistics of its input.
        gone: ``[k]`` int64, the removed channels.
        method: ``"least_squares"``: all kept channels together; ``"merge"``: one each; ``"mean"``: the constant alone.
        constant: Whether the consumer can absorb a shift of its outputs.
        survivors: For ``"merge"``; by default the kept channel whose vector is nearest to parallel, scaled.

    Returns:
        The plan; ``None`` if the record has no Gram matrix or the consumer is of an unknown kind.
    """
    matrices = consumer_matrices(module, record.layout)
    if matrices is None or record.gram is None:
        return None
    size = record.layout.slot.numel() // channel_groups(module)
    changed, shifts, nothing = [], [], []
    errors = torch.zeros(2, dtype=torch.float64)
    for number, matrix in enumerate(matrices):
        removed = gone[gone // size == number] - number * size
        kept = complement(size, removed)
        gram = record.gram[number].double()
        if method == "mean":
            mix = means(gram, kept, removed)
        elif method == "least_squares":
            mix = mixing(gram, kept, removed, constant=constant, ridge=RIDGE)
        else:
            mix = _merged(gram, kept, removed, constant, survivors, number * size)
        if not constant:
            mix[:, -1] = 0.0
        weight, shift = take_over(matrix, mix, kept, removed)
        shift *= kernel_share(module)
        left = matrix.clone()
        left[:, :, removed] = 0.0
        changed.append(weight)
        shifts.append(shift)
        nothing.append(left)
        if matrix.shape[1] == 1:
            errors += _errors(gram, matrix, weight, shift, left)
    is_worse = exceeds(errors) if matrices[0].shape[1] == 1 else None
    return Plan(changed, torch.cat(shifts), nothing, is_worse)


def apply_plan(module: nn.Module, layout: Layout, plan: Plan, norm: nn.Module | None) -> None:
    """Write a plan into its consumer and, if that has no bias, into the batch norm that follows."""
    set_consumer_matrices(module, plan.matrices)
    add_shift(module, norm, plan.shift)


def add_shift(module: nn.Module, norm: nn.Module | None, shift: Tensor) -> None:
    """Raise a consumer's outputs by a shift ``[O]``: in its bias, or in the batch norm that follows."""
    if has_bias(module):
        add_to_bias(module, shift)
    elif norm is not None:
        running_mean = cast(Tensor, norm.running_mean)
        running_mean.sub_(shift.to(running_mean))


def worse_than_nothing(
    model: nn.Module, plans: Mapping[str, Plan], statistics: Statistics, loader: Iterable[Any]
) -> set[str]:
    """Consumers whose plan errs more on the data than plain removal, found in one pass for all of them.

    Args:
        model: The model, still whole.
        plans: By name of the consumer.
        statistics: Statistics of the model.
        loader: Yields ``(inputs, labels)`` or ``inputs``.
    """
    changes = {}
    for name, plan in plans.items():
        module, layout = model.get_submodule(name), statistics.records["in", name].layout
        before = consumer_matrices(module, layout) or []
        pairs = [(plan.matrices, plan.shift), (plan.nothing, torch.zeros_like(plan.shift))]
        changes[name] = [
            _layer_like(module, layout, [new - old for new, old in zip(after, before, strict=True)], shift)
            for after, shift in pairs
        ]
    errors = {name: torch.zeros(2, dtype=torch.float64) for name in changes}
    if not changes:
        return set()
    with preserved(model), torch.no_grad():
        model.eval()
        for batch in batches(loader, model):
            for name, layers in changes.items():
                reached = capture_input(model, name, batch.inputs)
                errors[name] += torch.stack([layer(reached).double().square().sum().cpu() for layer in layers])
    return {name for name, pair in errors.items() if exceeds(pair)}


def exceeds(errors: Tensor) -> bool:
    """Whether the first of two squared errors is larger, by more than rounding."""
    return not float(errors[0]) <= float(errors[1]) * (1 + 1e-6)


def _merged(
    gram: Tensor, kept: Tensor, removed: Tensor, constant: bool, survivors: Survivors | None, start: int
) -> Tensor:
    if survivors is None:
        center: Center = "mean" if constant else None  # with a constant, the best replacement by one channel
        return merging(gram, kept, removed, nearest(gram, kept, removed, center), center=center)
    channel = survivors.channel[removed + start] - start
    survivor = torch.where(torch.isin(channel, kept), channel, -1)
    return merging(gram, kept, removed, survivor, merge=survivors.merge, center=survivors.center)


def _errors(gram: Tensor, before: Tensor, after: Tensor, shift: Tensor, nothing: Tensor) -> Tensor:
    """Squared output errors ``[2]`` of new weights and of plain removal, for kernels of one position."""
    planned = torch.cat([(after - before)[:, 0], shift[:, None]], 1)
    plain = (nothing - before)[:, 0]
    return torch.stack([((planned @ gram) * planned).sum(), ((plain @ gram[:-1, :-1]) * plain).sum()])


def _layer_like(module: nn.Module, layout: Layout, matrices: list[Tensor], shift: Tensor) -> nn.Module:
    """A copy of a layer with the given weights and bias."""
    layer = copy.deepcopy(module)
    set_consumer_matrices(layer, matrices)
    layer.bias = nn.Parameter(shift.to(weight_of(layer)))
    return layer
