"""Unfolding: a layer as a matrix product of its weights and what it reads."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from nns_plugin.models.layers.kinds import Convolution, Transposed, channel_groups, weight_of
from nns_plugin.models.layers.layouts import Layout


def unfolded(module: nn.Module, inputs: Tensor) -> Tensor:
    """The input of a layer, laid out so that its output is a matrix product.

    Args:
        module: A linear, convolutional or transposed convolutional layer.
        inputs: What it works on.

    Returns:
        ``[G, D, M]``: for each of G channel groups and each of M output positions, D = C / G x kernel positions
        (channels outermost), in the order of :func:`weight_matrix`.
    """
    if isinstance(module, nn.Linear):
        return inputs.reshape(-1, inputs.shape[-1]).T[None]
    if not isinstance(module, Convolution):
        raise TypeError(f"a {type(module).__name__} cannot be laid out as a matrix product")
    padded, stride = _padded(module, inputs)
    windows = padded
    for axis, (size, step, spread) in enumerate(zip(module.kernel_size, stride, module.dilation, strict=True), 2):
        windows = windows.unfold(axis, spread * (size - 1) + 1, step)[..., ::spread]
    dimensions = len(module.kernel_size)  # windows: [N, C, positions..., kernel...]
    kernel = tuple(range(2 + dimensions, 2 + 2 * dimensions))
    positions = tuple(range(2, 2 + dimensions))
    laid = windows.permute(1, *kernel, 0, *positions)
    depth = module.in_channels // module.groups
    for size in module.kernel_size:
        depth *= size
    return laid.reshape(module.groups, depth, -1)


def channel_matrix(module: nn.Module, layout: Layout, inputs: Tensor) -> Tensor:
    """The input of a consumer by channel: ``[G, C / G, M]`` for its G channel groups and M inputs and positions."""
    groups, channels = channel_groups(module), layout.slot.numel()
    if isinstance(module, Convolution):
        return inputs.transpose(0, 1).reshape(groups, channels // groups, -1)
    # Pooled positions of a channel are adjacent.
    return inputs.reshape(-1, channels, inputs.shape[-1] // channels).transpose(0, 1).reshape(1, channels, -1)


def output_matrix(module: nn.Module, output: Tensor) -> Tensor:
    """The output of a layer in the layout of :func:`unfolded`: ``[G, O / G, M]``."""
    if isinstance(module, nn.Linear):
        return output.reshape(-1, output.shape[-1]).T[None]
    groups = module.groups if isinstance(module, Convolution) else 1
    return output.transpose(0, 1).reshape(groups, output.shape[1] // groups, -1)


def weight_matrix(module: nn.Module) -> Tensor:
    """The weights of a layer in the layout of :func:`unfolded`: ``[G, O / G, D]``."""
    weight = weight_of(module).detach()
    groups = channel_groups(module)
    parts = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    if isinstance(module, Transposed):
        kernel = tuple(range(3, parts.dim()))
        parts = parts.transpose(1, 2).flip(kernel)
    return parts.flatten(2)


@torch.no_grad()
def set_weight_matrix(module: nn.Module, matrix: Tensor) -> None:
    """Put back what :func:`weight_matrix` gave, in place."""
    weight = weight_of(module)
    matrix = matrix.to(weight.device, weight.dtype)
    if isinstance(module, Transposed):
        size = tuple(module.kernel_size)
        parts = matrix.reshape(matrix.shape[0], matrix.shape[1], weight.shape[0] // matrix.shape[0], *size)
        matrix = parts.flip(tuple(range(3, parts.dim()))).transpose(1, 2)
    weight.copy_(matrix.reshape(weight.shape))


def _padded(module: Convolution, inputs: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The input with its padding, and the stride of the windows; a transposed convolution is one of stride 1."""
    if not isinstance(module, Transposed):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        return nn.functional.pad(inputs, module._reversed_padding_repeated_twice, mode=mode), module.stride
    spread = inputs
    for axis, step in enumerate(module.stride, 2):
        if step > 1:
            shape = list(spread.shape)
            shape[axis] = (shape[axis] - 1) * step + 1
            index = torch.arange(0, shape[axis], step, device=spread.device)
            spread = spread.new_zeros(shape).index_copy(axis, index, spread)
    pads: list[int] = []
    settings = zip(module.kernel_size, module.dilation, module.padding, module.output_padding, strict=True)
    for size, dilation, padding, extra in reversed(list(settings)):
        around = dilation * (size - 1) - int(cast(int, padding))
        pads += [around, around + extra]
    return nn.functional.pad(spread, pads), (1,) * len(module.kernel_size)
