"""Narrow a model to the inputs that it uses: which ones, and the layers that read them."""

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


class UnusedInputsWarning(UserWarning):
    """Unused inputs could not be removed."""


@dataclass(frozen=True, eq=False)
class InputSelection:
    """The inputs that a narrowed model uses; calling it selects them.

    Attributes:
        indices: ``[F]`` int64, ascending: the kept inputs.
        total: Their original number.
        axis: The axis of the input tensor on which they are counted.
        flat: Whether all axes after the batch are flattened into axis 1.
    """

    indices: Tensor
    total: int
    axis: int
    flat: bool

    def __call__(self, inputs: Tensor) -> Tensor:
        """Select the inputs of the narrowed model from those of the original."""
        values = inputs.flatten(1) if self.flat else inputs
        return values.index_select(self.axis, self.indices.to(values.device))


def narrowed_to_used(model: nn.Module, inputs: Any) -> tuple[nn.Module, InputSelection] | None:
    """Remove the unused inputs, which no synapse reads, from a copy of a model.

    Inputs are features if linear layers read the model's single input tensor, flattened or not, and channels if
    convolutions do. At least one is kept.

    Args:
        model: In double precision, without masks; not changed.
        inputs: Inputs that it can run on, with different values.

    Returns:
        The narrowed copy and its inputs; ``None`` if all inputs are used, or if anything but those layers reads them.

    Warns:
        UnusedInputsWarning: If a layer does not use all the inputs that it reads, but they cannot be removed.
    """
    if not isinstance(inputs, Tensor) or inputs.dim() < 2 or not inputs.is_floating_point():
        return None
    small = copied(model)
    consumers = input_consumers(small, inputs, inputs)
    each = [(weight_of(module) != 0).transpose(0, 1).flatten(1).any(1) for module, _, _ in consumers]
    if len({(flat, axis, len(columns)) for (_, flat, axis), columns in zip(consumers, each, strict=True)}) != 1:
        _warn_unused(each, "layers read them in different layouts")
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
    except (RuntimeError, ValueError, IndexError):  # a forward that needs inputs of the original shape
        same = False
    if not same:
        _warn_unused(each, "something else also reads them or needs their original shape")
        return None
    return small, selection


def _warn_unused(each: Sequence[Tensor], reason: str) -> None:
    """Warn that inputs are kept that some consumer does not use."""
    unused = sum(int(not columns.all()) for columns in each)
    if unused:
        warnings.warn(
            f"unused inputs are kept: {unused} of the {len(each)} layers that read inputs use only some, but {reason}",
            UnusedInputsWarning,
            stacklevel=4,
        )


def input_consumers(model: nn.Module, inputs: Any, chosen: Tensor) -> list[tuple[nn.Module, bool, int]]:
    """Find the layers that read one of the model's inputs, flattened or not, and the axis of their features."""
    found: dict[nn.Module, tuple[bool, int]] = {}

    def look(module: nn.Module, x: Any) -> None:
        for flat, values in ((False, chosen), (True, chosen.flatten(1))):
            if isinstance(x, Tensor) and x.shape == values.shape and torch.equal(x, values):
                found.setdefault(module, (flat and chosen.dim() > 2, channel_axis(module)))

    layers = [module for module in model.modules() if isinstance(module, nn.Linear) or is_plain_convolution(module)]
    hooks: list[Hook] = [(module, "input", partial(look, module)) for module in layers]
    with hooked(*hooks), preserved(model), torch.no_grad():
        run_model(model.eval(), inputs)
    return [(module, flat, axis) for module, (flat, axis) in found.items()]
