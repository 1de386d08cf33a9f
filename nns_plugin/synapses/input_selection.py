"""Narrow a model to the inputs that it uses."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nns_plugin.models.comparison import same_outputs
from nns_plugin.models.hooks import Hook, hooked
from nns_plugin.models.inputs import run_model
from nns_plugin.models.layers import channel_axis, is_plain_convolution, narrow_inputs, weight_of
from nns_plugin.models.preserve import copied, preserved


class UnnarrowedWarning(UserWarning):
    """Inputs that no synapse reads had to stay."""


@dataclass(frozen=True, eq=False)
class InputSelection:
    """Which of a model's inputs are left.

    Attributes:
        indices: ``[F]`` int64, ascending: those that are left.
        total: How many there were.
        axis: The axis of the input tensor that they are counted on.
        flat: Whether the axes behind the batch are counted as one, axis 1.
    """

    indices: Tensor
    total: int
    axis: int
    flat: bool

    def __call__(self, inputs: Tensor) -> Tensor:
        """What the narrowed model works on, out of the inputs of the wide one."""
        values = inputs.flatten(1) if self.flat else inputs
        return values.index_select(self.axis, self.indices.to(values.device))


def narrowed_to_used(model: nn.Module, inputs: Any) -> tuple[nn.Module, InputSelection] | None:
    """A copy without the inputs that no synapse reads, and those that it wants.

    Features, where linear layers read the model's one input tensor or flatten it; channels, where convolutions do. At
    least one is left.

    Args:
        model: In double precision, without masks; left as it is.
        inputs: Inputs that it can run on, all of which differ.

    Returns:
        ``None`` if all inputs are used, or something else than those layers reads them.

    Warns:
        UnnarrowedWarning: If a layer reads inputs of which it uses only some, and all of them have to stay.
    """
    if not isinstance(inputs, Tensor) or inputs.dim() < 2 or not inputs.is_floating_point():
        return None
    small = copied(model)
    consumers = input_consumers(small, inputs, inputs)
    each = [(weight_of(module) != 0).transpose(0, 1).flatten(1).any(1) for module, _, _ in consumers]
    if len({(flat, axis, len(columns)) for (_, flat, axis), columns in zip(consumers, each, strict=True)}) != 1:
        _tell(each, "layers read them in different forms")
        return None
    _, flat, axis = consumers[0]
    used = torch.stack(each).any(0)
    if bool(used.all()):
        return None
    if not bool(used.any()):
        used[0] = True
    selection = InputSelection(used.nonzero().flatten().cpu(), used.numel(), axis, flat)
    for module, _, _ in consumers:
        narrow_inputs(module, selection.indices)
    try:
        same = same_outputs(model, small, inputs, selection(inputs))
    except (RuntimeError, ValueError, IndexError):  # a forward that wants its inputs' shape as it was
        same = False
    if not same:
        _tell(each, "something else reads them too, or wants them in their shape")
        return None
    return small, selection


def _tell(each: Sequence[Tensor], reason: str) -> None:
    """Say that inputs which some consumer does not use stay."""
    unused = sum(int(not columns.all()) for columns in each)
    if unused:
        warnings.warn(
            f"inputs that no synapse of {unused} of the {len(each)} layers that read them uses stay: {reason}",
            UnnarrowedWarning,
            stacklevel=4,
        )


def input_consumers(model: nn.Module, inputs: Any, wanted: Tensor) -> list[tuple[nn.Module, bool, int]]:
    """Layers that work on one of the model's inputs as it is, or flattened, and the axis of their features."""
    found: dict[nn.Module, tuple[bool, int]] = {}

    def look(module: nn.Module, x: Any) -> None:
        for flat, values in ((False, wanted), (True, wanted.flatten(1))):
            if isinstance(x, Tensor) and x.shape == values.shape and torch.equal(x, values):
                found.setdefault(module, (flat and wanted.dim() > 2, channel_axis(module)))

    layers = [module for module in model.modules() if isinstance(module, nn.Linear) or is_plain_convolution(module)]
    hooks: list[Hook] = [(module, "input", partial(look, module)) for module in layers]
    with hooked(*hooks), preserved(model), torch.no_grad():
        run_model(model.eval(), inputs)
    return [(module, flat, axis) for module, (flat, axis) in found.items()]
