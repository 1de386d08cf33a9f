"""Axes: how many positions a layer reads and writes, and where its weight counts them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from nns_plugin.errors import CalibrationError
from nns_plugin.models.layers.kinds import Convolution, Transposed


def axis_length(module: nn.Module, side: str, name: str) -> int:
    """Number of positions on a module's in or out axis.

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


def rows_of(module: nn.Module, weight: Tensor) -> Tensor:
    """Values of a module's weight by the out-position that it writes, ``[out-positions, ...]``.

    Args:
        module: The module; says how its weight is laid out.
        weight: Its weight, or other values of that shape.
    """
    if isinstance(module, Transposed):  # [C, O / G, K...]
        parts = weight.reshape(module.groups, -1, *weight.shape[1:])
        return parts.transpose(1, 2).flatten(0, 1)
    return weight.T if isinstance(module, nn.Embedding) else weight


def out_axis(module: nn.Module) -> int:
    """The axis of a module's weight that counts its out-positions."""
    return int(isinstance(module, nn.Embedding) or (isinstance(module, Transposed) and module.groups == 1))


def spread(module: nn.Module, values: Tensor, side: str, shape: Sequence[int]) -> Tensor:
    """Values of a layer's positions, at each of its weights.

    Args:
        module: Says how its weight is laid out.
        values: ``[n]``, one for each position on the side.
        side: ``"out"`` or ``"in"``.
        shape: Of the weight.
    """
    if len(shape) == 1:
        return values
    groups = module.groups if isinstance(module, Convolution) else 1
    along_first = (side == "out") != isinstance(module, (Transposed, nn.Embedding))
    if along_first:
        table = values[:, None].expand(-1, shape[1])
    else:  # rows of one group of a convolution see the positions of that group
        table = values.reshape(groups, 1, -1).expand(groups, shape[0] // groups, -1).flatten(0, 1)
    return table.reshape(*table.shape, *[1] * (len(shape) - 2)).expand(*shape)


def synapse_axis(module: nn.Module, is_out: bool) -> int | None:
    """The axis of a layer's weight that counts its out- or in-positions; ``None`` if it counts part of them."""
    if not isinstance(module, (nn.Linear, Convolution)):
        return None
    axis = int(is_out == isinstance(module, Transposed))
    return axis if axis == 0 or isinstance(module, nn.Linear) or module.groups == 1 else None
