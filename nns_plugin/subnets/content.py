"""The contents of a subnet and of its file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nns_plugin.labels import LabelSet
from nns_plugin.subnets.provenance import Provenance


@dataclass(frozen=True, eq=False)
class SubnetContent:
    """The kept units and labels of a parent model, with their weights.

    Attributes:
        kept: For each pruned group's name the kept units of the parent, ``[k]`` int64 ascending.
        sizes: For each pruned group's name its number of units U in the parent.
        scores: For each pruned group's name the scores of the kept units, ``[k]`` float64; empty where a selection
            gave none.
        labels: The kept labels, and the label of each output.
        head_layer: Name of the layer whose outputs were narrowed to the labels; ``None`` if it is as in the parent.
        weights: The small model's parameters and persistent buffers, by name.
        inputs: Kinds of the example inputs, from :func:`nns_plugin.models.inputs.kinds_of`.
        provenance: Where it comes from.
    """

    kept: Mapping[str, Tensor]
    sizes: Mapping[str, int]
    scores: Mapping[str, Tensor]
    labels: LabelSet
    head_layer: str | None
    weights: Mapping[str, Tensor]
    inputs: Any
    provenance: Provenance
