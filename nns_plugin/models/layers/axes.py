"""Axes: where activations and weights count the positions that a layer reads and writes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nns_plugin.errors import CalibrationError
from nns_plugin.models.layers.kinds import (
    Convolution,
    TransposedConvolution,
    channel_groups,
    is_linear_or_convolution,
    weight_of,
)


def axis_length(module: nn.Module, side: str, name: str) -> int:
    """Number of positions on a module's in or out axis.

    Args:
        module: The module.
        side: ``"in"`` or ``"out"``.
        name: Name of the module, for the message.

    Raises:
        CalibrationError: If units cannot be observed at a module of this type.
    """
    attributes = {
        "in": ("in_channels", "in_features", "input_size"),
        "out": ("out_channels", "out_features", "hidden_size", "embed_dim", "embedding_dim"),
    }
    for attribute in attributes[side]:
        length = getattr(module, attribute, None)
        if isinstance(length, int):
            both_ways = side == "out" and getattr(module, "bidirectional", False)
            return 2 * length if both_ways else length
    raise CalibrationError(
        f"module {name!r} is a {type(module).__name__}; units can be observed at linear, convolutional, recurrent, "
        "attention and embedding layers"
    )


def channel_axis(module: nn.Module) -> int:
    """The axis of a module's inputs and outputs that counts its positions: 1 for convolutions, otherwise the last."""
    return 1 if isinstance(module, Convolution) else -1


def by_channel(module: nn.Module, activation: Tensor) -> Tensor:
    """An input or output of a module as ``[positions, samples]``."""
    if channel_axis(module) == 1:
        return activation.transpose(0, 1).flatten(1)
    return activation.reshape(-1, activation.shape[-1]).T


def broadcast_to_activation(module: nn.Module, values: Tensor, dimensions: int) -> Tensor:
    """One value for each position, ``[n]``, shaped to broadcast over an activation of a module.

    Args:
        module: The module that the activation is an input or output of.
        values: ``[n]``.
        dimensions: Number of dimensions of the activation.
    """
    return values.reshape(-1, *[1] * (dimensions - 2)) if channel_axis(module) == 1 else values


def weight_axis(module: nn.Module, side: str) -> int | None:
    """The axis of a linear or convolutional layer's weight that counts its in- or out-positions.

    Args:
        module: The layer.
        side: ``"in"`` or ``"out"``.

    Returns:
        ``None`` if the axis counts only the positions of one group, or for layers of other kinds.
    """
    if not is_linear_or_convolution(module):
        return None
    axis = int((side == "out") == isinstance(module, TransposedConvolution))
    return axis if axis == 0 or channel_groups(module) == 1 else None


def out_axis(module: nn.Module) -> int:
    """The axis of any module's weight that counts its out-positions."""
    return 1 if isinstance(module, nn.Embedding) else weight_axis(module, "out") or 0


def by_output(module: nn.Module, weight: Tensor) -> Tensor:
    """Values of a module's weight by out-position, ``[out-positions, ...]``.

    Args:
        module: The module; determines the layout of its weight.
        weight: Its weight, or other values of that shape.
    """
    if isinstance(module, TransposedConvolution):  # [C, O / G, K...]
        return _swapped_in_groups(module, weight)
    return weight.T if isinstance(module, nn.Embedding) else weight


def by_input(module: nn.Module, weight: Tensor) -> Tensor:
    """Values of a linear or convolutional layer's weight by in-position, ``[in-positions, ...]``.

    Args:
        module: The layer; determines the layout of its weight.
        weight: Its weight, or other values of that shape.
    """
    if isinstance(module, TransposedConvolution):
        return weight
    return _swapped_in_groups(module, weight)  # [O, C / G, K...]


def broadcast_to_weight(module: nn.Module, values: Tensor, side: str, shape: Sequence[int]) -> Tensor:
    """One value for each position, ``[n]``, expanded to each weight that writes or reads the position.

    Args:
        module: The module; determines the layout of its weight.
        values: ``[n]``, one for each position on the side.
        side: ``"out"`` or ``"in"``.
        shape: Shape of the weight.
    """
    if len(shape) == 1:
        return values
    groups = channel_groups(module)
    along_first = (side == "out") != isinstance(module, (TransposedConvolution, nn.Embedding))
    if along_first:
        table = values[:, None].expand(-1, shape[1])
    else:  # rows of one group of a convolution see the positions of that group
        table = values.reshape(groups, 1, -1).expand(groups, shape[0] // groups, -1).flatten(0, 1)
    return table.reshape(*table.shape, *[1] * (len(shape) - 2)).expand(*shape)


@torch.no_grad()
def narrow_inputs(module: nn.Module, indices: Tensor) -> None:
    """Keep only some in-positions of a linear layer, or of a convolution that is not grouped, in place."""
    weight = weight_of(module)
    module.weight = nn.Parameter(weight.detach()[:, indices.to(weight.device)].clone(), weight.requires_grad)
    setattr(module, "in_features" if isinstance(module, nn.Linear) else "in_channels", indices.numel())


def _swapped_in_groups(module: nn.Module, weight: Tensor) -> Tensor:
    """``[G * A, B, ...]`` as ``[G * B, A, ...]``, group by group."""
    parts = weight.reshape(channel_groups(module), -1, *weight.shape[1:])
    return parts.transpose(1, 2).flatten(0, 1)
