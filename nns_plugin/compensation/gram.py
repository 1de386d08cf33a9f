"""Gram sums: the running sums from which a regression is solved."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nns_plugin.compensation.least_squares import solve_positive


@dataclass
class RegressionSums:
    """Running sums of one multivariate regression for each channel group.

    Attributes:
        inner: ``[G, D + 1, D + 1]`` float64: Gram matrix of the inputs and the constant 1, which is last.
        cross: ``[G, O / G, D + 1]`` float64: products of the targets with them.
    """

    inner: Tensor
    cross: Tensor

    @classmethod
    def empty(cls, groups: int, depth: int, outputs: int) -> RegressionSums:
        """Sums over no samples."""
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

    def solve(self, prior: Tensor, constant: bool, ridge: float) -> Tensor:
        """Weights ``[G, O / G, D + 1]``, the constant's last, pulled towards a prior of that shape by a ridge.

        ``W = (Y X^T + r P) inv(X X^T + r)`` with r relative to the mean of the diagonal; without a constant its
        column is 0. W minimises the squared error plus ``r |W - P|^2`` (without the constant's column), so it never
        errs more on the samples than P does, but for rounding.
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
