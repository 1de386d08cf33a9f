"""Weights of any kind of layer as matrices over its input channels, one for each group of a grouped convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from nns_plugin.models.layers.kinds import (
    Convolution,
    TransposedConvolution,
    channel_groups,
    input_weight_names,
    weight_of,
)
from nns_plugin.models.layers.layouts import Layout


def consumer_matrices(module: nn.Module, layout: Layout) -> list[Tensor] | None:
    """The weights with which a consumer reads each channel.

    Args:
        module: A linear, convolutional, transposed convolutional or recurrent layer.
        layout: How its in-positions pool to C channels.

    Returns:
        One matrix ``[O, K, C / G]`` float64 on the CPU for each of its G channel groups: O outputs of the group, K
        positions of the kernel, or of the map that a flatten laid out. ``None`` for other layers, and where channels
        pool different numbers of positions.
    """
    if isinstance(module, nn.Linear):
        lengths = layout.positions_per_channel.unique()
        return _matrices(module, int(lengths[0])) if lengths.numel() == 1 else None
    if isinstance(module, Convolution):
        return _matrices(module)
    if isinstance(module, nn.RNNBase):
        weights = [getattr(module, name).detach().double().cpu() for name in input_weight_names(module)]
        return [torch.cat(weights)[:, None]]
    return None


@torch.no_grad()
def set_consumer_matrices(module: nn.Module, matrices: Sequence[Tensor]) -> None:
    """Write back, in place, weights in the layout of :func:`consumer_matrices`; shapes must be the same."""
    if isinstance(module, nn.RNNBase):
        names = input_weight_names(module)
        for name, part in zip(names, matrices[0][:, 0].chunk(len(names)), strict=True):
            getattr(module, name).copy_(part)
        return
    weight = weight_of(module)
    order = (2, 0, 1) if isinstance(module, TransposedConvolution) else (0, 2, 1)
    weight.copy_(torch.cat([part.permute(order) for part in matrices]).reshape(weight.shape))


def unfolded_weight(module: nn.Module) -> Tensor:
    """The weights of a linear or convolutional layer as one matrix for each channel group.

    Returns:
        ``[G, O / G, D]`` float64 on the CPU, D = C / G x kernel positions in the order of :func:`unfolded_input`: the
        :func:`consumer_matrices` with channels outermost, mirrored for a transposed convolution.
    """
    return torch.stack([_mirrored(module, matrix.transpose(1, 2)).flatten(1) for matrix in _matrices(module)])


def set_unfolded_weight(module: nn.Module, matrix: Tensor) -> None:
    """Write back, in place, weights in the layout of :func:`unfolded_weight`."""
    kernel = math.prod(module.kernel_size) if isinstance(module, Convolution) else 1
    parts = matrix.reshape(*matrix.shape[:2], -1, kernel)
    set_consumer_matrices(module, [_mirrored(module, part).transpose(1, 2) for part in parts])


def kernel_share(module: nn.Module) -> float:
    """Share of the kernel's positions that each output of a consumer sums, away from the borders.

    A constant input raises the outputs of a transposed convolution by this share of the kernel's sum, on average, and
    those of every other layer by all of it.
    """
    return 1 / math.prod(module.stride) if isinstance(module, TransposedConvolution) else 1.0


def has_bias(module: nn.Module) -> bool:
    """Whether a consumer has a bias that can take up a shift."""
    return bool(module.bias) if isinstance(module, nn.RNNBase) else module.bias is not None


@torch.no_grad()
def add_to_bias(module: nn.Module, shift: Tensor) -> None:
    """Add ``[O]`` (the outputs of all groups, in order) to a consumer's bias, in place."""
    names = ["bias"]
    if isinstance(module, nn.RNNBase):
        names = [name.replace("weight", "bias") for name in input_weight_names(module)]
    for name, part in zip(names, shift.chunk(len(names)), strict=True):
        bias = cast(Tensor, getattr(module, name))
        bias.copy_(bias.double() + part.to(bias.device))


def _matrices(module: nn.Module, pooled: int = 1) -> list[Tensor]:
    """:func:`consumer_matrices` of a linear or convolutional layer; a linear one's channels pool adjacent positions."""
    weight = weight_of(module).detach().double().cpu()
    if isinstance(module, nn.Linear):
        return [weight.reshape(weight.shape[0], -1, pooled).transpose(1, 2)]
    order = (1, 2, 0) if isinstance(module, TransposedConvolution) else (0, 2, 1)
    return [part.permute(order) for part in weight.flatten(2).chunk(channel_groups(module))]


def _mirrored(module: nn.Module, kernels: Tensor) -> Tensor:
    """Kernels ``[..., K]`` in the order in which windows meet them: back to front in a transposed convolution."""
    return kernels.flip(-1) if isinstance(module, TransposedConvolution) else kernels
