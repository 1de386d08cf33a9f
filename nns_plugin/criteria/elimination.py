"""Greedy elimination: remove the unit that costs its consumers least after optimal compensation, and repeat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FLUSH = 64
# Removed channels stay in the matrices until fewer than this share is left: copying costs time, too.
COMPACT = 0.8


@dataclass(frozen=True, eq=False)
class Consumer:
    """One consumer of the units of a group: their products over the calibration data, and its weights on them.

    Attributes:
        gram: ``[C + 1, C + 1]`` float64 Gram matrix of the channels and the constant, which comes last.
        energy: ``[C, C]`` float64 ``W^T W`` of the consumer's weights on the channels.
        unit: ``[C]`` int64, the unit of each channel.
        weight: Factor of this consumer's errors, such as one over its output energy.
    """

    gram: Tensor
    energy: Tensor
    unit: Tensor
    weight: float


def output_energy(gram: Tensor, energy: Tensor) -> float:
    """Sum of squares of a consumer's output over the calibration data, without its bias: ``tr(W G W^T)``."""
    return float((gram[:-1, :-1] * energy).sum())


def greedy_errors(consumers: Sequence[Consumer], size: int, ridge: float) -> Tensor:
    """Score units by the cumulative error at their turn in greedy elimination.

    With A the inverse of the Gram matrix of the remaining units (and the constant), removing unit u costs its
    consumer ``e[u] = |W[:, u]|^2 / A[u, u]`` after optimal compensation; then, with a = A[:, u] / A[u, u], W becomes
    ``W - W[:, u] a^T`` and A becomes ``A - A[u, u] a a^T``. The unit with the smallest sum over its consumers goes
    first. Only ``diag(A)``, ``diag(W^T W)`` and the rows of removed units are updated at once; the matrices follow
    every 64 removals, as matrix products, and are compacted to the remaining units now and then.

    Args:
        consumers: The group's consumers; of a grouped convolution one for each conv group.
        size: Number of units, U.
        ridge: Added to the diagonals of the Gram matrices, relative to their means.

    Returns:
        ``[U]`` float64, the sum of the errors of all removals up to the unit's own: not decreasing in the order of
        removal.
    """
    states = [_State(consumer, size, ridge) for consumer in consumers]
    left = torch.ones(size, dtype=torch.bool)
    cumulative = 0.0
    scores = torch.zeros(size, dtype=torch.float64)
    for turn in range(size):
        cost = torch.zeros(size, dtype=torch.float64)
        for state in states:
            state.add_costs(cost)
        cost[~left] = torch.inf
        unit = int(cost.argmin())
        cumulative += max(float(cost[unit]), 0.0)
        scores[unit] = cumulative
        left[unit] = False
        if turn + 1 < size:
            for state in states:
                state.remove(unit)
    return scores


