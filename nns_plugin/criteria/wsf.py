"""Weight significance factor (WSF): units whose synapses training did not move are redundant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from nns_plugin.errors import CriterionError
from nns_plugin.synapses.by_unit import summed_synapses
from nns_plugin.synapses.snapshot import WeightSnapshot
from nns_plugin.units import UnitGroup

Reduction = Literal["mean", "sum", "max", "first"]


@dataclass(frozen=True, eq=False)
class WSF:
    """Criterion: how far training moved a unit's synapses, the sum of |w(t) - w(0)| per layer, reduced over layers.

    Attributes:
        model: The model as it is now.
        snapshot: Its weights before training, or at any earlier checkpoint.
        reduction: Over the producers and consumers of a unit, as torch-pruning's ``group_reduction``: ``"mean"``,
            ``"sum"``, ``"max"``, or ``"first"`` for its first producer alone. Biases are not synapses.

    Raises:
        CriterionError: If the reduction is unknown.

    Source:
        Bulin and Smidl, "Optimization of Neural Network": WSF(k) = |w_k(t_f) - w_k(0)|.

    Example:
        >>> import torch
        >>> from nns_plugin import Port, UnitGroup
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
        >>> before = WeightSnapshot(model)
        >>> with torch.no_grad():
        ...     _ = model[0].weight.add_(torch.tensor([[1.0, -2.0], [0.0, 0.5]]))
        >>> units = torch.arange(2)
        >>> group = UnitGroup("0", 2, producers=(Port("0", units, units),), consumers=(Port("1", units, units),))
        >>> WSF(model, before, "sum")(group).round(decimals=5)
        tensor([3.0000, 0.5000], dtype=torch.float64)
    """

    model: nn.Module
    snapshot: WeightSnapshot
    reduction: Reduction = "mean"

    requires: ClassVar[tuple[str, ...]] = ("model", "snapshot")

    def __post_init__(self) -> None:
        if self.reduction not in get_args(Reduction):
            raise CriterionError(f"reduction is {self.reduction!r}; it must be one of {', '.join(get_args(Reduction))}")

    def __call__(self, group: UnitGroup) -> Tensor | None:
        """Scores ``[U]``; ``None`` if no layer of the group has weights."""
        layers = summed_synapses(self.model, group, self.snapshot.movement(self.model))
        if not layers:
            return None
        sums, touched = (torch.stack(parts) for parts in zip(*layers, strict=True))
        if self.reduction == "max":
            return sums.amax(0)
        if self.reduction == "first":
            return sums[touched.double().argmax(0), torch.arange(group.size)]
        total = sums.sum(0)
        return total if self.reduction == "sum" else total / touched.sum(0).clamp_min(1)
