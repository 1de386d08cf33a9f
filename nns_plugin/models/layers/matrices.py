"""Consumers: the weights with which any kind of layer reads its input, as matrices over channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from nns_plugin.models.layers.kinds import Convolution, Transposed, weight_of
from nns_plugin.models.layers.layouts import Layout


@torch.no_grad()
def narrow_columns(module: nn.Module, indices: Tensor) -> None:
    """Let a linear layer, or a convolution that is not grouped, read only some of its in-positions, in place."""
    weight = weight_of(module)
    module.weight = nn.Parameter(weight.detach()[:, indices.to(weight.device)].clone(), weight.requires_grad)
    setattr(module, "in_features" if isinstance(module, nn.Linear) else "in_channels", indices.numel())


def tap_share(module: nn.Module) -> float:
    """Share of its kernel's positions that an output of a consumer sums, away from the borders.

    A constant input raises the outputs of a transposed convolution by this share of the kernel's sum, on average;
    those of every other layer by all of it.
    """
    return 1 / math.prod(module.stride) if isinstance(module, Transposed) else 1.0


def padded_positions(module: nn.Module, spatial: Sequence[int]) -> int:
    """Number of zero positions that a convolution adds around an input of the given spatial shape."""
    if not isinstance(module, Convolution) or isinstance(module, Transposed) or module.padding_mode != "zeros":
        return 0
    if module.padding == "valid":
        return 0
    if module.padding == "same":
        added = [dilation * (size - 1) for size, dilation in zip(module.kernel_size, module.dilation, strict=True)]
    else:
        added = [2 * int(padding) for padding in module.padding]
    return math.prod(size + more for size, more in zip(spatial, added, strict=True)) - math.prod(spatial)


def reading_matrices(module: nn.Module, layout: Layout) -> list[Tensor] | None:
    """The weights with which a consumer reads each channel.

    Args:
        module: A linear, convolutional, transposed convolutional or recurrent layer.
        layout: How its in-positions pool to C channels.

    Returns:
        One matrix ``[O, K, C / G]`` float64 for each of its G channel groups: O outputs of the group, K positions of
        the kernel, or of the map that a flatten laid out. ``None`` for other layers, and where channels pool
        different numbers of positions.
    """
    if isinstance(module, nn.Linear):
        pooled = _pooled_length(layout)
        if pooled is None:
            return None
        # Pooled positions of a channel are adjacent: [O, C, K] in memory.
        weight = module.weight.detach().double()
        return [weight.reshape(weight.shape[0], -1, pooled).transpose(1, 2).cpu()]
    if isinstance(module, Convolution):
        weight = module.weight.detach().double().flatten(2).cpu()
        groups = module.groups
        if isinstance(module, Transposed):  # [C, O / G, K]
            return [part.permute(1, 2, 0) for part in weight.chunk(groups, 0)]
        return [part.transpose(1, 2) for part in weight.chunk(groups, 0)]  # [O, C / G, K]
    if isinstance(module, nn.RNNBase):
        return [torch.cat([getattr(module, name).detach().double().cpu() for name in _input_weights(module)])[:, None]]
    return None


@torch.no_grad()
def write_matrices(module: nn.Module, layout: Layout, matrices: Sequence[Tensor]) -> None:
    """Put back what :func:`reading_matrices` gave, in place; shapes must be the same."""
    if isinstance(module, nn.RNNBase):
        names = _input_weights(module)
        for name, part in zip(names, matrices[0][:, 0].chunk(len(names)), strict=True):
            getattr(module, name).copy_(part)
        return
    weight = weight_of(module)
    if isinstance(module, nn.Linear):
        value = matrices[0].transpose(1, 2).reshape(weight.shape)
    elif isinstance(module, Transposed):
        value = torch.cat([part.permute(2, 0, 1) for part in matrices], 0).reshape(weight.shape)
    else:
        value = torch.cat([part.transpose(1, 2) for part in matrices], 0).reshape(weight.shape)
    weight.copy_(value)


def has_bias(module: nn.Module) -> bool:
    """Whether a consumer has a bias that can take up a shift."""
    return bool(module.bias) if isinstance(module, nn.RNNBase) else module.bias is not None


@torch.no_grad()
def add_to_bias(module: nn.Module, shift: Tensor) -> None:
    """Add ``[O]`` (all groups' outputs, in order) to a consumer's bias, in place."""
    if isinstance(module, nn.RNNBase):
        names = [name.replace("weight", "bias") for name in _input_weights(module)]
        for name, part in zip(names, shift.chunk(len(names)), strict=True):
            bias = getattr(module, name)
            bias.copy_(bias.double() + part.to(bias.device))
        return
    bias = cast(Tensor, module.bias)
    bias.copy_(bias.double() + shift.to(bias.device))


def _input_weights(module: nn.RNNBase) -> list[str]:
    """Names of the weights with which a recurrent layer reads its input: its first layer, in each direction."""
    return [f"weight_ih_l0{direction}" for direction in (("", "_reverse") if module.bidirectional else ("",))]


def _pooled_length(layout: Layout) -> int | None:
    lengths = layout.positions_per_channel.unique()
    return int(lengths[0]) if lengths.numel() == 1 else None
