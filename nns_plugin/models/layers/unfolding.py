"""Unfolding: the inputs and outputs of a layer as matrices, so that the layer is a matrix product."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from nns_plugin.models.layers.axes import by_channel
from nns_plugin.models.layers.kinds import Convolution, TransposedConvolution, channel_groups
from nns_plugin.models.layers.layouts import Layout


def unfolded_input(module: nn.Module, inputs: Tensor) -> Tensor:
    """The input of a layer, laid out so that its output is a matrix product.

    Args:
        module: A linear, convolutional or transposed convolutional layer.
        inputs: Its input.

    Returns:
        ``[G, D, M]``: for each of G channel groups and each of M output positions, D = C / G x kernel positions
        (channels outermost), in the order of :func:`nns_plugin.models.layers.unfolded_weight`.
    """
    if isinstance(module, nn.Linear):
        return by_channel(module, inputs)[None]
    if not isinstance(module, Convolution):
        raise TypeError(f"a {type(module).__name__} cannot be laid out as a matrix product")
    padded, stride = _padded(module, inputs)
    windows = padded
    for axis, (size, step, dilation) in enumerate(zip(module.kernel_size, stride, module.dilation, strict=True), 2):
        windows = windows.unfold(axis, dilation * (size - 1) + 1, step)[..., ::dilation]
    dimensions = len(module.kernel_size)  # windows: [N, C, positions..., kernel...]
    kernel = tuple(range(2 + dimensions, 2 + 2 * dimensions))
    positions = tuple(range(2, 2 + dimensions))
    laid = windows.permute(1, *kernel, 0, *positions)
    depth = module.in_channels // module.groups * math.prod(module.kernel_size)
    return laid.reshape(module.groups, depth, -1)


def input_matrix(module: nn.Module, layout: Layout, inputs: Tensor) -> Tensor:
    """The input of a consumer by channel: ``[G, C / G, M]`` for its G channel groups and M inputs and positions."""
    groups, channels = channel_groups(module), layout.slot.numel()
    if isinstance(module, Convolution):
        return by_channel(module, inputs).reshape(groups, channels // groups, -1)
    # Pooled positions of a channel are adjacent.
    return inputs.reshape(-1, channels, inputs.shape[-1] // channels).transpose(0, 1).reshape(1, channels, -1)


def output_matrix(module: nn.Module, output: Tensor) -> Tensor:
    """The output of a layer in the layout of :func:`unfolded_input`: ``[G, O / G, M]``."""
    channels = by_channel(module, output)
    return channels.reshape(channel_groups(module), -1, channels.shape[1])


def padded_positions(module: nn.Module, spatial: Sequence[int]) -> int:
    """Number of zero positions that a convolution adds around an input of the given spatial shape."""
    if not isinstance(module, Convolution) or isinstance(module, TransposedConvolution):
        return 0
    if module.padding_mode != "zeros" or module.padding == "valid":
        return 0
    if module.padding == "same":
        added = [dilation * (size - 1) for size, dilation in zip(module.kernel_size, module.dilation, strict=True)]
    else:
        added = [2 * int(padding) for padding in module.padding]
    return math.prod(size + more for size, more in zip(spatial, added, strict=True)) - math.prod(spatial)


def _padded(module: Convolution, inputs: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The input with its padding, and the stride of the windows; a transposed convolution is one of stride 1."""
    if not isinstance(module, TransposedConvolution):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        return nn.functional.pad(inputs, module._reversed_padding_repeated_twice, mode=mode), module.stride
    stretched = inputs
    for axis, step in enumerate(module.stride, 2):
        if step > 1:
            shape = list(stretched.shape)
            shape[axis] = (shape[axis] - 1) * step + 1
            index = torch.arange(0, shape[axis], step, device=stretched.device)
            stretched = stretched.new_zeros(shape).index_copy(axis, index, stretched)
    pads: list[int] = []
    settings = zip(module.kernel_size, module.dilation, module.padding, module.output_padding, strict=True)
    for size, dilation, padding, extra in reversed(list(settings)):
        around = dilation * (size - 1) - int(cast(int, padding))
        pads += [around, around + extra]
    return nn.functional.pad(stretched, pads), (1,) * len(module.kernel_size)
