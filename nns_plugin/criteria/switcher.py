"""Switcher: the scaling factors of a switcher network as scores of units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nns_plugin.errors import CriterionError
from nns_plugin.switcher.scaling_factors import ScalingFactors
from nns_plugin.units import UnitGroup


@dataclass(frozen=True, eq=False)
class Switcher:
    """Criterion: the scaling factor of each unit; 0 prunes, below 1 weakens, from 1 on strengthens.

    Attributes:
        factors: What :class:`nns_plugin.switcher.network.SwitcherNetwork` gives for the model as it is now.

    Source:
        Han et al., "Mining the Knowledge of Weights for Optimizing Neural Network Structures".

    Example:
        >>> import torch
        >>> from nns_plugin import Port
        >>> from nns_plugin.switcher.switches import Switch
        >>> units = torch.arange(2)
        >>> group = UnitGroup("0", 2, producers=(Port("0", units, units),), consumers=(Port("1", units, units),))
        >>> switch = Switch("0", 2, group.consumers, group.producers)
        >>> factors = ScalingFactors([switch], {"0": torch.tensor([0.0, 1.5])})
        >>> Switcher(factors)(group)
        tensor([0.0000, 1.5000], dtype=torch.float64)
    """

    factors: ScalingFactors

    requires: ClassVar[tuple[str, ...]] = ("factors",)

    def __call__(self, group: UnitGroup) -> Tensor | None:
        """Scores ``[U]``; ``None`` if the group has no factors.

        Raises:
            CriterionError: If the group had other units when the factors were computed.
        """
        found = self.factors.get(group.name)
        if found is None:
            return None
        if found.shape != (group.size,):
            raise CriterionError(
                f"there are {found.numel()} factors for group {group.name!r}, which has {group.size} units now; "
                "compute them again after each removal, or remove all units at once"
            )
        return found.detach().double().cpu()
