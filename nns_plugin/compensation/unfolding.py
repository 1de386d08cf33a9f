"""Refit: give a consumer of a pruned model the weights with which it best repeats the dense model's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from nns_plugin.compensation.least_squares import solve_positive
from nns_plugin.models.layers import Convolution, Transposed, channel_groups, weight_of
from nns_plugin.statistics.statistics import Layout


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


@dataclass
class LeastSquares:
    """Running sums of a multivariate regression, one a channel group.

    Attributes:
        inner: ``[G, D + 1, D + 1]`` float64, of the inputs and the constant, which stands last.
        cross: ``[G, O / G, D + 1]`` float64, of the targets with them.
        target: Sum of squares of the targets.
    """

    inner: Tensor
    cross: Tensor
    target: float = 0.0

    @classmethod
    def empty(cls, groups: int, depth: int, outputs: int) -> LeastSquares:
        """Sums of nothing."""
        inner = torch.zeros(groups, depth + 1, depth + 1, dtype=torch.float64)
        return cls(inner, torch.zeros(groups, outputs, depth + 1, dtype=torch.float64))

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Add samples: inputs ``[G, D, M]``, targets ``[G, O / G, M]``."""
        depth = inputs.shape[1]
        device = self.inner.device
        self.inner[:, :depth, :depth] += torch.bmm(inputs, inputs.transpose(1, 2)).to(device)
        sums = inputs.sum(2).to(device)
        self.inner[:, depth, :depth] += sums
        self.inner[:, :depth, depth] += sums
        self.inner[:, depth, depth] += inputs.shape[2]
        self.cross[:, :, :depth] += torch.bmm(targets, inputs.transpose(1, 2)).to(device)
        self.cross[:, :, depth] += targets.sum(2).to(device)
        self.target += float(targets.double().square().sum())

    def solve(self, prior: Tensor, constant: bool, ridge: float) -> Tensor:
        """Weights ``[G, O / G, D + 1]``, the constant's last, drawn towards a prior of that shape by a ridge.

        ``W = (Y X^T + r P) inv(X X^T + r)`` with r relative to the mean of the diagonal; without a constant its
        column is 0.
        """
        depth = self.inner.shape[1] - 1
        used = depth + 1 if constant else depth
        result = torch.zeros_like(self.cross)
        for number, (inner, cross) in enumerate(zip(self.inner, self.cross, strict=True)):
            mean = float(inner.diagonal()[:depth].mean())
            pull = torch.full((used,), ridge * mean if mean > 0 else 1.0, dtype=torch.float64)
            pull[depth:] = 0.0
            left = inner[:used, :used] + torch.diag(pull)
            right = cross[:, :used] + prior[number].double()[:, :used] * pull
            result[number, :, :used] = solve_positive(left, right.T).T
        return result

    def error(self, weights: Tensor) -> float:
        """Sum of squared errors of weights ``[G, O / G, D + 1]``."""
        fitted = weights @ self.inner
        return self.target + float(((fitted - 2 * self.cross) * weights).sum())


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
