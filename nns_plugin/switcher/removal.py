"""Remove what scaling factors turn off: units, input features and flattened positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nns_plugin.backends import Backend
from nns_plugin.switcher.scaling_factors import ScalingFactors, fold
from nns_plugin.switcher.selected import selected
from nns_plugin.synapses.compaction import compact


@dataclass(frozen=True, eq=False)
class SwitchedOff:
    """A model without what its scaling factors turn off.

    Attributes:
        model: Takes the same inputs as before; in evaluation mode. Layers that lost single input positions are
            :class:`~nns_plugin.switcher.selected.Selected`.
        kept: The kept units of each group that lost some, ``[k]`` int64 ascending.
        inputs: The kept input positions of each layer that lost some, ``[k]`` int64 ascending, counted after the
            removal of units.
    """

    model: nn.Module
    kept: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor]


def switch_off(
    model: nn.Module, factors: ScalingFactors, example_inputs: Any, *, backend: Backend | None = None
) -> SwitchedOff:
    """Fold the factors into a copy and remove what they turn off: units, input features and flattened positions.

    Args:
        model: Not changed.
        factors: Its scaling factors.
        example_inputs: Inputs that it can run on.
        backend: Removes units; torch-pruning by default.

    Raises:
        SwitchError: If the factors belong to another model.
        PruningError: If the model cannot run in double precision on the CPU.

    Warns:
        DeadUnitsWarning: If units at 0 cannot be removed.
    """
    small = compact(fold(model, factors), example_inputs, narrow_inputs=False, backend=backend)
    single = [switch.consumers[0].name for switch in factors.switches if not switch.producers]
    network, inputs = selected(small.model, single)
    return SwitchedOff(network, small.kept, inputs)
