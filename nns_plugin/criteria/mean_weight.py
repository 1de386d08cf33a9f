"""Mean weight: units with small sums of incoming weights, relative to the layer's mean, go first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from nns_plugin.criteria.incoming_weights import incoming_weights
from nns_plugin.errors import CriterionError
from nns_plugin.units import UnitGroup

Weights = Literal["magnitudes", "values"]


@dataclass(frozen=True, eq=False)
class MeanWeight:
    """Criterion: a unit's sum of incoming weights, relative to the mean over the units.

    A score less than 1 is below the mean.

    Attributes:
        model: The model whose weights are measured.
        weights: Sum of ``"magnitudes"``, or of the ``"values"`` with their signs, relative to the mean of its
            magnitude. Biases do not count.

    Raises:
        CriterionError: If ``weights`` is unknown.

    Source:
        "The Pruning Methods for feed-forward network and Convolutional Neural Network", section 2.2: the filters with
        the lowest sum of weights go. It does not say whether it means magnitudes.

    Example:
        >>> import torch
        >>> from nns_plugin import Port, UnitGroup
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, -2.0], [0.0, 1.0]]))
        >>> units = torch.arange(2)
        >>> group = UnitGroup("0", 2, producers=(Port("0", units, units),), consumers=(Port("1", units, units),))
        >>> MeanWeight(model)(group)
        tensor([1.5000, 0.5000], dtype=torch.float64)
    """

    model: nn.Module
    weights: Weights = "magnitudes"

    requires: ClassVar[tuple[str, ...]] = ("model",)

    def __post_init__(self) -> None:
        if self.weights not in get_args(Weights):
            raise CriterionError(f"weights is {self.weights!r}; it must be one of {', '.join(get_args(Weights))}")

    def __call__(self, group: UnitGroup) -> Tensor | None:
        """Scores ``[U]``; ``None`` if a producer has no weights."""
        vectors = incoming_weights(self.model, group)
        if not vectors:
            return None
        sums = [(vector.abs() if self.weights == "magnitudes" else vector).sum(1) for vector in vectors]
        return relative_to_mean(torch.stack(sums).sum(0))


def relative_to_mean(sums: Tensor) -> Tensor:
    """Sums ``[U]`` over the mean of their magnitudes; all 0 where that is 0."""
    mean = sums.abs().mean()
    return torch.zeros_like(sums) if float(mean) == 0 else sums / mean  # a NaN stays NaN, which the contract refuses
