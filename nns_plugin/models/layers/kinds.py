"""Kinds of layers, and their weights."""

from __future__ import annotations

from typing import TypeGuard, cast

from torch import Tensor, nn

Convolution = nn.modules.conv._ConvNd
Transposed = nn.modules.conv._ConvTransposeNd


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a layer that has exactly one."""
    return cast(Tensor, module.weight)


def weight_key(name: str) -> str:
    """Name of the weight of a layer among a model's parameters; the model itself has no name."""
    return f"{name}.weight" if name else "weight"


def is_plain_convolution(module: nn.Module) -> TypeGuard[Convolution]:
    """Whether each output channel reads all input channels, at positions around its own: not transposed, no groups."""
    return isinstance(module, Convolution) and not isinstance(module, Transposed) and module.groups == 1


def channel_groups(module: nn.Module) -> int:
    """Number of groups whose channels a consumer reads separately; 1 but for grouped convolutions."""
    return module.groups if isinstance(module, Convolution) else 1
