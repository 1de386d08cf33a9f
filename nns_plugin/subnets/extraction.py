"""An extraction: how a model is prepared, which units are chosen, and the small model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from torch import Tensor, nn

from nns_plugin.backends import Backend, TracedModel
from nns_plugin.compensation.survivors import Survivors
from nns_plugin.errors import PruningError
from nns_plugin.labels import LabelSet
from nns_plugin.models.preserve import copied
from nns_plugin.statistics.statistics import Statistics
from nns_plugin.subnets.options import Head
from nns_plugin.units import UnitGroup


@dataclass(frozen=True)
class Preparation:
    """How a model is prepared.

    Attributes:
        head: What becomes of the head.
        gram: Whether Gram matrices are needed.
        ignored_layers: Names of layers whose outputs must stay whole.
        backend: Name of the backend.
    """

    head: Head = "keep"
    gram: bool = False
    ignored_layers: tuple[str, ...] = ()
    backend: str = "torch_pruning"

    def __post_init__(self) -> None:
        if self.head not in get_args(Head):
            raise PruningError(f"head is {self.head!r}; it must be one of {', '.join(get_args(Head))}")


@dataclass(frozen=True, eq=False)
class Prepared:
    """A calibrated copy of a dense model, whose units can be chosen.

    Attributes:
        traced: The copy, with the head shrunk as far as it was before calibration.
        backend: What traced it.
        example_inputs: Inputs that it can run on.
        groups: Its unit groups.
        statistics: Statistics of the copy.
        labels: The kept labels, and the outputs so far.
        head: The layer that was shrunk; ``None`` if none was.
        opens: Whether the output "other" belongs to the head.
    """

    traced: TracedModel
    backend: Backend
    example_inputs: Any
    groups: tuple[UnitGroup, ...]
    statistics: Statistics
    labels: LabelSet
    head: str | None
    opens: bool

    @property
    def model(self) -> nn.Module:
        """The copy."""
        return self.traced.model

    def fork(self) -> Prepared:
        """The same with a copy of its own, traced anew, so that several extractions can be carried out."""
        return replace(self, traced=self.backend(copied(self.model), self.example_inputs))


@dataclass(frozen=True, eq=False)
class Choice:
    """Which units stay.

    Attributes:
        kept: For each pruned group's name the kept units, ``[k]`` int64 ascending.
        scores: For each scored group's name the scores of all units, ``[U]`` float64, that chose them.
        survivors: Who takes over from whom, after a selection by angles.
    """

    kept: Mapping[str, Tensor]
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    survivors: Mapping[str, Survivors] | None = None


@dataclass(frozen=True, eq=False)
class Extraction:
    """The small model of a label set.

    Attributes:
        model: The small model.
        example_inputs: Inputs that it can run on.
        groups: The dense model's unit groups.
        heads: Names of the layers that write the outputs.
        labels: The kept labels, and the label of each output.
        head: The layer that was shrunk; ``None`` if none was.
        opens: Whether the head has the output "other".
        kept: For each pruned group's name the kept units, ``[k]`` int64 ascending.
        scores: For each scored group's name the scores of all units, ``[U]`` float64.
    """

    model: nn.Module
    example_inputs: Any
    groups: tuple[UnitGroup, ...]
    heads: tuple[str, ...]
    labels: LabelSet
    head: str | None
    opens: bool
    kept: Mapping[str, Tensor]
    scores: Mapping[str, Tensor]