class _State:
    """A and W^T W of one consumer while units are eliminated, with delayed updates."""

    def __init__(self, consumer: Consumer, size: int, ridge: float) -> None:
        gram = consumer.gram.double().clone()
        diagonal = gram.diagonal()[:-1]
        mean = float(diagonal.mean())
        diagonal += ridge * mean if mean > 0 else 1.0
        self.inverse = torch.cholesky_inverse(_cholesky(gram, ridge))[:-1, :-1].contiguous()
        self.part = consumer.energy.double() / 2  # W^T W is this and its transpose
        self.unit = consumer.unit
        self.weight = consumer.weight
        self.single = self.unit.unique().numel() == self.unit.numel()
        self.place = torch.full((size,), -1, dtype=torch.int64)
        self._index()
        self.alive = torch.ones(self.unit.numel(), dtype=torch.bool)
        self.left = self.unit.numel()
        # Delayed updates: A loses sum of pivot a a^T, W^T W loses sum of (half a^T + a half^T).
        self.share = self.inverse.new_empty(FLUSH, self.unit.numel())  # a
        self.half = self.inverse.new_empty(FLUSH, self.unit.numel())
        self.pivot = self.inverse.new_empty(FLUSH)
        self.delayed = 0
        self.inverse_diagonal = self.inverse.diagonal().clone()
        self.energy_diagonal = 2 * self.part.diagonal()

    def add_costs(self, cost: Tensor) -> None:
        """Add this consumer's error of removing each unit to ``cost`` ``[U]``."""
        if self.single:
            value = self.energy_diagonal / self.inverse_diagonal.clamp_min(1e-300)
            cost.index_add_(0, self.unit, torch.where(self.alive, self.weight * value.clamp_min(0), 0.0))
        else:
            self._flush()
            cost += self.weight * self._block_costs(cost.numel())

    def remove(self, unit: int) -> None:
        """Remove all channels of a unit, one after the other: their errors add up to that of the unit."""
        if self.single:
            if (place := int(self.place[unit])) >= 0:
                self._eliminate(place)
        else:
            while (places := ((self.unit == unit) & self.alive).nonzero().flatten()).numel():
                self._eliminate(int(places[0]))

    def _eliminate(self, channel: int) -> None:
        if self.delayed == self.pivot.numel():
            before = int(self.alive[:channel].sum())
            self._flush()
            channel = before if self.alive.numel() == self.left else channel
        column, read = self._row(channel)
        pivot = max(float(column[channel]), 1e-300)
        share = column / pivot
        half = read - float(read[channel]) / 2 * share
        self.inverse_diagonal.addcmul_(column, share, value=-1)
        self.energy_diagonal.addcmul_(half, share, value=-2)
        self.share[self.delayed], self.half[self.delayed], self.pivot[self.delayed] = share, half, pivot
        self.delayed += 1
        self.alive[channel] = False
        self.left -= 1

    def _row(self, channel: int) -> tuple[Tensor, Tensor]:
        share, half, pivot = self.share[: self.delayed], self.half[: self.delayed], self.pivot[: self.delayed]
        column = self.inverse[channel] - (pivot * share[:, channel]) @ share
        read = self.part[channel] + self.part[:, channel]
        return column, read - half[:, channel] @ share - share[:, channel] @ half

    def _flush(self) -> None:
        """Apply the delayed updates, and drop the removed channels if they are many."""
        if self.delayed:
            share, half = self.share[: self.delayed], self.half[: self.delayed]
            self.inverse.addmm_((share * self.pivot[: self.delayed, None]).T, share, alpha=-1)
            self.part.addmm_(half.T, share, alpha=-1)
            self.delayed = 0
        if self.left < COMPACT * self.alive.numel() or not self.single:
            keep = self.alive.nonzero().flatten()
            self.inverse, self.part = (
                matrix.index_select(0, keep).index_select(1, keep) for matrix in (self.inverse, self.part)
            )
            self.unit, self.alive = self.unit[keep], self.alive[keep]
            self.share, self.half = self.share.new_empty(FLUSH, keep.numel()), self.half.new_empty(FLUSH, keep.numel())
            self._index()
        self.inverse_diagonal = self.inverse.diagonal().clone()
        self.energy_diagonal = 2 * self.part.diagonal()

    def _index(self) -> None:
        self.place.fill_(-1)
        self.place[self.unit] = torch.arange(self.unit.numel())

    def _block_costs(self, size: int) -> Tensor:
        """Error of removing units with several channels here: ``tr(inv(A_uu) H_uu)`` over each unit's block."""
        cost = torch.zeros(size, dtype=torch.float64)
        order = self.unit.argsort(stable=True)
        units, counts = self.unit[order].unique_consecutive(return_counts=True)
        for count in counts.unique().tolist():
            chosen = counts == count
            starts = (counts.cumsum(0) - counts)[chosen]
            block = order[starts[:, None] + torch.arange(count)]  # [B, k]
            inverse = self.inverse[block[:, :, None], block[:, None, :]]
            part = self.part[block[:, :, None], block[:, None, :]]
            energy = part + part.transpose(1, 2)
            solved = torch.linalg.solve(inverse, energy)
            cost[units[chosen]] = solved.diagonal(dim1=1, dim2=2).sum(1).clamp_min(0)
        return cost


def _cholesky(matrix: Tensor, ridge: float) -> Tensor:
    """The Cholesky factor; if rounding made the matrix indefinite, that of one with a larger diagonal."""
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    boost = ridge * float(matrix.diagonal()[:-1].mean())
    while int(failed):
        raised = matrix.clone()
        raised.diagonal().add_(boost)
        factor, failed = torch.linalg.cholesky_ex(raised)
        boost *= 10
    return factor
