"""Kinds of layers and norms, and the weights and channel groups of a layer."""

from __future__ import annotations

from typing import TypeGuard, cast

from torch import Tensor, nn

Convolution = nn.modules.conv._ConvNd
TransposedConvolution = nn.modules.conv._ConvTransposeNd
BatchNorm = nn.modules.batchnorm._BatchNorm
NormOverUnits = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def is_batch_norm(module: nn.Module | None) -> TypeGuard[BatchNorm]:
    """Whether a module normalises each unit by itself, over the batch and the positions."""
    return isinstance(module, BatchNorm)


def is_norm_over_units(module: nn.Module | None) -> TypeGuard[nn.LayerNorm | nn.GroupNorm | nn.RMSNorm]:
    """Whether a module normalises several units together, so that removing one changes the others."""
    return isinstance(module, NormOverUnits)


def is_linear_or_convolution(module: nn.Module) -> TypeGuard[nn.Linear | Convolution]:
    """Whether a layer's outputs are a matrix product of its one weight and its input."""
    return isinstance(module, (nn.Linear, Convolution))


def is_plain_convolution(module: nn.Module) -> TypeGuard[Convolution]:
    """Whether each output channel reads all input channels, at positions around its own: not transposed, no groups."""
    return isinstance(module, Convolution) and not isinstance(module, TransposedConvolution) and module.groups == 1


def is_depthwise(module: nn.Module) -> TypeGuard[Convolution]:
    """Whether a convolution reads each channel by itself: it passes units on instead of producing its own."""
    return isinstance(module, Convolution) and module.groups == module.out_channels > 1


def channel_groups(module: nn.Module) -> int:
    """Number of groups whose channels a layer reads separately; 1 except for grouped convolutions."""
    return module.groups if isinstance(module, Convolution) else 1


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a layer that has exactly one."""
    return cast(Tensor, module.weight)


def weight_key(name: str) -> str:
    """Name of the weight of a layer among a model's parameters; the model itself has no name."""
    return f"{name}.weight" if name else "weight"


def input_weight_names(module: nn.RNNBase) -> list[str]:
    """Names of the weights with which a recurrent layer reads its input: its first layer, in each direction."""
    return [f"weight_ih_l0{direction}" for direction in (("", "_reverse") if module.bidirectional else ("",))]
